package router

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/fault"
	"github.com/isthmus-net/isthmus/tunnel"
)

// disablable is base in block style, whose text an edit keeps.
const disablable = `
node: {name: n, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4}
tunnels:
- name: a # the first
  ipsec: {remoteAddress: 198.51.100.1, psk: k}
- {name: b, ipsec: {remoteAddress: 198.51.100.2, psk: k}}
peers:
- {name: a, tunnel: a, asn: 65001}
- {name: b, tunnel: b, asn: 65002}
staticRoutes: [{prefix: 10.7.0.0/16, tunnels: [a]}]
egress:
  pools: [{name: p, addresses: [{address: 10.9.0.5}]}]
  policies: [{name: x, sources: [10.0.0.0/8], pool: p}]
  maps: [{tunnels: [a], inside: 10.1.0.0/16, mapped: 100.64.0.0/16}]
`

func setDisabled(t *testing.T, r *Router, q *isthmusv1.SetDisabledRequest) *isthmusv1.ApplyResponse {
	t.Helper()
	a, err := r.SetDisabled(t.Context(), "tester", q)
	if err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	return a
}

// TestDisabledTunnel checks that a disabled tunnel is gone from the machine and stays so over a
// restart, that this is not an error, and that it comes back as it was.
func TestDisabledTunnel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		r, stop := m.boot(dir)
		defer func() { stop() }()
		accept(t, r, disablable)
		m.report[tunnel.KindIPsec](tunnel.State{Name: "a", Kind: tunnel.KindIPsec, Status: tunnel.Up})
		synctest.Wait()
		m.taken()
		before := m.tunnels[place{tunnel.KindIPsec, "a"}]

		plan := setDisabled(t, r, &isthmusv1.SetDisabledRequest{Tunnels: []string{"a"}, Disabled: true, DryRun: true})
		if len(plan.Changes) != 2 || plan.Generation != 1 {
			t.Fatalf("plan of generation %d: %v", plan.Generation, plan.Changes)
		}
		if c := plan.Changes[0]; c.Kind != "tunnel" || !slices.Contains(c.Fields, "disabled: false -> true") || !strings.Contains(c.Interrupts, "is shut down") {
			t.Errorf("plan: %v", c)
		}
		if c := plan.Changes[1]; c.Kind != "peer" || !strings.Contains(c.Interrupts, "the session is shut down") {
			t.Errorf("plan: %v", c)
		}
		expect(t, m)

		done := setDisabled(t, r, &isthmusv1.SetDisabledRequest{Tunnels: []string{"a"}, Disabled: true, Message: "NET-1"})
		if len(done.Changes) != 2 || done.Generation != 2 {
			t.Errorf("generation %d: %v", done.Generation, done.Changes)
		}
		expect(t, m, "bgp", "remove tunnel a")
		if !m.bgp.Peers[0].Disabled || m.bgp.Peers[1].Disabled || m.bgp.Reason != "NET-1" {
			t.Errorf("BGP has %+v", m.bgp)
		}
		if len(m.bgp.Announce) > 0 {
			t.Errorf("the mapped prefix of the tunnel is announced: %v", m.bgp.Announce)
		}
		disabled := func() {
			t.Helper()
			time.Sleep(time.Minute)
			if a := tunnelsOf(r)[0]; a.State != "disabled" || a.LastError != "disabled in the document" || len(a.Conditions) > 0 || a.Explanation != nil || a.Since == nil {
				t.Errorf("tunnel %v", a)
			}
			peers, _ := r.Peers()
			if p := peers[0]; p.State != "disabled" || p.LastError != "its tunnel a is disabled in the document" || len(p.Conditions) > 0 {
				t.Errorf("peer %v", p)
			}
			s := status(r)
			if s.GetSummary().TunnelsDisabled != 1 || s.GetSummary().TunnelsUp != 1 || s.AppliedGeneration != 2 {
				t.Errorf("status %v", s)
			}
			for _, c := range s.Conditions {
				if strings.HasSuffix(c.Object, " a") {
					t.Errorf("condition %v", c)
				}
			}
			if h := r.Health(); h["tunnel/a"] || h["peer/a"] || !h["node"] || !h["peer/b"] {
				t.Errorf("health %v", h)
			}
		}
		disabled()
		// A late report of the driver changes nothing.
		m.report[tunnel.KindIPsec](tunnel.State{Name: "a", Kind: tunnel.KindIPsec, Status: tunnel.Down})
		synctest.Wait()
		disabled()
		// The same again changes nothing.
		if again := setDisabled(t, r, &isthmusv1.SetDisabledRequest{Tunnels: []string{"a"}, Disabled: true}); again.Generation != 2 || len(again.Changes) > 0 {
			t.Errorf("again: %v", again)
		}
		stop()
		// The daemon may have ended before it removed the tunnel.
		m.tunnels[place{tunnel.KindIPsec, "a"}] = before
		r, stop = m.boot(dir)
		synctest.Wait()
		if got := m.taken(); !slices.Contains(got, "remove tunnel a") || slices.Contains(got, "tunnel a") {
			t.Errorf("after a restart: %q", got)
		}
		disabled()

		setDisabled(t, r, &isthmusv1.SetDisabledRequest{Tunnels: []string{"a"}})
		if now := m.tunnels[place{tunnel.KindIPsec, "a"}]; len(tunnel.Diff(before, now)) > 0 {
			t.Errorf("it came back as %+v, was %+v", now, before)
		}
		if a := tunnelsOf(r)[0]; a.State == "disabled" {
			t.Errorf("tunnel %v", a)
		}
		if _, _, doc, _ := r.documents.Document(0); doc != disablable {
			t.Errorf("the text is not the former one:\n%s", doc)
		}
		if h := r.o.Store.History(); h[0].Reason != "enable tunnel a" || h[1].Reason != "disable tunnel a" || h[1].Message != "NET-1" {
			t.Errorf("history %+v", h)
		}
	})
}

