package lane

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/lane/stamp"
)

// path is the network between the nodes on one lane. Index 0 is the direction from a to b.
type path struct {
	cut    [2]bool
	udp    bool // only UDP is cut, both ways
	limit  [2]int
	every  int // of this many requests one is lost
	passed int
}

// world is two nodes with a link of three lanes, and a clock.
type world struct {
	t       *testing.T
	now     time.Time
	judges  [2]*Judge
	off     [2]bool // the daemon is stopped
	down    [2]bool // the node is
	stalled [2]bool
	lanes   []*path
	// dead counts the judgements at which a node does not use a lane.
	dead [2][]int
	next uint64
}

func link(node string, n int) Link {
	l := Link{Name: "pair", Node: node}
	for i := range n {
		a := netip.AddrFrom4([4]byte{169, 254, 0, byte(2 * i)})
		l.Lanes = append(l.Lanes, Lane{Name: fmt.Sprintf("pair-%d", i+1), Number: i + 1, Interface: fmt.Sprintf("w%d", i), Local: a, Remote: a.Next(), MTU: 1420})
	}
	return l
}

func newWorld(t *testing.T, lanes int) *world {
	w := &world{t: t, now: time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC), next: 100}
	for range lanes {
		w.lanes = append(w.lanes, &path{})
	}
	for n := range w.judges {
		w.dead[n] = make([]int, lanes)
		w.start(n)
	}
	return w
}

func (w *world) start(n int) {
	w.next++
	w.judges[n], w.off[n] = NewJudge(link([]string{"b", "a"}[n], len(w.lanes)), w.next, w.now), false
}

// pass reports whether a packet of a size from a node passes, and its answer back.
func (w *world) pass(lane, from, size int, udp bool) bool {
	p := w.lanes[lane]
	return !w.down[0] && !w.down[1] && !p.cut[from] && !(p.udp && udp) && (p.limit[from] == 0 || size <= p.limit[from])
}

// step lets a node send and judge once.
func (w *world) step(n int) {
	if w.off[n] || w.stalled[n] || w.down[n] {
		return
	}
	a, b := w.judges[n], w.judges[1-n]
	for lane, p := range w.lanes {
		for _, probe := range []bool{false, true} {
			q, size, ok := a.Request(lane+1, probe, w.now)
			if ok {
				p.passed++
			}
			if !ok || !w.pass(lane, n, size, true) || p.every > 0 && p.passed%p.every == 0 || w.off[1-n] || w.stalled[1-n] {
				continue
			}
			if r := b.Receive(lane+1, through(w.t, q, false), 255, w.now); r != nil && w.pass(lane, 1-n, 0, true) {
				if a.Receive(lane+1, through(w.t, *r, true), 255, w.now) != nil {
					w.t.Fatal("a reply was answered")
				}
			}
		}
		if a.Asks(lane+1, w.now) && w.pass(lane, n, 0, false) && w.pass(lane, 1-n, 0, false) {
			a.Echoed(lane+1, w.now)
		}
	}
	a.Tick(w.now)
	for i, l := range a.State().Lanes {
		if !l.Usable {
			w.dead[n][i]++
		}
	}
}

// through encodes and decodes a packet.
func through(t *testing.T, p stamp.Packet, reply bool) stamp.Packet {
	b := stamp.AppendRequest(nil, &p, 0)
	if reply {
		b = stamp.AppendReply(nil, &p, 0)
	}
	q, err := stamp.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// run lets time pass. The nodes judge 37 ms apart.
func (w *world) run(d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); {
		w.step(0)
		w.now = w.now.Add(37 * time.Millisecond)
		w.step(1)
		w.now = w.now.Add(Interval - 37*time.Millisecond)
	}
}

// until lets time pass until something is so, and returns how long that took.
func (w *world) until(what string, is func() bool) time.Duration {
	w.t.Helper()
	begun := w.now
	for !is() {
		if w.now.Sub(begun) > time.Minute {
			w.t.Fatalf("%s: not within a minute:\n%+v\n%+v", what, w.judges[0].State(), w.judges[1].State())
		}
		w.run(Interval)
	}
	return w.now.Sub(begun)
}

func (w *world) lane(node, lane int) LaneState { return w.judges[node].State().Lanes[lane] }

