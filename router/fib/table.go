package fib

import (
	"cmp"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
)

// Ids of nexthop objects and groups are taken from this range, in ascending order.
const (
	firstID = 0x49000000
	lastID  = 0x49ffffff
)

// What a route of the kernel points at when it is no group of ours.
const (
	nothing   = 0 // there is no route
	blackhole = 1 // a route of type blackhole
	stranger  = 2 // something that the table never makes
)

// Table decides what the kernel's forwarding state should be and which changes lead there. It does no I/O and knows no
// clock. It is not safe for concurrent use.
//
// Until Synced, routes that a former run left in the kernel stay although they were not asked for yet.
type Table struct {
	links    map[string]Link
	names    map[uint32]string // of links, by index
	dead     map[NextHop]bool  // reported dead; without a gateway: all of the interface
	reserved *reserve

	routes   map[netip.Prefix]*entry
	groups   map[string]*group // wanted sets of next hops, by key
	byID     map[uint32]*group
	objects  map[Object]*object // by what they are; ID is zero in the key
	spare    []uint32           // nexthop objects of ours that are not needed
	taken    map[uint32]bool
	lastID   uint32
	hole     *group // what a wanted black hole points at
	static   map[netip.Prefix]bool
	epoch    uint32
	isSynced bool

	dirty       []netip.Prefix
	dirtyGroups []*group
	idle        []*group // candidates for deletion
	sweep       bool     // nexthop objects may have become unused
	random      *rand.Rand
	key         []byte
}

// entry is a prefix: what each source wants, and what the kernel has.
type entry struct {
	static, bgp *group
	kernel      uint32 // id of a group, or nothing, blackhole, stranger
	epoch       uint32 // in which bgp was reported
	dirty       bool
}

// group is a set of next hops that are used together.
type group struct {
	id     uint32 // 0: not chosen yet
	key    string // empty: found in the kernel, and not yet known for whom
	ipv6   bool   // family of the routes in it
	hops   []NextHop
	kernel []uint32 // members that the kernel has; nil: the kernel has no such group
	former []Object // that it was found with, while key is empty
	refs   int      // sources that name it
	wanted int      // prefixes that it has won
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
		reserved: &reserve{},
		links:    map[string]Link{},
		dead:     map[NextHop]bool{},
		routes:   map[netip.Prefix]*entry{},
		groups:   map[string]*group{},
		byID:     map[uint32]*group{},
		objects:  map[Object]*object{},
		taken:    map[uint32]bool{},
		static:   map[netip.Prefix]bool{},
		lastID:   firstID,
		hole:     &group{id: blackhole},
		random:   rand.New(rand.NewPCG(0, 0)),
	}
}

// SetStatic replaces all static routes. They win over BGP for the same prefix.
func (t *Table) SetStatic(routes []Route) {
	before := t.static
	t.static = make(map[netip.Prefix]bool, len(routes))
	for _, r := range routes {
		p := r.Prefix.Masked()
		t.static[p] = true
		t.set(p, Static, t.intern(p, r))
	}
	for p := range before {
		if !t.static[p] {
			t.set(p, Static, nil)
		}
	}
}

// Update replaces the BGP routes of the given prefixes. One without next hops that is no black hole is withdrawn.
func (t *Table) Update(routes []Route) {
	for _, r := range routes {
		p := r.Prefix.Masked()
		t.set(p, BGP, t.intern(p, r))
	}
}

// SetLinks says which interfaces there are.
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

// SetAlive says whether what is sent to a next hop arrives. A next hop without a gateway stands for its interface, and
// with it for every next hop on it. Next hops about which nothing was said are alive while their interface is up.
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
	for _, g := range t.byID { // those of a former run that were not asked for yet
		if slices.ContainsFunc(g.former, func(o Object) bool { return names[t.names[o.Link]] }) {
			t.markGroup(g)
		}
	}
}

