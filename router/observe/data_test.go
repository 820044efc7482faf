package observe

import (
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/bell"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/liveness"
)

// table records which interfaces routes may use.
type table struct {
	FIB
	alive map[string]bool
}

func (t *table) SetAlive(h fib.NextHop, alive bool) { t.alive[h.Interface] = alive }

func observer(tunnels ...tunnel.Config) (*Observer, *table) {
	t := &table{alive: map[string]bool{}}
	o := New(Options{FIB: t, Bell: &bell.Bell{}, Log: slog.New(slog.DiscardHandler), Nudge: func(...string) {}})
	o.Use(nil, plan.Target{Tunnels: tunnels})
	return o, t
}

func (o *Observer) state(name string) (s tunnel.State) {
	o.Read(func(seen *State) { s = seen.Tunnels[name] })
	return s
}

// TestSilence checks that a tunnel without data leaves its routes, and comes back with its data.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, routes := observer(tunnel.Config{Name: "a", Interface: "t-a", IPsec: &tunnel.IPsec{}})
		up := time.Now()
		o.Changed(tunnel.State{Name: "a", Kind: tunnel.KindIPsec, Status: tunnel.Up, Since: up})
		report := func(s tunnel.Silence) {
			time.Sleep(time.Second)
			o.setData(map[string]liveness.Report{"a": {Counters: liveness.Counters{Index: 3, RxPackets: 7}, Silence: s, Probe: "answered"}, "gone": {}})
		}
		want := func(status tunnel.Status, alive bool, reason tunnel.Reason, since time.Time) {
			t.Helper()
			s := o.state("a")
			if s.Status != status || routes.alive["t-a"] != alive || s.Failure.Reason != reason || (s.LastError == "") != (reason == "") || !s.Since.Equal(since) || o.down()["t-a"] == alive {
				t.Errorf("%+v, alive %v", s, routes.alive["t-a"])
			}
		}
		want(tunnel.Up, true, "", up)
		report(tunnel.Silence{})
		want(tunnel.Up, true, "", up)
		if s := o.state("a"); s.RxPackets != 7 || s.Answers != "answered" {
			t.Errorf("%+v", s)
		}
		report(tunnel.Silence{Since: up, Sent: 3, Inbound: true})
		silent := time.Now()
		want(tunnel.Suspect, false, tunnel.NoData, silent)
		report(tunnel.Silence{Since: up, Sent: 4, Inbound: true})
		want(tunnel.Suspect, false, tunnel.NoData, silent)
		// a state that the driver reads again changes nothing
		o.Changed(tunnel.State{Name: "a", Kind: tunnel.KindIPsec, Status: tunnel.Up, Since: up})
		want(tunnel.Suspect, false, tunnel.NoData, silent)
		report(tunnel.Silence{Since: up, Sent: 9})
		want(tunnel.Suspect, false, tunnel.OneWay, silent)
		report(tunnel.Silence{})
		want(tunnel.Up, true, "", time.Now())
		report(tunnel.Silence{Since: up, Inbound: true})
		// The reason of the driver has precedence.
		o.Changed(tunnel.State{Name: "a", Kind: tunnel.KindIPsec, Status: tunnel.Down, Since: up, LastError: "x", Failure: tunnel.Failure{Reason: tunnel.PeerLost}})
		want(tunnel.Down, false, tunnel.PeerLost, up)
		o.Changed(tunnel.State{Name: "a", Kind: tunnel.KindIPsec, Status: tunnel.Up, Since: time.Now()})
		want(tunnel.Up, true, "", time.Now()) // new keys begin without the silence of former ones
	})
}

// TestDeadPeer checks that a WireGuard peer that is gone is down after twice the keepalive and 5 s,
// although its keys are valid for 180 s, and that one which still has handshakes is suspect.
func TestDeadPeer(t *testing.T) {
	for keepalive, limit := range map[time.Duration]time.Duration{10 * time.Second: 25 * time.Second, 25 * time.Second: 55 * time.Second, time.Second: 15 * time.Second, 0: 55 * time.Second} {
		for _, handshakes := range []bool{false, true} {
			t.Run(fmt.Sprint(keepalive, " ", handshakes), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					o, routes := observer(tunnel.Config{Name: "w", Interface: "t-w", WireGuard: &tunnel.WireGuard{Keepalive: keepalive}})
					up := time.Now()
					state := tunnel.State{Name: "w", Kind: tunnel.KindWireGuard, Status: tunnel.Up, Since: up, Keyed: up, Remote: netip.MustParseAddrPort("192.0.2.1:5")}
					o.Changed(state)
					for at := time.Second; at < 100*time.Second; at += time.Second {
						time.Sleep(time.Second)
						if handshakes {
							state.Keyed = time.Now()
							o.Changed(state)
						}
						o.setData(map[string]liveness.Report{"w": {Silence: tunnel.Silence{Since: up, Sent: 3, Inbound: true}}})
						want := tunnel.Suspect
						if at >= limit && !handshakes {
							want = tunnel.Down
						}
						if s := o.state("w"); s.Status != want || routes.alive["t-w"] {
							t.Fatalf("after %v: %+v", at, s)
						}
					}
				})
			})
		}
	}
}

// TestTalks checks for which tunnels missing packets of a BGP session are a proof.
func TestTalks(t *testing.T) {
	o, _ := observer()
	peer := func(name string, passive bool) bgp.Peer {
		return bgp.Peer{Name: name, Tunnel: name, Keepalive: 10 * time.Second, Passive: passive}
	}
	var tunnels []tunnel.Config
	for _, name := range []string{"active", "passive", "idle", "up", "none"} {
		tunnels = append(tunnels, tunnel.Config{Name: name, Probe: tunnel.ProbeAuto})
	}
	o.Use(nil, plan.Target{Tunnels: tunnels, BGP: bgp.Config{Peers: []bgp.Peer{peer("active", false), peer("passive", true), peer("idle", false), peer("up", true)}}})
	for name, state := range map[string]bgp.SessionState{"active": bgp.Active, "passive": bgp.Active, "idle": bgp.Idle, "up": bgp.Established, "gone": bgp.Established} {
		o.Peer(bgp.PeerState{Name: name, State: state})
	}
	for _, g := range o.dataTargets() {
		if talks := g.Talks == 10*time.Second; talks != (g.Name == "active" || g.Name == "up") || g.Up || g.Probe != tunnel.ProbeAuto {
			t.Errorf("%+v", g)
		}
	}
	o.Use(nil, plan.Target{})
	if len(o.sessions) != 0 {
		t.Errorf("sessions of former peers are kept: %v", o.sessions)
	}
}
