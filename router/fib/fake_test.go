package fib

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// fakeKernel is a strict model of the kernel's nexthop objects and routes. Unlike the kernel, it
// refuses to delete an object that is in use instead of deleting its users as well.
type fakeKernel struct {
	mu      sync.Mutex
	links   map[string]Link
	objects map[uint32]Object
	groups  map[uint32][]uint32
	buckets map[uint32]uint16
	routes  map[Key]Installed
	foreign map[Key]bool // routes of others with our metric
	writes  uint64
	kinds   map[OpKind]int
	fail    func(Op) error
	notify  func(Event)
}

func newFakeKernel() *fakeKernel {
	return &fakeKernel{
		links: map[string]Link{}, objects: map[uint32]Object{}, groups: map[uint32][]uint32{}, buckets: map[uint32]uint16{},
		routes: map[Key]Installed{}, foreign: map[Key]bool{}, kinds: map[OpKind]int{},
	}
}

func (k *fakeKernel) Execute(_ context.Context, ops []Op) []error {
	k.mu.Lock()
	defer k.mu.Unlock()
	errs := make([]error, len(ops))
	failed := false
	for i, op := range ops {
		if errs[i] = k.execute(op); errs[i] != nil {
			errs[i] = fmt.Errorf("%+v: %w", op, errs[i])
			failed = true
		}
		k.writes++
		k.kinds[op.Kind]++
	}
	if !failed {
		return nil
	}
	return errs
}

func (k *fakeKernel) execute(op Op) error {
	if k.fail != nil {
		if err := k.fail(op); err != nil {
			return err
		}
	}
	switch op.Kind {
	case SetNextHop:
		if op.ID < firstID || op.ID > lastID {
			return fmt.Errorf("id out of range")
		}
		if !op.Object.Blackhole {
			up := false
			for _, l := range k.links {
				up = up || l.Index == op.Object.Link && l.Up
			}
			if !up {
				return fmt.Errorf("network is down")
			}
		}
		if k.groups[op.ID] != nil {
			return fmt.Errorf("is a group")
		}
		k.objects[op.ID] = op.Object
	case SetGroup:
		if _, ok := k.objects[op.ID]; ok || len(op.Members) == 0 {
			return fmt.Errorf("no group")
		}
		for i, id := range op.Members {
			o, ok := k.objects[id]
			if !ok {
				return fmt.Errorf("no such member %d", id)
			}
			if o.Blackhole && len(op.Members) > 1 {
				return fmt.Errorf("black hole together with others")
			}
			if slices.Contains(op.Members[:i], id) {
				return fmt.Errorf("duplicate member")
			}
		}
		if was, ok := k.buckets[op.ID]; ok && was != op.Buckets {
			return fmt.Errorf("has %d buckets, not %d", was, op.Buckets)
		}
		k.groups[op.ID], k.buckets[op.ID] = slices.Clone(op.Members), op.Buckets
	case AddRoute, ReplaceRoute:
		_, there := k.routes[op.Key]
		if there == (op.Kind == AddRoute) || k.foreign[op.Key] {
			return fmt.Errorf("there: %v", there)
		}
		if op.ID != 0 && k.groups[op.ID] == nil {
			return fmt.Errorf("no such group")
		}
		if op.ID != 0 && op.Key.Prefix.Addr().Is6() {
			for _, id := range k.groups[op.ID] {
				if !k.objects[id].IPv6 {
					return fmt.Errorf("IPv6 route through an IPv4 next hop")
				}
			}
		}
		k.routes[op.Key] = Installed{Key: op.Key, NextHop: op.ID, Blackhole: op.ID == 0}
	case DeleteRoute:
		if _, ok := k.routes[op.Key]; !ok {
			return fmt.Errorf("no such route")
		}
		delete(k.routes, op.Key)
	case DeleteGroup:
		if k.groups[op.ID] == nil {
			return fmt.Errorf("no such group")
		}
		for _, r := range k.routes {
			if r.NextHop == op.ID {
				return fmt.Errorf("in use by %v", r.Key)
			}
		}
		delete(k.groups, op.ID)
		delete(k.buckets, op.ID)
	case DeleteNextHop:
		if _, ok := k.objects[op.ID]; !ok {
			return fmt.Errorf("no such nexthop object")
		}
		for g, members := range k.groups {
			if slices.Contains(members, op.ID) {
				return fmt.Errorf("in use by group %d", g)
			}
		}
		delete(k.objects, op.ID)
	default:
		return fmt.Errorf("unknown kind")
	}
	return nil
}

// setLink adds, changes or deletes an interface with the effects that the kernel causes.
func (k *fakeKernel) setLink(l Link) {
	k.mu.Lock()
	if l.Index == 0 {
		l.Index = k.links[l.Name].Index
		delete(k.links, l.Name)
	} else {
		k.links[l.Name] = l
	}
	if !l.Up {
		for id, o := range k.objects {
			if !o.Blackhole && o.Link == l.Index {
				k.removeObject(id)
			}
		}
	}
	notify := k.notify
	k.mu.Unlock()
	if notify != nil {
		notify(LinkEvent | RouteEvent)
	}
}

func (k *fakeKernel) removeObject(id uint32) {
	delete(k.objects, id)
	for g, members := range k.groups {
		members = slices.DeleteFunc(slices.Clone(members), func(m uint32) bool { return m == id })
		if k.groups[g] = members; len(members) == 0 {
			k.removeGroup(g)
		}
	}
}

func (k *fakeKernel) removeGroup(id uint32) {
	delete(k.groups, id)
	delete(k.buckets, id)
	for p, r := range k.routes {
		if r.NextHop == id {
			delete(k.routes, p)
		}
	}
}

func (k *fakeKernel) state() State {
	var s State
	for _, l := range k.links {
		s.Links = append(s.Links, l)
	}
	for id, o := range k.objects {
		o.ID = id
		s.NextHops = append(s.NextHops, o)
	}
	for id, m := range k.groups {
		s.Groups = append(s.Groups, Group{ID: id, Members: m, Buckets: k.buckets[id]})
	}
	for _, r := range k.routes {
		s.Routes = append(s.Routes, r)
	}
	return s
}

func (k *fakeKernel) Observe(context.Context) (State, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.state(), nil
}

func (k *fakeKernel) Links(context.Context) ([]Link, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.state().Links, nil
}

func (k *fakeKernel) Watch(ctx context.Context, notify func(Event)) error {
	k.mu.Lock()
	k.notify = notify
	k.mu.Unlock()
	notify(LinkEvent | RouteEvent)
	<-ctx.Done()
	return ctx.Err()
}

func (k *fakeKernel) Writes() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.writes
}
