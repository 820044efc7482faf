// Package root skips the tests that only root can run, and shortens long ones for `make unit`.
package root

import (
	"os"
	"testing"
)

// Unit reports whether `make unit` runs the tests (ISTHMUS_UNIT=1). It has to end within a minute.
func Unit() bool { return os.Getenv("ISTHMUS_UNIT") != "" }

// Need skips the test unless the process runs as root. For root, ISTHMUS_UNIT=1 skips it as well.
// what names the privilege that the test uses, such as "network namespaces". `make test`, which
// runs as root, fails if it skips any test.
func Need(t testing.TB, what string) {
	t.Helper()
	if os.Geteuid() != 0 || Unit() {
		t.Skipf("needs root for %s: `make test` runs this test", what)
	}
}

// NeedTime skips in Unit a test that takes seconds of processor time, or fails when other tests
// take them.
func NeedTime(t testing.TB) {
	t.Helper()
	if Unit() {
		t.Skip("takes seconds of processor time: `make test` runs this test")
	}
}

// Count returns how many rounds a test on made-up input runs: few of them in Unit, otherwise all.
func Count[N int | uint64](all, few N) N {
	if Unit() {
		return few
	}
	return all
}
