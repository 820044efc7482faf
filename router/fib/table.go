package fib

import (
	"cmp"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
)

// Ids of nexthop objects and groups come from this range, in ascending order.
const (
	firstID = 0x49000000
	lastID  = 0x49ffffff
)

// Values of entry.kernel that are not ids of groups.
const (
	nothing   = 0 // no route
	blackhole = 1 // a route of type blackhole
	stranger  = 2 // a route that the table never makes
)

// Table computes the wanted forwarding state of the kernel, and the changes that lead to it. It has
// no I/O and no clock. It is not safe for concurrent use.
//
// Until Synced, routes that a former run left in the kernel stay although no source wants them yet.
type Table struct {
	links map[string]Link
	names map[uint32]string // of links, by index
	dead  map[NextHop]bool  // reported dead; without a gateway: all on the interface

	reservations []Reserved // sorted
	reserved     reserve

	routes   map[Key]*entry
	groups   map[string]*group // wanted sets of next hops, by key
	byID     map[uint32]*group
	objects  map[Object]*object // by their content; ID is zero in the key
	spare    []uint32           // nexthop objects of ours that are not needed
	taken    map[uint32]bool
	lastID   uint32
	hole     *group // stands for wanted black holes
	static   map[Key]bool
	epoch    uint32
	isSynced bool

	dirty       []*entry
	dirtyGroups []*group
	idle        []*group // candidates for deletion
	sweep       bool     // nexthop objects may have become unused
	random      *rand.Rand
	key         []byte
}

// entry is a route: the groups that the sources want, and the one that the kernel has.
type entry struct {
	key         Key
	static, bgp *group
	takes       *Reserved // why it is withheld; nil: it is not
	kernel      uint32    // id of a group, or nothing, blackhole, stranger
	epoch       uint32    // in which bgp was reported
	dirty       bool
}

// group is a set of next hops that share the traffic of routes.
type group struct {
	id     uint32 // 0: not chosen yet
	key    string // empty: found in the kernel, and not yet wanted
	ipv6   bool   // family of the routes in it
	hops   []NextHop
	kernel []uint32 // members that the kernel has; nil: the kernel has no such group
	former []Object // content when it was found, while key is empty
	refs   int      // sources that want it
	wanted int      // entries that it has won
	used   int      // routes of the kernel in it
	dirty  bool
}

// object is a nexthop object.
type object struct {
	id     uint32
	kernel bool // the kernel has it
}

// NewTable returns an empty table.
func NewTable() *Table {
	return &Table{
		links:   map[string]Link{},
		dead:    map[NextHop]bool{},
		routes:  map[Key]*entry{},
		groups:  map[string]*group{},
		byID:    map[uint32]*group{},
		objects: map[Object]*object{},
		taken:   map[uint32]bool{},
		static:  map[Key]bool{},
		lastID:  firstID,
		hole:    &group{id: blackhole},
		random:  rand.New(rand.NewPCG(0, 0)),
	}
}

// SetStatic replaces all static routes. They win over BGP routes with the same key.
func (t *Table) SetStatic(routes []Route) {
	before := t.static
	t.static = make(map[Key]bool, len(routes))
	for _, r := range routes {
		k := r.Key.Masked()
		t.static[k] = true
		t.set(k, Static, t.intern(k, r))
	}
	for k := range before {
		if !t.static[k] {
			t.set(k, Static, nil)
		}
	}
}

// Update replaces the BGP routes of the given keys. A route without next hops that is not a black
// hole is withdrawn.
func (t *Table) Update(routes []Route) {
	for _, r := range routes {
		k := r.Key.Masked()
		t.set(k, BGP, t.intern(k, r))
	}
}

// SetLinks sets the interfaces of the kernel.
func (t *Table) SetLinks(links []Link) {
	before := t.links
	t.links, t.names = make(map[string]Link, len(links)), make(map[uint32]string, len(links))
	changed := map[string]bool{}
	for _, l := range links {
		t.links[l.Name], t.names[l.Index] = l, l.Name
		if before[l.Name] != l {
			changed[l.Name] = true
		}
	}
	for name := range before {
		if _, ok := t.links[name]; !ok {
			changed[name] = true
		}
	}
	t.touch(changed)
}

