package capability

import (
	"context"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/egress/takeover"
	"github.com/isthmus-net/isthmus/router/plan"
)

// Takeover takes over the public addresses of the node that shares them when that node fails.
type Takeover struct {
	Runner  *takeover.Runner
	Started time.Time
}

// Capability describes Takeover.
func (t Takeover) Capability() Capability {
	return Capability{
		Name: "takeover of public addresses", Section: "egress.takeover", Conditions: t.conditions, Run: t.Runner.Run,
		Kinds: []*condition.Kind{condition.TakeoverFailed, condition.TakeoverImpossible, condition.TakeoverNotReady, condition.TookOver},
		Jobs: []apply.Job{{
			Key: "takeover", Stage: apply.StageGuard, Part: func(t *plan.Target) any { return t.Takeover },
			Do: func(_ context.Context, target *plan.Target) error { t.Runner.Use(target.Takeover); return nil },
		}},
	}
}

func (t Takeover) conditions() (out []*isthmusv1.Condition) {
	s := t.Runner.State()
	switch {
	case s.Paths == 0:
	case t.Runner.Mover == nil:
		out = append(out, condition.TakeoverImpossible.Error(t.Started, "the document asks for a takeover of addresses, and the daemon has no program for it: start isthmusd with -mover"))
	case !s.Seen && s.Tried.IsZero():
		out = append(out, condition.TakeoverNotReady.Warning(s.Since, "the other node of the pair has not answered on any of %d paths since %s: from %s on this node takes the addresses without having seen it; look whether it runs, and at the tunnels of `egress.takeover.watch`",
			s.Paths, s.Since.UTC().Format(time.TimeOnly), s.Since.Add(takeover.Grace).UTC().Format(time.TimeOnly)))
	case s.Err != nil:
		out = append(out, condition.TakeoverFailed.Error(s.Tried, "taking the public addresses: %v; trying again", s.Err))
	case !s.Tried.IsZero():
		out = append(out, condition.TookOver.Warning(s.Tried, "the other node did not answer, and this one has taken over the public addresses of the pools"))
	}
	return out
}
