package router

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

const withWireGuard = `
node: {name: n, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4}
tunnels:
- {name: w, wireguard: {privateKey: w, peerPublicKey: a2V5IG9mIHRoaXJ0eS10d28gYnl0ZXMgZm9yIHRlc3Q=, listenPort: 51820}}
peers: [{name: w, tunnel: w, asn: 65001, password: p}]
`

// TestSecretsFitTheirFields checks that a secret that does not fit its field is refused when it is
// set and when a document names it, and that the present document stays.
func TestSecretsFitTheirFields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		r, stop := m.boot(dir)
		ctx := context.Background()
		set := func(name, value string) error {
			_, err := r.SetSecret(ctx, "tester", name, []byte(value))
			return err
		}
		const key = "a2V5IG9mIHRoaXJ0eS10d28gYnl0ZXMgZm9yIHRlc3Q="
		for name, value := range map[string]string{"w": "no key", "p": strings.Repeat("x", 81)} {
			if err := set(name, value); err != nil {
				t.Fatalf("a secret that no document names: %v", err)
			}
		}
		_, _, err := r.documents.Apply(ctx, document.Change{Author: "tester"}, text(withWireGuard))
		problems, _ := errors.AsType[spec.Problems](err)
		if len(problems) != 2 || !strings.Contains(problems[0].String(), `line 5: tunnels[0].wireguard.privateKey: "w" is a secret that does not fit`) || !strings.HasPrefix(problems[1].Path, "peers[0].password") {
			t.Errorf("got %v", err)
		}
		if err := errors.Join(set("w", key), set("p", "good")); err != nil {
			t.Fatal(err)
		}
		accept(t, r, withWireGuard)
		if err := set("w", "no key"); !errors.Is(err, api.ErrInvalid) || !strings.Contains(err.Error(), "tunnels[0].wireguard.privateKey") {
			t.Errorf("set: %v", err)
		}
		if err := set("p", strings.Repeat("x", 81)); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("set: %v", err)
		}
		stop()
		// A document that an earlier version accepted without this check stays.
		st, err := store.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := st.SetSecret("w", []byte("no key"), time.Now()); err != nil {
			t.Fatal(err)
		}
		st.Close()
		r, stop = m.boot(dir)
		defer stop()
		synctest.Wait()
		if s := status(r); len(s.Conditions) > 0 || s.AppliedGeneration != 1 {
			t.Errorf("status %v", s)
		}
	})
}

// TestSecretRollback checks that the value before the last one returns, together with the tunnels
// that use it, until a document is accepted without a pending confirmation.
func TestSecretRollback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		ctx := context.Background()
		accept(t, r, base)
		first := target(r).Tunnels[0].IPsec.PSK
		if _, err := r.SetSecret(ctx, "tester", "k", []byte("another")); err != nil {
			t.Fatal(err)
		}
		if target(r).Tunnels[0].IPsec.PSK == first {
			t.Error("the tunnel has the former secret")
		}
		synctest.Wait()
		m.taken()
		if i, err := r.RollbackSecret(ctx, "tester", "k"); err != nil || i.Fingerprint != first.Fingerprint || len(i.UsedBy) != 2 {
			t.Errorf("got %v, %v", i, err)
		}
		synctest.Wait()
		expect(t, m, "tunnel a", "tunnel b")
		if target(r).Tunnels[0].IPsec.PSK != first {
			t.Error("the tunnel has the later secret")
		}
		g, _, err := r.documents.Apply(ctx, document.Change{Author: "tester", Confirm: time.Minute}, text(changedBase))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.o.Store.FormerSecret("k"); err != nil {
			t.Errorf("while a document waits for its confirmation: %v", err)
		}
		if err := r.documents.Confirm(g); err != nil {
			t.Fatal(err)
		}
		if _, err := r.RollbackSecret(ctx, "tester", "k"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("after its confirmation: %v", err)
		}
	})
}