// SetAlive sets whether a next hop carries traffic. A next hop without a gateway stands for all
// next hops on its interface. Unless set otherwise, a next hop is alive while its interface is up.
func (t *Table) SetAlive(h NextHop, alive bool) {
	if t.dead[h] != alive {
		return
	}
	if alive {
		delete(t.dead, h)
	} else {
		t.dead[h] = true
	}
	t.touch(map[string]bool{h.Interface: true})
}

// touch marks the groups that have a next hop on one of the interfaces.
func (t *Table) touch(names map[string]bool) {
	if len(names) == 0 {
		return
	}
	for _, g := range t.groups {
		if slices.ContainsFunc(g.hops, func(h NextHop) bool { return names[h.Interface] }) {
			t.markGroup(g)
		}
	}
	for _, g := range t.byID { // those of a former run that are not wanted yet
		if slices.ContainsFunc(g.former, func(o Object) bool { return names[t.names[o.Link]] }) {
			t.markGroup(g)
		}
	}
}

// SetReserved sets the keys that routes must not divert from the node: the outside addresses of the
// tunnels' peers, because a route that covers one would draw encrypted packets into a tunnel; what
// the platform serves; the node's own networks. Such a route is withheld from the kernel. Default
// routes (of length 0) are not: by Metric they lose against the underlay's.
func (t *Table) SetReserved(all []Reserved) {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b Reserved) int {
		return cmp.Or(a.Key.Compare(b.Key), cmp.Compare(a.Own, b.Own), cmp.Compare(a.Why, b.Why))
	})
	if slices.Equal(t.reservations, all) {
		return
	}
	t.reservations, t.reserved = all, newReserve(all)
	for k, e := range t.routes {
		before := e.winner()
		e.takes = t.reserved.taken(k)
		t.update(e, before)
	}
}

// reserve finds what a route would divert, by domain: see Reserved.
type reserve map[Domain]*domainReserve

type domainReserve struct {
	within  map[netip.Prefix]*Reserved
	lengths [2][129]bool // of within
	covered []*Reserved  // ascending
}

// newReserve makes a reserve of a sorted list.
func newReserve(all []Reserved) reserve {
	out := reserve{}
	for i := range all {
		r := &all[i]
		d := out[r.Key.Domain]
		if d == nil {
			d = &domainReserve{within: map[netip.Prefix]*Reserved{}}
			out[r.Key.Domain] = d
		}
		p := r.Key.Prefix.Masked()
		if d.within[p] == nil {
			d.within[p] = r
		}
		d.lengths[familyOf(p)][p.Bits()] = true
		if r.Covered {
			d.covered = append(d.covered, r)
		}
	}
	return out
}

// familyOf returns 0 for IPv4 and 1 for IPv6.
func familyOf(p netip.Prefix) int {
	if p.Addr().Is6() {
		return 1
	}
	return 0
}

// taken returns what a route would divert, nil for nothing.
func (r reserve) taken(k Key) *Reserved {
	p, d := k.Prefix, r[k.Domain]
	if p.Bits() == 0 || d == nil {
		return nil
	}
	six := familyOf(p)
	for bits := 0; bits <= p.Bits(); bits++ {
		if !d.lengths[six][bits] {
			continue
		}
		q, _ := p.Addr().Prefix(bits)
		if found := d.within[q]; found != nil {
			return found
		}
	}
	// The addresses of a prefix sort directly behind its first one.
	i, _ := slices.BinarySearchFunc(d.covered, p.Addr(), func(r *Reserved, a netip.Addr) int { return r.Key.Prefix.Addr().Compare(a) })
	for ; i < len(d.covered) && p.Contains(d.covered[i].Key.Prefix.Addr()); i++ {
		if p.Bits() > d.covered[i].Own {
			return d.covered[i]
		}
	}
	return nil
}