// want checks the states of a lane at both nodes: out, in and usable.
func (w *world) want(lane int, a, b string) {
	w.t.Helper()
	for n, want := range []string{a, b} {
		l := w.lane(n, lane)
		if got := fmt.Sprintf("%s %s %v", l.Out.Status, l.In.Status, l.Usable); got != want {
			w.t.Errorf("node %d, lane %d: %s, want %s: %+v", n, lane+1, got, want, l)
		}
	}
}

// quiet checks that no node has ever stopped using the other lanes.
func (w *world) quiet(but int) {
	w.t.Helper()
	for n := range w.dead {
		for lane, count := range w.dead[n] {
			if lane != but && count > 0 {
				w.t.Errorf("node %d did not use lane %d for %d judgements", n, lane+1, count)
			}
		}
	}
}

// TestCut cuts a lane one way, the other way and both ways. Both ends stop to use it within half a
// second, say which direction it is, and use it again a second after it returns.
func TestCut(t *testing.T) {
	for name, k := range map[string]struct {
		cut  [2]bool
		a, b string
	}{
		"a to b":    {[2]bool{true, false}, "dead ok false", "ok dead false"},
		"b to a":    {[2]bool{false, true}, "ok dead false", "dead ok false"},
		"both ways": {[2]bool{true, true}, "dead dead false", "dead dead false"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 3)
			w.run(2 * time.Second)
			for lane := range 3 {
				w.want(lane, "ok ok true", "ok ok true")
			}
			w.quiet(-1)
			w.lanes[1].cut = k.cut
			at := w.now
			took := w.until("dead", func() bool { return !w.lane(0, 1).Usable && !w.lane(1, 1).Usable })
			if took > 500*time.Millisecond || took < DeadAfter {
				t.Errorf("dead after %v", took)
			}
			w.run(time.Minute)
			w.want(1, k.a, k.b)
			for n := range 2 {
				for _, d := range []Direction{w.lane(n, 1).In, w.lane(n, 1).Out} {
					if d.Status == Dead && (d.Why == "" || d.Loss != 1 || d.Since.Sub(at).Abs() > 500*time.Millisecond) {
						t.Errorf("node %d: %+v, cut at %v", n, d, at)
					}
				}
			}
			w.lanes[1].cut = [2]bool{}
			took = w.until("alive", func() bool { return w.lane(0, 1).Usable && w.lane(1, 1).Usable })
			if took < time.Second || took > 1600*time.Millisecond {
				t.Errorf("alive after %v", took)
			}
			w.run(time.Second)
			w.want(1, "ok ok true", "ok ok true")
			w.quiet(1)
		})
	}
}

// TestFlap has a lane that carries packets for 600 ms of each second. It stays out.
func TestFlap(t *testing.T) {
	w := newWorld(t, 2)
	w.run(time.Second)
	for range 20 {
		w.lanes[1].cut[0] = true
		w.run(400 * time.Millisecond)
		w.lanes[1].cut[0] = false
		w.run(600 * time.Millisecond)
		if w.lane(0, 1).Usable || w.lane(1, 1).Usable {
			t.Fatal("the lane is usable")
		}
	}
	w.quiet(1)
}

// TestDaemons stops and stalls daemons. No lane leaves.
func TestDaemons(t *testing.T) {
	w := newWorld(t, 3)
	w.run(2 * time.Second)
	w.off[1] = true
	w.run(10 * time.Second)
	if s := w.judges[0].State(); s.Silent.IsZero() || !s.Lanes[0].Silent || w.now.Sub(s.Silent) < 9*time.Second || w.now.Sub(s.Silent) > 11*time.Second {
		t.Errorf("the other daemon is stopped: %+v", s)
	}
	w.want(0, "ok ok true", "ok ok true")
	w.start(1)
	w.run(2 * time.Second)
	if s := w.judges[0].State(); !s.Silent.IsZero() || s.Lanes[0].Silent || s.Restarts != 1 || s.Lanes[0].In.Loss != 0 || s.Lanes[0].Out.Loss != 0 {
		t.Errorf("the other daemon is back: %+v", s)
	}
	w.stalled[0] = true
	w.run(5 * time.Second)
	w.stalled[0] = false
	w.run(time.Second)
	if s := w.judges[0].State(); s.Stalls != 1 {
		t.Errorf("%d stalls", s.Stalls)
	}
	w.quiet(-1)
	for lane := range 3 {
		w.want(lane, "ok ok true", "ok ok true")
	}
}

