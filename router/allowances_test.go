package router

import (
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/report"
)

// TestAllowances checks that packets beyond the cloud's allowances are in the metrics and in the
// status, that the condition ends by itself, and that reading the state does not read the driver.
func TestAllowances(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		var exceeded, reads atomic.Uint64
		m.allowances = func(iface string) (map[string]uint64, error) {
			if iface != "eth0" {
				t.Errorf("interface %s is not in the document", iface)
			}
			reads.Add(1)
			return map[string]uint64{"pps": exceeded.Load()}, nil
		}
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, base)
		check := func(when string, packets uint64, warns bool) {
			t.Helper()
			time.Sleep(11 * time.Second) // by the test's clock; counters are read every ten seconds
			synctest.Wait()
			before := reads.Load()
			if got, want := r.Snapshot().Allowances, []report.Allowance{{Interface: "eth0", Kind: "pps", Packets: packets}}; !slices.Equal(got, want) {
				t.Errorf("%s: got %v, want %v", when, got, want)
			}
			s, _ := r.Status()
			has := slices.ContainsFunc(s.Conditions, func(c *isthmusv1.Condition) bool {
				return c.Type == condition.NICAllowance.Name && strings.Contains(c.Message, "interface eth0: ") && strings.Contains(c.Message, "larger instance type")
			})
			if has != warns {
				t.Errorf("%s: conditions %v", when, s.Conditions)
			}
			if reads.Load() != before {
				t.Errorf("%s: the driver was read for a snapshot", when)
			}
		}
		check("at the start", 0, false)
		exceeded.Store(3)
		check("beyond the allowance", 3, true)
		time.Sleep(2 * time.Minute)
		check("later", 3, false)
	})
}