// Restarted announces that all BGP routes will be reported again. The present ones stay until
// Synced.
func (t *Table) Restarted() {
	t.epoch++
	t.isSynced = false
}

// Synced announces that all BGP routes have been reported since the start or since Restarted. Other
// BGP routes are removed, and so are routes of a former run that no source wants.
func (t *Table) Synced() {
	t.isSynced = true
	for k, e := range t.routes {
		if e.bgp != nil && e.epoch != t.epoch {
			t.set(k, BGP, nil)
		}
		t.mark(e)
	}
}

// intern returns the group of a route's next hops, nil for none.
func (t *Table) intern(k Key, r Route) *group {
	if r.Blackhole {
		return t.hole
	}
	if len(r.NextHops) == 0 {
		return nil
	}
	hops := r.NextHops
	if !slices.IsSortedFunc(hops, compareHops) {
		hops = slices.SortedFunc(slices.Values(hops), compareHops)
	}
	ipv6 := k.Prefix.Addr().Is6()
	key := append(t.key[:0], 4)
	if ipv6 {
		key[0] = 6
	}
	for i, h := range hops {
		if i > 0 && h == hops[i-1] {
			continue
		}
		key = append(key, h.Interface...)
		key = append(key, 0)
		if h.Gateway.IsValid() {
			a := h.Gateway.As16()
			key = append(key, byte(h.Gateway.BitLen()))
			key = append(key, a[:]...)
		} else {
			key = append(key, 0)
		}
	}
	t.key = key
	g := t.groups[string(key)]
	if g == nil {
		g = &group{key: string(key), ipv6: ipv6, hops: slices.Compact(slices.Clone(hops))}
		t.groups[g.key] = g
		t.markGroup(g)
	}
	return g
}

func compareHops(a, b NextHop) int {
	if c := strings.Compare(a.Interface, b.Interface); c != 0 {
		return c
	}
	return a.Gateway.Compare(b.Gateway)
}

// set sets the group that a source wants for a key.
func (t *Table) set(k Key, s Source, g *group) {
	e := t.routes[k]
	if e == nil {
		if g == nil {
			return
		}
		e = t.add(k)
	}
	before, old := e.winner(), &e.static
	if s == BGP {
		old, e.epoch = &e.bgp, t.epoch
	}
	if *old == g {
		return
	}
	if g != nil {
		g.refs++
	}
	if *old != nil {
		(*old).refs--
		defer t.retire(*old)
	}
	*old = g
	t.update(e, before)
}

// update does what follows when the winner of an entry may differ from before.
func (t *Table) update(e *entry, before *group) {
	after := e.winner()
	if after == before {
		t.forget(e)
		return
	}
	if after != nil {
		after.wanted++
		t.markGroup(after)
	}
	if before != nil {
		before.wanted--
		t.retire(before)
	}
	t.markAlways(e)
}

// add adds an entry without routes. It is withheld or not until SetReserved is called again.
func (t *Table) add(k Key) *entry {
	e := &entry{key: k, takes: t.reserved.taken(k)}
	t.routes[k] = e
	return e
}

// winner returns the group that the kernel should use; nil: none.
func (e *entry) winner() *group {
	switch {
	case e.takes != nil:
		return nil
	case e.static != nil:
		return e.static
	}
	return e.bgp
}

// mark puts an entry on the list of changes if the kernel differs from the winner.
func (t *Table) mark(e *entry) {
	if w := e.winner(); w == nil && (e.kernel == nothing || !t.isSynced) || w != nil && w.has(e) {
		t.forget(e)
		return
	}
	t.markAlways(e)
}

// has reports whether the kernel's route uses the group.
func (g *group) has(e *entry) bool { return e.kernel != nothing && e.kernel == g.id }

func (t *Table) markAlways(e *entry) {
	if !e.dirty {
		e.dirty = true
		t.dirty = append(t.dirty, e)
	}
}

// forget removes an entry that neither a source nor the kernel has.
func (t *Table) forget(e *entry) {
	if e.static == nil && e.bgp == nil && e.kernel == nothing && !e.dirty {
		delete(t.routes, e.key)
	}
}

