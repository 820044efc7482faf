package capability

import (
	"context"

	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/plan"
)

// Transit has the default routes of tunnels for forwarded packets alone. table has the routes, and
// rules are the machine's routing rules.
func Transit(table interface{ SetTransit(bool) }, rules interface{ RouteTransit(bool) error }) Capability {
	return Capability{
		Name: "default route of forwarded packets", Section: "underlay.defaultRoute",
		Jobs: []apply.Job{{
			Key: "transit", Stage: apply.StageRoutes, Part: func(t *plan.Target) any { return t.Underlay.Transit },
			Do: func(_ context.Context, t *plan.Target) error {
				table.SetTransit(t.Underlay.Transit)
				return rules.RouteTransit(t.Underlay.Transit)
			},
		}},
	}
}
