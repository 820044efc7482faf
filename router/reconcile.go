package router

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"sync"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/tunnel"
)

// The stages of a pass. What keeps inside addresses in comes before the first tunnel; what uses a tunnel goes before
// the tunnel.
const (
	stageHost = iota
	stageGuard
	stageForward
	stageTunnel
	stageRoutes
	stageBGP
	stageRemoval
)

// schedule has the drivers work on what differs between two targets, or on everything when there was none before:
// they compare with what is there, and write nothing where it is the same.
func (r *Router) schedule(former, target plan.Target, first bool, lived []nat.Pool) {
	ending := r.outliving.add(lived, target.NAT)
	plain := target.NAT.Plain()
	if first || former.Underlay != target.Underlay || !slices.Equal(former.NAT.Plain(), plain) || former.PortlessTimeout != target.PortlessTimeout {
		portless := target.PortlessTimeout
		if portless == 0 && former.PortlessTimeout != 0 {
			portless = -1 // it was given, and is not any more
		}
		r.work.set(object{key: "host", stage: stageHost, apply: func(context.Context) error {
			return r.Host.Prepare(target.Underlay.Interface, plain, portless)
		}})
	}
	if first || !slices.Equal(former.SSHKeys, target.SSHKeys) {
		r.allowSSH(target.SSHKeys)
	}
	if first {
		// Not before the guard: what is routed meanwhile would leave under its inside address.
		r.work.set(object{key: "forwarding", stage: stageForward, apply: func(ctx context.Context) error {
			if err := r.guarded(ctx); err != nil {
				return err
			}
			return r.Host.Forward(true)
		}})
	}
	if r.Translations != nil && (first || former.Log != target.Log) {
		r.work.set(object{key: "translation log", stage: stageGuard, apply: func(context.Context) error {
			r.Translations.Limit(target.Log)
			return nil
		}})
	}
	if first || !former.NAT.Equal(target.NAT) || !reflect.DeepEqual(former.Health, target.Health) || !reflect.DeepEqual(former.Proxies, target.Proxies) || !reflect.DeepEqual(former.Names, target.Names) {
		before := former
		r.work.set(object{key: "nat", stage: stageGuard, apply: func(ctx context.Context) error {
			if err := r.applyNAT(ctx, before, target); err != nil {
				return err
			}
			before = target // it may be applied again
			return nil
		}})
	} else if ending {
		r.work.again("nat")
	}
	wanted := make(map[string]bool, len(target.Tunnels))
	had := make(map[string]tunnel.Config, len(former.Tunnels))
	for _, c := range former.Tunnels {
		had[c.Name] = c
	}
	for _, c := range target.Tunnels {
		wanted[c.Name] = true
		was, ok := had[c.Name]
		if ok && was.Kind() != c.Kind() {
			r.state.forgetTunnel(c.Name)
			r.leaving.add(was)
		}
		r.leaving.drop(c)
		if !ok || first || len(tunnel.Diff(was, c)) > 0 {
			r.work.set(object{key: "tunnel/" + c.Name, stage: stageTunnel, apply: func(ctx context.Context) error {
				if err := r.guarded(ctx); err != nil {
					return err
				}
				if !ok && !first { // the removal of the former one may have come half way
					r.FIB.SetAlive(fib.NextHop{Interface: c.Interface}, !r.state.down()[c.Interface])
				}
				// A tunnel of the other kind has the same interface name.
				if err := r.removeLeaving(ctx, c.Name, c.Kind()); err != nil {
					return err
				}
				return r.Drivers[c.Kind()].Apply(ctx, c)
			}})
		}
	}
	// What is reserved depends on much of the target. The table finds out by itself what changes.
	r.work.set(object{key: "routes", stage: stageRoutes, apply: func(context.Context) error {
		r.FIB.SetReserved(reserved(target, r.around.get(), r.resolvers()))
		r.FIB.SetStatic(target.Routes)
		if r.names.SetInside(r.inside(target)) {
			r.work.again("nat")
		}
		return nil
	}})
	if first || !reflect.DeepEqual(former.BGP, target.BGP) || !reflect.DeepEqual(former.Health, target.Health) || !reflect.DeepEqual(former.Takeover, target.Takeover) {
		r.work.set(object{key: "bgp", stage: stageBGP, apply: func(ctx context.Context) error {
			r.awaitVerdict(ctx, target)
			return r.applyBGP(ctx, r.liveBGP(target))
		}})
	}
	for _, c := range former.Tunnels {
		if !wanted[c.Name] {
			r.leaving.add(c)
			r.removeTunnel(c)
		}
	}
	if first || !reflect.DeepEqual(former.Takeover, target.Takeover) {
		r.taker.use(target.Takeover)
	}
	r.state.use(target)
	if first {
		r.work.set(object{key: "prune", stage: stageRemoval, apply: r.prune})
	}
}