func (t *Table) markGroup(g *group) {
	if !g.dirty && g != t.hole {
		g.dirty = true
		t.dirtyGroups = append(t.dirtyGroups, g)
	}
}

// retire records that a group may be unused.
func (t *Table) retire(g *group) {
	if g != t.hole && g.wanted == 0 && g.used == 0 {
		t.idle = append(t.idle, g)
	}
}

// alive returns the next hops of a group that carry traffic.
func (t *Table) alive(g *group) []NextHop {
	var hops []NextHop
	for _, h := range g.hops {
		if l, ok := t.links[h.Interface]; ok && l.Up && !t.dead[NextHop{Interface: h.Interface}] && !t.dead[h] {
			hops = append(hops, h)
		}
	}
	return hops
}

// content returns the nexthop objects that a group should have now.
func (t *Table) content(g *group) []Object {
	var objects []Object
	for _, o := range g.former {
		name := t.names[o.Link]
		if o.Blackhole || t.links[name].Up && !t.dead[NextHop{Interface: name}] && !t.dead[NextHop{Interface: name, Gateway: o.Gateway}] {
			objects = append(objects, o)
		}
	}
	if objects == nil && g.former != nil {
		return []Object{{Blackhole: true, IPv6: g.former[0].IPv6}}
	} else if g.former != nil {
		return objects
	}
	for _, h := range t.alive(g) {
		ipv6 := g.ipv6
		if h.Gateway.IsValid() {
			ipv6 = h.Gateway.Is6()
		}
		objects = append(objects, Object{Link: t.links[h.Interface].Index, Gateway: h.Gateway, IPv6: ipv6})
	}
	if objects == nil {
		objects = []Object{{Blackhole: true, IPv6: g.ipv6}}
	}
	return objects
}

// Ops returns the next changes, with at most limit routes among them, in an order in which each can
// be made. It returns deletions of groups and nexthop objects only when no other change is left:
// those are certainly unused then. Call Done after the changes were made and before the next call
// of Ops. When Ops returns no changes, none are left.
func (t *Table) Ops(limit int) []Op {
	var ops, groups []Op
	for _, g := range t.dirtyGroups {
		g.dirty = false
		if found := g.key == "" && g.used > 0 && g.former != nil && t.byID[g.id] == g; !found && (g.wanted == 0 || t.groups[g.key] != g) {
			continue
		}
		var members []uint32
		for _, o := range t.content(g) {
			known := t.objects[o]
			if known == nil {
				known = &object{id: t.newID()}
				t.objects[o] = known
			}
			members = append(members, known.id)
			if !known.kernel {
				o.ID = known.id
				op := Op{Kind: SetNextHop, ID: known.id, Object: o}
				if !slices.ContainsFunc(ops, func(p Op) bool { return p.ID == op.ID }) {
					ops = append(ops, op)
				}
			}
		}
		slices.Sort(members)
		if g.id == 0 {
			t.claim(g, members)
		}
		if !slices.Equal(members, g.kernel) {
			groups = append(groups, Op{Kind: SetGroup, ID: g.id, Members: members})
		}
	}
	t.dirtyGroups = t.dirtyGroups[:0]
	ops = append(ops, groups...)

	// The order is random: deleting many prefixes in ascending order costs the kernel ten times as
	// much as in any other order.
	for limit += len(ops); len(ops) < limit && len(t.dirty) > 0; {
		i, last := t.random.IntN(len(t.dirty)), len(t.dirty)-1
		e := t.dirty[i]
		t.dirty[i] = t.dirty[last]
		t.dirty = t.dirty[:last]
		e.dirty = false
		w := e.winner()
		switch {
		case w == nil && e.kernel != nothing:
			ops = append(ops, Op{Kind: DeleteRoute, Key: e.key})
		case w != nil && e.kernel == nothing:
			ops = append(ops, Op{Kind: AddRoute, Key: e.key, ID: routeID(w)})
		case w != nil && !w.has(e):
			ops = append(ops, Op{Kind: ReplaceRoute, Key: e.key, ID: routeID(w)})
		default:
			t.forget(e)
		}
	}
	if len(ops) == 0 {
		ops = t.deletions()
	}
	return ops
}

