package nftables

import (
	"maps"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

// When only a few policies change and the kernel still has the last written rules, the whole table
// need not be compiled: only the rules of these policies are removed from and laid into layers,
// and the rules that they overlap in later layers are checked again. The result equals the output
// of compile, element by element. A change that may affect more than the elements of layers is
// left to compile.

const (
	// maxAmended bounds how many policies, and how many of their rules, one amendment may change.
	maxAmended = 64
	// maxLooks bounds how many pairs of rules are compared; beyond that, compile is faster.
	maxLooks = 1 << 20
)

// position is the place of an element: its set and its key.
type position struct{ set, key string }

// amendment holds the changes from one ruleset to another.
type amendment struct {
	laid        []laid
	remove, add map[position]element
	// made holds chains to add or replace, and timeouts to add.
	made ruleset
	// chains and timeouts to delete
	chains, timeouts []string
}

// position returns where the element of a rule in a layer is.
func (r *ruleset) position(view string, layer int16, rule *nat.Rule) position {
	key := ruleKey(rule)
	return position{r.mapFor(view, int(layer), rule, key), key}
}

// differing returns the policies of a that are not in b, and those of b that are not in a. ok is
// false when there are too many differences, or when there are any and b is not sorted by name.
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

// beats reports whether a has precedence over b for some flow, judged by prefixes alone.
func beats(a, b *nat.Rule) bool {
	return overlap(a, b) && nat.Precedence(*a, *b) < 0
}

func overlap(a, b *nat.Rule) bool {
	return a.Destination.Overlaps(b.Destination) && a.Source.Overlaps(b.Source)
}

// alike reports whether two rules have the same prefixes and the same precedence, so that they
// beat, and are beaten by, the same rules.
func alike(a, b *nat.Rule) bool {
	return a.Source == b.Source && a.Destination == b.Destination && nat.Precedence(*a, *b) == 0
}

// amend returns how a compiled ruleset changes when the policies gone are replaced by came. It
// returns nil when that takes a full compilation. The ruleset stays as it is. c is the
// configuration that includes came.
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
		return nil // compile reports the tie
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

// timeouts returns the names of the timeout objects that a chain refers to.
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

// amendBy applies an amendment to a ruleset.
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

// parts returns the changed elements of a ruleset, before and after. For policies that stay,
// counted reads the counters of removed elements. A policy that loses elements also gets new ones,
// even if only the same again.
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

// amend updates the kernel's rules when only a few policies differ from them. It returns false,
// and has changed nothing, when that takes a full compilation.
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
		// The connection stays open: closing it would block this and all other transactions until
		// the memory of the removed elements is freed (nft_rcv_nl_event), which takes an RCU grace
		// period.
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
