package gobgp

import (
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

// sampleEntries are entries in the order of an answer, without the names of peers.
var sampleEntries = []bgp.Entry{
	{Prefix: prefix("0.0.0.0/0"), Attributes: bgp.Attributes{ASPath: []uint32{}, Communities: []uint32{}, At: time.Unix(1, 0)}},
	{Prefix: prefix("10.1.0.0/16"), Attributes: bgp.Attributes{Peer: "a", NextHop: addr("169.254.0.11"), ASPath: []uint32{65001, 4200000000}, ASLength: 2, FirstAS: 65001, Origin: 2,
		MED: new(uint32(0)), LocalPreference: new(uint32(4294967295)), Communities: []uint32{0xffffff01}, Large: [][3]uint32{{1, 2, 3}, {4, 5, 4294967295}},
		RouterID: addr("1.2.3.4"), At: time.Unix(1700000000, 5), Stale: true}},
	{Prefix: prefix("10.1.0.0/16"), Attributes: bgp.Attributes{Peer: "b", ASPath: []uint32{}, Communities: []uint32{}, At: time.Unix(0, 0)}},
	{Prefix: prefix("2001:db8::/32"), Attributes: bgp.Attributes{Peer: "b", NextHop: addr("fe80::1"), ASPath: []uint32{1}, Communities: []uint32{}, At: time.Unix(2, 0)}},
}

// encode returns an answer with entries.
func encode(id uint64, flags byte, entries ...bgp.Entry) []byte {
	b := answerHead(id, flags)
	for _, e := range entries {
		a := pathAttributes{Attributes: e.Attributes}
		a.peer = map[string]uint32{"": 0, "a": 7, "b": 8}[e.Peer]
		b = appendEntry(b, e.Prefix, &a)
	}
	return b
}

func TestAnswerCodec(t *testing.T) {
	b := encode(1<<63, answerMore, sampleEntries...)
	got, err := decodeAnswer(b, names)
	if want := (answer{id: 1 << 63, more: true, size: len(b), entries: sampleEntries}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, got %+v", err, got)
	}
	got, err = decodeAnswer(append(answerHead(5, answerProblem), "no\xff"+strings.Repeat("x", 1000)...), names)
	if err != nil || got.id != 5 || len(got.problem) > 510 || !strings.HasPrefix(got.problem, "no?x") {
		t.Errorf("a problem: %v, %+v", err, got)
	}
	with := func(change func(*bgp.Entry)) []byte {
		e := sampleEntries[1]
		change(&e)
		return encode(1, 0, e)
	}
	unknown := pathAttributes{peer: 9}
	for name, b := range map[string][]byte{
		"empty":                {},
		"without flags":        {1},
		"unknown flags":        {1, 3},
		"more of nothing":      {1, answerMore},
		"out of order":         encode(1, 0, sampleEntries[1], sampleEntries[0]),
		"truncated":            b[:len(b)-1],
		"host bits":            with(func(e *bgp.Entry) { e.Prefix = netip.PrefixFrom(addr("10.1.0.1"), 16) }),
		"mapped":               with(func(e *bgp.Entry) { e.Prefix = netip.PrefixFrom(addr("::ffff:10.0.0.0"), 128) }),
		"unknown peer":         appendEntry(answerHead(1, 0), prefix("10.0.0.0/8"), &unknown),
		"unknown origin":       with(func(e *bgp.Entry) { e.Origin = 3 }),
		"AS path too long":     with(func(e *bgp.Entry) { e.ASPath = make([]uint32, maxASPath+1) }),
		"too many communities": with(func(e *bgp.Entry) { e.Communities = make([]uint32, maxCommunities+1) }),
		"too many large ones":  with(func(e *bgp.Entry) { e.Large = make([][3]uint32, maxCommunities+1) }),
		"prefix too long":      append(answerHead(1, 0), 33, 4, 10, 0, 0, 0, 0),
	} {
		if _, err := decodeAnswer(b, names); !errors.Is(err, errMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add(encode(1, 0, sampleEntries...))
	f.Add(encode(2, answerMore, sampleEntries[1]))
	f.Add(append(answerHead(3, answerProblem), "busy"...))
	f.Add(encode(4, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := decodeAnswer(b, names)
		if err != nil {
			if !errors.Is(err, errMalformed) {
				t.Fatal(err)
			}
			return
		}
		for i, e := range a.entries {
			if !e.Prefix.IsValid() || e.Prefix != e.Prefix.Masked() || i > 0 && a.entries[i-1].Prefix.Compare(e.Prefix) > 0 || e.Origin > 2 ||
				len(e.ASPath) > maxASPath || len(e.Communities) > maxCommunities || len(e.Large) > maxCommunities || bgp.OriginName(e.Origin) == "" {
				t.Fatalf("entry %+v", e)
			}
		}
	})
}

// asked starts a Driver with a fake child, which answers with the function; nil: not at all.
func asked(t *testing.T, reply func(m askMessage) []byte) (*node, *fake) {
	n, started := drive(t)
	f := <-started
	expectConfig(t, f, "abc")
	f.ask = func(m askMessage) {
		if reply != nil {
			writeFrame(f.conn, frameAnswer, reply(m))
		}
	}
	synctest.Wait()
	return n, f
}

// TestListDistrusts: answers that would keep the daemon busy forever, or that are none, end the
// child and not the daemon.
func TestListDistrusts(t *testing.T) {
	entry := func(p string) bgp.Entry { return bgp.Entry{Prefix: prefix(p)} }
	for name, reply := range map[string]func(m askMessage) []byte{
		"the same again":  func(m askMessage) []byte { return encode(m.ID, answerMore, entry("10.1.0.0/16")) },
		"malformed":       func(m askMessage) []byte { return answerHead(m.ID, 77) },
		"an unknown peer": func(m askMessage) []byte { return append(answerHead(m.ID, 0), 16, 4, 10, 1, 0, 0, 99) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n, _ := asked(t, reply)
				_, err := n.List(t.Context(), bgp.Query{Peer: "a", View: bgp.Received, Limit: 10})
				if !errors.Is(err, bgp.ErrRestarted) {
					t.Errorf("%v", err)
				}
				synctest.Wait()
				time.Sleep(time.Minute)
				if n.Starts() < 2 {
					t.Error("the child was not replaced")
				}
			})
		})
	}
}