// routeID is the nexthop id of a route in a group: none for a black hole.
func routeID(g *group) uint32 {
	if g.id == blackhole {
		return 0
	}
	return g.id
}

// claim gives a group its id: that of a group of the kernel with the same content, or a new one.
func (t *Table) claim(g *group, members []uint32) {
	var found *group
	for _, k := range t.byID {
		if k.key == "" && slices.Equal(k.kernel, members) &&
			(found == nil || k.used > found.used || k.used == found.used && k.id < found.id) {
			found = k
		}
	}
	if found == nil {
		g.id = t.newID()
	} else {
		g.id, g.kernel, g.used = found.id, found.kernel, found.used
	}
	t.byID[g.id] = g
}

func (t *Table) newID() uint32 {
	for {
		if t.lastID++; t.lastID > lastID {
			t.lastID = firstID + 1
		}
		if id := t.lastID; !t.taken[id] && t.byID[id] == nil {
			t.taken[id] = true
			return id
		}
	}
}

// deletions returns deletions of the groups that no route uses, or else of the nexthop objects that
// no group has.
func (t *Table) deletions() []Op {
	var ops []Op
	idle := t.idle
	t.idle = nil
	for _, g := range idle {
		if g.wanted > 0 || g.used > 0 {
			continue
		}
		if g.refs == 0 && t.groups[g.key] == g {
			delete(t.groups, g.key)
		}
		if t.byID[g.id] != g {
			continue // it has no id
		}
		t.sweep = true
		if g.kernel == nil {
			delete(t.taken, g.id)
		} else {
			ops = append(ops, Op{Kind: DeleteGroup, ID: g.id})
		}
		delete(t.byID, g.id) // a route that needs it again during the deletion gets a new id
		g.id, g.kernel = 0, nil
	}
	if len(ops) > 0 || !t.sweep {
		return ops
	}
	t.sweep = false
	used := map[uint32]bool{}
	for _, g := range t.byID {
		for _, id := range g.kernel {
			used[id] = true
		}
	}
	for what, o := range t.objects {
		if !used[o.id] {
			delete(t.objects, what)
			if o.kernel {
				t.spare = append(t.spare, o.id)
			} else {
				delete(t.taken, o.id)
			}
		}
	}
	keep := t.spare[:0]
	for _, id := range t.spare {
		if used[id] {
			keep = append(keep, id)
		} else {
			ops = append(ops, Op{Kind: DeleteNextHop, ID: id})
		}
	}
	t.spare = keep
	slices.SortFunc(ops, func(a, b Op) int { return int(a.ID) - int(b.ID) })
	return ops
}

// Done takes the results of the changes that Ops returned: one error per change, or nil when all
// were made. When it returns false, the kernel's state is not as expected: call Adopt with its
// actual state.
func (t *Table) Done(ops []Op, errs []error) bool {
	ok := true
	for i, op := range ops {
		if errs != nil && errs[i] != nil {
			ok = false
			continue
		}
		switch op.Kind {
		case SetNextHop:
			op.Object.ID = 0
			if o := t.objects[op.Object]; o != nil && o.id == op.ID {
				o.kernel = true
			}
		case SetGroup:
			if g := t.byID[op.ID]; g != nil {
				g.kernel = op.Members
			}
			t.sweep = true
		case AddRoute, ReplaceRoute:
			id := op.ID
			if id == 0 {
				id = blackhole
			}
			t.point(op.Key, id)
		case DeleteRoute:
			t.point(op.Key, nothing)
		case DeleteGroup, DeleteNextHop:
			delete(t.taken, op.ID)
		}
	}
	return ok
}

