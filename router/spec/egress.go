package spec

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Limits on what is probed and asked.
const (
	maxTargets = 16
	maxNames   = 1000
	maxWatched = 8
	// maxRoutable is how many addresses the proxy may listen on for every tunnel and attachment.
	maxRoutable = 4
)

func (c *checker) zones(list []*isthmusv1.Zone) {
	var taken []placed
	c.zoneList = make(map[string]bool, len(list))
	for i, z := range list {
		path := fmt.Sprintf("egress.zones[%d]", i)
		c.Name("zone", path+".name", z.GetName())
		out := nat.Zone{Name: z.GetName()}
		if len(z.GetSources()) == 0 {
			c.Missing(path+".sources", "give the prefixes of the sources in the zone")
		}
		for j, text := range z.GetSources() {
			at := fmt.Sprintf("%s.sources[%d]", path, j)
			p, ok := c.Prefix(at, text)
			if !ok {
				continue
			}
			taken = append(taken, placed{p, at})
			out.Prefixes = append(out.Prefixes, p)
		}
		c.s.Zones = append(c.s.Zones, out)
		c.zoneList[out.Name] = true
	}
	overlaps(taken, nil, func(i, j int) {
		c.Problem(taken[i].path, taken[i].prefix.String(), "overlaps "+taken[j].prefix.String()+" of "+taken[j].path, "a source is in one zone")
	})
}

// health checks how a pool is probed, and what it announces.
func (c *checker) health(path string, p *isthmusv1.Pool, pool nat.Pool) {
	out := egress.ProbedPool{Name: pool.Name}
	for _, a := range pool.Addresses {
		out.Addresses = append(out.Addresses, a.Address)
	}
	for i, text := range p.GetAnnounce() {
		at := fmt.Sprintf("%s.announce[%d]", path, i)
		prefix, ok := c.Prefix(at, text)
		if !ok {
			continue
		}
		if c.announcing == nil {
			c.announcing = map[netip.Prefix]string{}
		}
		switch other, twice := c.announcing[prefix]; {
		case c.announce[prefix]:
			c.Problem(at, text, "is in `announce` too, which does not ask for health", "keep one of them")
		case twice:
			c.Problem(at, text, "is "+other+" too", "let it depend on one pool")
		}
		c.announcing[prefix] = at
		out.Announce = append(out.Announce, prefix)
	}
	if p.GetProbes() != nil {
		out.Probes = c.probes(path+".probes", p.GetProbes(), out.Addresses)
	}
	if len(out.Announce) > 0 || len(out.Probes.Targets) > 0 {
		c.s.Health = append(c.s.Health, out)
	}
}

func (c *checker) probes(path string, p *isthmusv1.Probes, addresses []netip.Addr) egress.Probes {
	out := egress.Probes{
		Interval: c.duration(path+".interval", p.GetInterval(), 5*time.Second, time.Second, time.Hour),
		HoldDown: c.duration(path+".holdDown", p.GetHoldDown(), time.Minute, 0, 24*time.Hour),
		Rise:     int(c.Number(path+".rise", p.GetRise(), 2, 1, 100)),
		Fall:     int(c.Number(path+".fall", p.GetFall(), 3, 1, 100)),
	}
	out.Timeout = c.duration(path+".timeout", p.GetTimeout(), min(2*time.Second, out.Interval), time.Second, out.Interval)
	switch n := len(p.GetTargets()); {
	case n == 0:
		c.Missing(path+".targets", `give what must be reached, such as "tcp://198.51.100.7:443"`)
	case n > maxTargets:
		c.Problem(path+".targets", strconv.Itoa(n), "are more than 16", "keep those that matter")
	}
	for i, text := range p.GetTargets()[:min(len(p.GetTargets()), maxTargets)] {
		at := fmt.Sprintf("%s.targets[%d]", path, i)
		t, err := egress.ParseTarget(text)
		if err != nil {
			c.Problem(at, text, err.Error(), `write it as "tcp://198.51.100.7:443", "https://api.partner.example/health" or "icmp://198.51.100.7"`)
			continue
		}
		if a, err := netip.ParseAddr(t.Host); err == nil {
			if _, ok := c.Address(at, a.String()); !ok {
				continue
			}
			c.notPlatform(at, text, a)
		} else if name, err := egress.ParseName(t.Host); err != nil || egress.IsWildcard(name) {
			c.Problem(at, text, "has a host that is neither an address nor a domain name", "give one of them")
			continue
		}
		if slices.Contains(out.Targets, t) {
			c.Problem(at, text, "is listed twice", "keep one of them")
		}
		out.Targets = append(out.Targets, t)
	}
	if len(out.Targets) == 0 || len(out.Targets) < len(p.GetTargets()) {
		return out // the rest would only repeat what is wrong
	}
	for _, a := range addresses {
		targets, _ := out.For(a)
		switch {
		case len(targets) == 0:
			c.Problem(path+".targets", "", "has none of the family of "+a.String(), "add one, or one with a name")
		case int64(p.GetQuorum()) > int64(len(targets)):
			c.Problem(path+".quorum", strconv.FormatUint(uint64(p.GetQuorum()), 10), fmt.Sprintf("is more than the %d targets of %v", len(targets), a), "give at most as many")
		default:
			continue
		}
		break
	}
	out.Quorum = int(p.GetQuorum())
	return out
}

