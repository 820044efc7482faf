package dns

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/egress"
)

// TestHold checks that an address stays while flows use it, and for Hold after the last answer or
// use. Without Hold, use changes nothing.
func TestHold(t *testing.T) {
	used := netip.MustParseAddr("198.51.100.1")
	for _, hold := range []time.Duration{0, 10 * time.Minute} {
		c := newClock(t, "a.example", "*.b.example")
		c.set([]string{"a.example", "*.b.example"}, egress.DNS{Floor: 30 * time.Second, Grace: time.Hour, Hold: hold}, c.now)
		c.answered("a.example", false, addrs("198.51.100.1", "198.51.100.2"), 0, c.now)
		c.learn("spoke", "x.b.example", addrs("198.51.100.1"), 0, c.now)
		c.answered("a.example", false, nil, 0, c.now) // the name has none from now on
		for range 200 {                               // flows live
			c.wait(15 * time.Second)
			if c.touch("a.example", used, c.now) != (hold > 0) && len(c.addresses("a.example")) > 0 {
				t.Errorf("hold %v: touch of an existing address returns the wrong result", hold)
			}
			if c.touch("a.example", netip.MustParseAddr("198.51.100.9"), c.now) || c.touch("c.example", used, c.now) {
				t.Error("touch of an unknown name or address returns true")
			}
		}
		if hold == 0 {
			c.want("a.example")
			continue
		}
		c.want("a.example", "198.51.100.1")
		c.want("*.b.example") // the address was not used under this name
		c.wait(hold - time.Second)
		c.want("a.example", "198.51.100.1")
		if next := c.next(); !next.Equal(c.now.Add(time.Second)) && next.After(c.now.Add(time.Second)) {
			t.Errorf("the table is due %v after the end", next.Sub(c.now))
		}
		c.wait(time.Second)
		c.want("a.example")

		// A shorter Hold takes effect at once, also for existing addresses.
		c.answered("a.example", false, addrs("198.51.100.3"), 0, c.now)
		c.answered("a.example", false, nil, 0, c.now)
		c.wait(hold - time.Second)
		c.want("a.example", "198.51.100.3")
		c.set([]string{"a.example"}, egress.DNS{Floor: 30 * time.Second, Grace: time.Hour, Hold: time.Minute}, c.now)
		c.wait(0)
		c.want("a.example")
	}
}

// TestLately checks that gone addresses are listed for an hour, up to maxGone, unless they return.
func TestLately(t *testing.T) {
	c := newClock(t, "a.example", "*.b.example")
	c.answered("a.example", false, addrs("198.51.100.1", "198.51.100.2"), 0, c.now)
	c.wait(time.Minute)
	went := c.now
	c.answered("a.example", false, addrs("198.51.100.2"), 0, c.now)
	if got := fmt.Sprint(c.lately(c.now)); got != fmt.Sprint([]Gone{{"a.example", netip.MustParseAddr("198.51.100.1"), went}}) {
		t.Errorf("gone: %s", got)
	}
	c.now = c.now.Add(goneTime)
	if got := c.lately(c.now); len(got) > 0 {
		t.Errorf("gone after an hour: %v", got)
	}
	for i := range 2 * maxGone { // more than maxGone in an hour
		c.learn("spoke", "x.b.example", []netip.Addr{netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})}, 0, c.now)
		c.wait(400 * time.Millisecond)
	}
	if len(c.gone) != maxGone {
		t.Errorf("%d addresses are listed", len(c.gone))
	}
	c.set([]string{"a.example"}, egress.DNS{Floor: time.Second}, c.now)
	if got := c.lately(c.now); len(got) > 0 {
		t.Errorf("addresses of a name that is not set: %d", len(got))
	}
}

// TestDiffers checks the case where each answer has new addresses. A zone that moves once does not
// count, nor does one whose addresses the table collects within their time to live.
func TestDiffers(t *testing.T) {
	at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}) }
	c := newClock(t, "a.example")
	r := c.records["a.example"]
	answer := func(list ...netip.Addr) {
		c.answered("a.example", false, list, 0, c.now)
		c.wait(30 * time.Second)
	}
	differs := func() bool { return !c.differs(r, c.now).IsZero() }
	for i := range changing { // the first answer does not count
		answer(at(2*i), at(2*i+1))
		if differs() {
			t.Fatalf("after %d answers", i+1)
		}
	}
	answer(at(100), at(101))
	if since := c.differs(r, c.now); !since.Equal(c.now.Add(-30 * time.Second)) {
		t.Errorf("differs since %v", since)
	}
	since := c.differs(r, c.now)
	answer(at(102), at(103))
	if !c.differs(r, c.now).Equal(since) {
		t.Error("since changes with each answer")
	}
	// The proxy has answered a client, so that the client's addresses are destinations.
	c.learn("spoke", "a.example", nil, 0, c.now)
	if differs() {
		t.Error("the condition stays although clients have the name from the proxy")
	}
	c.now = c.now.Add(goneTime)
	answer(at(200))
	answer(at(201))
	if !differs() {
		t.Error("no client has used the proxy for an hour, but differs is zero")
	}
	answer(at(201))
	if differs() {
		t.Error("differs is set after an answer with known addresses")
	}
	for i := range changing - 1 {
		answer(at(300 + i))
	}
	answer()
	answer(at(400))
	if differs() {
		t.Error("differs is set although an answer without addresses came in between")
	}
	for i := range changing {
		answer(at(500 + i))
	}
	if !differs() {
		t.Error("differs is not set a second time")
	}
}

// TestShareOfTheTable checks that an attachment that learns more and more addresses evicts its own,
// not those of others.
func TestShareOfTheTable(t *testing.T) {
	at := func(net, i int) netip.Addr { return netip.AddrFrom4([4]byte{198, byte(net), byte(i >> 8), byte(i)}) }
	c := newClock(t, "*.example.com", "*.example.net")
	var modest []netip.Addr
	for i := range 100 {
		modest = append(modest, at(18, i))
	}
	c.learn("modest", "x.example.com", modest, 0, c.now)
	// it also claims addresses of modest
	c.learn("greedy", "x.example.com", modest[:50], time.Hour, c.now)
	for i := range 2 * maxAddresses {
		c.learn("greedy", "x.example.com", []netip.Addr{at(19, i)}, 2*time.Hour, c.now)
	}
	has := c.addresses("*.example.com")
	for _, a := range modest {
		if !slices.Contains(has, a) {
			t.Fatalf("%v is gone", a)
		}
	}
	if n := c.records["*.example.com"].held["greedy"]; n != maxAddresses-len(modest) {
		t.Errorf("greedy has %d claims", n)
	}
	// Nor does it get more by using many names, and addresses that only it claimed go.
	for i := range maxAddresses {
		c.learn("greedy", "x.example.net", []netip.Addr{at(20, i)}, 4*time.Hour, c.now)
	}
	if n := c.owned["greedy"]; n != maxAddresses {
		t.Errorf("greedy has %d claims to addresses of all names, want %d", n, maxAddresses)
	}
	if got := c.addresses("*.example.com"); !slices.Equal(got, modest) {
		t.Errorf("%d addresses are left, want %d", len(got), len(modest))
	}
	c.set(nil, egress.DNS{}, c.now)
	if len(c.owned) > 0 {
		t.Errorf("claims of names that are not set: %v", c.owned)
	}
}
