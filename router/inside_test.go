package router

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
)

// TestNamesLoseWhatBecomesInside checks that an address that has become the inside address of a
// tunnel is no longer a destination, although nothing else in the rules has changed.
func TestNamesLoseWhatBecomesInside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		dir := t.TempDir()
		known := `{"a.example": {"198.51.100.9": "2100-01-01T00:00:00Z", "192.168.6.3": "2100-01-01T00:00:00Z"}}`
		if err := os.WriteFile(filepath.Join(dir, "names.json"), []byte(known), 0o600); err != nil {
			t.Fatal(err)
		}
		r, stop := m.boot(dir)
		defer stop()
		doc := strings.Replace(base, "policies: [", `resolvers: ["127.0.0.1:1"], policies: [{name: w, sources: [10.0.0.0/8], names: [a.example], pool: p}, `, 1)
		doc = strings.Replace(doc, "name: a, ipsec", `name: a, inside: [{local: 192.168.6.9/32, remote: 192.168.6.2}], ipsec`, 1)
		has := func(want string) {
			t.Helper()
			synctest.Wait()
			m.mu.Lock()
			defer m.mu.Unlock()
			if got := fmt.Sprint(m.nat.Policies[0].Destinations); got != want {
				t.Errorf("%s, want %s", got, want)
			}
		}
		accept(t, r, doc)
		has("[192.168.6.3/32 198.51.100.9/32]")
		accept(t, r, strings.Replace(doc, "192.168.6.9/32", "192.168.6.3/32", 1))
		has("[198.51.100.9/32]")
	})
}
