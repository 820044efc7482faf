package nftables

import (
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/isthmus-net/isthmus/nat"
)

// amender builds an amendment.
type amender struct {
	amendment
	was   *ruleset
	views [viewCount]view
	gone  []laid
	looks int
}

// unlaid stands for a layer that is not chosen yet.
const unlaid = -2

// plain updates the pairs of prefixes that the guard lets pass without translation. It returns
// false when their layers need other sets.
func (a *amender) plain(c nat.Config) bool {
	next := &ruleset{sets: map[string]*set{}, layers: map[string][2][]int{}}
	next.addPlain(c)
	was, is := a.was.layers[plainView], next.layers[plainView]
	return slices.Equal(was[0], is[0]) && slices.Equal(was[1], is[1]) && a.replaceSets(next.sets)
}

// replaceSets replaces the elements of sets. It returns false when a set would have another shape.
func (a *amender) replaceSets(sets map[string]*set) bool {
	for name, next := range sets {
		was := a.was.sets[name]
		if was == nil || was.shape.size != room(next) {
			return false
		}
		for key, e := range was.elements {
			if n, ok := next.elements[key]; !ok || !e.wants(n) {
				a.remove[position{name, key}] = e
			}
		}
		for key, e := range next.elements {
			if old, ok := was.elements[key]; !ok || !old.wants(e) {
				a.add[position{name, key}] = e
			}
		}
	}
	return true
}

// frame finds the chains and timeouts to add and to delete.
func (a *amender) frame(gone []nat.Policy) {
	for name, c := range a.made.chains {
		if was := a.was.chains[name]; was != nil && sameChain(was, c) {
			delete(a.made.chains, name)
		}
	}
	candidates := map[string]bool{}
	for _, p := range gone {
		candidates[targetChain(&p)] = true
	}
	for _, e := range a.remove {
		candidates[e.chain] = candidates[e.chain] || strings.Contains(e.chain, timedInfix)
	}
	for name, may := range candidates {
		if may && a.was.chains[name] != nil && !a.uses(name) {
			a.chains = append(a.chains, name)
		}
	}
	slices.Sort(a.chains)

	stay, needed := maps.Clone(a.was.chains), map[string]bool{}
	maps.Copy(stay, a.made.chains)
	for name, c := range stay {
		for _, id := range c.timeouts() {
			needed[id] = needed[id] || !slices.Contains(a.chains, name)
		}
	}
	for id := range a.was.timeouts {
		delete(a.made.timeouts, id)
		if !needed[id] {
			a.timeouts = append(a.timeouts, id)
		}
	}
	slices.Sort(a.timeouts)
}

// ties reports whether a new rule ties with a rule of another policy. Rules that tie are adjacent
// in a.laid, or separated only by rules that are alike.
func (a *amender) ties() bool {
	for i := range a.laid {
		if a.laid[i].layers[inPolicy] != unlaid {
			continue
		}
		for _, step := range []int{-1, 1} {
			for j := i + step; j >= 0 && j < len(a.laid); j += step {
				x, y := &a.laid[i].Rule, &a.laid[j].Rule
				if !alike(x, y) || x.Protocol != y.Protocol {
					break
				}
				if x.Policy.Name != y.Policy.Name && x.Ports.First <= y.Ports.Last && y.Ports.First <= x.Ports.Last {
					return true
				}
			}
		}
	}
	return false
}

// shift is a rule that enters or leaves a layer.
type shift struct {
	rule  *nat.Rule
	layer int16
}

// view lays the new rules into the layers of a view, and moves the rules that have to move. It
// returns false when that takes too many comparisons.
func (a *amender) view(v int) bool {
	name := a.views[v].name
	isNew := func(l *laid) bool { return l.layers[v] == unlaid }
	if len(a.was.layers[name][0])+len(a.was.layers[name][1]) == 0 {
		for i := range a.laid {
			if l := &a.laid[i]; isNew(l) {
				if a.views[v].wants(l.Policy) {
					return false // the view does not exist yet
				}
				l.layers[v] = absent
			}
		}
		return true
	}
	var left []shift
	for i := range a.gone {
		g := &a.gone[i]
		if g.layers[v] != absent {
			left = append(left, shift{&g.Rule, g.layers[v]})
			a.take(v, g.layers[v], &g.Rule)
		}
	}
	if v != inPolicy {
		left = a.members(v, left)
	}
	var entered []shift
	for i := range a.laid {
		l := &a.laid[i]
		old := l.layers[v]
		if old == absent || !isNew(l) && !a.touched(l, old, left, entered) {
			continue
		}
		layer := a.layer(v, i)
		if layer == old {
			continue
		}
		l.layers[v] = layer
		if old != unlaid {
			e := a.take(v, old, &l.Rule)
			left = append(left, shift{&l.Rule, old})
			a.add[a.position(v, layer, &l.Rule)] = e
		} else {
			a.add[a.position(v, layer, &l.Rule)] = a.views[v].verdict(&a.made, &l.Rule)
			// The rules in later layers see no change: the new rule has taken the place of the one
			// that left.
			left = slices.DeleteFunc(left, func(s shift) bool { return s.layer == layer && alike(s.rule, &l.Rule) })
		}
		entered = append(entered, shift{&l.Rule, layer})
		if a.looks < 0 {
			return false
		}
	}
	return a.looks >= 0
}