// SetReserved names what routes must not take away from the node: the outside addresses of the tunnels' peers, because a route that
// covers one would draw encrypted packets into a tunnel; what the platform serves; the node's own networks. Such a route is withheld from
// the kernel. Default routes (of length 0) are not: by Metric they lose against the underlay's.
func (t *Table) SetReserved(all []Reserved) {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b Reserved) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()), cmp.Compare(a.Own, b.Own), cmp.Compare(a.Why, b.Why))
	})
	if slices.Equal(t.reserved.all, all) {
		return
	}
	before := make(map[netip.Prefix]*group, len(t.routes))
	for p, e := range t.routes {
		before[p] = t.winner(p, e)
	}
	t.reserved = newReserve(all)
	for p, e := range t.routes {
		t.settle(p, e, before[p])
	}
}

// reserve finds what a route would take away.
type reserve struct {
	all     []Reserved
	within  map[netip.Prefix]*Reserved
	lengths [2][129]bool // of within
	covered []*Reserved  // ascending
}

func newReserve(all []Reserved) *reserve {
	r := &reserve{all: all, within: map[netip.Prefix]*Reserved{}}
	for i := range all {
		k := &all[i]
		p := k.Prefix.Masked()
		if r.within[p] == nil {
			r.within[p] = k
		}
		six := 0
		if p.Addr().Is6() {
			six = 1
		}
		r.lengths[six][p.Bits()] = true
		if k.Covered {
			r.covered = append(r.covered, k)
		}
	}
	return r
}

// taken returns what a route for a prefix would take away, nil for nothing.
func (r *reserve) taken(p netip.Prefix) *Reserved {
	if p.Bits() == 0 {
		return nil
	}
	six := 0
	if p.Addr().Is6() {
		six = 1
	}
	for bits := 0; bits <= p.Bits(); bits++ {
		if !r.lengths[six][bits] {
			continue
		}
		q, _ := p.Addr().Prefix(bits)
		if k := r.within[q]; k != nil {
			return k
		}
	}
	// The addresses in a prefix follow its own one.
	i, _ := slices.BinarySearchFunc(r.covered, p.Addr(), func(k *Reserved, a netip.Addr) int { return k.Prefix.Addr().Compare(a) })
	for ; i < len(r.covered) && p.Contains(r.covered[i].Prefix.Addr()); i++ {
		if p.Bits() > r.covered[i].Own {
			return r.covered[i]
		}
	}
	return nil
}

// Restarted says that the BGP routes will be reported again from the start. Until Synced the known ones stay.
func (t *Table) Restarted() {
	t.epoch++
	t.isSynced = false
}

// Synced says that all BGP routes have been reported since the start or since Restarted. Those that were not are
// removed, and so is what a former run left behind.
func (t *Table) Synced() {
	t.isSynced = true
	for p, e := range t.routes {
		if e.bgp != nil && e.epoch != t.epoch {
			t.set(p, BGP, nil)
		}
		t.mark(p, e)
	}
}

