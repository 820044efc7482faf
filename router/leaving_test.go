package router

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/tunnel"
)

const one = "- {name: a, ipsec: {remoteAddress: 198.51.100.1, psk: k}}\n"

// quiet is base without a session in tunnel a, without lacks tunnel a, and in other it is of the
// other kind.
var (
	quiet   = strings.NewReplacer("- {name: a, tunnel: a, asn: 65001}\n", "", "tunnels: [a]", "tunnels: [b]").Replace(base)
	without = strings.Replace(quiet, one, "", 1)
	other   = strings.Replace(quiet, one, "- {name: a, wireguard: {privateKey: k, listenPort: 51820, peerPublicKey: "+strings.Repeat("A", 42)+"E=}, inside: [{local: 169.254.9.2/30, remote: 169.254.9.1}]}\n", 1)
)

// TestFormerKindGoesThoughDocumentsCome applies documents before the driver of the former kind
// could remove its tunnel.
func TestFormerKindGoesThoughDocumentsCome(t *testing.T) {
	for name, documents := range map[string][]string{
		"changed again": {other, strings.Replace(other, "51820", "51821", 1)},
		"taken away":    {without, other},
		"and back":      {other, without, other},
		"gone":          {other, without},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMachine(t)
				r, stop := m.boot(t.TempDir())
				defer stop()
				accept(t, r, quiet)
				m.mu.Lock()
				m.staying = errors.New("charon is away")
				m.mu.Unlock()
				for _, d := range documents {
					accept(t, r, d)
				}
				m.taken()
				m.mu.Lock()
				m.staying = nil
				m.mu.Unlock()
				time.Sleep(3 * lastRetry)
				if got := m.taken(); !slices.Contains(got, "remove tunnel a") {
					t.Errorf("ipsec still has tunnel a: %q", got)
				}
				if s := status(r); s.GetAppliedGeneration() != s.GetGeneration() || len(s.GetConditions()) > 0 {
					t.Errorf("status %v", s)
				}
			})
		})
	}
}

// TestTunnelThatStaysIsNotDead checks that a tunnel that could not be removed can be wanted again.
func TestTunnelThatStaysIsNotDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, quiet)
		m.report[tunnel.KindIPsec](tunnel.State{Name: "a", Kind: tunnel.KindIPsec, Status: tunnel.Up})
		m.mu.Lock()
		m.staying = errors.New("charon is away")
		m.failing["a"] = m.staying
		m.mu.Unlock()
		accept(t, r, without)
		accept(t, r, quiet)
		m.mu.Lock()
		defer m.mu.Unlock()
		if !m.alive["t-a"] {
			t.Error("a still counts as dead")
		}
	})
}