// TestDisabledPeer checks that a disabled peer is not an error, and that its tunnel stays.
func TestDisabledPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, disablable)
		m.taken()
		setDisabled(t, r, &isthmusv1.SetDisabledRequest{Peers: []string{"b"}, Disabled: true, Message: "bye"})
		expect(t, m, "bgp")
		if !m.bgp.Peers[1].Disabled || m.bgp.Reason != "bye" {
			t.Errorf("BGP has %+v", m.bgp)
		}
		time.Sleep(time.Minute)
		peers, _ := r.Peers()
		if p := peers[1]; p.State != "disabled" || p.LastError != "disabled in the document" || len(p.Conditions) > 0 {
			t.Errorf("peer %v", p)
		}
		if h := r.Health(); h["peer/b"] || !h["peer/a"] || !h["node"] {
			t.Errorf("health %v", h)
		}
		// An edit with a confirm timeout goes back.
		setDisabled(t, r, &isthmusv1.SetDisabledRequest{Peers: []string{"a"}, Disabled: true, ConfirmWithin: durationpb.New(time.Minute)})
		if !m.bgp.Peers[0].Disabled {
			t.Errorf("BGP has %+v", m.bgp)
		}
		time.Sleep(2 * time.Minute)
		if m.bgp.Peers[0].Disabled || !m.bgp.Peers[1].Disabled {
			t.Errorf("not confirmed: BGP has %+v", m.bgp)
		}
	})
}

// TestResetTunnel checks that a tunnel is reset by the driver of its kind, and not more often than
// its pace allows.
func TestResetTunnel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, disablable)
		m.taken()
		if err := r.ResetTunnel(t.Context(), "x"); !errors.Is(err, fault.ErrNoTunnel) {
			t.Errorf("an unknown tunnel: %v", err)
		}
		for range 3 {
			if err := r.ResetTunnel(t.Context(), "a"); err != nil {
				t.Error(err)
			}
			for range 1000 {
				if err := r.ResetTunnel(t.Context(), "a"); !errors.Is(err, fault.ErrTooSoon) {
					t.Fatalf("again: %v", err)
				}
			}
			if err := r.ResetTunnel(t.Context(), "b"); err != nil {
				t.Error(err)
			}
			expect(t, m, "reset ipsec a", "reset ipsec b")
			time.Sleep(10 * time.Second)
		}
		setDisabled(t, r, &isthmusv1.SetDisabledRequest{Tunnels: []string{"a"}, Disabled: true})
		m.taken()
		if err := r.ResetTunnel(t.Context(), "a"); !errors.Is(err, fault.ErrPrecondition) {
			t.Errorf("a disabled tunnel: %v", err)
		}
		expect(t, m)
	})
}
