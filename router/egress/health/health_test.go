package health

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/router/egress"
)

func target(t testing.TB, text string) egress.Target {
	t.Helper()
	out, err := egress.ParseTarget(text)
	if err != nil {
		t.Fatal(text, err)
	}
	return out
}

// model returns the state of a target from all its results, as the schema defines it: it looks for
// runs from the end.
func model(results []bool, rise, fall int) Status {
	run := func(i int, of bool) (n int) {
		for ; i >= 0 && results[i] == of; i-- {
			n++
		}
		return n
	}
	answered := false
	for i := len(results) - 1; i >= 0; i-- {
		if run(i, false) >= fall {
			return Down
		}
		if run(i, true) >= rise {
			return Healthy
		}
		answered = answered || results[i]
	}
	if answered {
		return Healthy
	}
	return Unknown
}

// TestRandomResults compares the state machine with a stateless model that has the whole history.
func TestRandomResults(t *testing.T) {
	seen := map[Status]int{}
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		p := egress.Probes{Rise: 1 + r.IntN(3), Fall: 1 + r.IntN(4), HoldDown: time.Duration(r.IntN(3)) * 10 * time.Second}
		n := 1 + r.IntN(4)
		for i := range n {
			p.Targets = append(p.Targets, egress.Target{Scheme: "icmp", Host: fmt.Sprintf("192.0.2.%d", i)})
		}
		p.Quorum = r.IntN(n + 1)
		now := time.Unix(0, 0)
		m := newMember(netip.MustParseAddr("192.0.2.100"), p, nil, now)
		_, quorum := p.For(m.Address)
		results := make([][]bool, n)
		good := 0.5 + r.Float64()/2
		var enough time.Time // since when the quorum is met, after it was not
		wasDown := false
		for range 300 {
			now = now.Add(time.Duration(r.IntN(4000)) * time.Millisecond)
			if r.IntN(40) == 0 {
				good = r.Float64()
			}
			i := r.IntN(n)
			ok := r.Float64() < good
			results[i] = append(results[i], ok)
			var err error
			if !ok {
				err = errTimeout
			}
			was := m.Status
			changed := m.record(i, err, now)
			up, unknown := 0, 0
			for j, rs := range results {
				want := model(rs, p.Rise, p.Fall)
				if got := m.Targets[j].Status; got != want {
					t.Fatalf("seed %d: target %d is %s after %v, want %s", seed, j, got, rs, want)
				}
				switch want {
				case Healthy:
					up++
				case Unknown:
					unknown++
				}
			}
			if up+unknown < quorum {
				wasDown, enough = true, time.Time{}
			} else if up >= quorum && enough.IsZero() {
				enough = now
			}
			var want Status
			switch {
			case up+unknown < quorum:
				want = Down
			case up < quorum:
				want = was // nothing can be concluded
			case wasDown && now.Sub(enough) < p.HoldDown:
				want = Returning
			default:
				want, wasDown = Healthy, false
			}
			if m.Status != want {
				t.Fatalf("seed %d: is %s, want %s (up %d, unknown %d, quorum %d)", seed, m.Status, want, up, unknown, quorum)
			}
			if (was != m.Status) && !changed {
				t.Fatalf("seed %d: a change from %s to %s is not reported", seed, was, m.Status)
			}
			if (m.Reason() != "") != !m.Usable() {
				t.Fatalf("seed %d: %s because %q", seed, m.Status, m.Reason())
			}
			seen[m.Status]++
		}
	}
	for _, s := range []Status{Unknown, Healthy, Down, Returning} {
		if seen[s] == 0 {
			t.Errorf("no address was %s", s)
		}
	}
}

// world answers probes.
type world struct {
	mu     sync.Mutex
	broken map[string]bool // by "address target"
	probes map[string]int
}

func (w *world) probe(_ context.Context, iface string, from netip.Addr, t egress.Target) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	k := from.String() + " " + t.Host
	w.probes[k]++
	if iface != "eth0" {
		return errors.New("out by " + iface)
	}
	if w.broken[k] {
		return errTimeout
	}
	return nil
}

