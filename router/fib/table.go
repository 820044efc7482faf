package fib

import (
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
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
	own      map[Key]bool // static routes that are not withheld
	transit  bool         // default routes are in Transit
	epoch    uint32
	isSynced bool

	dirty       []Key
	dirtyGroups []*group
	idle        []*group // candidates for deletion
	sweep       bool     // nexthop objects may have become unused
	random      *rand.Rand
	key         []byte
}

// entry is a route: the groups that the sources want, and the one that the kernel has. There may be
// a hundred thousand.
type entry struct {
	static, bgp *group
	kernel      uint32 // id of a group, or nothing, blackhole, stranger
	epoch       uint32 // in which bgp was reported
	withheld    bool   // because of t.reserved
	dirty       bool
}

// group is a set of next hops that share the traffic of routes.
type group struct {
	id   uint32 // 0: not chosen yet
	key  string // empty: found in the kernel, and not yet wanted
	ipv6 bool   // family of the routes in it
	hops []NextHop
	// buckets of a resilient group, 0 of another one
	buckets uint16
	kernel  []uint32 // members that the kernel has; nil: the kernel has no such group
	former  []Object // content when it was found, while key is empty
	refs    int      // sources that want it
	wanted  int      // entries that it has won
	used    int      // routes of the kernel in it
	dirty   bool
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
	former := t.own
	t.own = map[Key]bool{}
	for _, r := range routes {
		if r.Own {
			t.own[t.place(r.Key.Masked())] = true
		}
	}
	for k := range former {
		if !t.own[k] {
			t.withhold(k)
		}
	}
	for k := range t.own {
		t.withhold(k)
	}
	for _, r := range routes {
		k := t.place(r.Key.Masked())
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
		k := t.place(r.Key.Masked())
		t.set(k, BGP, t.intern(k, r))
	}
}

// SetTransit sets whether the default routes of the main table are for forwarded packets alone:
// they are in the table of Transit then.
func (t *Table) SetTransit(on bool) {
	if t.transit == on {
		return
	}
	t.transit = on
	for _, p := range []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)} {
		from, to := Main(p), Key{Transit, p}
		if !on {
			from, to = to, from
		}
		e := t.routes[from]
		if e == nil {
			continue
		}
		static, learned, epoch := e.static, e.bgp, e.epoch
		if t.static[from] {
			delete(t.static, from)
			t.static[to] = true
		}
		t.set(to, Static, static)
		t.set(to, BGP, learned)
		if moved := t.routes[to]; moved != nil {
			moved.epoch = epoch
		}
		t.set(from, Static, nil)
		t.set(from, BGP, nil)
	}
}

// place returns the key under which the table has a route.
func (t *Table) place(k Key) Key {
	if t.transit && k.Domain == 0 && k.Prefix.Bits() == 0 {
		k.Domain = Transit
	}
	return k
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
		t.mark(k, e)
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
	resilient := r.Resilient && len(hops) > 1
	key := append(t.key[:0], 4)
	if ipv6 {
		key[0] = 6
	}
	if resilient {
		key[0] |= 0x80
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
		if resilient {
			g.buckets = buckets(len(g.hops))
		}
		t.groups[g.key] = g
		t.markGroup(g)
	}
	return g
}

// bucketsEach is the least number of buckets of each member of a resilient group: the shares of
// members differ by one bucket at most, so by 3 %.
const bucketsEach = 32

// buckets returns the number of buckets of a resilient group: a power of two.
func buckets(members int) uint16 { return bucketsEach << bits.Len(uint(members-1)) }

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
	t.update(k, e, before)
}

// update does what follows when the winner of an entry may differ from before.
func (t *Table) update(k Key, e *entry, before *group) {
	after := e.winner()
	if after == before {
		t.forget(k, e)
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
	t.markAlways(k, e)
}

// add adds an entry without routes. It is withheld or not until SetReserved is called again.
func (t *Table) add(k Key) *entry {
	e := &entry{withheld: t.withholds(k)}
	t.routes[k] = e
	return e
}

// winner returns the group that the kernel should use; nil: none.
func (e *entry) winner() *group {
	switch {
	case e.withheld:
		return nil
	case e.static != nil:
		return e.static
	}
	return e.bgp
}

// mark puts an entry on the list of changes if the kernel differs from the winner.
func (t *Table) mark(k Key, e *entry) {
	if w := e.winner(); w == nil && (e.kernel == nothing || !t.isSynced) || w != nil && w.has(e) {
		t.forget(k, e)
		return
	}
	t.markAlways(k, e)
}

// has reports whether the kernel's route uses the group.
func (g *group) has(e *entry) bool { return e.kernel != nothing && e.kernel == g.id }

func (t *Table) markAlways(k Key, e *entry) {
	if !e.dirty {
		e.dirty = true
		t.dirty = append(t.dirty, k)
	}
}

// forget removes an entry that neither a source nor the kernel has.
func (t *Table) forget(k Key, e *entry) {
	if e.static == nil && e.bgp == nil && e.kernel == nothing && !e.dirty {
		delete(t.routes, k)
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

// Routes returns every route, in no order, until yield returns false.
func (t *Table) Routes(yield func(RouteState) bool) {
	for k, e := range t.routes {
		s := RouteState{Key: k}
		if k.Domain == Transit {
			s.Key.Domain, s.Transit = 0, true
		}
		if e.withheld {
			s.Takes = t.reserved.taken(k)
		}
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
