package capability

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"

	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/health"
	"github.com/isthmus-net/isthmus/router/observe"
)

// Probes checks which addresses of pools work, and which proxies of redirect policies.
type Probes struct {
	Health   *health.Checker // of addresses
	Proxies  *health.Checker
	Observed *observe.Observer
}

// Capability describes Probes. The job "nat" sets the probes, after it has added the addresses.
func (c Probes) Capability() Capability {
	return Capability{
		Name: "probes of pools and proxies", Section: "egress.pools.probes", Nouns: []api.Noun{api.Pools.From(c.List)},
		Kinds:      []*condition.Kind{condition.PoolDegraded, condition.PoolDown, condition.ProxyDown},
		Conditions: func() []*isthmusv1.Condition { return append(c.poolConditions(), c.proxyConditions()...) },
		Summarize: func(s *isthmusv1.Summary) {
			for _, p := range c.List() {
				s.Pools++
				s.PoolAddresses += uint32(len(p.Members))
				s.PoolAddressesHealthy += p.Healthy
			}
		},
		Run: func(ctx context.Context) error {
			var wg sync.WaitGroup
			defer wg.Wait()
			wg.Go(func() { c.Proxies.Run(ctx) })
			return c.Health.Run(ctx)
		},
	}
}

// unprobed is the state of an address that no probe checks.
const unprobed = "unprobed"

// AddressStates lists the states that an address of a pool can have.
func AddressStates() []string {
	out := []string{unprobed}
	for _, s := range health.Statuses {
		out = append(out, string(s))
	}
	return out
}

// List returns the pools with their last known health, by name.
func (c Probes) List() []*isthmusv1.PoolStatus {
	seen := map[string]health.PoolState{}
	for _, p := range c.Health.Pools() {
		seen[p.Name] = p
	}
	target := c.Observed.Target()
	out := make([]*isthmusv1.PoolStatus, 0, len(target.NAT.Pools))
	for _, p := range target.NAT.Pools {
		s := &isthmusv1.PoolStatus{Name: p.Name}
		known := seen[p.Name]
		for _, a := range p.Addresses {
			m := &isthmusv1.PoolMember{Address: a.Address.String(), PublicAddress: a.Public.String(), Zone: a.Zone, Weight: max(a.Weight, 1), Health: unprobed}
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

// poolConditions reports pools with addresses that do not work.
func (c Probes) poolConditions() (out []*isthmusv1.Condition) {
	for _, p := range c.Health.Pools() {
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
		one := condition.PoolDegraded.Warning(last.Since, "pool %s: %s", p.Name, strings.Join(why, "; "))
		if p.Usable() == 0 {
			withdrawn := ""
			if len(p.Announce) > 0 {
				withdrawn = fmt.Sprintf(", and %v is withdrawn from BGP", p.Announce)
			}
			one = condition.PoolDown.Error(last.Since, "pool %s: %s; all stay in use%s", p.Name, strings.Join(why, "; "), withdrawn)
		}
		if len(why) > 0 {
			one.Object = "pool " + p.Name
			out = append(out, one)
		}
	}
	slices.SortStableFunc(out, func(a, b *isthmusv1.Condition) int { return cmp.Compare(a.Severity, b.Severity) })
	return out
}

// proxyConditions reports proxies that do not work.
func (c Probes) proxyConditions() (out []*isthmusv1.Condition) {
	sick := c.Observed.SickProxies()
	policies := c.Observed.Target().NAT.Policies
	for _, p := range policies {
		m, ok := sick[p.Name]
		if !ok {
			continue
		}
		severity, what := condition.Error, "new flows are rejected"
		if p.Bypass {
			severity, what = condition.Warning, "new flows are decided by the other policies"
		}
		one := condition.ProxyDown.With(severity, m.Since, "proxy %v of policy %s is %s, %s; %s", m.Address, p.Name, m.Status, m.Reason(), what)
		one.Object = "policy " + p.Name
		out = append(out, one)
	}
	return out
}
