package nftables

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/nftables/reach"
)

// Departures returns the source addresses with which new flows may leave by the rules in the
// kernel. See nat.Prover.
func (d *Driver) Departures(ctx context.Context, underlay string, sources, destinations []netip.Prefix) ([]nat.Departure, error) {
	have, _, err := d.read(ctx)
	if err != nil {
		return nil, err
	}
	if have == nil {
		return nil, errors.New("the table of the rules is missing")
	}
	var index uint32
	d.mu.Lock()
	if d.config != nil {
		index = d.config.Links.Of(underlay)
	}
	d.mu.Unlock()
	return have.reach().Departures(underlay, index, sources, destinations)
}

// Predict is Departures for the rules compiled from a configuration.
func (d *Driver) Predict(c nat.Config, sources, destinations []netip.Prefix) ([]nat.Departure, error) {
	r, err := compile(c)
	if err != nil {
		return nil, fmt.Errorf("compiling rules: %w", err)
	}
	return r.reach().Departures(c.Underlay, c.Links.Of(c.Underlay), sources, destinations)
}

// reach returns the ruleset in the form that package reach reads.
func (r *ruleset) reach() reach.Ruleset {
	out := reach.Ruleset{Chains: map[string]*reach.Chain{}, Sets: map[string]*reach.Set{}}
	for name, c := range r.chains {
		if name != sourcesChain { // this chain does not affect with which source a flow leaves
			out.Chains[name] = &reach.Chain{Base: c.kind != "", Hook: c.hook, Priority: c.priority, Rules: c.rules}
		}
	}
	for name, s := range r.sets {
		t := &reach.Set{IsVerdict: s.shape.isVerdict, IsInterval: s.shape.isInterval, IsDynamic: s.shape.isDynamic}
		for _, key := range slices.Sorted(maps.Keys(s.elements)) {
			e := s.elements[key]
			t.Elements = append(t.Elements, reach.Element{Key: key, Data: e.data, Verdict: expr.Verdict{Kind: expr.VerdictKind(e.kind), Chain: e.chain}})
		}
		out.Sets[name] = t
	}
	return out
}
