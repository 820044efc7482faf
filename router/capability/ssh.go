package capability

import (
	"context"

	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/plan"
)

// SSH gives the keys of the document to the machine's SSH server. set replaces the accepted keys.
func SSH(set func(keys []string) error) Capability {
	return Capability{
		Name: "keys of the SSH server", Section: "access.ssh_keys",
		Jobs: []apply.Job{{
			Key: "ssh", Stage: apply.StageForward, Always: true, Part: func(t *plan.Target) any { return t.SSHKeys },
			Do: func(_ context.Context, t *plan.Target) error { return set(t.SSHKeys) },
		}},
	}
}
