package capability

import (
	"context"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/door"
	"github.com/isthmus-net/isthmus/router/plan"
)

// Metrics serves the metrics of the node at inside addresses.
func Metrics(d *door.Doors) Capability {
	return Capability{
		Name: "metrics over plain HTTP", Section: "metrics", Run: d.Run,
		Jobs: []apply.Job{{
			// After the rules, which decide who reaches it.
			Key: "metrics", Stage: apply.StageForward, Part: func(t *plan.Target) any { return t.NAT.Metrics },
			Do: func(_ context.Context, t *plan.Target) error { d.Set(t.NAT.Metrics); return nil },
		}},
		Kinds: []*condition.Kind{condition.MetricsDown},
		Conditions: func() []*isthmusv1.Condition {
			at, err, since, n := d.Shut()
			if n == 0 || time.Since(since) < deafTold {
				return nil
			}
			return []*isthmusv1.Condition{condition.MetricsDown.Warning(since, "the metrics are not served at %d of their addresses, the first one %v: %s: the address must be one of this node, and no other program may use the port", n, at, err)}
		},
	}
}