// TestNodeDown has the other node die. Every lane is dead, and what cannot be known is unknown.
func TestNodeDown(t *testing.T) {
	w := newWorld(t, 3)
	w.run(2 * time.Second)
	w.down[1] = true
	took := w.until("dead", func() bool { s := w.judges[0].State(); return s.Usable() == 0 })
	if took > 500*time.Millisecond {
		t.Errorf("dead after %v", took)
	}
	w.run(time.Second)
	for lane := range 3 {
		if l := w.lane(0, lane); l.In.Status != Dead || l.Out.Status != Unknown {
			t.Errorf("%+v", l)
		}
	}
	w.down[1] = false
	w.start(1)
	w.until("alive", func() bool {
		a, b := w.judges[0].State(), w.judges[1].State()
		return a.Usable() == 3 && b.Usable() == 3
	})
}

// TestRestartWithDeadLane restarts a daemon while a lane is dead: it does not use the lane again,
// because the other node says so.
func TestRestartWithDeadLane(t *testing.T) {
	w := newWorld(t, 3)
	w.run(2 * time.Second)
	w.lanes[1].cut[0] = true
	w.run(2 * time.Second)
	for n := range 2 {
		w.start(n)
		w.dead[n][1] = 0
		w.run(3 * time.Second)
		if w.lane(0, 1).Usable || w.lane(1, 1).Usable || w.dead[n][1] < 18 {
			t.Errorf("node %d was restarted: %+v, %+v, out for %d judgements", n, w.lane(0, 1), w.lane(1, 1), w.dead[n][1])
		}
	}
	w.quiet(1)
}

// TestNeverUp has lanes that never carried a packet. They are not dead, and routes use them only
// while no other lane is proved.
func TestNeverUp(t *testing.T) {
	w := newWorld(t, 2)
	w.lanes[0].cut, w.lanes[1].cut = [2]bool{true, true}, [2]bool{true, true}
	w.run(10 * time.Second)
	w.want(0, "unknown unknown true", "unknown unknown true")
	w.lanes[0].cut = [2]bool{}
	w.run(10 * time.Second)
	w.want(0, "ok ok true", "ok ok true")
	w.want(1, "unknown unknown false", "unknown unknown false")
}

// TestFiltered has a firewall that drops the UDP packets of one lane. Echo replies prove that it
// carries packets.
func TestFiltered(t *testing.T) {
	w := newWorld(t, 2)
	w.run(2 * time.Second)
	w.lanes[1].udp = true
	w.run(5 * time.Second)
	w.want(1, "ok ok true", "ok ok true")
	if l := w.lane(0, 1); !l.Silent {
		t.Errorf("not silent: %+v", l)
	}
	if s := w.judges[0].State(); !s.Silent.IsZero() {
		t.Errorf("the link is silent: %+v", s)
	}
	w.quiet(-1)
}

// TestMTU has a path that drops large packets of one direction.
func TestMTU(t *testing.T) {
	w := newWorld(t, 2)
	w.run(11 * time.Second)
	if l := w.lane(0, 1); l.PathMTU != 1420 {
		t.Errorf("%+v", l)
	}
	w.lanes[1].limit[0] = 1277
	w.until("mtu", func() bool { return w.lane(0, 1).PathMTU == 1277 })
	w.run(time.Second)
	w.want(1, "mtu ok false", "ok mtu false")
	w.want(0, "ok ok true", "ok ok true")
	w.lanes[0].limit[0] = 1300
	w.until("mtu", func() bool { return w.lane(0, 0).PathMTU == 1300 })
	w.run(time.Minute) // with both of them narrow, both are used
	w.want(0, "mtu ok true", "ok mtu true")
	w.want(1, "mtu ok true", "ok mtu true")
	if l := w.lane(0, 1); l.PathMTU != 1277 {
		t.Errorf("%+v", l)
	}
	w.lanes[0].limit, w.lanes[1].limit = [2]int{}, [2]int{}
	if took := w.until("full", func() bool { return w.lane(0, 0).PathMTU == 1420 && w.lane(0, 1).PathMTU == 1420 }); took > sizeEvery+10*time.Second {
		t.Errorf("full after %v", took)
	}
}

