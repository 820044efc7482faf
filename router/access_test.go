package router

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/document"
)

// access returns who may reach the node by the rules of the machine.
func (m *machine) access() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.rules {
		return "open"
	}
	return fmt.Sprintf("%q API %d %v SSH %v drop %v", m.nat.Underlay, m.nat.API.Port, m.nat.API.From, m.nat.Input.SSH, m.nat.Input.Drop)
}

const operators = "access: {api: [203.0.113.0/28], ssh: [203.0.113.0/29]}\n"

// TestClosedWithoutDocument checks that a node is closed before its API listens, by the daemon's
// options and a stored document's access, whether or not the document is applied. Existing rules of
// a document stay.
func TestClosedWithoutDocument(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		m.drop, m.apiFrom = true, []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
		wants := func(what, want string) {
			t.Helper()
			synctest.Wait()
			if got := m.access(); got != want {
				t.Errorf("%s: %s, want %s", what, got, want)
			}
		}
		reboot := func() { m.nat, m.rules = nat.Config{}, false }
		const empty = `"" API 7443 [198.51.100.0/24] SSH [] drop true`
		const full = `"eth0" API 7443 [198.51.100.0/24 203.0.113.0/28] SSH [203.0.113.0/29] drop true`
		closed := strings.Replace(full, "eth0", "", 1)

		r := m.begin(dir, false)
		wants("before it runs", empty)
		r.o.Store.Close()
		r, stop := m.boot(dir)
		reboot()
		r.applier.RulesChanged(false)
		wants("flushed", empty)
		accept(t, r, operators+base)
		wants("a document", full)
		stop()

		for _, safe := range []bool{true, false} {
			r = m.begin(dir, safe)
			wants("started, with the rules of the document", full)
			r.o.Store.Close()
			reboot()
			r = m.begin(dir, safe)
			wants("started without rules", closed)
			r.o.Store.Close()
			m.nat.Underlay = "eth0"
		}

		// The document is no longer usable.
		r, stop = m.boot(dir)
		if err := r.o.Store.DeleteSecret("k"); err != nil {
			t.Fatal(err)
		}
		if _, err := r.o.Store.SetSecret("other", []byte("x"), time.Now()); err != nil {
			t.Fatal(err)
		}
		stop()
		reboot()
		r, stop = m.boot(dir)
		wants("unusable", closed)
		reboot()
		r.applier.RulesChanged(false)
		wants("unusable, and flushed", closed)
		accept(t, r, strings.ReplaceAll(operators+base, "psk: k", "psk: other"))
		wants("usable", full)
		stop()
	})
}

// TestClosesAgain checks that a first document that is not confirmed leaves the node as closed as
// before.
func TestClosesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		m.apiFrom = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
		r, stop := m.boot(t.TempDir())
		defer stop()
		if _, _, err := r.documents.Apply(t.Context(), document.Change{Author: "tester", Confirm: time.Minute}, text("access: {api: [0.0.0.0/0], input: drop}\n"+base)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(70 * time.Second)
		synctest.Wait()
		const want = `"" API 7443 [198.51.100.0/24] SSH [] drop false`
		if got := m.access(); got != want {
			t.Errorf("%s, want %s", got, want)
		}
		m.nat, m.rules = nat.Config{}, false
		r.applier.RulesChanged(false)
		synctest.Wait()
		if got := m.access(); got != want {
			t.Errorf("flushed: %s, want %s", got, want)
		}
	})
}

// TestCallerIsWarned checks that plan and apply warn callers who would lose the API by a document,
// and only those, and list the ports that it closes.
func TestCallerIsWarned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, "access: {api: [203.0.113.0/24, \"2001:db8::/64\"]}\n"+base)
		next := "access: {api: [203.0.113.0/28], input: drop}\n" + base
		for caller, warned := range map[string]bool{"203.0.113.7": false, "203.0.113.77": true, "2001:db8::7": true, "127.0.0.1": false, "": false} {
			ctx := t.Context()
			if caller != "" {
				ctx = peer.NewContext(ctx, &peer.Peer{Addr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(caller), 1))})
			}
			plan, err := r.Plan(ctx, text(next))
			if err != nil {
				t.Fatal(err)
			}
			said := fmt.Sprintf("this document closes the API to you (%s); use --confirm-within", caller)
			if got := fmt.Sprint(plan.GetChanges()); strings.Contains(got, said) != warned || strings.Contains(got, "to you") != warned || !strings.Contains(got, "ports that listen now: tcp/22") {
				t.Errorf("%q: %s", caller, got)
			}
		}
		ctx := peer.NewContext(t.Context(), &peer.Peer{Addr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort("[::ffff:203.0.113.77]:1"))})
		answer, err := r.Apply(ctx, "tester", &isthmusv1.ApplyRequest{Source: text(next), ConfirmWithin: durationpb.New(time.Minute)})
		if got := fmt.Sprint(answer.GetChanges()); err != nil || !strings.Contains(got, "closes the API to you (203.0.113.77)") {
			t.Errorf("apply: %s, %v", got, err)
		}
	})
}