// members adds rules to a view and removes others after rules that they beat have come or gone.
func (a *amender) members(v int, left []shift) []shift {
	wants := a.views[v].wants
	var lost, won []*nat.Rule // rules of policies that the view wants
	for i := range a.gone {
		if wants(a.gone[i].Policy) {
			lost = append(lost, &a.gone[i].Rule)
		}
	}
	for i := range a.laid {
		if a.laid[i].layers[v] == unlaid && wants(a.laid[i].Policy) {
			won = append(won, &a.laid[i].Rule)
		}
	}
	before := func(l *nat.Rule) func(*nat.Rule) bool {
		return func(w *nat.Rule) bool { return overlap(l, w) && nat.Order(*l, *w) < 0 }
	}
	for i := range a.laid {
		l := &a.laid[i]
		switch {
		case wants(l.Policy):
		case l.layers[v] == unlaid:
			if !a.needed(v, i) {
				l.layers[v] = absent
			}
		case l.layers[v] == absent:
			if slices.ContainsFunc(won, before(&l.Rule)) {
				l.layers[v] = unlaid
			}
		case slices.ContainsFunc(lost, before(&l.Rule)) && !a.needed(v, i):
			left = append(left, shift{&l.Rule, l.layers[v]})
			a.take(v, l.layers[v], &l.Rule)
			l.layers[v] = absent
		}
	}
	return left
}

// needed reports whether a rule precedes a rule that the view wants, and overlaps it.
func (a *amender) needed(v, i int) bool {
	a.looks -= len(a.laid) - i
	return a.looks >= 0 && slices.ContainsFunc(a.laid[i+1:], func(w laid) bool { return overlap(&a.laid[i].Rule, &w.Rule) && a.views[v].wants(w.Policy) })
}

// touched reports whether the layer of a rule may change because rules have left or entered
// layers.
func (a *amender) touched(l *laid, layer int16, left, entered []shift) bool {
	a.looks -= len(left) + len(entered)
	return slices.ContainsFunc(left, func(s shift) bool { return s.layer+1 == layer && beats(s.rule, &l.Rule) }) ||
		slices.ContainsFunc(entered, func(s shift) bool { return s.layer >= layer && beats(s.rule, &l.Rule) })
}

// layer returns the first layer that is behind the layers of all rules that beat a rule. These
// rules are before it in a.laid.
func (a *amender) layer(v, i int) (layer int16) {
	a.looks -= i
	if a.looks < 0 {
		return math.MaxInt16
	}
	for j := range i {
		if o := &a.laid[j]; o.layers[v] >= layer && beats(&o.Rule, &a.laid[i].Rule) {
			layer = o.layers[v] + 1
		}
	}
	return layer
}

func (a *amender) position(v int, layer int16, rule *nat.Rule) position {
	return a.was.position(a.views[v].name, layer, rule)
}

// take removes a rule's element from its layer.
func (a *amender) take(v int, layer int16, rule *nat.Rule) element {
	at := a.position(v, layer, rule)
	e := a.was.sets[at.set].elements[at.key]
	a.remove[at] = e
	return e
}

// fits reports whether the same sets suffice, and the chain of each new element exists.
func (a *amender) fits() bool {
	for at, e := range a.add {
		if a.was.sets[at.set] == nil || e.chain != "" && a.was.chains[e.chain] == nil && a.made.chains[e.chain] == nil {
			return false
		}
	}
	for v := range a.views {
		var sizes [2]map[int16]int
		for _, f := range families {
			sizes[b2i(f.ipv6)] = map[int16]int{}
		}
		for i := range a.laid {
			if layer := a.laid[i].layers[v]; layer != absent {
				sizes[b2i(a.laid[i].Source.Addr().Is6())][layer]++
			}
		}
		for _, f := range families {
			for layer, n := range a.was.layers[a.views[v].name][b2i(f.ipv6)] {
				if size := sizes[b2i(f.ipv6)][int16(layer)]; size == 0 || parts(size) != n {
					return false // a layer ends, or is divided differently
				}
			}
		}
	}
	return true
}

// uses reports whether an element still leads to a chain.
func (a *amender) uses(chain string) bool {
	for _, e := range a.add {
		if e.chain == chain {
			return true
		}
	}
	for name, s := range a.was.sets {
		if !s.shape.isVerdict {
			continue
		}
		for key, e := range s.elements {
			if _, goes := a.remove[position{name, key}]; e.chain == chain && !goes {
				return true
			}
		}
	}
	return false
}
