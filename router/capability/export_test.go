package capability

import (
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/event/export"
)

// TestExportFailing checks that a receiver that has failed once is not reported, and another one
// with its error.
func TestExportFailing(t *testing.T) {
	at := time.Unix(1_800_000_000, 0)
	once, often := export.State{Failures: 1, Error: "x"}, export.State{Failures: 2, Since: at, Error: "connection refused"}
	once.Name, often.Name = "once", "often"
	all := failing([]export.State{{}, once, often})
	if len(all) != 1 || all[0].Object != "export often" || !all[0].Since.AsTime().Equal(at) || !strings.Contains(all[0].Message, "do not reach often of `events.export`: connection refused") {
		t.Errorf("%v", all)
	}
}