func (w *world) set(k string, broken bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.broken[k] = broken
}

func (w *world) count(k string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.probes[k]
}

func TestChecker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{broken: map[string]bool{}, probes: map[string]int{}}
		changes := 0
		var mu sync.Mutex
		c := New(Options{Probe: w.probe, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Changed: func() { mu.Lock(); changes++; mu.Unlock() }})
		pool := egress.ProbedPool{Name: "p", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")}, Probes: egress.Probes{
			Targets:  []egress.Target{target(t, "icmp://198.51.100.1"), target(t, "icmp://198.51.100.2"), target(t, "icmp://198.51.100.3")},
			Interval: 10 * time.Second, Timeout: 2 * time.Second, HoldDown: time.Minute, Rise: 2, Fall: 3}}
		plain := egress.ProbedPool{Name: "q", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.3")}}
		c.Set("eth0", []egress.ProbedPool{pool, plain})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { c.Run(ctx); close(done) }()
		status := func(i int) Status { t.Helper(); synctest.Wait(); return c.Pools()[0].Members[i].Status }
		want := func(first, second Status) {
			t.Helper()
			if a, b := status(0), status(1); a != first || b != second {
				t.Fatalf("addresses are %s and %s, want %s and %s", a, b, first, second)
			}
		}
		want(Unknown, Unknown)
		time.Sleep(2 * time.Second)
		want(Healthy, Healthy)
		if p := c.Pools(); p[0].Usable() != 2 || p[1].Usable() != 1 {
			t.Errorf("usable: %d and %d", p[0].Usable(), p[1].Usable())
		}

		// One failed target of three does not bring an address down; two do, after three failures
		// each.
		w.set("192.0.2.1 198.51.100.1", true)
		time.Sleep(time.Minute)
		want(Healthy, Healthy)
		w.set("192.0.2.1 198.51.100.2", true)
		time.Sleep(15 * time.Second)
		want(Healthy, Healthy)
		time.Sleep(20 * time.Second)
		want(Down, Healthy)
		if r := c.Pools()[0].Members[0].Reason(); !strings.Contains(r, "reaches 1 of 3 targets, needs 2 (icmp://198.51.100.1: no answer in time") {
			t.Errorf("reason %q", r)
		}

		// The address is healthy again, but not used for a minute; a change of the configuration
		// meanwhile does not affect it.
		w.set("192.0.2.1 198.51.100.2", false)
		time.Sleep(25 * time.Second)
		want(Returning, Healthy)
		since := c.Pools()[0].Members[0].Since
		time.Sleep(20 * time.Second)
		pool.Probes.Timeout = time.Second
		pool.Addresses = append(pool.Addresses, netip.MustParseAddr("192.0.2.4"))
		c.Set("eth0", []egress.ProbedPool{pool, plain})
		want(Returning, Healthy)
		if p := c.Pools()[0]; p.Members[2].Status != Unknown || p.Usable() != 2 {
			t.Errorf("%+v", p.Members[2])
		}
		time.Sleep(time.Until(since.Add(time.Minute - time.Millisecond)))
		want(Returning, Healthy)
		time.Sleep(2 * time.Millisecond)
		want(Healthy, Healthy)

		// An interval is kept within a tenth, also after a change of the configuration.
		before := w.count("192.0.2.2 198.51.100.1")
		time.Sleep(1000 * time.Second)
		synctest.Wait()
		if n := w.count("192.0.2.2 198.51.100.1") - before; n < 95 || n > 105 {
			t.Errorf("%d probes in 100 intervals", n)
		}
		mu.Lock()
		quiet := changes
		mu.Unlock()
		time.Sleep(time.Hour)
		synctest.Wait()
		if mu.Lock(); changes != quiet {
			t.Errorf("%d calls of Changed although nothing changed", changes-quiet)
		}
		mu.Unlock()

		// An address that is no longer probed counts as healthy, and is not probed.
		w.set("192.0.2.2 198.51.100.1", true)
		w.set("192.0.2.2 198.51.100.2", true)
		time.Sleep(time.Minute)
		want(Healthy, Down)
		pool.Probes = egress.Probes{}
		c.Set("eth0", []egress.ProbedPool{pool})
		before = w.count("192.0.2.2 198.51.100.1")
		time.Sleep(time.Minute)
		synctest.Wait()
		if p := c.Pools(); len(p) != 1 || p[0].Usable() != 3 || w.count("192.0.2.2 198.51.100.1") != before {
			t.Errorf("%+v", p)
		}
		cancel()
		<-done
	})
}

