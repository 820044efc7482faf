package report

import (
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"

	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/health"
)

// pools returns the pools as they were last seen, by name.
func (r *Report) pools() []*isthmusv1.PoolStatus {
	seen := map[string]health.PoolState{}
	for _, p := range r.Health.Pools() {
		seen[p.Name] = p
	}
	target := r.Observed.Target()
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

// poolConditions tells of pools that lack addresses.
func (r *Report) poolConditions() (out []*isthmusv1.Condition) {
	for _, p := range r.Health.Pools() {
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
		c := condition.PoolDegraded.Warning(last.Since, "pool %s: %s", p.Name, strings.Join(why, "; "))
		if p.Usable() == 0 {
			withdrawn := ""
			if len(p.Announce) > 0 {
				withdrawn = fmt.Sprintf(", and %v is withdrawn from BGP", p.Announce)
			}
			c = condition.PoolDown.Error(last.Since, "pool %s: %s; all stay in use%s", p.Name, strings.Join(why, "; "), withdrawn)
		}
		if len(why) > 0 {
			out = append(out, c)
		}
	}
	slices.SortStableFunc(out, func(a, b *isthmusv1.Condition) int { return cmp.Compare(a.Severity, b.Severity) })
	return out
}

// proxyConditions tells of proxies that do not work.
func (r *Report) proxyConditions() (out []*isthmusv1.Condition) {
	sick := r.Observed.SickProxies()
	policies := r.Observed.Target().NAT.Policies
	for _, p := range policies {
		m, ok := sick[p.Name]
		if !ok {
			continue
		}
		severity, what := condition.Error, "new flows are rejected"
		if p.Bypass {
			severity, what = condition.Warning, "new flows are decided by the other policies"
		}
		out = append(out, condition.ProxyDown.With(severity, m.Since, "proxy %v of policy %s is %s, %s; %s", m.Address, p.Name, m.Status, m.Reason(), what))
	}
	return out
}
