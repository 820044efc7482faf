package ipsec

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/tunnel"
)

// TestClear checks that objects with our mark are removed, also a key and an SA without a
// connection, and that those of others stay.
func TestClear(t *testing.T) {
	f, links := newFake(t), &fakeLinks{links: map[string]link.Wanted{}}
	b := runFake(t, f, t.TempDir(), links)
	for i := range 3 {
		if err := b.d.Apply(t.Context(), numbered(i)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		b.await(t, numbered(i), tunnel.Up)
	}
	f.mu.Lock()
	f.conns["theirs"], f.keys["theirs"] = msg(), "x"
	f.keys[tunnel.Mark+"lone"] = "x"
	f.sas = append(f.sas, &fakeSA{id: 900, child: 900, conn: "theirs", state: "ESTABLISHED"}, &fakeSA{id: 901, child: 901, conn: tunnel.Mark + "former", state: "ESTABLISHED"})
	f.mu.Unlock()
	if err := b.stop(); err != nil {
		t.Fatal(err)
	}

	d := New(Options{Socket: f.socket, Links: links})
	defer d.Close()
	if n, err := d.Clear(t.Context()); n != 7 || err != nil {
		t.Errorf("%d removed, %v; want 7: three connections, four keys", n, err)
	}
	f.mu.Lock()
	if len(f.conns) != 1 || len(f.keys) != 1 || f.conns["theirs"] == nil || f.keys["theirs"] == "" || len(f.sas) != 1 || f.sas[0].conn != "theirs" {
		t.Errorf("charon has %v, %v, %v", f.conns, f.keys, f.sas)
	}
	f.mu.Unlock()
	if len(links.links) > 0 {
		t.Errorf("interfaces %v", links.links)
	}
	writes := d.Writes()
	if n, err := d.Clear(t.Context()); n != 0 || err != nil || d.Writes() != writes {
		t.Errorf("the second time: %d removed, %v, %d writes", n, err, d.Writes()-writes)
	}

	// Clear does not wait longer than ctx for SAs that do not end.
	f.mu.Lock()
	f.sas = append(f.sas, &fakeSA{id: 902, child: 902, conn: tunnel.Mark + "slow", state: "DELETING"})
	f.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := d.Clear(ctx); err == nil {
		t.Error("a remaining SA is not reported")
	}

	none := New(Options{Socket: filepath.Join(t.TempDir(), "none"), Links: links})
	if _, err := none.Clear(t.Context()); !errors.Is(err, ErrNoCharon) {
		t.Errorf("without charon: %v", err)
	}
}
