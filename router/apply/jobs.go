package apply

import (
	"context"
	"errors"
	"reflect"
	"slices"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/live"
	"github.com/isthmus-net/isthmus/router/plan"
)

// The stages of a pass. What keeps inside addresses in comes before the first tunnel; what uses a
// tunnel goes before the tunnel.
const (
	StageHost Stage = iota
	StageGuard
	StageForward
	StageReplace // of tunnels by some of another kind
	StageTunnel
	StageRoutes
	StageBGP
	StageRemoval
)

// Stage is when in a pass a job is worked on.
type Stage int

// Job carries out a part of the target.
type Job struct {
	Key   string
	Stage Stage
	// Part returns the part, by value: the job is worked on when it has changed. Do is worked on
	// again after failures, and makes what is there be the part, whatever was wanted before.
	Part func(*plan.Target) any
	Do   func(context.Context, *plan.Target) error
	// Always has the job worked on although nothing is carried out, as long as no document can be.
	Always bool
}

func (j *Job) object(t *plan.Target) *object {
	return &object{
		key: j.Key, stage: j.Stage, apply: func(ctx context.Context) error { return j.Do(ctx, t) },
		same: func(former *plan.Target) bool { return reflect.DeepEqual(j.Part(former), j.Part(t)) },
	}
}

// triedKey is the object that goes when everything was tried once.
const triedKey = "document"

// jobs returns everything that is to be done for what is wanted.
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
		// The rules that keep inside addresses in go: forwarding ends first.
		add("forwarding", StageHost, nil, func(context.Context) error { return a.o.Host.Forward(false) })
	case Carry:
		add("host", StageHost, func(f *plan.Target) bool {
			return f.Underlay == t.Underlay && slices.Equal(f.NAT.Plain(), t.NAT.Plain()) && f.PortlessTimeout == t.PortlessTimeout
		}, func(context.Context) error {
			return a.o.Host.Prepare(t.Underlay.Interface, t.NAT.Plain(), t.PortlessTimeout)
		})
		// Not before the guard: what is routed meanwhile would leave under its inside address.
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
	// What is reserved depends on much of the target. The table finds out by itself what changes.
	add("routes", StageRoutes, nil, func(context.Context) error { return a.applyRoutes(t) })
	add("bgp", StageBGP, func(f *plan.Target) bool {
		return reflect.DeepEqual(f.BGP, t.BGP) && reflect.DeepEqual(f.Health, t.Health) && reflect.DeepEqual(f.Takeover, t.Takeover)
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

// errNoVerdict is why BGP waits after the start of a node that shares its pools.
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
	if c.ASN == 0 {
		c = bgp.Config{}
	}
	if err := a.o.BGP.Apply(ctx, c); err != nil {
		return err
	}
	if c.ASN == 0 {
		a.o.FIB.Synced() // BGP, which does not run, will not say that learned routes are complete
	}
	return nil
}
