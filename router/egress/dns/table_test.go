package dns

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/egress"
)

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

var errDead = errors.New("dead")

// clock is a table with a clock.
type clock struct {
	*testing.T
	*table
	now time.Time
}

func newClock(t *testing.T, names ...string) *clock {
	c := &clock{t, newTable(), time.Unix(1e9, 0)}
	c.set(names, egress.DNS{Floor: 30 * time.Second, Grace: time.Hour}, c.now)
	return c
}

func (c *clock) wait(d time.Duration) {
	c.now = c.now.Add(d)
	c.expire(c.now)
}

func (c *clock) want(name string, want ...string) {
	c.Helper()
	if got := fmt.Sprint(c.addresses(name)); got != fmt.Sprint(addrs(want...)) {
		c.Errorf("%s has %v, want %v", name, got, want)
	}
}

func TestTimeToLive(t *testing.T) {
	c := newClock(t, "a.example")
	if asks := c.due(c.now); fmt.Sprint(asks) != "[{a.example false} {a.example true}]" {
		t.Errorf("due at once: %v", asks)
	}
	if asks := c.due(c.now.Add(askTimeout)); len(asks) > 0 {
		t.Errorf("asked again while the first query is under way: %v", asks)
	}
	if !c.answered("a.example", false, addrs("198.51.100.1", "198.51.100.2"), 100*time.Second, c.now) || c.answered("a.example", true, nil, 0, c.now) {
		t.Error("answered does not report new addresses correctly")
	}
	c.want("a.example", "198.51.100.1", "198.51.100.2")
	// The answer without a time to live is queried again after the floor, the other one after its
	// time to live.
	for at, want := range map[time.Duration]string{29 * time.Second: "[]", 30 * time.Second: "[{a.example true}]", 100 * time.Second: "[{a.example false} {a.example true}]"} {
		copied := *c.records["a.example"]
		if got := fmt.Sprint(c.due(c.now.Add(at))); got != want {
			t.Errorf("due after %v: %s, want %s", at, got, want)
		}
		*c.records["a.example"] = copied
	}
	// After another answer, clients that asked just before may use the former one for its time to
	// live.
	c.wait(100 * time.Second)
	if !c.answered("a.example", false, addrs("198.51.100.2", "198.51.100.3"), time.Second, c.now) {
		t.Error("answered does not report a new address")
	}
	c.want("a.example", "198.51.100.1", "198.51.100.2", "198.51.100.3")
	c.wait(59 * time.Second)
	c.want("a.example", "198.51.100.1", "198.51.100.2", "198.51.100.3")
	c.wait(time.Second) // twice the floor
	c.want("a.example", "198.51.100.1", "198.51.100.2")
	c.wait(40 * time.Second)
	c.want("a.example")
	// A zone cannot pin an address for a century.
	c.answered("a.example", false, addrs("198.51.100.4"), 100*365*24*time.Hour, c.now)
	c.wait(2*longest - time.Second)
	c.want("a.example", "198.51.100.4")
	c.wait(time.Second)
	c.want("a.example")
}

func TestNoServerAnswers(t *testing.T) {
	c := newClock(t, "a.example")
	c.answered("a.example", false, addrs("198.51.100.1"), 60*time.Second, c.now)
	c.answered("a.example", true, addrs("2001:db8::1"), 60*time.Second, c.now)
	c.wait(60 * time.Second)
	// Queries are frequent at first, and then follow the floor.
	var waits []time.Duration
	for range 8 {
		c.failed("a.example", false, errDead, c.now)
		d := c.records["a.example"].queries[0].next.Sub(c.now)
		waits = append(waits, d)
		c.now = c.now.Add(d)
	}
	if got := fmt.Sprint(waits); got != "[1s 2s 4s 8s 16s 30s 30s 30s]" {
		t.Errorf("waits %s", got)
	}
	// The family that fails keeps its addresses for the grace time; the other one does not.
	c.answered("a.example", true, nil, 0, c.now)
	c.wait(0)
	c.want("a.example", "198.51.100.1")
	c.wait(time.Hour - 122*time.Second)
	c.want("a.example", "198.51.100.1")
	c.wait(2 * time.Second)
	c.want("a.example")

	// Addresses stay while an answer is pending.
	c.answered("a.example", false, addrs("198.51.100.1"), 30*time.Second, c.now)
	c.wait(30 * time.Second)
	c.due(c.now)
	c.wait(40 * time.Second)
	c.want("a.example", "198.51.100.1")
	c.failed("a.example", false, errDead, c.now)
	c.wait(time.Hour - 41*time.Second)
	c.want("a.example", "198.51.100.1")
	c.wait(time.Second)
	c.want("a.example")

	// An answer without addresses is an answer.
	c.answered("a.example", false, addrs("198.51.100.1"), 60*time.Second, c.now)
	c.wait(60 * time.Second)
	c.answered("a.example", false, nil, 0, c.now)
	c.wait(60 * time.Second)
	c.failed("a.example", false, errDead, c.now)
	c.wait(0)
	c.want("a.example")
}

