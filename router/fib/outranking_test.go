package fib

import (
	"log/slog"
	"net/netip"
	"testing"
)

// TestOutranking checks which routes of the machine take the packets of a route of isthmus.
func TestOutranking(t *testing.T) {
	p := netip.MustParsePrefix
	s := Surroundings{Routes: []Foreign{
		{Table: TableMain, Prefix: p("0.0.0.0/0"), Interface: "wan", Metric: 100},
		{Table: TableMain, Prefix: p("0.0.0.0/0"), Interface: "mgmt", Metric: 50},
		{Table: TableMain, Prefix: p("10.0.0.0/8"), Interface: "wan", Metric: Metric},
		{Table: TableDefault, Prefix: p("10.1.0.0/16"), Interface: "wan"},
	}}
	got := s.Outranking()
	if len(got) != 1 || got[p("0.0.0.0/0")].Interface != "mgmt" {
		t.Errorf("%v", got)
	}
}

// TestCount counts routes that are installed and withheld.
func TestCount(t *testing.T) {
	p := netip.MustParsePrefix
	f := New(nil, slog.New(slog.DiscardHandler))
	f.SetReserved(covered([]netip.Addr{netip.MustParseAddr("203.0.113.7")}))
	f.Update([]Route{
		{Key: Main(p("10.0.0.0/8")), NextHops: []NextHop{{Interface: "t-a"}}},
		{Key: Main(p("203.0.113.0/24")), NextHops: []NextHop{{Interface: "t-a"}}},
	})
	if c := f.Count(); c != (Counts{Routes: 2, Withheld: 1}) {
		t.Errorf("%+v", c)
	}
}