// allowSSH has the machine's SSH server take these keys and no others.
func (r *Router) allowSSH(keys []string) {
	if r.SSH != nil {
		r.work.set(object{key: "ssh", stage: stageForward, apply: func(context.Context) error { return r.SSH(keys) }})
	}
}

// scheduleNothing has the drivers remove everything that was made for a target. Forwarding ends first, since the rules that keep inside addresses in
// go as well.
func (r *Router) scheduleNothing(from plan.Target) {
	r.state.use(plan.Target{})
	r.taker.use(plan.Target{}.Takeover)
	r.work.forget("host")
	r.allowSSH(nil)
	r.work.set(object{key: "forwarding", stage: stageHost, last: true, apply: func(context.Context) error { return r.Host.Forward(false) }})
	closed := r.closed
	r.work.set(object{key: "nat", stage: stageGuard, apply: func(ctx context.Context) error {
		r.names.Set(egress.DNS{}, nil, nil)
		r.health.Set("", nil)
		r.proxies.Set("", nil)
		if err := r.nat.apply(ctx, r, closed); err != nil {
			return err
		}
		r.guard.Store(false)
		if r.pooled == nil {
			r.pooled = map[string][]netip.Addr{}
		}
		if from.Underlay.Interface != "" {
			r.pooled[from.Underlay.Interface] = nil
		}
		for iface := range r.pooled {
			if err := r.Addresses.SetPool(iface, nil); err != nil {
				return err
			}
			r.pooled[iface] = nil
		}
		return nil
	}})
	r.work.set(object{key: "routes", stage: stageRoutes, last: true, apply: func(context.Context) error {
		r.FIB.SetStatic(nil)
		return nil
	}})
	r.work.set(object{key: "bgp", stage: stageBGP, last: true, apply: func(ctx context.Context) error { return r.applyBGP(ctx, bgp.Config{}) }})
	for _, c := range from.Tunnels {
		r.leaving.add(c)
		r.removeTunnel(c)
	}
	r.work.set(object{key: "prune", stage: stageRemoval, last: true, apply: r.prune})
}

func (r *Router) removeTunnel(c tunnel.Config) {
	r.work.set(object{key: "tunnel/" + c.Name, stage: stageRemoval, last: true, apply: func(ctx context.Context) error {
		// With an interface the kernel removes the groups that it is in, and the routes on them.
		r.FIB.SetAlive(fib.NextHop{Interface: c.Interface}, false)
		if err := r.removeLeaving(ctx, c.Name, ""); err != nil {
			return err
		}
		r.FIB.SetAlive(fib.NextHop{Interface: c.Interface}, true) // what comes next under this name is not dead
		r.state.forgetTunnel(c.Name)
		return nil
	}})
}

// leaving are the tunnels that no document wants any more and that their drivers may still have: a document that comes
// before they are removed knows nothing of them.
type leaving struct {
	mu  sync.Mutex
	all map[string]map[tunnel.Kind]tunnel.Config // by name
}

func (l *leaving) add(c tunnel.Config) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil {
		l.all = map[string]map[tunnel.Kind]tunnel.Config{}
	}
	if l.all[c.Name] == nil {
		l.all[c.Name] = map[tunnel.Kind]tunnel.Config{}
	}
	l.all[c.Name][c.Kind()] = c
}

func (l *leaving) drop(c tunnel.Config) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.all[c.Name], c.Kind())
	if len(l.all[c.Name]) == 0 {
		delete(l.all, c.Name)
	}
}

func (l *leaving) named(name string) []tunnel.Config {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Collect(maps.Values(l.all[name]))
}

// removeLeaving removes what leaves under a name, but for a tunnel of the kind that stays.
func (r *Router) removeLeaving(ctx context.Context, name string, stays tunnel.Kind) error {
	for _, c := range r.leaving.named(name) {
		if c.Kind() == stays {
			continue
		}
		if err := r.Drivers[c.Kind()].Remove(ctx, name); err != nil {
			return err
		}
		r.leaving.drop(c)
	}
	return nil
}

