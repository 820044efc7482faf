package conntrack

import (
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/netns"
)

// forget ends all flows.
func forget(t testing.TB, ns *netns.NS) {
	t.Helper()
	var err error
	ns.Do(func() {
		var c *Conn
		if c, err = Open(); err == nil {
			err = c.ask(messageDelete, unix.AF_UNSPEC, 0, func(message) error { return nil })
			c.Close()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestEvents ends flows and hears of every one of them: with a large buffer, and with a small one that keeps. With a small one
// that does not keep, the overrun is told.
func TestEvents(t *testing.T) {
	const n = 3000
	for _, k := range []struct {
		name   string
		buffer int
		keep   bool
		whole  bool
	}{{"large", 32 << 20, false, true}, {"small", 8 << 10, false, false}, {"small, keeping", 8 << 10, true, true}} {
		t.Run(k.name, func(t *testing.T) {
			ns := tracking(t)
			var e *Events
			var err error
			ns.Do(func() { e, err = Hear(k.buffer) })
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			if err := e.Keep(k.keep); err != nil {
				t.Fatal(err)
			}
			send(t, ns, n)
			forget(t, ns)
			seen := map[netip.AddrPort]int{}
			for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline) && len(seen) < n; {
				if err := e.Read(func(f *Flow) {
					if f.Protocol != unix.IPPROTO_UDP {
						return
					}
					seen[f.Original.Destination]++
					if f.End.Before(f.Start) || f.Start.IsZero() || f.Sent.Packets != 1 || f.Status&SourceNAT == 0 {
						t.Errorf("%+v", f)
					}
				}); err != nil {
					t.Fatal(err)
				}
				if !k.whole && len(seen) > 0 && e.Overruns() > 0 {
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
			for to, times := range seen {
				if times != 1 {
					t.Errorf("%v ended %d times", to, times)
				}
			}
			if (len(seen) == n) != k.whole || (e.Overruns() > 0) != (k.buffer < 1<<20) {
				t.Errorf("heard of %d of %d ends, %d overruns", len(seen), n, e.Overruns())
			}
		})
	}
}

// BenchmarkEvents ends flows of which nobody hears, and flows that are heard of.
func BenchmarkEvents(b *testing.B) {
	const n = 20_000
	ns := tracking(b)
	var e *Events
	var err error
	ns.Do(func() { e, err = Hear(64 << 20) })
	if err != nil {
		b.Fatal(err)
	}
	defer e.Close()
	end := func(listen bool) time.Duration {
		if err := e.Listen(listen); err != nil {
			b.Fatal(err)
		}
		send(b, ns, n)
		start := threadTime()
		forget(b, ns)
		return threadTime() - start
	}
	end(false)
	var made, read time.Duration
	var heard int
	for b.Loop() {
		unheard := end(false)
		made += end(true) - unheard
		start := threadTime()
		if err := e.Read(func(*Flow) { heard++ }); err != nil {
			b.Fatal(err)
		}
		read += threadTime() - start
	}
	if heard < n*b.N {
		b.Fatalf("heard of %d of %d ends", heard, n*b.N)
	}
	b.ReportMetric(float64(made.Nanoseconds())/float64(heard), "ns/made")
	b.ReportMetric(float64(read.Nanoseconds())/float64(heard), "ns/read")
}

func BenchmarkDecode(b *testing.B) {
	message := example()
	var f Flow
	for b.Loop() {
		if err := decode(message, &f); err != nil {
			b.Fatal(err)
		}
	}
}
