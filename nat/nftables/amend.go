package nftables

import (
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

// While the kernel has what was last written, an edit of a few policies need not be compiled as a whole: only their rules are
// taken apart and laid into layers, and what lies below them is looked at again. The result is what compile would return, element by
// element. Whatever could change more than elements of layers is left to compile.

const (
	// maxAmended is how many policies, and how many of their rules, are amended at a time.
	maxAmended = 64
	// maxLooks bounds how often two rules are compared; compile would be quicker beyond.
	maxLooks = 1 << 20
)

// position is where an element is.
type position struct{ set, key string }

// amendment is what turns a ruleset into another one.
type amendment struct {
	laid        []laid
	remove, add map[position]element
	// made are chains that come, or take the place of others, and timeouts that come.
	made ruleset
	// chains and timeouts that go.
	chains, timeouts []string
}

// position returns where a rule of a layer is.
func (r *ruleset) position(view string, layer int16, rule *nat.Rule) position {
	key := ruleKey(rule)
	return position{r.mapFor(view, int(layer), rule, key), key}
}

// differing returns the policies of a that are not in b, and those of b that are not in a. ok is false when there are too many, or when there
// are any and b is not in order of names.
func differing(a, b []nat.Policy) (gone, came []nat.Policy, ok bool) {
	inOrder := true
	for i, j := 0, 0; i < len(a) || j < len(b); {
		if j > 0 && j < len(b) && b[j-1].Name >= b[j].Name {
			inOrder = false
		}
		switch {
		case i == len(a) || j < len(b) && b[j].Name < a[i].Name:
			came = append(came, b[j])
			j++
		case j == len(b) || a[i].Name < b[j].Name:
			gone = append(gone, a[i])
			i++
		default:
			if !a[i].Equal(&b[j]) {
				gone, came = append(gone, a[i]), append(came, b[j])
			}
			i, j = i+1, j+1
		}
		if len(gone)+len(came) > maxAmended {
			return nil, nil, false
		}
	}
	return gone, came, inOrder || len(gone)+len(came) == 0
}

// beats says whether a rule comes before another one for some flow, as far as prefixes tell.
func beats(a, b *nat.Rule) bool {
	return overlap(a, b) && nat.Precedence(*a, *b) < 0
}

func overlap(a, b *nat.Rule) bool {
	return a.Destination.Overlaps(b.Destination) && a.Source.Overlaps(b.Source)
}

// alike says whether two rules beat, and are beaten by, the same.
func alike(a, b *nat.Rule) bool {
	return a.Source == b.Source && a.Destination == b.Destination && nat.Precedence(*a, *b) == 0
}

// amend returns how a compiled ruleset changes when policies go and come, or nil when that is for compile to say. The ruleset stays as it is. c is
// the configuration with those that come.
func (r *ruleset) amend(c nat.Config, gone, came []nat.Policy) *amendment {
	before, after := c, c
	before.Policies, after.Policies = gone, came
	drop, err := before.Rules()
	if err != nil {
		return nil
	}
	fresh, err := after.Rules()
	if err != nil {
		return nil
	}
	if len(drop)+len(fresh) > maxAmended || check(after, fresh) != nil || slices.ContainsFunc(slices.Concat(drop, fresh), func(r nat.Rule) bool { return r.NamesPlatform() }) {
		return nil
	}
	a := &amender{was: r, views: views(c), looks: maxLooks,
		amendment: amendment{laid: slices.Clone(r.laid), remove: map[position]element{}, add: map[position]element{},
			made: ruleset{chains: map[string]*chain{}, timeouts: map[string]*expr.CtTimeout{}}}}
	for i := range drop {
		at, found := slices.BinarySearchFunc(a.laid, drop[i], func(l laid, d nat.Rule) int { return nat.Order(l.Rule, d) })
		if !found {
			return nil
		}
		a.gone = append(a.gone, a.laid[at])
		a.laid = slices.Delete(a.laid, at, at+1)
	}
	for i := range fresh {
		at, _ := slices.BinarySearchFunc(a.laid, fresh[i], func(l laid, f nat.Rule) int { return nat.Order(l.Rule, f) })
		a.laid = slices.Insert(a.laid, at, laid{fresh[i], [viewCount]int16{unlaid, unlaid, unlaid, unlaid, unlaid}})
	}
	if a.ties() {
		return nil // which compile will say
	}
	for v := range a.views {
		if !a.view(v) {
			return nil
		}
	}
	does := func(action nat.Action) bool {
		acts := func(p nat.Policy) bool { return p.Action == action }
		return slices.ContainsFunc(gone, acts) || slices.ContainsFunc(came, acts)
	}
	if does(nat.NoNAT) && !a.plain(c) || does(nat.DNAT) && !a.replaceSets(fronts(c)) || !a.fits() {
		return nil
	}
	a.frame(gone)
	return &a.amendment
}

// plain rewrites what the guard lets pass without translation. It returns false when that needs other sets.
func (a *amender) plain(c nat.Config) bool {
	next := &ruleset{sets: map[string]*set{}, layers: map[string][2][]int{}}
	next.addPlain(c)
	was, is := a.was.layers[plainView], next.layers[plainView]
	return slices.Equal(was[0], is[0]) && slices.Equal(was[1], is[1]) && a.replaceSets(next.sets)
}

// replaceSets has sets hold other elements. It returns false when one would have another shape.
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

// frame finds what comes and goes beside elements.
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

// timeouts returns the names of the objects that a chain refers to.
func (c *chain) timeouts() (names []string) {
	for _, rule := range c.rules {
		for _, e := range rule {
			if o, ok := e.(*expr.Objref); ok && o.Type == unix.NFT_OBJECT_CT_TIMEOUT {
				names = append(names, o.Name)
			}
		}
	}
	return names
}

// unlaid is the layer of a rule that will get one.
const unlaid = -2

// amender is an amendment at work.
type amender struct {
	amendment
	was   *ruleset
	views [viewCount]view
	gone  []laid
	looks int
}

// ties says whether one of the new rules ties with another one. What can lies side by side.
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

// shift is a rule that comes to a layer, or leaves it.
type shift struct {
	rule  *nat.Rule
	layer int16
}

// view lays what is new into the layers of a view, and moves what must. It returns false when it is too much.
func (a *amender) view(v int) bool {
	name := a.views[v].name
	isNew := func(l *laid) bool { return l.layers[v] == unlaid }
	if len(a.was.layers[name][0])+len(a.was.layers[name][1]) == 0 {
		for i := range a.laid {
			if l := &a.laid[i]; isNew(l) {
				if a.views[v].wants(l.Policy) {
					return false // the view begins
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
			// For what lies below it is as if nothing had gone.
			left = slices.DeleteFunc(left, func(s shift) bool { return s.layer == layer && alike(s.rule, &l.Rule) })
		}
		entered = append(entered, shift{&l.Rule, layer})
		if a.looks < 0 {
			return false
		}
	}
	return a.looks >= 0
}

// members has rules come to a view and leave it, of which rules that they beat have come or gone.
func (a *amender) members(v int, left []shift) []shift {
	wants := a.views[v].wants
	var lost, won []*nat.Rule // rules that the view is for
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

// needed says whether a rule comes before one that a view is for.
func (a *amender) needed(v, i int) bool {
	a.looks -= len(a.laid) - i
	return a.looks >= 0 && slices.ContainsFunc(a.laid[i+1:], func(w laid) bool { return overlap(&a.laid[i].Rule, &w.Rule) && a.views[v].wants(w.Policy) })
}

// touched says whether the layer of a rule may be another one because of rules that left layers or entered them.
func (a *amender) touched(l *laid, layer int16, left, entered []shift) bool {
	a.looks -= len(left) + len(entered)
	return slices.ContainsFunc(left, func(s shift) bool { return s.layer+1 == layer && beats(s.rule, &l.Rule) }) ||
		slices.ContainsFunc(entered, func(s shift) bool { return s.layer >= layer && beats(s.rule, &l.Rule) })
}

// layer returns the first layer in which a rule loses against all that it may overlap. What beats it comes before it.
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

// take removes a rule's element from where it was.
func (a *amender) take(v int, layer int16, rule *nat.Rule) element {
	at := a.position(v, layer, rule)
	e := a.was.sets[at.set].elements[at.key]
	a.remove[at] = e
	return e
}

// fits says whether the sets stay the same, and each element leads somewhere.
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
					return false // a layer ends, or is divided in another way
				}
			}
		}
	}
	return true
}

