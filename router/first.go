package router

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// FirstBoot is the author of the document that came with the machine's user-data. A client's name has no space.
const FirstBoot = "first boot"

// awaits says whether secrets that a document names may come later. User-data has no secrets, and those are set over the API when the document is there already.
func awaits(rev store.Revision) bool { return rev.Author == FirstBoot }

// CheckFirst says what is wrong with a text as the first document; an error that is spec.Problems is about the text.
func (r *Router) CheckFirst(ctx context.Context, text string) error {
	d, problems := spec.Decode([]byte(text))
	_, _, _, problems, err := r.planNew(ctx, source{doc: d, problems: problems, text: text, awaits: true}, r.basis())
	if err == nil && len(problems) > 0 {
		err = problems
	}
	return err
}

// ApplyFirst makes a text the first document, as Apply does. Secrets that it names may be missing: what uses them is made when they are set. With another
// document accepted meanwhile, the error wraps store.ErrStale.
func (r *Router) ApplyFirst(ctx context.Context, text string) (uint64, error) {
	d, problems := spec.Decode([]byte(text))
	none := uint64(0)
	generation, _, err := r.accept(ctx, source{doc: d, problems: problems, text: text, awaits: true}, &none, 0, FirstBoot, "user-data")
	return generation, err
}

// Generation returns the number of the newest accepted document; 0: there has never been one.
func (r *Router) Generation() uint64 { return r.basis().present.Generation }

// SetFirstAccess says which sources may reach the API as long as the document names none. It returns before the rules are in the kernel.
func (r *Router) SetFirstAccess(ctx context.Context, api []netip.Prefix) error {
	r.first.Store(&api)
	r.mu.Lock()
	r.version++ // what was planned before has the former access
	without := r.spec == nil
	if without {
		d, _ := spec.Decode([]byte(r.present.Text))
		r.closed = plan.Nothing(r.machine(), spec.AccessOf(d.Message)).NAT
		if r.present.Text == "" {
			r.target.NAT = r.closed
		}
	}
	r.mu.Unlock()
	if without {
		r.work.again("nat")
		return nil
	}
	return r.planAgain(ctx)
}

// SetFacts says what the platform says of addresses now, and carries the present document out with it. When the document cannot be used with it, what runs stays as it is,
// and the error says why.
func (r *Router) SetFacts(ctx context.Context, p spec.Platform) error {
	former := r.facts.Swap(&p)
	if reflect.DeepEqual(*former, p) && !r.unplanned.Load() {
		return nil
	}
	r.mu.Lock()
	r.version++ // what was planned before has the former facts
	r.mu.Unlock()
	err := r.planAgain(ctx)
	r.unplanned.Store(err != nil)
	return err
}

// maxMissing is how many secrets that are not stored have a condition of their own.
const maxMissing = 20

// secretConditions tells of secrets that the document names and that are not stored. It needs the lock.
func (r *Router) secretConditions() (out []*isthmusv1.Condition) {
	if r.spec == nil || !awaits(r.carried()) {
		return nil
	}
	more := 0
	for _, u := range r.spec.Secrets {
		if _, err := r.Store.Ref(u.Name); !errors.Is(err, secret.ErrNotFound) {
			continue
		}
		if len(out) >= maxMissing {
			more++
			continue
		}
		out = append(out, &isthmusv1.Condition{Type: "SecretMissing", Severity: "error", Since: stamp(r.present.Time),
			Message: fmt.Sprintf("%s: secret %s is not stored, and what uses it waits for it: `isthmus secret set %s`", u.Path, u.Name, u.Name)})
	}
	if more > 0 {
		out[maxMissing-1].Message += fmt.Sprintf("; and %d more secrets are missing", more)
	}
	return out
}