// point records the group of the kernel's route for a key.
func (t *Table) point(k Key, id uint32) {
	e := t.routes[k]
	if e == nil {
		if id == nothing {
			return
		}
		e = t.add(k)
	}
	before := t.byID[e.kernel]
	e.kernel = id
	if g := t.byID[id]; g != nil {
		g.used++
	}
	if before != nil {
		before.used--
		t.retire(before)
	}
	t.forget(e)
}

// Adopt takes the kernel's state. Objects that are already as wanted need no write.
func (t *Table) Adopt(s State) {
	t.SetLinks(s.Links)

	t.taken = map[uint32]bool{}
	for _, id := range s.Taken {
		t.taken[id] = true
	}
	present := map[uint32]Object{}
	for _, o := range s.NextHops {
		present[o.ID] = o
		t.taken[o.ID] = true
	}
	t.spare = nil
	t.sweep = true
	for what, o := range t.objects {
		found, ok := present[o.id]
		found.ID = 0
		if o.kernel = ok && found == what; o.kernel {
			delete(present, o.id)
		} else {
			delete(t.objects, what)
		}
	}
	for id, o := range present {
		o.ID = 0
		if t.objects[o] == nil {
			t.objects[o] = &object{id: id, kernel: true}
		} else {
			t.spare = append(t.spare, id)
		}
	}

	before := map[uint32][]Object{}
	for id, g := range t.byID {
		g.kernel, g.used = nil, 0
		if g.key == "" {
			before[id] = g.former
			delete(t.byID, id)
		}
	}
	objects := map[uint32]Object{}
	for _, o := range s.NextHops {
		objects[o.ID] = o
	}
	for _, k := range s.Groups {
		if t.byID[k.ID] == nil {
			g := &group{id: k.ID, former: before[k.ID]}
			for _, id := range k.Members {
				if o, ok := objects[id]; ok && before[k.ID] == nil {
					o.ID = 0
					g.former = append(g.former, o)
				}
			}
			if before[k.ID] == nil && len(g.former) != len(k.Members) {
				g.former = nil // it has a member that is not ours
			}
			t.byID[k.ID] = g
		}
		t.byID[k.ID].kernel = slices.Sorted(slices.Values(k.Members))
	}
	for id := range t.byID {
		t.taken[id] = true
	}

	for _, e := range t.routes {
		e.kernel = nothing
	}
	for _, r := range s.Routes {
		k := r.Key.Masked()
		e := t.routes[k]
		if e == nil {
			e = t.add(k)
		}
		switch g := t.byID[r.NextHop]; {
		case r.Blackhole && r.NextHop == 0:
			e.kernel = blackhole
		case g != nil:
			e.kernel = g.id
			g.used++
		default:
			e.kernel = stranger
		}
	}
	for _, e := range t.routes {
		t.mark(e)
	}
	for _, g := range t.groups {
		t.markGroup(g)
	}
	for _, g := range t.byID {
		t.markGroup(g)
		t.retire(g)
	}
	for _, g := range t.groups {
		t.retire(g)
	}
}

// Routes returns every route, in no order, until yield returns false.
func (t *Table) Routes(yield func(RouteState) bool) {
	for _, e := range t.routes {
		s := RouteState{Key: e.key, Takes: e.takes}
		g := e.bgp
		if g != nil {
			s.Source = BGP
		}
		if e.static != nil {
			s.Source, g = Static, e.static
		}
		switch {
		case g == t.hole:
			s.Blackhole = true
		case g != nil:
			s.NextHops, s.Alive = slices.Clone(g.hops), t.alive(g)
		}
		w := e.winner()
		s.Installed = w != nil && w.has(e) && !w.dirty
		if !yield(s) {
			return
		}
	}
}

// Best returns the length of our most specific route in the main table that covers an address and
// that the kernel has, -1 when there is none.
func (t *Table) Best(a netip.Addr) int {
	for bits := a.BitLen(); bits >= 0; bits-- {
		p, _ := a.Prefix(bits)
		if e := t.routes[Main(p)]; e != nil && e.kernel != nothing && e.kernel != stranger {
			return bits
		}
	}
	return -1
}