// TestListSilent: a child that does not answer costs one call its time, and the sessions nothing.
func TestListSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, f := asked(t, nil)
		f.state(1, bgp.Established)
		start := time.Now()
		second := make(chan error, 1)
		go func() {
			_, err := n.LookUp(t.Context(), prefix("10.0.0.0/8"))
			second <- err
		}()
		_, err := n.List(t.Context(), bgp.Query{Peer: "a", View: bgp.Received, Limit: 10})
		if !errors.Is(err, bgp.ErrSilent) || !errors.Is(<-second, bgp.ErrSilent) || time.Since(start) > 2*answerTimeout {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		// An answer that comes late is not one to the next question.
		third := make(chan bgp.Page, 1)
		go func() {
			page, err := n.List(t.Context(), bgp.Query{Peer: "a", View: bgp.Received, Limit: 10})
			if err != nil {
				t.Error(err)
			}
			third <- page
		}()
		synctest.Wait()
		f.mu.Lock()
		late, now := f.asked[0], f.asked[2]
		f.mu.Unlock()
		writeFrame(f.conn, frameAnswer, encode(late.ID, 0, bgp.Entry{Prefix: prefix("10.1.0.0/16")}))
		synctest.Wait()
		writeFrame(f.conn, frameAnswer, encode(now.ID, 0))
		if page := <-third; len(page.Entries) > 0 {
			t.Errorf("the late answer was taken: %+v", page)
		}
		if s := n.state("a"); n.Starts() != 1 || s.State != bgp.Established {
			t.Errorf("%d starts, %+v", n.Starts(), s)
		}
	})
}

// TestListEnds: the child ends while it is asked.
func TestListEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, f := asked(t, nil)
		go func() { time.Sleep(time.Second); f.die(crash{reason: "signal: killed"}) }()
		if _, err := n.List(t.Context(), bgp.Query{Peer: "a", View: bgp.Received, Limit: 10}); !errors.Is(err, bgp.ErrRestarted) {
			t.Errorf("%v", err)
		}
	})
}

