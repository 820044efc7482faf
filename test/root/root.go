// Package root skips the tests that only root can run.
package root

import (
	"os"
	"testing"
)

// Need skips the test unless the process runs as root. For root, ISTHMUS_UNIT=1 skips it as well.
// what names the privilege that the test uses, such as "network namespaces". `make test`, which
// runs as root, fails if it skips any test.
func Need(t testing.TB, what string) {
	t.Helper()
	if os.Geteuid() != 0 || os.Getenv("ISTHMUS_UNIT") != "" {
		t.Skipf("needs root for %s: `make test` runs this test", what)
	}
}
