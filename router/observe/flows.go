package observe

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
)

// ErrUncounted is why flows are not counted or ended where nothing reads the connection table.
var ErrUncounted = errors.New("the connection table is not read")

// CountFlows returns how many flows under way are in each of some sets.
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
