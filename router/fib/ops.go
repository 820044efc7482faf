package fib

import "slices"

// Ids of nexthop objects and groups come from this range, in ascending order.
const (
	firstID = 0x49000000
	lastID  = 0x49ffffff
)

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
			groups = append(groups, Op{Kind: SetGroup, ID: g.id, Members: members, Buckets: g.buckets})
		}
	}
	t.dirtyGroups = t.dirtyGroups[:0]
	ops = append(ops, groups...)

	// The order is random: deleting many prefixes in ascending order costs the kernel ten times as
	// much as in any other order.
	for limit += len(ops); len(ops) < limit && len(t.dirty) > 0; {
		i, last := t.random.IntN(len(t.dirty)), len(t.dirty)-1
		k := t.dirty[i]
		t.dirty[i] = t.dirty[last]
		t.dirty = t.dirty[:last]
		e := t.routes[k]
		e.dirty = false
		w := e.winner()
		switch {
		case w == nil && e.kernel != nothing:
			ops = append(ops, Op{Kind: DeleteRoute, Key: k})
		case w != nil && e.kernel == nothing:
			ops = append(ops, Op{Kind: AddRoute, Key: k, ID: routeID(w)})
		case w != nil && !w.has(e):
			ops = append(ops, Op{Kind: ReplaceRoute, Key: k, ID: routeID(w)})
		default:
			t.forget(k, e)
		}
	}
	if len(t.dirty) == 0 {
		t.dirty = nil // it may have had every route
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
		if k.key == "" && k.buckets == g.buckets && slices.Equal(k.kernel, members) &&
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
	t.forget(k, e)
}
