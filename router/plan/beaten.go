package plan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/isthmus-net/isthmus/nat"
)

const (
	// maxBeatenSteps bounds the pairs of rules that are compared to find policies that win over
	// denials.
	maxBeatenSteps = 20_000_000
	// maxBeatenNames bounds the names of policies that win over one.
	maxBeatenNames = 5
)

// withBeaten adds to changes the policies that win over a new or changed policy that denies: they
// still let some of its flows pass.
func withBeaten(changes []Change, c nat.Config) []Change {
	denies := map[string]*nat.Policy{}
	for i := range c.Policies {
		if p := &c.Policies[i]; p.Action == nat.Deny || p.Action == nat.Reject {
			denies[p.Name] = p
		}
	}
	var rules []nat.Rule // of the policies that let flows pass
	var err error
	steps := maxBeatenSteps
	for i := range changes {
		ch := &changes[i]
		p := denies[ch.Name]
		if p == nil || ch.Kind != "policy" || ch.Action == Remove {
			continue
		}
		if rules == nil && err == nil {
			pass := nat.Config{Policies: slices.DeleteFunc(slices.Clone(c.Policies), func(p nat.Policy) bool {
				return p.Action != nat.SNAT && p.Action != nat.NoNAT && p.Action != nat.Redirect
			})}
			if rules, err = pass.Rules(); rules == nil {
				rules = []nat.Rule{}
			}
		}
		own, ownErr := (&nat.Config{Policies: []nat.Policy{*p}}).Rules()
		names, whole := beats(own, rules, &steps)
		if !whole || err != nil || ownErr != nil {
			ch.Fields = slices.Insert(ch.Fields, 0, "there are too many rules to find other policies that win over it")
			return changes
		}
		if len(names) > 0 {
			said := strings.Join(names[:min(len(names), maxBeatenNames)], ", ")
			if more := len(names) - maxBeatenNames; more > 0 {
				said += fmt.Sprintf(" and %d more", more)
			}
			ch.Fields = slices.Insert(ch.Fields, 0, "does not apply everywhere: more specific policies let some of its flows pass: "+said)
		}
	}
	return changes
}

// beats returns the sorted names of the policies with a rule that wins over one of others for some
// flow, and whether the steps were enough to find all.
func beats(others, rules []nat.Rule, steps *int) (names []string, whole bool) {
	found := map[string]bool{}
	for i := range rules {
		r := &rules[i]
		if found[r.Policy.Name] {
			continue
		}
		for j := range others {
			o := &others[j]
			if *steps--; *steps < 0 {
				return nil, false
			}
			common, overlap := intersection(r, o)
			if !overlap || nat.Precedence(*r, *o) >= 0 {
				continue
			}
			// Another rule of the same policy may win over r there.
			covered := slices.ContainsFunc(others, func(p nat.Rule) bool {
				*steps--
				in, overlap := intersection(&common, &p)
				return overlap && in == common && nat.Precedence(p, *r) < 0
			})
			if !covered {
				found[r.Policy.Name] = true
				names = append(names, r.Policy.Name)
				break
			}
		}
	}
	slices.Sort(names)
	return names, true
}

// intersection returns a rule that matches the flows of both rules, and whether there are any.
func intersection(a, b *nat.Rule) (both nat.Rule, overlap bool) {
	if !a.Source.Overlaps(b.Source) || !a.Destination.Overlaps(b.Destination) || a.Protocol != 0 && b.Protocol != 0 && a.Protocol != b.Protocol ||
		a.Ports.First > b.Ports.Last || b.Ports.First > a.Ports.Last {
		return both, false
	}
	longer := func(p, q netip.Prefix) netip.Prefix {
		if p.Bits() >= q.Bits() {
			return p
		}
		return q
	}
	return nat.Rule{
		Source: longer(a.Source, b.Source), Destination: longer(a.Destination, b.Destination), Protocol: max(a.Protocol, b.Protocol),
		Ports: nat.PortRange{First: max(a.Ports.First, b.Ports.First), Last: min(a.Ports.Last, b.Ports.Last)},
	}, true
}