// TestLoss loses one of eleven requests.
func TestLoss(t *testing.T) {
	w := newWorld(t, 1)
	w.lanes[0].every = 11 // of both nodes
	w.run(30 * time.Second)
	for n := range 2 {
		l := w.lane(n, 0)
		if l.In.Loss < 0.07 || l.In.Loss > 0.11 || l.Out.Loss < 0.07 || l.Out.Loss > 0.11 {
			t.Errorf("node %d: %+v", n, l)
		}
	}
	w.quiet(-1)
}

// TestUse adds and removes lanes. Those that stay keep their states.
func TestUse(t *testing.T) {
	w := newWorld(t, 3)
	w.run(2 * time.Second)
	since := w.lane(0, 1).In.Since
	w.lanes = append(w.lanes, &path{})
	for n, node := range []string{"b", "a"} {
		w.judges[n].Use(link(node, 4), w.now)
		w.dead[n] = make([]int, 4)
	}
	w.run(time.Second)
	w.want(3, "ok ok true", "ok ok true")
	if !w.lane(0, 1).In.Since.Equal(since) {
		t.Error("a lane that stayed has another state")
	}
	w.quiet(-1)
	w.judges[0].Use(link("b", 1), w.now)
	if _, _, ok := w.judges[0].Request(2, false, w.now); ok || len(w.judges[0].State().Lanes) != 1 {
		t.Error("a removed lane is still there")
	}
	if w.judges[0].Receive(2, stamp.Packet{}, 0, w.now) != nil || w.judges[0].Asks(2, w.now) {
		t.Error("a removed lane answers")
	}
}

// TestForeign answers the sender of another implementation, which proves nothing.
func TestForeign(t *testing.T) {
	w := newWorld(t, 1)
	r := w.judges[0].Receive(1, stamp.Packet{Stamp: stamp.Stamp{Sequence: 5, Session: 9}}, 255, w.now)
	if r == nil || r.Sender.Sequence != 5 || r.Session != 9 || r.TTL != 255 || r.Report != nil {
		t.Errorf("%+v", r)
	}
	w.judges[0].Tick(w.now)
	if l := w.lane(0, 0); l.In.Status != Unknown {
		t.Errorf("%+v", l)
	}
}

// TestWindow counts lost, late and repeated packets.
func TestWindow(t *testing.T) {
	for name, k := range map[string]struct {
		numbers []uint32
		last    uint32
		seen    [2]uint64
	}{
		"first":      {[]uint32{7}, 7, [2]uint64{1}},
		"gap":        {[]uint32{7, 9}, 9, [2]uint64{5}},
		"late":       {[]uint32{7, 9, 8, 8}, 9, [2]uint64{7}},
		"very late":  {[]uint32{7, 7 + 128, 7}, 135, [2]uint64{1}},
		"far":        {[]uint32{7, 7 + 100}, 107, [2]uint64{1, 1 << 36}},
		"64":         {[]uint32{7, 7 + 64}, 71, [2]uint64{1, 1}},
		"another":    {[]uint32{7, 1 << 30}, 1 << 30, [2]uint64{1}},
		"wraps":      {[]uint32{1<<32 - 1, 0}, 0, [2]uint64{3}},
		"far behind": {[]uint32{1 << 20, 3}, 3, [2]uint64{1}},
	} {
		var w window
		for _, n := range k.numbers {
			w.add(n)
		}
		if w.last != k.last || w.seen != k.seen {
			t.Errorf("%s: %+v", name, w)
		}
	}
}

// TestRoundTrip measures round trips by one clock, whatever the other one shows, and does not count
// the time for which the other node kept a request, nor a second copy of a reply.
func TestRoundTrip(t *testing.T) {
	now := time.Now()
	a, b := NewJudge(link("b", 1), 1, now), NewJudge(link("a", 1), 2, now.Add(-time.Hour))
	for i := range 100 {
		p, _, _ := a.Request(1, false, now)
		r := b.Receive(1, p, 255, now.Add(-time.Hour))
		r.Time = stamp.Time(now.Add(5*time.Millisecond - time.Hour))
		r.Reply = true
		trip := 20 * time.Millisecond
		if i >= 98 {
			trip = 80 * time.Millisecond
		}
		now = now.Add(trip + 5*time.Millisecond)
		for range 2 {
			a.Receive(1, *r, 255, now)
		}
	}
	if r := a.State().Lanes[0].RTT; r.Samples != 100 || r.P50.Round(time.Millisecond) != 20*time.Millisecond || r.P99.Round(time.Millisecond) != 80*time.Millisecond {
		t.Errorf("%+v", r)
	}
}
