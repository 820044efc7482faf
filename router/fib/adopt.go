package fib

import "slices"

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
			g := &group{id: k.ID, former: before[k.ID], buckets: k.Buckets}
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
	for k, e := range t.routes {
		t.mark(k, e)
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
