package router

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/dns"
	"github.com/isthmus-net/isthmus/router/egress/health"
	"github.com/isthmus-net/isthmus/router/plan"
)

// What was planned does not change when an address dies. What is given to the drivers does: it is the plan with
// what was observed since.

// appliedNAT is what was last given to the driver of NAT, without what was observed.
type appliedNAT struct {
	mu        sync.Mutex // held from looking at what was observed to the end of the driver's work: what is older is not written last
	config    *nat.Config
	conflicts []dns.Conflict
	canary    *nat.Attachment // of a proof's canary while it calls
}

// apply has a configuration carried out as it is to be now.
func (a *appliedNAT) apply(ctx context.Context, r *Router, c nat.Config) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.config = &c
	return a.againLocked(ctx, r)
}

func (a *appliedNAT) againLocked(ctx context.Context, r *Router) error {
	if a.config == nil {
		return nil
	}
	var live nat.Config
	live, a.conflicts = r.liveNAT(*a.config)
	rules := live
	if a.canary != nil {
		rules.Attachments = append(slices.Clone(live.Attachments), *a.canary)
	}
	if err := r.NAT.Apply(ctx, rules); err != nil {
		return err
	}
	if r.placer != nil {
		r.placer.use(live)
	}
	r.unsticker.use(live)
	if r.Translations != nil {
		r.Translations.Use(live)
	}
	if a.canary == nil {
		return r.Addresses.RemoveCanary() // of a call that could not take it away, or of a daemon that died
	}
	return nil
}

// applyNames has the present addresses of names be destinations.
func (r *Router) applyNames(ctx context.Context) error {
	r.nat.mu.Lock()
	defer r.nat.mu.Unlock()
	return r.nat.againLocked(ctx, r)
}

// namesChanged has the drivers take in what was found out about names.
func (r *Router) namesChanged(addresses bool) {
	if addresses {
		r.work.again("nat")
	}
	r.state.bell.Ring()
}