// uses says whether an element still leads to a chain.
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

// amendBy makes an amendment part of a ruleset.
func (r *ruleset) amendBy(a *amendment) {
	for at := range a.remove {
		delete(r.sets[at.set].elements, at.key)
	}
	for at, e := range a.add {
		r.sets[at.set].elements[at.key] = e
	}
	maps.Copy(r.chains, a.made.chains)
	maps.Copy(r.timeouts, a.made.timeouts)
	for _, name := range a.chains {
		delete(r.chains, name)
	}
	for _, id := range a.timeouts {
		delete(r.timeouts, id)
	}
	r.laid = a.laid
}

// parts returns what changes of a ruleset, before and after. The counters of policies that stay are read by counted: one that loses elements
// also gets some, if only the same again.
func (r *ruleset) parts(a *amendment, counted func(position) (element, error)) (have, want *ruleset, err error) {
	have, want = &ruleset{sets: map[string]*set{}}, &ruleset{sets: map[string]*set{}}
	elementsIn := func(part *ruleset, at position) map[string]element {
		for _, p := range []*ruleset{have, want} {
			if p.sets[at.set] == nil {
				p.sets[at.set] = &set{r.sets[at.set].shape, map[string]element{}}
			}
		}
		return part.sets[at.set].elements
	}
	stays := map[string]bool{}
	for at, e := range a.add {
		elementsIn(want, at)[at.key] = e
		stays[e.policy] = e.policy != ""
	}
	for at, e := range a.remove {
		if stays[e.policy] {
			if e, err = counted(at); err != nil {
				return nil, nil, err
			}
		}
		elementsIn(have, at)[at.key] = e
	}
	return have, want, nil
}

