package spec

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress"
)

// actions lists the actions of policies in the order of the message that names them.
var actions = []nat.Action{nat.SNAT, nat.NoNAT, nat.Deny, nat.Reject, nat.DNAT, nat.Redirect}

// action checks the action of a policy and the fields that depend on it.
func (c *checker) action(path string, p *isthmusv1.EgressPolicy, out *nat.Policy) {
	if !slices.Contains(actions, out.Action) {
		c.Problem(path+".action", string(out.Action), "is not a valid action", fmt.Sprintf("give one of %q", actions))
		return
	}
	only := func(field, value string, with ...nat.Action) bool {
		if value != "" && !slices.Contains(with, out.Action) {
			c.Problem(path+"."+field, value, "has no meaning with action "+string(out.Action), "leave it out")
		}
		return value != "" && slices.Contains(with, out.Action)
	}
	only("pool", p.GetPool(), nat.SNAT, nat.DNAT)
	only("names", strings.Join(p.GetNames()[:min(len(p.GetNames()), maxShown)], ","), nat.SNAT, nat.Deny, nat.Reject, nat.Redirect)
	out.Pickup = only("pickup", yes(p.GetPickup()), nat.SNAT, nat.NoNAT)
	if p.GetTimeouts() != nil && only("timeouts", "timeouts", nat.SNAT, nat.NoNAT, nat.DNAT) {
		out.Timeouts = c.timeouts(path+".timeouts", p.GetTimeouts())
	}
	if only("flows", p.GetFlows(), nat.Deny, nat.Reject) {
		if out.Ends = p.GetFlows() == "end"; !out.Ends && p.GetFlows() != "keep" {
			c.Problem(path+".flows", p.GetFlows(), "is not a valid value", `give "keep" or "end"`)
		}
	}
	if only("to", p.GetTo(), nat.DNAT, nat.Redirect) {
		out.To = c.target(path+".to", p.GetTo())
	}
	if only("whenDown", p.GetWhenDown(), nat.Redirect) {
		if out.Bypass = p.GetWhenDown() == "bypass"; !out.Bypass && p.GetWhenDown() != "block" {
			c.Problem(path+".whenDown", p.GetWhenDown(), "is not a valid value", `give "block" or "bypass"`)
		}
	}
	if p.GetProbes() != nil && only("probes", "probes", nat.Redirect) {
		c.watched(path+".probes", p.GetProbes(), out)
	}
	switch out.Action {
	case nat.SNAT:
		c.pooled(path, out)
	case nat.NoNAT:
		c.plain(path, out)
	case nat.DNAT:
		c.forward(path, p, out)
		c.targeted(path, p, out)
	case nat.Redirect:
		c.targeted(path, p, out)
	}
}

func yes(v bool) string {
	if v {
		return "true"
	}
	return ""
}

func (c *checker) timeouts(path string, t *isthmusv1.FlowTimeouts) nat.Timeouts {
	given := func(field string, d *durationpb.Duration) time.Duration {
		return c.duration(path+"."+field, d, 0, time.Second, 120*time.Hour)
	}
	return nat.Timeouts{
		TCPEstablished: given("tcpEstablished", t.GetTcpEstablished()), TCPClosing: given("tcpClosing", t.GetTcpClosing()),
		UDP: given("udp", t.GetUdp()), UDPStream: given("udpStream", t.GetUdpStream()),
	}
}

// target reads an address with or without a port.
func (c *checker) target(path, text string) netip.AddrPort {
	if ap, err := netip.ParseAddrPort(text); err == nil && ap.Port() != 0 {
		if a, ok := c.Address(path, ap.Addr().String()); ok {
			return netip.AddrPortFrom(a, ap.Port())
		}
		return netip.AddrPort{}
	}
	a, err := netip.ParseAddr(text)
	if err != nil {
		c.Problem(path, text, "is not an address with a port", `write it as "10.0.1.5:8443", "[2001:db8::5]:8443", or "10.0.1.5" to keep the port`)
		return netip.AddrPort{}
	}
	a, _ = c.Address(path, a.String())
	return netip.AddrPortFrom(a, 0)
}

// poolOf returns the pool of a policy.
func (c *checker) poolOf(path string, out *nat.Policy) (*poolFacts, bool) {
	if out.Pool == "" {
		c.Missing(path+".pool", "give the name of a pool")
		return nil, false
	}
	f, ok := c.poolNamed(out.Pool)
	if !ok {
		c.Reference(path+".pool", out.Pool, "egress.pools", "pool")
	}
	return f, ok
}

func (c *checker) pooled(path string, out *nat.Policy) {
	pool, ok := c.poolOf(path, out)
	if !ok {
		return
	}
	c.inBlocks(path, pool.pool, out.Sources)
	for i, src := range out.Sources {
		if !pool.hasFamily(src.Addr()) {
			c.Problem(fmt.Sprintf("%s.sources[%d]", path, i), src.String(), "is of a family without an address in pool "+out.Pool, "add one to the pool")
		}
	}
}

