package nat

import (
	"fmt"
	"slices"
	"strings"
)

// Explain returns why the guard drops a packet, or would: the policy that should have matched it,
// and why it did not.
func (c *Config) Explain(f Flow) string {
	if slices.Contains(c.addresses(), f.Source) {
		return "someone inside uses an address of this node as source"
	}
	if r, found := c.best(f); found {
		p := r.Policy
		switch {
		case f.Late && !p.Pickup && (p.Action == SNAT || p.Action == NoNAT):
			return fmt.Sprintf("policy %s decides such flows, but this one did not begin here, and the policy has no pickup", p.Name)
		case p.Action == NoNAT || p.Action == SNAT && c.Pool(p.Pool).For(f.Source, c.Zone(f.Source)).IsValid():
			return fmt.Sprintf("policy %s decides such flows, but the packet is of none that is known or can begin with it", p.Name)
		}
		return fmt.Sprintf("policy %s (%s) lets no such flow leave", p.Name, p.Does())
	}
	rules, err := c.Rules()
	if err != nil {
		return err.Error()
	}
	var best *Rule
	var why string
	score := -1
	for i := range rules {
		r := &rules[i]
		if n, miss := r.misses(f); n > score {
			best, score, why = r, n, miss
		}
	}
	if best == nil {
		return "no policies are configured"
	}
	return fmt.Sprintf("no policy has it; %s comes nearest, for %s", best.Policy.Name, why)
}

// misses returns how much of a rule a flow matches, and what the rule requires where it does not.
func (r *Rule) misses(f Flow) (score int, wants string) {
	var all []string
	for _, k := range []struct {
		ok   bool
		what string
	}{
		{r.Source.Contains(f.Source), "sources in " + r.Source.String()},
		{r.Destination.Contains(f.Destination), "destinations in " + r.Destination.String()},
		{r.Protocol == 0 || r.Protocol == f.Protocol, "protocol " + r.Policy.Protocol},
		{r.Ports == everyPort || r.Ports.First <= f.Port && f.Port <= r.Ports.Last, "ports " + r.Ports.String()},
	} {
		if k.ok {
			score++
		} else {
			all = append(all, k.what)
		}
	}
	return score, strings.Join(all, " and ")
}
