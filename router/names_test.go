package router

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestProxyListensBehindTheRules checks that the DNS proxy begins to listen once the rules that
// restrict its clients are there. Its tunnel's interface does not exist, so that the attempt fails
// and is reported.
func TestProxyListensBehindTheRules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, base)
		tries := func(want int) {
			t.Helper()
			synctest.Wait()
			if _, _, _, n := r.names.Deaf(); n != want {
				t.Errorf("%d listeners fail, want %d", n, want)
			}
		}
		m.mu.Lock()
		m.unruly = errors.New("no")
		m.mu.Unlock()
		doc := strings.Replace(base, "egress: {", "egress: {dnsProxy: {listen: [10.9.0.4], from: [a]}, ", 1)
		accept(t, r, doc)
		accept(t, r, strings.Replace(doc, "name: x", "name: y", 1)) // neither is applied
		time.Sleep(2 * lastRetry)
		tries(0)
		m.mu.Lock()
		m.unruly = nil
		m.mu.Unlock()
		time.Sleep(2 * lastRetry)
		tries(1)
		if got := fmt.Sprint(m.nat.DNS); got != "[{t-a 10.9.0.4 []}]" {
			t.Errorf("doors %s", got)
		}
		if got := fmt.Sprint(status(r).GetConditions()); !strings.Contains(got, "DNSProxyDown") || !strings.Contains(got, "10.9.0.4 by interface t-a") {
			t.Errorf("conditions %s", got)
		}

		// Another listener leaves the first one alone, and when the rules cannot be written, the
		// first one stays.
		m.mu.Lock()
		m.unruly = errors.New("no")
		m.mu.Unlock()
		accept(t, r, strings.Replace(doc, "from: [a]", "from: [a, b]", 1))
		time.Sleep(2 * lastRetry)
		tries(1)
		accept(t, r, base)
		synctest.Wait()
		tries(0)
	})
}