// wantedNames returns the names whose addresses are needed: those of policies, and those of probe targets.
func wantedNames(t plan.Target) []string {
	var out []string
	for i := range t.NAT.Policies {
		out = append(out, t.NAT.Policies[i].Names...)
	}
	for _, p := range slices.Concat(t.Health, t.Proxies) {
		for _, target := range p.Probes.Targets {
			if name, err := egress.ParseName(target.Host); err == nil { // else it is an address
				out = append(out, name)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// unusedFamilies says whether no policy and no probe can use the addresses of a name of one family.
func unusedFamilies(t plan.Target) func(name string, ipv6 bool) bool {
	type use struct {
		name string
		ipv6 bool
	}
	used := map[use]bool{}
	for i := range t.NAT.Policies {
		p := &t.NAT.Policies[i]
		for _, name := range p.Names {
			for _, s := range p.Sources {
				if !p.To.IsValid() || p.To.Addr().Is6() == s.Addr().Is6() {
					used[use{name, s.Addr().Is6()}] = true
				}
			}
		}
	}
	for _, p := range slices.Concat(t.Health, t.Proxies) {
		for _, target := range p.Probes.Targets {
			name, err := egress.ParseName(target.Host)
			for _, a := range p.Addresses {
				if err == nil {
					used[use{name, a.Is6()}] = true
				}
			}
		}
	}
	return func(name string, ipv6 bool) bool { return !used[use{name, ipv6}] }
}

// inside says which addresses no name may stand for, of a policy or of a probe: those that no route may take from the node (its own, those of pools and of the
// platform, networks that it is connected to, inside addresses of tunnels, routers of the underlay), DNS servers with a private address, and what is inside. A
// prefix of everything, as the sources of a tunnel may be, is not inside. A public DNS server, or the outside address of a tunnel, may well be whom a
// policy names.
func (r *Router) inside(t plan.Target) func(netip.Addr) bool {
	addrs := map[netip.Addr]bool{}
	for _, a := range r.own(t.NAT) {
		addrs[a] = true
	}
	for _, p := range t.NAT.Pools {
		for _, a := range p.Addresses {
			addrs[a.Address], addrs[a.Public] = true, true
		}
	}
	resolvers := r.resolvers()
	for _, server := range t.Names.Resolvers {
		resolvers = append(resolvers, server.Addr())
	}
	for _, a := range resolvers {
		if a.IsPrivate() {
			addrs[a] = true
		}
	}
	seen := r.around.get()
	for _, a := range seen.Gateways(t.Underlay.Interface) {
		addrs[a] = true
	}
	var prefixes []netip.Prefix
	for _, p := range reserved(t, seen, nil) {
		switch {
		case p.Covered: // what is more exact may lead there
		case p.Prefix.IsSingleIP():
			addrs[p.Prefix.Addr()] = true
		case p.Prefix.Bits() > 0:
			prefixes = append(prefixes, p.Prefix)
		}
	}
	for _, a := range t.NAT.Attachments {
		for _, p := range a.Sources {
			if p.Bits() > 0 {
				prefixes = append(prefixes, p)
			}
		}
	}
	for _, m := range t.NAT.Maps {
		prefixes = append(prefixes, m.Mapped)
	}
	return func(a netip.Addr) bool {
		return addrs[a] || slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
	}
}

// liveNAT returns what is wanted of NAT now, and the addresses that two policies want.
func (r *Router) liveNAT(c nat.Config) (nat.Config, []dns.Conflict) {
	c, conflicts := dns.Extend(c, r.names.Addresses)
	c.Own, c.API.Port = r.own(c), r.APIPort
	c.Links = r.links(c)
	down := map[netip.Addr]bool{}
	for _, p := range r.health.Pools() {
		for _, m := range p.Members {
			down[m.Address] = !m.Usable()
		}
	}
	c.Pools = slices.Clone(c.Pools)
	for i := range c.Pools {
		p := &c.Pools[i]
		p.Addresses = slices.Clone(p.Addresses)
		for j := range p.Addresses {
			p.Addresses[j].Down = down[p.Addresses[j].Address]
		}
	}
	if sick := r.sickProxies(); len(sick) > 0 { // there may be ten thousand policies
		c.Policies = slices.Clone(c.Policies)
		for i := range c.Policies {
			_, c.Policies[i].Down = sick[c.Policies[i].Name]
		}
	}
	return c, conflicts
}

// liveBGP returns what is wanted of BGP now: it announces for a pool while one of its addresses is usable, and a mapped prefix while
// one of its tunnels is not known to be down.
func (r *Router) liveBGP(t plan.Target) bgp.Config {
	c := t.BGP
	c.Announce = slices.Clone(c.Announce)
	usable := map[string]bool{}
	for _, p := range r.health.Pools() {
		usable[p.Name] = proven(t, p)
	}
	for _, p := range t.Health {
		// A pool of which nothing is known yet, because its addresses are not there, counts as usable like one not yet probed.
		if known, ok := usable[p.Name]; known || !ok && len(t.Takeover.Paths) == 0 {
			c.Announce = append(c.Announce, p.Announce...)
		}
	}
	down := r.state.down()
	for _, m := range t.NAT.Maps {
		if !slices.ContainsFunc(m.Interfaces, func(i string) bool { return !down[i] }) {
			c.Announce = slices.DeleteFunc(c.Announce, func(p netip.Prefix) bool { return p == m.Mapped })
		}
	}
	slices.SortFunc(c.Announce, netip.Prefix.Compare)
	return c
}

// healthChanged has the drivers take in what was found out about addresses.
func (r *Router) healthChanged() {
	r.work.again("nat")
	r.work.again("bgp")
	r.state.bell.Ring()
}

// sickProxies returns the proxies that do not work, by the names of their policies.
func (r *Router) sickProxies() map[string]health.Member {
	sick := map[string]health.Member{}
	for _, p := range r.proxies.Pools() {
		if p.Usable() == 0 {
			sick[p.Name] = p.Members[0]
		}
	}
	return sick
}

// proxyChanged has the rules take in what was found out about proxies.
func (r *Router) proxyChanged() {
	r.work.again("nat")
	r.state.bell.Ring()
}

// proxyConditions tells of proxies that do not work.
func (r *Router) proxyConditions() (out []*isthmusv1.Condition) {
	sick := r.sickProxies()
	r.state.mu.Lock()
	policies := r.state.target.NAT.Policies
	r.state.mu.Unlock()
	for _, p := range policies {
		m, ok := sick[p.Name]
		if !ok {
			continue
		}
		c := &isthmusv1.Condition{Type: "ProxyDown", Severity: "error", Since: stamp(m.Since)}
		what := "new flows are rejected"
		if p.Bypass {
			c.Severity, what = "warning", "new flows are decided by the other policies"
		}
		c.Message = fmt.Sprintf("proxy %v of policy %s is %s, %s; %s", m.Address, p.Name, m.Status, m.Reason(), what)
		out = append(out, c)
	}
	return out
}

// pools returns the pools as they were last seen, by name.
func (r *Router) pools() []*isthmusv1.PoolStatus {
	seen := map[string]health.PoolState{}
	for _, p := range r.health.Pools() {
		seen[p.Name] = p
	}
	r.state.mu.Lock()
	target := r.state.target
	r.state.mu.Unlock()
	out := make([]*isthmusv1.PoolStatus, 0, len(target.NAT.Pools))
	for _, p := range target.NAT.Pools {
		s := &isthmusv1.PoolStatus{Name: p.Name}
		known := seen[p.Name]
		for _, a := range p.Addresses {
			m := &isthmusv1.PoolMember{Address: a.Address.String(), PublicAddress: a.Public.String(), Zone: a.Zone, Weight: max(a.Weight, 1), Health: "unprobed"}
			usable := true
			if i := slices.IndexFunc(known.Members, func(k health.Member) bool { return k.Address == a.Address }); i >= 0 {
				k := &known.Members[i]
				m.Health, m.Since, m.Reason, usable = string(k.Status), stamp(k.Since), k.Reason(), k.Usable()
				for _, t := range k.Targets {
					state := map[health.Status]string{health.Healthy: "up", health.Down: "down", health.Unknown: "unknown"}[t.Status]
					m.Targets = append(m.Targets, &isthmusv1.ProbeTarget{Target: t.Target.String(), State: state, Since: stamp(t.Since), LastError: t.LastError, Failed: stamp(t.Failed)})
				}
			}
			if usable {
				s.Healthy++
			}
			s.Members = append(s.Members, m)
		}
		if i := slices.IndexFunc(target.Health, func(h egress.ProbedPool) bool { return h.Name == p.Name }); i >= 0 {
			s.Announce = texts(target.Health[i].Announce)
			s.Announced = len(s.Announce) > 0 && s.Healthy > 0
		}
		out = append(out, s)
	}
	return out
}

// policyNames returns the names of policies with what they stand for, in order.
func (r *Router) policyNames() []*isthmusv1.NameStatus {
	r.state.mu.Lock()
	policies := r.state.target.NAT.Policies
	r.state.mu.Unlock()
	byName := map[string]*isthmusv1.NameStatus{}
	gone := map[string][]*isthmusv1.GoneAddress{}
	for _, g := range r.names.Lately() {
		gone[g.Name] = append(gone[g.Name], &isthmusv1.GoneAddress{Address: g.Address.String(), Since: stamp(g.At)})
	}
	for _, p := range policies {
		for _, name := range p.Names {
			if byName[name] == nil {
				s := r.names.State(name)
				byName[name] = &isthmusv1.NameStatus{Name: name, Addresses: texts(s.Addresses), Next: stamp(s.Next), LastError: s.LastError, Failing: stamp(s.Failing),
					Gone: gone[name], Differs: stamp(s.Differs), Refused: texts(s.Refused)}
			}
			byName[name].Policies = append(byName[name].Policies, p.Name)
		}
	}
	out := make([]*isthmusv1.NameStatus, 0, len(byName))
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		out = append(out, byName[name])
	}
	return out
}

// deafTold is after what time it is told that the DNS proxy does not listen: an interface may be made in that time.
const deafTold = 5 * time.Second

// maxToldConflicts is how many addresses of names that are no destinations have a condition each: a zone decides how many there are.
const maxToldConflicts = 20

// nameConditions tells of names that cannot be resolved, and of addresses that two policies want.
func (r *Router) nameConditions() (out []*isthmusv1.Condition) {
	names := r.policyNames()
	for _, n := range names {
		if n.LastError != "" {
			out = append(out, &isthmusv1.Condition{Type: "NameUnresolved", Severity: "warning", Since: n.Failing,
				Message: fmt.Sprintf("name %s of policies %s: %s; its %d addresses of that family stay for `nameGrace`", n.Name, strings.Join(n.Policies, ", "), n.LastError, r.names.State(n.Name).Stale)})
		}
	}
	for _, n := range names {
		if n.Differs != nil {
			out = append(out, &isthmusv1.Condition{Type: "NameDiffers", Severity: "warning", Since: n.Differs,
				Message: fmt.Sprintf("name %s of policies %s: each answer has addresses that were not in those before, so that clients which ask another resolver are told addresses that are no destinations: have them ask `egress.dnsProxy` of this node", n.Name, strings.Join(n.Policies, ", "))})
		}
		if len(n.Refused) > 0 {
			out = append(out, &isthmusv1.Condition{Type: "AddressesRefused", Severity: "warning",
				Message: fmt.Sprintf("name %s of policies %s: %s and the like are refused, since they are addresses that the node, a pool, the platform or the inside needs: write those that are wanted in `destinations`", n.Name, strings.Join(n.Policies, ", "), n.Refused[0])})
		}
	}
	if l, err, since, n := r.names.Deaf(); n > 0 && time.Since(since) > deafTold {
		out = append(out, &isthmusv1.Condition{Type: "DNSProxyDown", Severity: "warning", Since: stamp(since),
			Message: fmt.Sprintf("the DNS proxy does not listen at %d of its places, the first one %v by interface %s: %s: the address must be one of this node, and no other program may listen at port 53 of it", n, l.Address, l.Interface, err)})
	}
	if n, last, host := r.names.Dropped(); n > 0 && time.Since(last) < time.Minute {
		out = append(out, &isthmusv1.Condition{Type: "QueriesDropped", Severity: "warning", Since: stamp(last),
			Message: fmt.Sprintf("the DNS proxy has dropped %d queries since the start, the last one of %v: a client, or all of a tunnel, asks for more than resolvers answer", n, host)})
	}
	if n, last, iface := r.names.Limited(); n > 0 && time.Since(last) < time.Minute {
		out = append(out, &isthmusv1.Condition{Type: "NewNamesLimited", Severity: "warning", Since: stamp(last),
			Message: fmt.Sprintf("the DNS proxy has refused %d answers since the start, the last one to a client behind %s: they would have given names more new addresses than one attachment may (1000 at once, 100 a second): look which host asks, or write prefixes in `destinations`", n, iface)})
	}
	if n, last, name := r.names.Refused(); n > 0 && time.Since(last) < time.Minute {
		out = append(out, &isthmusv1.Condition{Type: "AnswersRefused", Severity: "warning", Since: stamp(last),
			Message: fmt.Sprintf("the DNS proxy has refused %d answers since the start, the last one for %s: they have addresses that the node, a pool, the platform or the inside needs", n, name)})
	}
	r.nat.mu.Lock()
	defer r.nat.mu.Unlock()
	for i, c := range r.nat.conflicts {
		if i == maxToldConflicts {
			out = append(out, &isthmusv1.Condition{Type: "NameShared", Severity: "warning",
				Message: fmt.Sprintf("%d more addresses of names are no destinations of their policies", len(r.nat.conflicts)-i)})
			break
		}
		if c.Winner == "" {
			out = append(out, &isthmusv1.Condition{Type: "NameTooLarge", Severity: "warning",
				Message: fmt.Sprintf("%v of name %s is no destination of policy %s, since %v: give the policy fewer sources or ports, or names with fewer addresses", c.Address, c.Name, c.Policy, nat.ErrTooManyRules)})
			continue
		}
		out = append(out, &isthmusv1.Condition{Type: "NameShared", Severity: "warning",
			Message: fmt.Sprintf("%v of name %s is no destination of policy %s, since policy %s decides the same flows to it", c.Address, c.Name, c.Policy, c.Winner)})
	}
	return out
}

// poolConditions tells of pools that lack addresses.
func (r *Router) poolConditions() (out []*isthmusv1.Condition) {
	for _, p := range r.health.Pools() {
		var why []string
		var last health.Member
		for _, m := range p.Members {
			if !m.Usable() {
				why = append(why, fmt.Sprintf("%v is %s, %s", m.Address, m.Status, m.Reason()))
				if m.Since.After(last.Since) {
					last = m
				}
			}
		}
		c := &isthmusv1.Condition{Type: "PoolDegraded", Severity: "warning", Since: stamp(last.Since), Message: fmt.Sprintf("pool %s: %s", p.Name, strings.Join(why, "; "))}
		if p.Usable() == 0 {
			c.Type, c.Severity = "PoolDown", "error"
			c.Message += "; all stay in use"
			if len(p.Announce) > 0 {
				c.Message += fmt.Sprintf(", and %v is withdrawn from BGP", p.Announce)
			}
		}
		if len(why) > 0 {
			out = append(out, c)
		}
	}
	slices.SortStableFunc(out, func(a, b *isthmusv1.Condition) int { return cmp.Compare(a.Severity, b.Severity) })
	return out
}
