package router

import (
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Ring: fake. The API returns the drivers' reports in the terms of the document.

const clouds = `node: {name: n, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4, publicAddress: 203.0.113.9}
tunnels:
- name: z-0
  cloud: aws
  ipsec:
    remoteAddress: 198.51.100.1
    remoteIdentity: 198.51.100.1
    psk: k
- name: b
  cloud: azure
  ipsec: {remoteAddress: 198.51.100.2, psk: k}
- name: a-0
  cloud: aws
  ipsec: {remoteAddress: 198.51.100.3, psk: k}
- name: a-1
  cloud: aws
  ipsec:
    remoteAddress: 198.51.100.4
    psk: k
    respondOnly: true
peers:
- {name: z, tunnel: z-0, asn: 64512}
`

func TestExplanations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		noted := func(what string, notes []*isthmusv1.Problem) {
			t.Helper()
			var got []string
			for _, n := range notes {
				if strings.HasSuffix(n.Path, ".sources") || n.Path == "access.api" {
					continue // spec.TestNotes has these
				}
				got = append(got, n.Value+" "+n.Path)
				if n.Line == 0 || n.Rule == "" || n.Remedy == "" {
					t.Errorf("%s: %v", what, n)
				}
			}
			if s := strings.Join(got, ", "); s != "z-0 tunnels[0], b tunnels[1], a-1 tunnels[3].ipsec.respondOnly" {
				t.Errorf("%s notes %s", what, s)
			}
		}
		v, err := r.Validate(t.Context(), text(clouds))
		if err != nil || len(v.Problems) > 0 {
			t.Fatal(err, v)
		}
		noted("validate", v.Notes)
		p, err := r.Plan(t.Context(), text(clouds))
		if err != nil {
			t.Fatal(err)
		}
		noted("plan", p.Notes)
		a, err := r.Apply(t.Context(), "tester", &isthmusv1.ApplyRequest{Source: text(clouds)})
		if err != nil {
			t.Fatal(err)
		}
		noted("apply", a.Notes)
		if v, err := r.Validate(t.Context(), text(strings.Replace(clouds, "psk: k", "psk: none", 1))); err != nil || len(v.Problems) == 0 || len(v.Notes) > 0 {
			t.Errorf("a bad document: %v, %v", v, err)
		}
		synctest.Wait()

		since := time.Now()
		report := m.report[tunnel.KindIPsec]
		report(tunnel.State{Name: "z-0", Kind: tunnel.KindIPsec, Status: tunnel.Down, Since: since, Failure: tunnel.Failure{Reason: tunnel.Identity, Since: since}, Evidence: tunnel.Evidence{Identity: "10.1.2.3"}, Heard: since})
		report(tunnel.State{Name: "b", Kind: tunnel.KindIPsec, Status: tunnel.Up})
		report(tunnel.State{Name: "a-1", Kind: tunnel.KindIPsec, Status: tunnel.Down, Failure: tunnel.Failure{Reason: tunnel.Waiting, Since: since}, Listening: since})
		states := map[string]string{}
		all, _ := r.Tunnels()
		for _, s := range all {
			states[s.Name] = s.State
			switch e := s.Explanation; s.Name {
			case "z-0":
				if e.GetReason() != "identity" || e.Field != "tunnels[0].ipsec.remoteIdentity" || e.Value != "10.1.2.3" || e.Line != 8 || !e.Since.AsTime().Equal(since) || !s.Heard.AsTime().Equal(since) {
					t.Errorf("z-0: %v", s)
				}
			case "a-1":
				if e.GetField() != "tunnels[3].ipsec.respondOnly" || e.Line != 21 || !strings.Contains(e.Cause, "startup action is Start") || s.Heard != nil || s.Listening == nil {
					t.Errorf("a-1: %v", s)
				}
			default:
				if e != nil {
					t.Errorf("%s: %v", s.Name, e)
				}
			}
		}
		if states["a-1"] != "dead" || states["z-0"] != "down" || states["b"] != "up" || states["a-0"] != "up" {
			t.Errorf("states %v", states)
		}
		// A tunnel that is dead by design is down for the routes, as the driver reported.
		if alive, ok := m.alive["t-a-1"]; !ok || alive {
			t.Errorf("alive %v", m.alive)
		}

		if s := listed[*isthmusv1.ListTunnelsResponse](t, r, &isthmusv1.ListTunnelsRequest{}).GetStrays(); len(s) != 1 || s[0].Beside != "z-0" || s[0].State != "dead" || s[0].Address != "" || s[0].Since != nil {
			t.Errorf("strays %v", s)
		}
		r.Callers = func() []tunnel.Caller {
			return []tunnel.Caller{{Address: netip.MustParseAddr("192.0.2.1"), First: since, Last: since.Add(time.Second), Attempts: 3}}
		}
		s := listed[*isthmusv1.ListTunnelsResponse](t, r, &isthmusv1.ListTunnelsRequest{}).GetStrays()
		if len(s) != 2 || s[0].Address != "192.0.2.1" || s[0].State != "dead" || s[0].Reason != "unpaired" || s[0].Attempts != 3 || !s[0].Last.AsTime().Equal(since.Add(time.Second)) {
			t.Errorf("strays %v", s)
		}
		accept(t, r, base)
		if s := listed[*isthmusv1.ListTunnelsResponse](t, r, &isthmusv1.ListTunnelsRequest{}).GetStrays(); len(s) != 1 || s[0].State != "refused" || s[0].Reason != "unknown-caller" {
			t.Errorf("strays without a cloud: %v", s)
		}
	})
}
