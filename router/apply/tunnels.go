package apply

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/tunnel"
)

// tunnelJobs returns a job for each tunnel, and the jobs that remove others.
func (a *Applier) tunnelJobs(t *plan.Target) (all []*object) {
	for i := range t.Tunnels {
		c := t.Tunnels[i]
		if c.Disabled {
			continue
		}
		all = append(all, &object{key: "tunnel/" + c.Name, stage: StageTunnel, apply: func(ctx context.Context) error { return a.applyTunnel(ctx, c) },
			same: func(f *plan.Target) bool { return sameTunnel(f, c) }})
	}
	kinds := kindsOf(t)
	same := func(f *plan.Target) bool { return maps.Equal(kindsOf(f), kinds) }
	// A tunnel of another kind has the same interface name and is removed first; a tunnel that is
	// not wanted is removed when routes and sessions have left it.
	all = append(all, &object{key: "tunnels", stage: StageReplace, same: same, apply: func(ctx context.Context) error {
		return a.prune(ctx, func(name string, kind tunnel.Kind) bool { wanted, ok := kinds[name]; return !ok || wanted == kind })
	}})
	return append(all, &object{key: "removal", stage: StageRemoval, same: same, apply: func(ctx context.Context) error {
		return a.prune(ctx, func(name string, kind tunnel.Kind) bool { return kinds[name] == kind })
	}})
}

// kindsOf returns the tunnels that must exist. Those that are disabled are removed like those that
// the document does not have, after routes and sessions have left them.
func kindsOf(t *plan.Target) map[string]tunnel.Kind {
	kinds := make(map[string]tunnel.Kind, len(t.Tunnels))
	for _, c := range t.Tunnels {
		if !c.Disabled {
			kinds[c.Name] = c.Kind()
		}
	}
	return kinds
}

// sameTunnel reports whether a target has an identical tunnel. Tunnels are sorted by name.
func sameTunnel(t *plan.Target, c tunnel.Config) bool {
	i, ok := t.Tunnel(c.Name)
	return ok && len(tunnel.Diff(t.Tunnels[i], c)) == 0
}

func (a *Applier) applyTunnel(ctx context.Context, c tunnel.Config) error {
	if err := a.guarded(ctx); err != nil {
		return err
	}
	d := a.o.Drivers[c.Kind()]
	if d == nil {
		return fmt.Errorf("tunnels of kind %q have no driver", c.Kind())
	}
	// The incomplete removal of a former tunnel with this name may have left its interface marked
	// dead.
	a.o.FIB.SetAlive(fib.NextHop{Interface: c.Interface}, !a.o.Facts().TunnelsDown[c.Interface])
	return d.Apply(ctx, c)
}

// prune reads back all tunnels that carry our mark, and removes those that are not wanted. A failed
// read removes nothing.
func (a *Applier) prune(ctx context.Context, stays func(name string, kind tunnel.Kind) bool) error {
	var errs []error
	for kind, d := range a.o.Drivers {
		mark := a.o.Mark()
		states, err := d.Observe(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("reading %s tunnels back: %w", kind, err))
			continue
		}
		for _, s := range states {
			if stays(s.Name, kind) {
				a.o.Seen(s, mark)
				continue
			}
			// With an interface the kernel also removes its nexthop groups, and the routes on them.
			if s.Interface != "" {
				a.o.FIB.SetAlive(fib.NextHop{Interface: s.Interface}, false)
			}
			if err := d.Remove(ctx, s.Name); err != nil {
				errs = append(errs, err)
				continue
			}
			if s.Interface != "" {
				// the next interface with this name is alive
				a.o.FIB.SetAlive(fib.NextHop{Interface: s.Interface}, true)
			}
			a.o.Changed()
		}
	}
	return errors.Join(errs...)
}
