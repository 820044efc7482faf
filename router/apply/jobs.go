package apply

import (
	"context"
	"errors"
	"maps"
	"reflect"
	"slices"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/live"
	"github.com/isthmus-net/isthmus/router/plan"
)

// The stages of a pass. The guard comes before the first tunnel; the users of a tunnel are removed
// before the tunnel.
const (
	StageHost Stage = iota
	StageGuard
	StageForward
	StageReplace // replaces tunnels by tunnels of another kind
	StageTunnel
	StageRoutes
	StageBGP
	StageRemoval
)

// Stage is the position of a job in a pass.
type Stage int

// Job applies a part of the target.
type Job struct {
	Key   string
	Stage Stage
	// Part returns the part, by value: the job runs when it has changed. Do runs again after
	// failures, and brings the system to the part, whatever was there before.
	Part func(*plan.Target) any
	Do   func(context.Context, *plan.Target) error
	// Always runs the job even if no document is applied, as long as none can be.
	Always bool
}

func (j *Job) object(t *plan.Target) *object {
	return &object{
		key: j.Key, stage: j.Stage, apply: func(ctx context.Context) error { return j.Do(ctx, t) },
		same: func(former *plan.Target) bool { return reflect.DeepEqual(j.Part(former), j.Part(t)) },
	}
}

// triedKey is the object that is removed when every job was tried once.
const triedKey = "document"

// jobs returns the jobs for what is wanted.
func (a *Applier) jobs(w *Wanted) []*object {
	t := &w.Target
	all := []*object{{key: triedKey, stage: StageRemoval, last: true, apply: func(context.Context) error { return nil }}}
	add := func(key string, stage Stage, same func(*plan.Target) bool, apply func(context.Context) error) {
		all = append(all, &object{key: key, stage: stage, same: same, apply: apply})
	}
	for i := range a.o.Jobs {
		if j := &a.o.Jobs[i]; w.Mode != Hold || j.Always {
			all = append(all, j.object(t))
		}
	}
	switch w.Mode {
	case Hold:
		add("nat", StageGuard, nil, func(ctx context.Context) error { return a.Close(ctx, t) })
		return all
	case Clear:
		// The guard is removed too, so stop forwarding first.
		add("forwarding", StageHost, nil, func(context.Context) error { return a.o.Host.Forward(false) })
	case Carry:
		add("host", StageHost, func(f *plan.Target) bool {
			return f.Underlay == t.Underlay && slices.Equal(f.NAT.Plain(), t.NAT.Plain()) && f.PortlessTimeout == t.PortlessTimeout
		}, func(context.Context) error {
			return a.o.Host.Prepare(t.Underlay.Interface, t.NAT.Plain(), t.PortlessTimeout)
		})
		// After the guard: packets routed earlier would leave under their inside addresses.
		add("forwarding", StageForward, func(*plan.Target) bool { return true }, func(ctx context.Context) error {
			if err := a.guarded(ctx); err != nil {
				return err
			}
			return a.o.Host.Forward(true)
		})
	}
	add("nat", StageGuard, func(f *plan.Target) bool {
		return f.NAT.Equal(t.NAT) && reflect.DeepEqual(f.Health, t.Health) && reflect.DeepEqual(f.Proxies, t.Proxies) && reflect.DeepEqual(f.Names, t.Names)
	}, func(ctx context.Context) error { return a.applyNAT(ctx, w) })
	// Reserved prefixes depend on many parts of the target. The table itself finds the changes.
	add("routes", StageRoutes, nil, func(context.Context) error { return a.applyRoutes(t) })
	add("bgp", StageBGP, func(f *plan.Target) bool {
		// A mapped prefix is announced while one of its tunnels is enabled.
		return maps.Equal(kindsOf(f), kindsOf(t)) && reflect.DeepEqual(f.BGP, t.BGP) && reflect.DeepEqual(f.Health, t.Health) && reflect.DeepEqual(f.Takeover, t.Takeover)
	}, func(ctx context.Context) error { return a.applyBGP(ctx, t) })
	return append(all, a.tunnelJobs(t)...)
}

func (a *Applier) applyRoutes(t *plan.Target) error {
	e := live.Of(t, a.o.Facts())
	a.o.FIB.SetReserved(e.Reserved)
	a.o.FIB.SetStatic(t.Routes)
	if a.o.Names.SetInside(e.Inside) {
		a.work.again("nat")
	}
	return nil
}

// errNoVerdict is the reason why BGP waits after the start of a node that shares its pools.
var errNoVerdict = errors.New("waiting for the first answers to probes of shared addresses")

func (a *Applier) applyBGP(ctx context.Context, t *plan.Target) error {
	facts := a.o.Facts()
	if len(t.Takeover.Paths) > 0 && a.young() {
		known := 0
		for _, p := range facts.Pools {
			known += p.Known
		}
		if known < len(t.Takeover.Addresses) {
			return errNoVerdict
		}
	}
	c := live.Of(t, facts).BGP
	c.Reason = t.Reason
	if c.ASN == 0 {
		c = bgp.Config{}
	}
	if err := a.o.BGP.Apply(ctx, c); err != nil {
		return err
	}
	if c.ASN == 0 {
		a.o.FIB.Synced() // BGP does not run and will never report that learned routes are complete
	}
	return nil
}