// applyNAT keeps the order that never lets a translated flow lose its address: addresses come before the rules that
// use them, and go after. The rules may be those of a document before the former one, which was replaced before it was
// carried out.
func (r *Router) applyNAT(ctx context.Context, former, target plan.Target) error {
	if !r.around.known() {
		return errors.New("waiting for the addresses of the machine: rules without them would cut the node off")
	}
	if r.pooled == nil {
		r.pooled = map[string][]netip.Addr{}
	}
	underlay := target.Underlay.Interface
	r.pooled[former.Underlay.Interface] = union(r.pooled[former.Underlay.Interface], poolAddresses(former))
	r.pooled[underlay] = union(poolAddresses(target), r.pooled[underlay])
	unpooled := r.Addresses.SetPool(underlay, r.pooled[underlay])
	// Before the underlay's interface is there, as at boot, nothing can leave by it, and the guard is not to wait for it.
	if unpooled != nil && r.around.has(underlay) {
		return unpooled
	}
	if len(r.triedNAT) == 0 {
		r.tried(former.NAT)
	}
	r.tried(target.NAT)
	// Now that the addresses are there.
	r.names.SetInside(r.inside(target))
	// The proxy begins to listen behind the rules, since those say who may ask.
	behind, listening := target.Names, r.names.Listeners()
	behind.Proxy = slices.DeleteFunc(slices.Clone(behind.Proxy), func(l egress.Listener) bool { return !slices.Contains(listening, l) })
	r.names.Set(behind, wantedNames(target), unusedFamilies(target))
	r.health.Set(target.Underlay.Interface, target.Health)
	r.proxies.Set("", target.Proxies)
	if err := r.nat.apply(ctx, r, target.NAT); err != nil {
		return err
	}
	r.guardInPlace()
	if unpooled != nil {
		return unpooled
	}
	if len(behind.Proxy) < len(target.Names.Proxy) {
		r.names.Set(target.Names, wantedNames(target), unusedFamilies(target))
	}
	for iface := range r.pooled {
		var stay []netip.Addr
		if iface == underlay {
			stay = poolAddresses(target)
		} else if len(r.pooled[iface]) == 0 {
			continue
		}
		if err := r.Addresses.SetPool(iface, stay); err != nil {
			return err
		}
		r.pooled[iface] = stay
	}
	r.unstick(target.NAT)
	return r.endFlows(ctx, target.NAT)
}

// union returns the addresses of a, and then those that only b has.
func union(a, b []netip.Addr) []netip.Addr {
	a = slices.Clone(a)
	for _, x := range b {
		if !slices.Contains(a, x) {
			a = append(a, x)
		}
	}
	return a
}

// poolAddresses returns the addresses that the underlay interface has for pools, which may share the node's own.
func poolAddresses(t plan.Target) []netip.Addr {
	var out []netip.Addr
	for _, p := range t.NAT.Pools {
		for _, a := range p.Addresses {
			if a.Address != t.Underlay.Address {
				out = append(out, a.Address)
			}
		}
	}
	return out
}

// applyBGP also takes BGP away from a node that no longer has a number.
func (r *Router) applyBGP(ctx context.Context, target bgp.Config) error {
	if target.ASN != 0 {
		r.speaks = bgp.Config{ASN: target.ASN, RouterID: target.RouterID}
		return r.BGP.Apply(ctx, target)
	}
	if r.speaks.ASN != 0 {
		if err := r.BGP.Apply(ctx, r.speaks); err != nil {
			return err
		}
		r.speaks = bgp.Config{}
	}
	r.FIB.Synced() // nobody else will say that no learnt routes are to be expected
	return nil
}

// prune removes the tunnels of a former run that nobody wants. It works only on what was read back: after a failed
// read nothing is removed.
func (r *Router) prune(ctx context.Context) error {
	var errs []error
	for kind, d := range r.Drivers {
		states, err := d.Observe(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("reading %s tunnels back: %w", kind, err))
			continue
		}
		for _, s := range states {
			if wanted, ok := r.state.kind(s.Name); !ok || wanted != kind {
				errs = append(errs, d.Remove(ctx, s.Name))
			}
		}
	}
	return errors.Join(errs...)
}

// readBack compares what is there with what is wanted, whether or not an event said so.
func (r *Router) readBack(ctx context.Context) {
	for _, d := range r.Drivers {
		mark := r.state.mark()
		states, err := d.Observe(ctx)
		if err != nil {
			r.Log.Warn("reading tunnels back failed; nothing is concluded", "err", err)
			continue
		}
		for _, s := range states {
			r.tunnelSeen(s, mark)
		}
	}
	r.work.again("nat")
	r.work.again("host")
	r.work.again("forwarding")
	r.surroundings()
}

// tunnelChanged takes a tunnel's state from its driver.
func (r *Router) tunnelChanged(s tunnel.State) { r.tunnelSeen(s, math.MaxUint64) }

// tunnelSeen takes a state that was read after a mark, unless a newer one came meanwhile.
func (r *Router) tunnelSeen(s tunnel.State, mark uint64) {
	r.telling.Lock()
	defer r.telling.Unlock()
	iface, ok := r.state.setTunnel(s, mark)
	if !ok || s.Status == tunnel.Unknown {
		return
	}
	// Only what is known to be down is taken out: while charon is away its tunnels still work.
	r.FIB.SetAlive(fib.NextHop{Interface: iface}, s.Status != tunnel.Down)
	if r.state.mapped(iface) {
		r.work.again("bgp")
	}
}