// TestFirstVerdictIsFast checks that a new daemon finds a dead address within seconds, although the
// interval is long.
func TestFirstVerdictIsFast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{broken: map[string]bool{"192.0.2.1 198.51.100.1": true}, probes: map[string]int{}}
		c := New(Options{Probe: w.probe, Log: slog.New(slog.DiscardHandler), Changed: func() {}})
		c.Set("eth0", []egress.ProbedPool{{Name: "p", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Probes: egress.Probes{
			Targets: []egress.Target{target(t, "icmp://198.51.100.1")}, Interval: time.Hour, Timeout: time.Second, Rise: 2, Fall: 3}}})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { c.Run(ctx); close(done) }()
		time.Sleep(4 * time.Second)
		synctest.Wait()
		if s := c.Pools()[0].Members[0].Status; s != Down {
			t.Errorf("is %s", s)
		}
		cancel()
		<-done
	})
}

// TestAwait has a node that takes the addresses of another one, at which they were down for long.
func TestAwait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{broken: map[string]bool{"192.0.2.1 198.51.100.1": true, "192.0.2.2 198.51.100.1": true}, probes: map[string]int{}}
		c := New(Options{Probe: w.probe, Log: slog.New(slog.DiscardHandler), Changed: func() {}})
		addresses := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("192.0.2.3")}
		c.Set("eth0", []egress.ProbedPool{{Name: "p", Addresses: addresses, Probes: egress.Probes{
			Targets: []egress.Target{target(t, "icmp://198.51.100.1")}, Interval: 5 * time.Second, Timeout: 2 * time.Second, HoldDown: time.Minute, Rise: 2, Fall: 2}}})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { c.Run(ctx); close(done) }()
		defer func() { cancel(); <-done }()
		want := func(when string, statuses ...Status) {
			t.Helper()
			synctest.Wait()
			for i, m := range c.Pools()[0].Members {
				if m.Status != statuses[i] {
					t.Fatalf("%s: %v is %s, want %s", when, m.Address, m.Status, statuses[i])
				}
			}
		}
		time.Sleep(time.Minute)
		want("elsewhere", Down, Down, Healthy)
		since := c.Pools()[0].Members[2].Since
		c.Await(addresses)
		want("taken", Unknown, Unknown, Healthy)
		time.Sleep(5 * time.Second)
		want("while packets still go to the other node", Unknown, Unknown, Healthy)
		w.set("192.0.2.1 198.51.100.1", false)
		time.Sleep(awaitInterval * 11 / 10)
		want("at the first answer", Healthy, Unknown, Healthy)
		if h := c.Health()[0]; h.Healthy != 2 || h.Usable != 3 || len(h.Unusable) != 0 {
			t.Errorf("at the first answer: %+v", h)
		}
		// An address whose first answers have come is judged as always.
		w.set("192.0.2.1 198.51.100.1", true)
		time.Sleep(12 * time.Second)
		want("when one fails later", Down, Unknown, Healthy)
		time.Sleep(awaitLimit)
		want("when one has never come", Down, Down, Healthy)
		if m := c.Pools()[0].Members[2]; m.Since != since {
			t.Errorf("a healthy address was disturbed: %+v", m)
		}
	})
}