// takeover checks how the addresses of pools are taken over. It comes after the pools.
func (c *checker) takeover(e *isthmusv1.Egress) {
	t := e.GetTakeover()
	if t == nil {
		return
	}
	out := egress.Takeover{
		Interval: c.duration("egress.takeover.interval", t.GetInterval(), 250*time.Millisecond, 100*time.Millisecond, 10*time.Second),
		Fall:     int(c.Number("egress.takeover.fall", t.GetFall(), 4, 2, 100)),
	}
	switch n := len(t.GetWatch()); {
	case n == 0:
		c.Missing("egress.takeover.watch", "give remote inside addresses of the tunnels to the node that shares the pools")
	case n > maxWatched:
		c.Problem("egress.takeover.watch", strconv.Itoa(n), "are more than 8", "keep those that fail apart")
	}
	for i, text := range t.GetWatch()[:min(len(t.GetWatch()), maxWatched)] {
		at := fmt.Sprintf("egress.takeover.watch[%d]", i)
		a, ok := c.Address(at, text)
		if !ok {
			continue
		}
		remote := func(t Tunnel) bool {
			return slices.ContainsFunc(t.Inside, func(in tunnel.Inside) bool { return in.Remote == a })
		}
		if !slices.ContainsFunc(c.s.Tunnels, remote) {
			c.Problem(at, text, "is no remote inside address of a tunnel", "write both addresses in the `inside` of the tunnel to the other node")
		}
		if slices.ContainsFunc(out.Paths, func(w egress.Path) bool { return w.To == a }) {
			c.Problem(at, text, "is listed twice", "keep one of them")
		}
		out.Paths = append(out.Paths, egress.Path{To: a})
	}
	for i, p := range e.GetPools() {
		if p.GetProbes() == nil {
			c.Problem(fmt.Sprintf("egress.pools[%d].probes", i), "", "is required with `egress.takeover`", "only probes tell whether an address leads here")
		}
	}
	for _, p := range c.s.Pools {
		for _, a := range p.Addresses {
			out.Addresses = append(out.Addresses, egress.SharedAddress{Address: a.Address, Public: a.Public})
		}
	}
	c.s.Takeover = out
}

// resolution checks how names are resolved, and how long flows without ports are remembered.
func (c *checker) resolution(e *isthmusv1.Egress) {
	c.s.PortlessTimeout = c.duration("egress.portlessTimeout", e.GetPortlessTimeout(), 0, 10*time.Second, 120*time.Hour)
	out := egress.DNS{
		Floor: c.duration("egress.nameFloor", e.GetNameFloor(), 30*time.Second, time.Second, time.Hour),
		Grace: c.duration("egress.nameGrace", e.GetNameGrace(), 24*time.Hour, 0, 720*time.Hour),
		Hold:  c.duration("egress.nameHold", e.GetNameHold(), 0, time.Minute, 720*time.Hour),
	}
	for i, text := range e.GetResolvers() {
		at := fmt.Sprintf("egress.resolvers[%d]", i)
		ap, err := netip.ParseAddrPort(text)
		if err != nil {
			var a netip.Addr
			a, err = netip.ParseAddr(text)
			ap = netip.AddrPortFrom(a, 53)
		}
		switch a := ap.Addr(); {
		case err != nil || ap.Port() == 0 || a.Zone() != "" || a.Is4In6():
			c.Problem(at, text, "is no address of a DNS server", `write it as "10.9.0.2" or "10.9.0.2:5353"`)
			continue
		case a.IsUnspecified() || a.IsMulticast():
			c.Problem(at, text, "is no unicast address of a host", "give the address of a DNS server")
			continue
		}
		if !c.spend(i) {
			return
		}
		if slices.Contains(out.Resolvers, ap) {
			c.Problem(at, text, "is listed twice", "keep one of them")
		}
		out.Resolvers = append(out.Resolvers, ap)
	}
	if proxy := e.GetDnsProxy(); proxy != nil {
		c.proxy = true
		c.listeners(proxy, &out)
	}
	c.s.Names = out
}