// amend makes the rules be as configured when only a few policies differ from what the kernel has. It returns false when it has changed
// nothing, because that is for a whole compilation.
func (d *Driver) amend(number uint32, known *applied, c nat.Config) (bool, error) {
	if !known.config.EqualFrame(c) {
		return false, nil
	}
	gone, came, ok := differing(known.config.Policies, c.Policies)
	if !ok {
		return false, nil
	}
	if len(gone)+len(came) == 0 {
		return true, nil
	}
	a := known.rules.amend(c, gone, came)
	if a == nil {
		return false, nil
	}
	have, want, err := known.rules.parts(a, func(at position) (element, error) {
		return d.generation.element(at, known.rules.sets[at.set].shape)
	})
	if err != nil {
		d.options.Log.Warn("reading all rules", "error", err)
		return false, nil
	}
	d.config = &c
	todo, _ := changes(have, want)
	return true, d.commit(number, c, known.rules, func() error {
		// The connection stays open: to close it would wait, and let all others wait, until the memory of what was removed is
		// free (nft_rcv_nl_event), a grace period of RCU.
		if d.edits == nil {
			if d.edits, err = d.open(); err != nil {
				return err
			}
		}
		if err := d.edit(d.edits, want, todo, a); err != nil {
			d.edits.CloseLasting()
			d.edits = nil
			return err
		}
		known.rules.amendBy(a)
		return nil
	})
}