// intern returns the group of a route's next hops, nil for none.
func (t *Table) intern(p netip.Prefix, r Route) *group {
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
	ipv6 := p.Addr().Is6()
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

// set makes g what a source wants for a prefix.
func (t *Table) set(p netip.Prefix, s Source, g *group) {
	e := t.routes[p]
	if e == nil {
		if g == nil {
			return
		}
		e = &entry{}
		t.routes[p] = e
	}
	before, old := t.winner(p, e), &e.static
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
	t.settle(p, e, before)
}

// settle does what follows when the winner of a prefix may be another than before.
func (t *Table) settle(p netip.Prefix, e *entry, before *group) {
	after := t.winner(p, e)
	if after == before {
		t.forget(p, e)
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
	t.markAlways(p, e)
}

// winner returns the group that the kernel should use for a prefix, nil for none.
func (t *Table) winner(p netip.Prefix, e *entry) *group {
	if e.static == nil && e.bgp == nil || t.reserved.taken(p) != nil {
		return nil
	}
	if e.static != nil {
		return e.static
	}
	return e.bgp
}

// mark puts a prefix on the list of changes when the kernel has something else than is wanted.
func (t *Table) mark(p netip.Prefix, e *entry) {
	if w := t.winner(p, e); w == nil && (e.kernel == nothing || !t.isSynced) || w != nil && w.has(e) {
		t.forget(p, e)
		return
	}
	t.markAlways(p, e)
}

// has says whether the kernel's route leads into the group.
func (g *group) has(e *entry) bool { return e.kernel != nothing && e.kernel == g.id }

func (t *Table) markAlways(p netip.Prefix, e *entry) {
	if !e.dirty {
		e.dirty = true
		t.dirty = append(t.dirty, p)
	}
}

// forget drops an entry that says nothing.
func (t *Table) forget(p netip.Prefix, e *entry) {
	if e.static == nil && e.bgp == nil && e.kernel == nothing && !e.dirty {
		delete(t.routes, p)
	}
}

func (t *Table) markGroup(g *group) {
	if !g.dirty && g != t.hole {
		g.dirty = true
		t.dirtyGroups = append(t.dirtyGroups, g)
	}
}

// retire notes that a group may be needed no more.
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

// Ops returns the next changes, with at most limit routes among them, in an order in which each can be made. Nothing
// is deleted in a call that still adds, so that what is deleted is known to be unused. After they have been carried
// out, Done must be called before Ops is called again. None are left when it returns none.
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

	// Deleting many prefixes in ascending order costs the kernel ten times as much as in any other, so the order is
	// random.
	for limit += len(ops); len(ops) < limit && len(t.dirty) > 0; {
		i, last := t.random.IntN(len(t.dirty)), len(t.dirty)-1
		p := t.dirty[i]
		t.dirty[i] = t.dirty[last]
		t.dirty = t.dirty[:last]
		e := t.routes[p]
		e.dirty = false
		w := t.winner(p, e)
		switch {
		case w == nil && e.kernel != nothing:
			ops = append(ops, Op{Kind: DeleteRoute, Prefix: p})
		case w != nil && e.kernel == nothing:
			ops = append(ops, Op{Kind: AddRoute, Prefix: p, ID: routeID(w)})
		case w != nil && !w.has(e):
			ops = append(ops, Op{Kind: ReplaceRoute, Prefix: p, ID: routeID(w)})
		default:
			t.forget(p, e)
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

// claim gives a group its id: that of a group which the kernel already has with this content, or a new one.
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

// deletions returns the groups that no route uses, or else the nexthop objects that are in no group.
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
		delete(t.byID, g.id) // who wants it again while it is being deleted gets a new id
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

// Done takes the results of the changes that Ops returned: one error per change, or nil when all were made. When it
// returns false, the kernel is not as expected, and Adopt must be called with what is really there.
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
			t.point(op.Prefix, id)
		case DeleteRoute:
			t.point(op.Prefix, nothing)
		case DeleteGroup, DeleteNextHop:
			delete(t.taken, op.ID)
		}
	}
	return ok
}

// point notes where the kernel's route of a prefix leads.
func (t *Table) point(p netip.Prefix, id uint32) {
	e := t.routes[p]
	if e == nil {
		if id == nothing {
			return
		}
		e = &entry{}
		t.routes[p] = e
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
	t.forget(p, e)
}

// Adopt takes what the kernel has. What is already as wanted is kept without a write.
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
				g.former = nil // it has what is not ours
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
		p := r.Prefix.Masked()
		e := t.routes[p]
		if e == nil {
			e = &entry{}
			t.routes[p] = e
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
	for p, e := range t.routes {
		t.mark(p, e)
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
	for p, e := range t.routes {
		s := RouteState{Prefix: p, Takes: t.reserved.taken(p)}
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
		w := t.winner(p, e)
		s.Installed = w != nil && w.has(e) && !w.dirty
		if !yield(s) {
			return
		}
	}
}

// Best returns the length of the most specific prefix of ours that holds an address and that the kernel has, -1 when there is none.
func (t *Table) Best(a netip.Addr) int {
	for bits := a.BitLen(); bits >= 0; bits-- {
		p, _ := a.Prefix(bits)
		if e := t.routes[p]; e != nil && e.kernel != nothing && e.kernel != stranger {
			return bits
		}
	}
	return -1
}
