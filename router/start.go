package router

import (
	"context"
	"fmt"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// A generation that ends the daemon while it is carried out must not end it at every start: after so many starts that did not come to its
// end, the one before it is carried out in its place, and after as many more that did not come to the end of that, nothing is.
const (
	startsOf       = 2
	startsWithBack = 2
)

// begin notes that this start is about to carry out the present generation, and says how that has gone until now. The note is on disk before
// the document is read. A disk that takes no note keeps no router from routing.
func (r *Router) begin() store.Carry {
	c := r.Store.Carry()
	generation := r.present.Generation
	if c.Carried == generation {
		return store.Carry{Carried: generation}
	}
	if c.Trying != generation {
		c.Trying, c.Starts, c.Back = generation, 0, false
	}
	next := c
	if !c.Back {
		next.Starts++
	}
	if err := r.Store.SetCarry(next); err != nil {
		r.Log.Warn("noting that a generation is carried out failed; if it ends the daemon, that is tried again at each start", "generation", generation, "err", err)
	}
	return c
}

// startBack carries out the newest generation that was carried out before, in place of the present one, under which the daemon died again
// and again, or nothing.
func (r *Router) startBack(c store.Carry) error {
	r.dying = true
	r.Log.Error("the present generation is not carried out: the daemon has died under it again and again", "generation", r.present.Generation, "starts", c.Starts, "carried out before", c.Carried)
	// An operator who is locked out waits for this.
	r.revertIfDue(time.Now(), plan.Target{})
	if r.spec != nil || c.Carried == 0 || c.Starts >= startsOf+startsWithBack && !c.Back {
		return nil
	}
	old, err := r.Store.Revision(c.Carried)
	if err != nil {
		r.Log.Error("nothing is carried out, since the generation before cannot be read", "err", err)
		return nil
	}
	d, problems := spec.Decode([]byte(old.Text))
	s, target, ledger, problems, err := r.plan(context.Background(), d, problems, r.present.Ledger, awaits(old))
	if err != nil {
		return err
	}
	if len(problems) > 0 {
		r.Log.Error("nothing is carried out, since the generation before cannot be used", "generation", old.Generation, "err", problems)
		return nil
	}
	r.held = &old
	r.use(s, target, ledger)
	return nil
}

// came notes that everything that was wanted has been tried once, with success or not.
func (r *Router) came() {
	r.mu.Lock()
	c := store.Carry{Carried: r.present.Generation}
	switch {
	case r.spec == nil || r.Safe || r.work.has("document"):
		r.mu.Unlock()
		return
	case r.held != nil:
		c = r.Store.Carry()
		c.Back = true
	case r.unstored != nil:
		c = store.Carry{Carried: r.present.RevertTo, Trying: r.present.Generation, Back: true}
	}
	r.mu.Unlock()
	if err := r.Store.SetCarry(c); err != nil {
		r.Log.Warn("noting that a generation was carried out failed", "generation", c.Carried, "err", err)
	}
}

// noteCarried notes after each pass how far carrying out has come, until ctx is done. A daemon that is stopped has not died.
func (r *Router) noteCarried(ctx context.Context) error {
	for {
		select {
		case <-r.passes:
			r.came()
		case <-ctx.Done():
			if c := r.Store.Carry(); c.Trying != 0 && !c.Back && c.Starts > 0 {
				c.Starts--
				if err := r.Store.SetCarry(c); err != nil {
					r.Log.Warn("noting that the daemon was stopped failed", "err", err)
				}
			}
			return nil
		}
	}
}

// startConditions tells why less is carried out than the present document says. It needs the lock.
func (r *Router) startConditions() []*isthmusv1.Condition {
	switch {
	case r.Safe:
		return []*isthmusv1.Condition{{Type: "SafeStart", Severity: "error", Since: stamp(r.started),
			Message: "the daemon was started with -safe and carries nothing out; what runs stays as it is: apply a document or `isthmus rollback`, then start it without -safe"}}
	case r.dying:
		instead := "nothing is carried out, and what runs stays as it is"
		if r.held != nil {
			instead = fmt.Sprintf("generation %d is carried out in its place", r.held.Generation)
		}
		return []*isthmusv1.Condition{{Type: "GenerationHeldBack", Severity: "error", Since: stamp(r.started),
			Message: fmt.Sprintf("the daemon died again and again while it carried out generation %d, and %s: apply another document, or `isthmus rollback`", r.present.Generation, instead)}}
	}
	return nil
}
