package observe

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
)

// ErrUncounted means that the daemon does not read the connection table, so that flows cannot be
// counted or ended.
var ErrUncounted = errors.New("the connection table is not read")

// CountFlows returns the number of established flows in each of some sets.
func CountFlows(ctx context.Context, flows Flows, sets []nat.Ending) ([]int, error) {
	if flows == nil {
		return nil, ErrUncounted
	}
	counts := make([]int, len(sets))
	err := flows.Dump(ctx, unix.AF_UNSPEC, func(f *conntrack.Flow) bool {
		if f.UnderWay() {
			t := f.Track()
			for i := range sets {
				if sets[i].Has(t) {
					counts[i]++
				}
			}
		}
		return true
	})
	return counts, err
}