// listeners checks where the proxy listens, and for whom.
func (c *checker) listeners(proxy *isthmusv1.DNSProxy, out *egress.DNS) {
	if len(proxy.GetListen()) == 0 {
		c.Missing("egress.dnsProxy.listen", "give local inside addresses of tunnels, or an address of the node that spokes have a route to")
	}
	routable := 0
	for i, text := range proxy.GetListen() {
		at := fmt.Sprintf("egress.dnsProxy.listen[%d]", i)
		a, ok := c.Address(at, text)
		if !ok {
			continue
		}
		if !c.spend(i + len(c.s.Tunnels)) {
			return
		}
		local := func(t Tunnel) bool {
			return slices.ContainsFunc(t.Inside, func(in tunnel.Inside) bool { return in.Local.Addr() == a })
		}
		remote := func(t Tunnel) bool {
			return slices.ContainsFunc(t.Inside, func(in tunnel.Inside) bool { return in.Remote == a })
		}
		switch {
		case slices.ContainsFunc(c.s.Tunnels, local):
		case a.IsLinkLocalUnicast() || slices.ContainsFunc(c.s.Tunnels, remote):
			c.Problem(at, text, "is no local inside address of a tunnel", "write the address in the `inside` of a tunnel, or give an address of the node that spokes have a route to")
		case !a.IsGlobalUnicast():
			c.Problem(at, text, "is no unicast address of a host", "give an address of the node that spokes have a route to")
		default:
			c.notPlatform(at, text, a)
			if routable++; routable == maxRoutable+1 {
				c.Problem(at, text, "is one more than 4 addresses that are no inside address", "keep those that spokes use")
			}
			if len(c.s.Tunnels)+len(c.s.Attachments) == 0 {
				c.Problem(at, text, "is served on tunnels and attachments, and there is none", "write the networks of the clients in `attachments`")
			}
		}
		if slices.ContainsFunc(out.Proxy, func(l egress.Listener) bool { return l.Address == a }) {
			c.Problem(at, text, "is listed twice", "keep one of them")
		}
		out.Proxy = append(out.Proxy, egress.Listener{Address: a})
	}
	if len(proxy.GetFrom()) > 0 && routable == 0 && len(proxy.GetListen()) > 0 {
		c.Problem("egress.dnsProxy.from", "", "has no meaning while `listen` has only inside addresses, each of which is served on its tunnels", "remove it, or listen on an address of the node that spokes have a route to")
		return
	}
	for i, name := range proxy.GetFrom() {
		at := fmt.Sprintf("egress.dnsProxy.from[%d]", i)
		if !c.spend(i + len(c.s.Tunnels) + len(c.s.Attachments)) {
			return
		}
		switch {
		case slices.Contains(c.s.ProxyFrom, name):
			c.Problem(at, name, "is listed twice", "keep one of them")
		case !slices.ContainsFunc(c.s.Tunnels, func(t Tunnel) bool { return t.Name == name }) && !slices.ContainsFunc(c.s.Attachments, func(a Attachment) bool { return a.Name == name }):
			c.Problem(at, name, "is no tunnel or attachment", "give the name of one")
		}
		c.s.ProxyFrom = append(c.s.ProxyFrom, name)
	}
}

// listenersAndPools refuses to listen on what a pool has. It comes after the pools.
func (c *checker) listenersAndPools() {
	for i, l := range c.s.Names.Proxy {
		for _, p := range c.s.Pools {
			has := func(a nat.PoolAddress) bool { return a.Address == l.Address }
			if l.Address != c.s.Underlay.Address && slices.ContainsFunc(p.Addresses, has) {
				c.Problem(fmt.Sprintf("egress.dnsProxy.listen[%d]", i), l.Address.String(), "is an address of pool "+p.Name+", at which the node itself answers nothing", "give another address of the node")
			}
		}
	}
}

// domains checks the names of a policy.
func (c *checker) domains(path string, list []string) (out []string) {
	listed := map[string]bool{}
	for i, text := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		name, err := egress.ParseName(text)
		switch {
		case err != nil && strings.Contains(err.Error(), "address"):
			c.Problem(at, text, err.Error(), "write it in `destinations`")
			continue
		case err != nil:
			c.Problem(at, text, err.Error(), `write it as "api.partner.example" or "*.partner.example"`)
			continue
		case egress.IsWildcard(name) && !c.proxy:
			c.Problem(at, text, "is a wildcard, which only the DNS proxy can resolve", "set `egress.dnsProxy`, or name each name")
		case listed[name]:
			c.Problem(at, text, "is listed twice", "keep one of them")
			continue
		}
		listed[name] = true
		out = append(out, name)
		if c.domainNames == nil {
			c.domainNames = map[string]bool{}
		}
		if c.domainNames[name] = true; len(c.domainNames) == maxNames+1 {
			c.Problem(at, text, "is one name more than 1000", "use prefixes, or wildcards")
		}
	}
	return out
}
