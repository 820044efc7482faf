package nftables

import (
	"maps"
	"slices"

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