// plain checks action no-nat: it must not carry an inside address into the Internet.
func (c *checker) plain(path string, out *nat.Policy) {
	if len(out.Destinations) == 0 {
		c.Missing(path+".destinations", "name the prefixes toward which the source is kept")
	}
	for i, dst := range out.Destinations {
		at := fmt.Sprintf("%s.destinations[%d]", path, i)
		if dst.Bits() == 0 {
			c.Problem(at, dst.String(), "covers every address, and action no-nat keeps the source", "name the networks that have a route to the sources")
			continue
		}
		for j, src := range out.Sources {
			if !c.spend(1) {
				return
			}
			if src.Addr().Is4() == dst.Addr().Is4() && nat.Exposes(src, dst) {
				c.Problem(fmt.Sprintf("%s.sources[%d]", path, j), src.String(), fmt.Sprintf("has private addresses, which must not leave toward %v, which is public", dst),
					"use action snat, or name public sources or private destinations")
			}
		}
	}
}

// forward checks the pool and the destinations of action dnat.
func (c *checker) forward(path string, p *isthmusv1.EgressPolicy, out *nat.Policy) {
	if len(p.GetPorts()) == 0 {
		c.Missing(path+".ports", "name the ports that are open")
	}
	pool, ok := c.poolOf(path, out)
	if !ok {
		return
	}
	for i, dst := range out.Destinations {
		if !dst.IsSingleIP() || pool.whole && !pool.known[dst.Addr()] {
			c.Problem(fmt.Sprintf("%s.destinations[%d]", path, i), dst.String(), "is not an address of pool "+out.Pool, "give addresses of the pool, such as 192.0.2.11/32, or leave it out for all")
		}
	}
	if !c.spend(len(pool.pool.Addresses) + len(out.Destinations)) {
		return
	}
	if a := c.s.Underlay.Address; slices.ContainsFunc(out.Opens(*pool.pool), func(p netip.Prefix) bool { return p.Addr() == a }) {
		c.Problem(path+".pool", out.Pool, "has the node's own address "+a.String()+", at which its tunnels end", "take another pool, or name other addresses of it in `destinations`")
	}
	if to := out.To.Addr(); to.IsValid() && !pool.hasFamily(to) {
		c.Problem(path+".to", p.GetTo(), "is of a family without an address in pool "+out.Pool, "give a server of the pool's family")
	}
}

// targeted checks actions that lead to a server or proxy.
func (c *checker) targeted(path string, p *isthmusv1.EgressPolicy, out *nat.Policy) {
	if !nat.TakesPorts(out.Protocol) && len(p.GetPorts()) == 0 {
		c.Problem(path+".protocol", out.Protocol, "has no ports", `set it to "tcp" or "udp"`)
	}
	if p.GetTo() == "" {
		c.Missing(path+".to", `give the server or proxy, as "10.0.1.5:8443"`)
	}
	if to := out.To.Addr(); to.IsValid() {
		c.notPlatform(path+".to", p.GetTo(), to)
		if c.sources[to] != "" {
			c.Problem(path+".to", p.GetTo(), "is an address of a pool", "give the address of the server or proxy")
		}
		for i, src := range out.Sources {
			if src.Addr().Is4() != to.Is4() {
				c.Problem(fmt.Sprintf("%s.sources[%d]", path, i), src.String(), "is of another family than `to`", "write one policy for each family")
			}
		}
	}
}

// watched checks the probes of a proxy.
func (c *checker) watched(path string, p *isthmusv1.Probes, out *nat.Policy) {
	if len(p.GetTargets()) == 0 && out.Protocol == "tcp" && out.To.IsValid() && out.To.Port() != 0 {
		p = proto.CloneOf(p)
		p.Targets = []string{"tcp://" + out.To.String()}
	}
	var proxy []netip.Addr
	if out.To.IsValid() {
		proxy = append(proxy, out.To.Addr())
	}
	c.s.Proxies = append(c.s.Proxies, egress.ProbedPool{Name: out.Name, Addresses: proxy, Probes: c.probes(path, p, proxy)})
}

// loops finds redirects that catch the packets of their own proxy.
func (c *checker) loops() {
	if !slices.ContainsFunc(c.s.Policies, func(p nat.Policy) bool { return p.Action == nat.Redirect }) {
		return
	}
	config := nat.Config{Pools: c.s.Pools, Policies: c.s.Policies}
	rules, err := config.Rules()
	if err != nil {
		return // see bounded
	}
	for i := range c.s.Policies {
		c.loop(rules, i)
	}
}

func (c *checker) loop(rules []nat.Rule, i int) {
	p := &c.s.Policies[i]
	if p.Action == nat.Redirect && p.To.IsValid() && from(p, p.To.Addr()) && c.spend(2*len(rules)) && catches(rules, p, p.To.Addr()) {
		c.Problem(c.paths[i]+".to", strings.TrimSuffix(p.To.String(), ":0"), "is among the sources, so that the packets of the proxy come back to it",
			fmt.Sprintf("write a policy with action snat for source %s and the same destinations, protocol and ports", netip.PrefixFrom(p.To.Addr(), p.To.Addr().BitLen())))
	}
}

// catches reports whether a policy decides flows of a source.
func catches(rules []nat.Rule, p *nat.Policy, source netip.Addr) bool {
	for _, r := range rules {
		f := nat.Flow{Source: source, Destination: r.Destination.Addr(), Protocol: r.Protocol, Port: r.Ports.First}
		if r.Policy == p && r.Matches(f) {
			first := slices.IndexFunc(rules, func(o nat.Rule) bool { return o.Matches(f) })
			return rules[first].Policy == p
		}
	}
	return false
}
