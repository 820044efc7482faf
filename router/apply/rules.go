package apply

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/live"
	"github.com/isthmus-net/isthmus/router/plan"
)

// rules is the last input of the NAT driver.
type rules struct {
	// held from reading the facts until the driver has finished, so that an older state is never
	// written last
	mu        sync.Mutex
	target    *plan.Target // nil: none yet
	conflicts []live.Conflict
	canary    *nat.Attachment // of a proof's canary during its call
}

// applyNAT adds addresses before the rules that use them and removes them after, so that no
// translated flow loses its address.
func (a *Applier) applyNAT(ctx context.Context, w *Wanted) error {
	t, facts := &w.Target, a.o.Facts()
	if w.Mode == Carry && !facts.Read {
		return errors.New("waiting for the addresses of the machine: rules without them would cut the node off")
	}
	e := live.Of(t, facts)
	unpooled := a.o.Addresses.AddPool(e.PoolAddresses)
	// Without the underlay's interface, as at boot, nothing can leave by it, and the guard must not
	// wait for it.
	if _, there := facts.Machine.Devices[t.Underlay.Interface]; unpooled != nil && there {
		return unpooled
	}
	// The addresses exist now.
	a.o.Names.SetInside(e.Inside)
	// The proxy listens only after the rules, because they decide which clients reach it.
	behind, listening := t.Names, a.o.Names.Listeners()
	behind.Proxy = slices.DeleteFunc(slices.Clone(behind.Proxy), func(l egress.Listener) bool { return !slices.Contains(listening, l) })
	a.o.Names.Set(behind, e.Names, e.Unused)
	a.o.Health.Set(t.Underlay.Interface, t.Health)
	a.o.Proxies.Set("", t.Proxies)
	if err := a.setRules(ctx, t); err != nil {
		return err
	}
	if w.Mode == Carry {
		a.guardInPlace()
	} else {
		a.guard.Store(false)
	}
	if unpooled != nil {
		return unpooled
	}
	if len(behind.Proxy) < len(t.Names.Proxy) {
		a.o.Names.Set(t.Names, e.Names, e.Unused)
	}
	if err := a.o.Addresses.PrunePool(e.PoolAddresses); err != nil {
		return err
	}
	if w.OnTrial || w.Mode != Carry {
		return nil
	}
	return a.endOrphans(ctx, e.NAT, facts)
}

// setRules installs the rules of a target under the present facts.
func (a *Applier) setRules(ctx context.Context, t *plan.Target) error {
	a.rules.mu.Lock()
	defer a.rules.mu.Unlock()
	a.rules.target = t
	return a.putRulesLocked(ctx)
}

// PutRules updates the rules with the present facts. It does nothing before the first rules were
// installed.
func (a *Applier) PutRules(ctx context.Context) error {
	a.rules.mu.Lock()
	defer a.rules.mu.Unlock()
	return a.putRulesLocked(ctx)
}

func (a *Applier) putRulesLocked(ctx context.Context) error {
	if a.rules.target == nil {
		return nil
	}
	facts := a.o.Facts()
	e := live.Of(a.rules.target, facts)
	a.rules.conflicts = e.Conflicts
	c := e.NAT
	if a.rules.canary != nil {
		c.Attachments = append(slices.Clone(c.Attachments), *a.rules.canary)
	}
	if err := a.o.NAT.Apply(ctx, c); err != nil {
		return err
	}
	a.o.Applied(e.NAT)
	a.unsticker.use(e.NAT, func(to netip.Addr) bool { return a.leaves(facts, e.NAT.Underlay, to) })
	if a.rules.canary == nil {
		// left by a call that could not remove it, or by a daemon that died
		return a.o.Addresses.RemoveCanary()
	}
	return nil
}

// leaves reports whether packets to an address leave by the underlay.
func (a *Applier) leaves(f live.Facts, underlay string, to netip.Addr) bool {
	return f.Machine.Way(to) == underlay && a.o.FIB.Best(to) < f.Machine.Best(to)
}

// Conflicts returns the addresses of names that are not destinations of the names' policies.
func (a *Applier) Conflicts() []live.Conflict {
	a.rules.mu.Lock()
	defer a.rules.mu.Unlock()
	return a.rules.conflicts
}

// Admit allows packets from one more attachment to be forwarded, until withdraw is called.
func (a *Applier) Admit(ctx context.Context, from nat.Attachment) (withdraw func(), err error) {
	set := func(ctx context.Context, canary *nat.Attachment) error {
		a.rules.mu.Lock()
		defer a.rules.mu.Unlock()
		if canary != nil && a.rules.target == nil {
			return errors.New("the rules of the document are not in force")
		}
		a.rules.canary = canary
		return a.putRulesLocked(ctx)
	}
	withdraw = func() {
		// ctx may be done already.
		if err := set(context.WithoutCancel(ctx), nil); err != nil {
			a.o.Log.Warn("the rules of the canary were not taken back; trying again", "err", err)
			a.work.again("nat")
		}
	}
	if err := set(ctx, &from); err != nil {
		withdraw()
		return nil, err
	}
	return withdraw, nil
}

// Close installs the rules of a target that applies nothing. Existing rules of a document stay,
// since they contain the guard.
func (a *Applier) Close(ctx context.Context, t *plan.Target) error {
	state, err := a.o.NAT.Observe(ctx)
	if err != nil {
		return fmt.Errorf("looking for the guard: %w", err)
	}
	if state.Guarded {
		return nil
	}
	return a.setRules(ctx, t)
}
