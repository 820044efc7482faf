package report

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
)

// TestTransitOutranked checks that a default route for forwarded packets is outranked by that of
// the machine unless the kernel has the rules that send them to it.
func TestTransitOutranked(t *testing.T) {
	all := netip.MustParsePrefix("0.0.0.0/0")
	route := fib.RouteState{Key: fib.Main(all), Source: fib.BGP, NextHops: []fib.NextHop{{Interface: "t-a"}}, Alive: []fib.NextHop{{Interface: "t-a"}}, Installed: true, Transit: true}
	for _, rules := range []bool{true, false} {
		seen := fib.Surroundings{Routes: []fib.Foreign{{Table: fib.TableMain, Prefix: all, Interface: "wan", Metric: 100}}, Transit: [2]bool{rules, true}}
		observed := observer(t, around{seen: seen}, nat.Config{})
		observed.Use(nil, plan.Target{Underlay: spec.Underlay{Interface: "wan", Transit: true}})
		observed.ReadMachine()
		r := New(Options{Observed: observed, FIB: installed{table{route}}})
		if c := r.outranked(); (c == nil) != rules {
			t.Errorf("rules %v: %v", rules, c)
		}
		if c := r.routes()[0].Conditions; (len(c) == 0) != rules || !rules && !strings.Contains(c[0].Message, "by interface wan") {
			t.Errorf("rules %v: %v", rules, c)
		}
	}
}

// around is a machine with routes.
type around struct {
	machine
	seen fib.Surroundings
}

func (a around) Surroundings() (fib.Surroundings, error) { return a.seen, nil }

// installed is a table whose routes are in the kernel.
type installed struct{ table }

func (installed) Installed(fib.Key) bool { return true }
