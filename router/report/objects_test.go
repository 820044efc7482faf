package report

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/isthmus-net/isthmus/bgp"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
)

// TestTunnelConditions checks that each state that is not good has a condition with the remedy.
func TestTunnelConditions(t *testing.T) {
	now := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	explained := &isthmusv1.Explanation{What: "no answer", Cause: "filtered", Remedy: "let it pass", Since: timestamppb.New(now)}
	for name, tt := range map[string]struct {
		state    string
		explain  *isthmusv1.Explanation
		err      string
		lost     time.Duration // ago; 0: it is up
		want     string
		severity string
	}{
		"up":               {"up", nil, "", 0, "", ""},
		"not renewed":      {"up", explained, "x", 0, "TunnelDegraded no answer; filtered; let it pass", "warning"},
		"suspect":          {"suspect", explained, "x", time.Second, "TunnelSuspect no answer; filtered; let it pass", "error"},
		"down for long":    {"down", explained, "x", time.Minute, "TunnelDown no answer; filtered; let it pass", "error"},
		"down for a while": {"down", explained, "x", lostFor - 1, "", ""},
		"connecting":       {"connecting", nil, "", time.Minute, "TunnelDown the tunnel is connecting", "error"},
		"dead":             {"dead", nil, "both wait", time.Minute, "TunnelDown both wait", "error"},
		"unknown, was up":  {"unknown", nil, "", 0, "", ""},
		"never seen":       {"unknown", nil, "", time.Minute, "TunnelDown the tunnel is unknown", "error"},
	} {
		var lost time.Time
		if tt.lost != 0 {
			lost = now.Add(-tt.lost)
		}
		got := tunnelConditions(&isthmusv1.TunnelStatus{State: tt.state, LastError: tt.err, Explanation: tt.explain, Since: timestamppb.New(now)}, lost, now)
		text, severity := "", ""
		if len(got) == 1 {
			text, severity = got[0].Type+" "+got[0].Message, got[0].Severity
		}
		if len(got) > 1 || text != tt.want || severity != tt.severity {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestPeerConditions(t *testing.T) {
	now := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	for name, tt := range map[string]struct {
		state     bgp.PeerState
		passive   bool
		lost      time.Duration
		noTunnel  bool
		want      string // types with severities
		mentioned string
	}{
		"established":           {bgp.PeerState{State: bgp.Established, LastError: "of the past"}, false, 0, false, "", ""},
		"held back":             {bgp.PeerState{State: bgp.Established, HeldBack: 3}, false, 0, false, "PrefixesHeldBack warning", "3 prefixes"},
		"limit":                 {bgp.PeerState{State: bgp.PrefixLimit, NextTry: now}, false, time.Hour, false, "PrefixLimit error", "more than 7 prefixes"},
		"quarantined":           {bgp.PeerState{State: bgp.Quarantined, QuarantineReason: "it crashed"}, false, time.Hour, false, "Quarantined error", "reset peer p"},
		"for a moment":          {bgp.PeerState{State: bgp.Active}, false, lostFor - 1, false, "", ""},
		"active":                {bgp.PeerState{State: bgp.Active, LastError: "connection refused"}, false, time.Minute, false, "SessionDown error", "connection refused; the session with 169.254.1.1 port 179 is active"},
		"passive":               {bgp.PeerState{State: bgp.Active}, true, time.Minute, false, "SessionDown error", "waits for the peer to connect from 169.254.1.1"},
		"opensent":              {bgp.PeerState{State: bgp.OpenSent}, false, time.Minute, false, "SessionDown error", "in state opensent"},
		"no tunnel":             {bgp.PeerState{State: bgp.Active}, false, time.Minute, true, "SessionDown warning", "tunnel t is not up"},
		"restarts":              {bgp.PeerState{State: bgp.Active, Restarting: true}, false, time.Minute, false, "SessionDown warning", "restarts gracefully"},
		"process down":          {bgp.PeerState{State: bgp.Unknown}, false, time.Minute, false, "SessionDown error", "process does not run"},
		"process down, was up":  {bgp.PeerState{State: bgp.Unknown}, false, 0, false, "", ""},
		"held back and lost it": {bgp.PeerState{State: bgp.Idle, HeldBack: 1}, false, time.Minute, false, "PrefixesHeldBack warning, SessionDown error", ""},
	} {
		c := bgp.Peer{Name: "p", Tunnel: "t", Address: netip.MustParseAddr("169.254.1.1"), ASN: 65001, MaxPrefixes: 7, Passive: tt.passive}
		var lost time.Time
		if tt.lost != 0 {
			lost = now.Add(-tt.lost)
		}
		var kinds, texts []string
		for _, one := range peerConditions(c, tt.state, lost, now, !tt.noTunnel) {
			kinds, texts = append(kinds, one.Type+" "+one.Severity), append(texts, one.Message)
		}
		if strings.Join(kinds, ", ") != tt.want || !strings.Contains(strings.Join(texts, "\n"), tt.mentioned) {
			t.Errorf("%s: %v %q", name, kinds, texts)
		}
	}
}

// TestLimited checks the bound of the conditions in a status, and that the rest is counted.
func TestLimited(t *testing.T) {
	var all []*isthmusv1.Condition
	for i := range 2000 {
		c := condition.TunnelDown.Error(time.Time{}, "down")
		c.Object = fmt.Sprint("tunnel ", i)
		all = append(all, c)
	}
	all = append(all, condition.ClockWrong.Error(time.Time{}, "wrong"))
	got := limited(all)
	if len(got) != maxObjects+1 || !strings.Contains(got[maxObjects-1].Message, "and 1980 more have the condition TunnelDown") || got[maxObjects].Type != "ClockWrong" {
		t.Errorf("%d conditions: %v", len(got), got[len(got)-2:])
	}
	if all[maxObjects-1].Message != "down" {
		t.Error("the condition of the object has changed")
	}
}
