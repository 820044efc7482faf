package router

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/health"
	"github.com/isthmus-net/isthmus/router/plan"
)

// What was planned does not change when an address dies. What is given to the drivers does: it is the plan with
// what was observed since.

// liveNAT returns what is wanted of NAT now.
func (r *Router) liveNAT(c nat.Config) nat.Config {
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
	return c
}

// liveBGP returns what is wanted of BGP now: it announces for a pool while one of its addresses is usable.
func (r *Router) liveBGP(t plan.Target) bgp.Config {
	c := t.BGP
	c.Announce = slices.Clone(c.Announce)
	usable := map[string]bool{}
	for _, p := range r.health.Pools() {
		usable[p.Name] = p.Usable() > 0
	}
	for _, p := range t.Health {
		// A pool of which nothing is known yet, because its addresses are not there, counts as usable like one not yet probed.
		if known, ok := usable[p.Name]; known || !ok {
			c.Announce = append(c.Announce, p.Announce...)
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
		if i := slices.IndexFunc(target.Health, func(h health.Pool) bool { return h.Name == p.Name }); i >= 0 {
			s.Announce = texts(target.Health[i].Announce)
			s.Announced = len(s.Announce) > 0 && s.Healthy > 0
		}
		out = append(out, s)
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
