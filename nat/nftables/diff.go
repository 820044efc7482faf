package nftables

import (
	"context"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
)

// Differences returns how the kernel's rules differ from those compiled from a configuration. See
// nat.Prover.
func (d *Driver) Differences(ctx context.Context, c nat.Config) ([]string, error) {
	want, err := compile(c)
	if err != nil {
		return nil, fmt.Errorf("compiling rules: %w", err)
	}
	d.mu.Lock() // placements and refusals must not change meanwhile
	have, _, err := d.read(ctx)
	placed, overload := d.placed, d.overload
	d.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if have == nil {
		return []string{"the table of the rules is missing"}, nil
	}
	if placed == nil {
		placed = have.placements()
	}
	want.place(c, placed)
	want.refuse(c, overload)
	return differences(have, want), nil
}

// differences returns how two rulesets differ.
func differences(have, want *ruleset) (out []string) {
	names := func(what string, have, want map[string]bool) {
		for _, name := range slices.Sorted(maps.Keys(want)) {
			if !have[name] {
				out = append(out, fmt.Sprintf("%s %s is missing", what, name))
			}
		}
		for _, name := range slices.Sorted(maps.Keys(have)) {
			if !want[name] {
				out = append(out, fmt.Sprintf("%s %s is not in the compiled rules", what, name))
			}
		}
	}
	names("chain", keys(have.chains), keys(want.chains))
	names("set", keys(have.sets), keys(want.sets))
	for _, name := range slices.Sorted(maps.Keys(want.chains)) {
		if have.chains[name] != nil && !sameChain(have.chains[name], want.chains[name]) {
			out = append(out, fmt.Sprintf("chain %s is not as compiled", name))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want.sets)) {
		h, w := have.sets[name], want.sets[name]
		if h == nil {
			continue
		}
		wrong := 0
		for key, e := range w.elements {
			if f, ok := h.elements[key]; !ok || !e.wants(f) {
				wrong++
			}
		}
		for key := range h.elements {
			if _, ok := w.elements[key]; !ok {
				wrong++
			}
		}
		if h.shape != w.shape {
			out = append(out, fmt.Sprintf("set %s has another type or size", name))
		}
		if wrong > 0 {
			out = append(out, fmt.Sprintf("set %s differs in %d elements", name, wrong))
		}
	}
	return out
}

func keys[V any](m map[string]V) map[string]bool {
	out := make(map[string]bool, len(m))
	for k := range m {
		out[k] = true
	}
	return out
}

// readable removes the expression that the library writes but cannot read back: rt. The comparison
// after it stays, and no other rule of ours has a comparison without a load before it.
func readable(rule []expr.Any) (out []expr.Any) {
	for _, e := range rule {
		if _, ok := e.(*expr.Rt); !ok {
			out = append(out, e)
		}
	}
	return out
}

// sameFrame reports whether two tables are equal but for the elements of their sets.
func sameFrame(a, b *ruleset) bool {
	if len(a.chains) != len(b.chains) || len(a.sets) != len(b.sets) {
		return false
	}
	for name, c := range a.chains {
		if d := b.chains[name]; d == nil || !sameChain(c, d) {
			return false
		}
	}
	for name, s := range a.sets {
		if b.sets[name] == nil || b.sets[name].shape != s.shape {
			return false
		}
	}
	return true
}

func sameChain(c, d *chain) bool {
	return c.kind == d.kind && c.hook == d.hook && c.priority == d.priority && slices.EqualFunc(c.rules, d.rules, func(a, b []expr.Any) bool {
		return reflect.DeepEqual(readable(a), readable(b))
	})
}

// change holds the elements to remove from a set and to add to it. A replaced element is in both.
type change struct {
	remove, add map[string]element
}

// changes returns how to get from the elements of have to those of want. The counters of policies
// in want move from removed elements to added or replaced ones. moved is true when there are such
// counters, so that the counters in have must be fresh.
func changes(have, want *ruleset) (all map[string]*change, moved bool) {
	all = map[string]*change{}
	changeOf := func(name string) *change {
		if all[name] == nil {
			all[name] = &change{map[string]element{}, map[string]element{}}
		}
		return all[name]
	}
	lost := map[string]nat.Counter{}
	for name, s := range have.sets {
		for key, e := range s.elements {
			if w, ok := want.sets[name].elements[key]; !ok || !e.wants(w) {
				changeOf(name).remove[key] = e
				if e.policy != "" {
					lost[e.policy] = add(lost[e.policy], add(e.before, e.now))
				}
			}
		}
	}
	for name, s := range want.sets {
		for key, w := range s.elements {
			if e, ok := have.sets[name].elements[key]; ok && e.wants(w) {
				continue
			}
			before, goes := lost[w.policy]
			moved = moved || goes
			w.before = before
			delete(lost, w.policy)
			changeOf(name).add[key] = w
		}
	}
	// The remaining counters have no new element to move to: an existing element of the same
	// policy is replaced by one that carries them.
	for name, s := range want.sets {
		if len(lost) == 0 {
			break
		}
		for key, w := range s.elements {
			counted, goes := lost[w.policy]
			if !goes {
				continue
			}
			moved = true
			e := have.sets[name].elements[key]
			changeOf(name).remove[key] = e
			w.before = add(counted, add(e.before, e.now))
			changeOf(name).add[key] = w
			delete(lost, w.policy)
		}
	}
	return all, moved
}

// keepsSet reports whether a set stays and only its elements may change.
func keepsSet(have, want *ruleset, name string) bool {
	h, w := have.sets[name], want.sets[name]
	return h != nil && w != nil && h.shape == w.shape
}

// besides returns the sets of two rulesets, completed for changes so that both have the same
// names: a set that does not stay is in the other ruleset without elements.
func besides(have, want *ruleset, whole bool) (h, w *ruleset) {
	h, w = &ruleset{sets: map[string]*set{}}, &ruleset{sets: map[string]*set{}}
	for name, s := range want.sets {
		h.sets[name], w.sets[name] = &set{shape: s.shape}, s
	}
	for name, s := range have.sets {
		if whole || !keepsSet(have, want, name) {
			name += " before" // no set has such a name
			w.sets[name] = &set{shape: s.shape}
		}
		h.sets[name] = s
	}
	return h, w
}