func TestLearn(t *testing.T) {
	c := newClock(t, "*.example.com", "a.example.com")
	if !c.learn("spoke", "a.example.com", addrs("198.51.100.1"), 60*time.Second, c.now) || !c.learn("spoke", "b.c.example.com", addrs("198.51.100.2"), 60*time.Second, c.now) {
		t.Error("learn does not report a new address")
	}
	if c.learn("spoke", "a.example.com", addrs("198.51.100.1"), 90*time.Second, c.now) || c.learn("spoke", "example.com", addrs("198.51.100.3"), 60*time.Second, c.now) {
		t.Error("learn reports an address that is not new")
	}
	c.want("*.example.com", "198.51.100.1", "198.51.100.2")
	c.want("a.example.com", "198.51.100.1")
	c.wait(120 * time.Second)
	c.want("*.example.com", "198.51.100.1")

	// The owner of the zone cannot reach into the node.
	c.learn("spoke", "x.example.com", addrs("127.0.0.1", "169.254.169.254", "fe80::1", "::1", "0.0.0.0", "224.0.0.1", "::ffff:198.51.100.9", "255.255.255.255", "ff02::1"), time.Minute, c.now)
	c.want("*.example.com", "198.51.100.1")

	// The owner can neither fill the memory nor evict addresses in use.
	c.wait(time.Hour)
	c.learn("spoke", "used.example.com", addrs("192.0.2.1"), time.Hour, c.now)
	for i := range maxAddresses + 500 {
		c.learn("spoke", "x.example.com", []netip.Addr{netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})}, time.Minute, c.now)
		c.now = c.now.Add(time.Millisecond)
	}
	if got := c.addresses("*.example.com"); len(got) != maxAddresses || got[0] != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("%d addresses, the first %v", len(got), got[0])
	}
	if asks := c.due(c.now.Add(time.Hour)); slices.ContainsFunc(asks, func(a ask) bool { return a.name != "a.example.com" }) {
		t.Errorf("a wildcard is queried: %v", asks)
	}
}

func TestAnswersToRemovedNames(t *testing.T) {
	c := newClock(t, "a.example")
	c.answered("a.example", false, addrs("198.51.100.1"), time.Minute, c.now)
	if c.set([]string{"a.example"}, egress.DNS{Floor: time.Second}, c.now) || !c.set(nil, egress.DNS{Floor: time.Second}, c.now) {
		t.Error("set reports gone addresses wrongly")
	}
	if c.answered("a.example", false, addrs("198.51.100.1"), time.Minute, c.now) {
		t.Error("news of a name that is not set")
	}
	c.failed("a.example", false, errDead, c.now)
	if !c.next().IsZero() || len(c.due(c.now)) > 0 {
		t.Error("something is due")
	}
}

func TestRestart(t *testing.T) {
	c := newClock(t, "a.example", "*.b.example")
	c.answered("a.example", false, addrs("198.51.100.1"), time.Minute, c.now)
	c.learn("spoke", "x.b.example", addrs("198.51.100.2"), time.Minute, c.now)
	data, err := c.encode()
	if err != nil {
		t.Fatal(err)
	}
	again := &clock{t, newTable(), c.now.Add(24 * time.Hour)} // it was off for long
	if err := again.decode(data, again.now); err != nil {
		t.Fatal(err)
	}
	again.set([]string{"a.example", "*.b.example"}, egress.DNS{Floor: 30 * time.Second, Grace: time.Hour}, again.now)
	again.wait(0)
	again.want("a.example", "198.51.100.1")
	again.want("*.b.example")
	if asks := again.due(again.now); len(asks) != 2 {
		t.Errorf("due: %v", asks)
	}
	again.answered("a.example", false, addrs("198.51.100.5"), time.Minute, again.now)
	again.wait(0)
	again.want("a.example", "198.51.100.5")

	for _, text := range []string{"", "[]", `{"A..b": {}}`, `{"a.example": {"x": "2026-01-01T00:00:00Z"}}`} {
		if err := newTable().decode([]byte(text), c.now); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
}

// TestRandomLife checks an invariant: an address is there until twice its time to live after its
// last answer, and longer only while no server answers.
func TestRandomLife(t *testing.T) {
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 3))
		c := newClock(t, "a.example")
		last := map[netip.Addr]time.Time{} // until when it must be there
		var failing time.Time
		for range 300 {
			c.wait(time.Duration(r.IntN(60)) * time.Second)
			switch r.IntN(3) {
			case 0:
				c.failed("a.example", false, errDead, c.now)
				if failing.IsZero() {
					failing = c.now
				}
			default:
				failing = time.Time{}
				ttl := time.Duration(r.IntN(200)) * time.Second
				var answer []netip.Addr
				for range r.IntN(4) {
					a := netip.AddrFrom4([4]byte{198, 51, 100, byte(r.IntN(8))})
					answer = append(answer, a)
					if until := c.now.Add(2 * max(ttl, 30*time.Second)); until.After(last[a]) {
						last[a] = until
					}
				}
				c.answered("a.example", false, answer, ttl, c.now)
				c.wait(0)
			}
			have := c.addresses("a.example")
			for a, until := range last {
				there := slices.Contains(have, a)
				grace := !failing.IsZero() && until.After(failing) && c.now.Before(failing.Add(time.Hour))
				if want := c.now.Before(until) || grace; there != want {
					t.Fatalf("seed %d: %v is there: %v, want %v; it was good until %v before now", seed, a, there, want, c.now.Sub(until))
				}
				if !there {
					delete(last, a)
				}
			}
		}
	}
}
