package report

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
)

// speaker is a BGP process with certain peers and paths.
type speaker struct {
	idle
	peers []bgp.PeerState
	page  bgp.Page
	err   error
	asked netip.Prefix
}

func (s *speaker) Peers() []bgp.PeerState { return s.peers }

func (s *speaker) List(context.Context, bgp.Query) (bgp.Page, error) { return s.page, s.err }

func (s *speaker) LookUp(_ context.Context, p netip.Prefix) (bgp.Page, error) {
	s.asked = p
	return s.page, s.err
}

// table is a forwarding table with certain routes.
type table []fib.RouteState

func (t table) Routes() []fib.RouteState { return slices.Clone(t) }
func (t table) Installed(fib.Key) bool   { return false }
func (t table) Count() fib.Counts        { return fib.Counts{} }

func TestPaths(t *testing.T) {
	prefix := netip.MustParsePrefix
	peers := []bgp.Peer{
		{Name: "a", Interface: "ist1", Address: netip.MustParseAddr("169.254.0.1")},
		{Name: "b", Interface: "ist2", Address: netip.MustParseAddr("169.254.0.2")},
	}
	a, b := fib.NextHop{Interface: "ist1", Gateway: peers[0].Address}, fib.NextHop{Interface: "ist2", Gateway: peers[1].Address}
	routes := table{
		{Key: fib.Main(prefix("10.0.0.0/8")), Source: fib.BGP, NextHops: []fib.NextHop{a, b}, Alive: []fib.NextHop{a}, Installed: true},
		{Key: fib.Main(prefix("10.1.0.0/16")), Source: fib.BGP, NextHops: []fib.NextHop{a}, Alive: []fib.NextHop{a}, Takes: &fib.Reserved{Key: fib.Main(prefix("10.1.0.1/32")), Why: "an address of this node"}},
		{Key: fib.Main(prefix("10.2.0.0/16")), Source: fib.Static, NextHops: []fib.NextHop{b}, Alive: []fib.NextHop{b}, Installed: true},
		{Key: fib.Main(prefix("10.3.0.0/16")), Source: fib.BGP, NextHops: []fib.NextHop{a}, Alive: []fib.NextHop{a}},
	}
	entry := func(p, peer string) bgp.Entry {
		return bgp.Entry{Prefix: prefix(p), Used: true, Attributes: bgp.Attributes{
			Peer: peer, NextHop: netip.MustParseAddr("192.0.2.1"), ASPath: []uint32{65001, 65002}, Origin: 2, MED: new(uint32(0)), Communities: []uint32{65001<<16 | 7, 0xffffff01, 0xffffff02},
			Large: [][3]uint32{{65001, 1, 2}}, RouterID: netip.MustParseAddr("1.1.1.1"), At: time.Unix(1_000_000, 0), Stale: true,
		}}
	}
	unused, refused := entry("10.0.0.0/8", "b"), entry("192.168.0.0/16", "a")
	unused.Used, unused.Reason, unused.Text, unused.Winner = false, bgp.ByMED, "a higher MED", "a"
	refused.Used, refused.Refused, refused.Reason, refused.Text = false, true, bgp.NotAllowed, "not allowed"
	s := &speaker{page: bgp.Page{Start: 7, More: true, Entries: []bgp.Entry{
		entry("10.0.0.0/8", "a"), entry("10.0.0.0/8", "b"), entry("10.1.0.0/16", "a"), entry("10.2.0.0/16", "a"), entry("10.3.0.0/16", "a"), entry("10.4.0.0/16", "a"), entry("10.5.0.0/16", ""), unused, refused,
	}}}
	observed := observer(t, machine{}, nat.Config{})
	observed.Use(nil, plan.Target{BGP: bgp.Config{Peers: peers}})
	r := New(Options{Observed: observed, BGP: s, Tables: s, FIB: routes})

	out, next, err := r.Paths(t.Context(), bgp.Query{Peer: "a", View: bgp.Received})
	if err != nil || next.Start != 7 || next.After != prefix("192.168.0.0/16") {
		t.Fatalf("%v, next %+v", err, next)
	}
	var got []string
	for _, p := range out.Paths {
		got = append(got, fmt.Sprintf("%s %s %s %s", p.Prefix, p.Peer, p.State, p.Reason))
	}
	if want := []string{
		"10.0.0.0/8 a used ", "10.0.0.0/8 b unused dead", "10.1.0.0/16 a unused withheld", "10.2.0.0/16 a unused static", "10.3.0.0/16 a unused not-installed",
		"10.4.0.0/16 a unused changing", "10.5.0.0/16  used ", "10.0.0.0/8 b unused med", "192.168.0.0/16 a refused not-allowed",
	}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if p := out.Paths[0]; p.NextHop != "192.0.2.1" || p.AsPath != "65001 65002" || p.Origin != "INCOMPLETE" || *p.Med != 0 || p.LocalPreference != nil || !slices.Equal(p.Communities, []string{"65001:7", "NO_EXPORT", "NO_ADVERTISE"}) ||
		!slices.Equal(p.LargeCommunities, []string{"65001:1:2"}) || p.RouterId != "1.1.1.1" || p.Since.AsTime().Unix() != 1_000_000 || !p.Stale {
		t.Errorf("attributes %v", p)
	}
	if !strings.Contains(out.Paths[2].Why, "10.1.0.1, an address of this node") {
		t.Errorf("withheld: %q", out.Paths[2].Why)
	}
	if _, why := kernelUse(routes[0], []fib.NextHop{a}, true); why == "" {
		t.Error("an outranked route is used")
	}
	sent, _, err := r.Paths(t.Context(), bgp.Query{Peer: "a", View: bgp.Advertised, After: prefix("10.0.0.0/8")})
	if err != nil || sent.Paths[0].State != "sent" || len(sent.Notes) > 0 {
		t.Errorf("%v, %v", err, sent)
	}

	// Destinations.
	for destination, want := range map[string]string{"10.1.0.1/32": "10.0.0.0/8", "10.2.0.1/32": "10.2.0.0/16", "10.1.0.0/16": "10.1.0.0/16", "192.168.0.0/16": ""} {
		out, err := r.LookUp(t.Context(), prefix(destination))
		if err != nil || out.GetRoute().GetPrefix() != want || want != "" && s.asked != prefix(want) {
			t.Errorf("to %s: %v, %v", destination, err, out.GetRoute())
		}
		if noted := strings.Contains(strings.Join(out.GetNotes(), " "), "10.1.0.0/16 is a longer match"); noted != (destination == "10.1.0.1/32") {
			t.Errorf("to %s: notes %q", destination, out.GetNotes())
		}
	}
	s.page.Offers = []bgp.Offer{{Peer: "a"}, {Peer: "b", Reason: bgp.PeerLoop, Text: "why"}}
	if out, err := r.LookUp(t.Context(), prefix("10.2.0.0/16")); err != nil || len(out.Offers) != 2 || !out.Offers[0].Announced ||
		!proto.Equal(out.Offers[1], &isthmusv1.PathOffer{Peer: "b", Reason: "peer-as", Why: "why"}) {
		t.Errorf("offers: %v, %v", err, out.GetOffers())
	}
	s.page = bgp.Page{}
	if _, err := r.LookUp(t.Context(), prefix("192.168.0.0/16")); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("nothing: %v", err)
	}
	s.err = fmt.Errorf("looking up: %w", bgp.ErrNotRunning)
	if out, err := r.LookUp(t.Context(), prefix("10.2.0.0/16")); err != nil || out.Route == nil || len(out.Notes) != 1 {
		t.Errorf("a static route without BGP: %v, %v", err, out)
	}
	if _, err := r.LookUp(t.Context(), prefix("192.168.0.0/16")); !errors.Is(err, bgp.ErrNotRunning) {
		t.Errorf("nothing without BGP: %v", err)
	}
}

func TestPathNotes(t *testing.T) {
	s := &speaker{peers: []bgp.PeerState{
		{Name: "a", State: bgp.Established},
		{Name: "b", State: bgp.PrefixLimit, Filtered: bgp.Filtered{Withdrawn: 3, Note: "ORIGIN 7"}},
		{Name: "c", State: bgp.Active, Restarting: true},
	}}
	r := New(Options{BGP: s})
	for peer, want := range map[string][]string{
		"a": nil,
		"b": {"the session is prefix-limit, so that no paths are exchanged", "3 UPDATE messages of the peer were malformed and taken as withdrawals (RFC 7606), since the daemon was started; the last one: ORIGIN 7"},
		"c": {"the session is active; the paths are kept"},
		"d": nil,
	} {
		got := r.pathNotes(bgp.Query{Peer: peer, View: bgp.Received})
		if !slices.EqualFunc(got, want, strings.HasPrefix) {
			t.Errorf("%s: %q", peer, got)
		}
	}
	var none *isthmusv1.ListPathsResponse
	if out, _, err := r.Paths(t.Context(), bgp.Query{}); !errors.Is(err, bgp.ErrNotRunning) || out != none {
		t.Errorf("without tables: %v", err)
	}
}
