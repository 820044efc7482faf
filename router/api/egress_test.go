package api_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
)

// TestWatchPoolsAndNames checks that fields that change with every probe and query cause no event,
// and that a new state does.
func TestWatchPoolsAndNames(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	pool := func(health, why string) *isthmusv1.PoolStatus {
		return &isthmusv1.PoolStatus{Name: "p", Members: []*isthmusv1.PoolMember{{Address: "192.0.2.1", Health: health, Reason: why, Targets: []*isthmusv1.ProbeTarget{{Target: "icmp://192.0.2.9", State: "up", LastError: why}}}}}
	}
	name := func(err string, addresses ...string) *isthmusv1.NameStatus {
		return &isthmusv1.NameStatus{Name: "a.example", Addresses: addresses, LastError: err}
	}
	s.Router.SetPools(pool("healthy", ""))
	s.Router.SetNames(name("", "192.0.2.7"))
	conn := dialRole(t, s, auth.Reader)
	pools, err := isthmusv1.NewPoolServiceClient(conn).WatchPools(soon(t), &isthmusv1.WatchPoolsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	names, err := isthmusv1.NewNameServiceClient(conn).WatchNames(soon(t), &isthmusv1.WatchNamesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := func(pool, name string) {
		t.Helper()
		p, err := pools.Recv()
		if err != nil {
			t.Fatal(err)
		}
		n, err := names.Recv()
		if err != nil {
			t.Fatal(err)
		}
		health := ""
		if m := p.GetPool().GetMembers(); len(m) > 0 {
			health = m[0].GetHealth()
		}
		word := func(t isthmusv1.EventType) string { return strings.TrimPrefix(t.String(), "EVENT_TYPE_") }
		if got := fmt.Sprint(word(p.Type), " ", health); got != pool {
			t.Errorf("event %q, want %q", got, pool)
		}
		if got := fmt.Sprint(word(n.Type), " ", n.GetName().GetAddresses()); got != name {
			t.Errorf("event %q, want %q", got, name)
		}
	}
	next("ADDED healthy", "ADDED [192.0.2.7]")
	next("MARK ", "MARK []")
	s.Router.SetPools(pool("healthy", "no answer in time"))
	s.Router.SetNames(name("no answer in time", "192.0.2.7"))
	time.Sleep(100 * time.Millisecond)
	s.Router.SetPools(pool("down", "no answer in time"))
	s.Router.SetNames(name("", "192.0.2.8"))
	next("UPDATED down", "UPDATED [192.0.2.8]")
}
