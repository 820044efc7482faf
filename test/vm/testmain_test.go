package vm

import (
	"fmt"
	"testing"
)

// failing records the failure of a test with another name.
type failing struct {
	*testing.T
	name, failure string
}

func (f *failing) Name() string { return f.name }

func (f *failing) Fatalf(format string, args ...any) { f.failure = fmt.Sprintf(format, args...) }

// TestInGuest runs itself and TestFailsInGuest in the guest, where only the other one fails.
func TestInGuest(t *testing.T) {
	if Inside() {
		return
	}
	InGuest(t)
	f := &failing{T: t, name: "TestFailsInGuest"}
	if InGuest(f); f.failure != "in the guest: status 1, <nil>" {
		t.Errorf("a test that fails in the guest: %q", f.failure)
	}
}

// TestFailsInGuest is for TestInGuest.
func TestFailsInGuest(t *testing.T) {
	if Inside() {
		t.Fatal("it runs in the guest")
	}
}