// TestListTurns: only one question is under way, and a call that waits for its turn can end.
func TestListTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, f := asked(t, nil)
		done := make(chan error, 20)
		for range cap(done) {
			go func() {
				_, err := n.List(t.Context(), bgp.Query{Peer: "a", View: bgp.Received, Limit: 10})
				done <- err
			}()
		}
		synctest.Wait()
		f.mu.Lock()
		if len(f.asked) != 1 {
			t.Errorf("%d questions at once", len(f.asked))
		}
		f.mu.Unlock()
		for range cap(done) {
			if err := <-done; !errors.Is(err, bgp.ErrSilent) {
				t.Error(err)
			}
		}
	})
}

func TestWindow(t *testing.T) {
	// 3/2 of the maximum, in the order of a map: about the lower half remains.
	const size = 64 << 10
	n := maxWindow / size * 3 / 2
	w := &window{}
	at := func(i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)
	}
	for i := range n {
		w.add(encoded{at(i * 7919 % n), make([]byte, size)})
	}
	w.sort()
	if !w.cut.IsValid() || w.size > maxWindow || len(w.list) < maxWindow/size/4 {
		t.Fatalf("%d entries with %d bytes, cut at %v", len(w.list), w.size, w.cut)
	}
	for i, e := range w.list {
		if e.prefix != at(i) {
			t.Fatalf("entry %d is %v: one before it is missing", i, e.prefix)
		}
	}
	if last := w.list[len(w.list)-1].prefix; last != w.cut {
		t.Errorf("cut at %v, the last is %v", w.cut, last)
	}
}

func TestLimit(t *testing.T) {
	e := func(p string, size int) encoded { return encoded{prefix(p), make([]byte, size)} }
	list := []encoded{e("10.1.0.0/16", 10), e("10.2.0.0/16", answerSize-10), e("10.2.0.0/16", 20), e("10.3.0.0/16", 1)}
	for _, k := range []struct {
		after string
		n     int
		more  bool
	}{{"", 1, true}, {"10.1.0.0/16", 1, true}, {"10.2.0.0/16", 1, false}, {"10.2.128.0/17", 1, false}, {"10.3.0.0/16", 0, false}} {
		var after netip.Prefix
		if k.after != "" {
			after = prefix(k.after)
		}
		if got, more := limit(list, after); len(got) != k.n || more != k.more {
			t.Errorf("after %q: %d, %v", k.after, len(got), more)
		}
	}
	big := []encoded{e("10.1.0.0/16", 2*answerSize), e("10.2.0.0/16", 1)}
	if got, more := limit(big, netip.Prefix{}); len(got) != 1 || !more {
		t.Errorf("an entry that is too large: %d, %v", len(got), more)
	}
}

// TestAskBeforeConfiguration: a question before the first configuration has an answer.
func TestAskBeforeConfiguration(t *testing.T) {
	c := newChild()
	c.tables.ask(askMessage{ID: 3, Table: local, Prefixes: []netip.Prefix{prefix("10.0.0.0/8")}})
	var frames []frame
	eventually(t, time.Second, "an answer", func() bool { frames = append(frames, c.out.takeFrames()...); return len(frames) == 1 })
	if a, err := decodeAnswer(frames[0].body, names); err != nil || a.id != 3 || len(a.entries) != 0 {
		t.Errorf("%v, %+v", err, a)
	}
}

// TestPaced: after a table was read, GoBGP has nine times as long for its other work, and at most
// maxRest.
func TestPaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tables := newTables(nil)
		var ends time.Time
		for i, k := range []struct{ takes, pause time.Duration }{{time.Second, 0}, {time.Minute, 9 * time.Second}, {0, maxRest}, {0, 0}} {
			tables.paced(func() {
				if pause := time.Since(ends); i > 0 && pause != k.pause {
					t.Errorf("reading %d began after %v, not %v", i, pause, k.pause)
				}
				time.Sleep(k.takes)
			})
			ends = time.Now()
		}
	})
}
