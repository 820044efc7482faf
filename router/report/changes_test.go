package report

import (
	"fmt"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/router/plan"
)

// TestPlanIsBounded: an answer neither lists any number of changes nor repeats long lists.
func TestPlanIsBounded(t *testing.T) {
	changes := make([]plan.Change, 100_000)
	for i := range changes {
		changes[i] = plan.Change{Action: plan.Modify, Kind: "policy", Name: fmt.Sprint("p", i), Fields: []string{"sources: " + strings.Repeat("10.0.0.0/8 ", 10)}}
	}
	out := changeMessages(changes)
	if n := len(out); n != maxChanges+1 || out[n-1].Name != "and 80000 more, which are not listed" {
		t.Errorf("%d changes, the last is %v", n, out[n-1])
	}
	changes[0].Fields[0] = "sources: " + strings.Repeat("10.0.0.0/8 ", 1<<20) + "-> end"
	if f := changeMessages(changes[:1])[0].Fields[0]; len(f) > maxFieldBytes+10 || !strings.HasSuffix(f, "-> end") || !strings.HasPrefix(f, "sources: ") {
		t.Errorf("a field has %d bytes", len(f))
	}
	long := []string{strings.Repeat("x", maxFieldBytes), strings.Repeat("y", maxFieldBytes)}
	for i := range changes {
		changes[i].Fields = long
	}
	if n := len(changeMessages(changes)); n > maxChangeBytes/maxFieldBytes {
		t.Errorf("%d changes of 2 KiB each", n)
	}
}
