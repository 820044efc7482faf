package router

import (
	"strings"
	"testing"
	"testing/synctest"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/store"
)

// TestOtherFamily checks that a rule of the family that the session does not carry is refused in a
// new document, and that a stored document with one stays in use and can be edited.
func TestOtherFamily(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		dir := t.TempDir()
		r, stop := m.boot(dir)
		accept(t, r, base)
		wrong := strings.Replace(base, "asn: 65001}", "asn: 65001, import: {allow: [{prefix: 'fd20::/20'}]}}", 1)
		apply := func(document string) error {
			_, err := r.Apply(t.Context(), "tester", &isthmusv1.ApplyRequest{Source: text(document)})
			return err
		}
		const why = "peers[0].import.allow[0]: has no effect: the session carries only IPv4"
		if err := apply(wrong); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("new: %v, want %q", err, why)
		}
		stop()
		st, err := store.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		present, _ := st.Current()
		present.Text = wrong
		if _, err := st.Accept(present.Generation, present); err != nil {
			t.Fatal(err)
		}
		st.Close()
		r, stop = m.boot(dir)
		defer stop()
		if s := r.documents.Status(); s.Invalid != nil {
			t.Error(s.Invalid)
		}
		if err := apply(strings.Replace(wrong, "10.7.0.0/16", "10.8.0.0/16", 1)); err != nil {
			t.Errorf("edited: %v", err)
		}
		if err := apply(strings.Replace(wrong, "fd20::", "fd30::", 1)); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("another rule: %v, want %q", err, why)
		}

		// A rollback brings it back after it was corrected.
		accept(t, r, base)
		if err := apply(wrong); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("new again: %v, want %q", err, why)
		}
		if _, err := r.Rollback(t.Context(), "tester", &isthmusv1.RollbackRequest{}); err != nil {
			t.Errorf("rollback: %v", err)
		}
	})
}
