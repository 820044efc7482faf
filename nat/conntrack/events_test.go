package conntrack

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/netlink"
	"github.com/isthmus-net/isthmus/test/netns"
)

// forget deletes all flows.
func forget(t testing.TB, ns *netns.NS) {
	t.Helper()
	var err error
	ns.Do(func() {
		var c *Conn
		if c, err = Open(); err == nil {
			err = c.ask(messageDelete, unix.AF_UNSPEC, 0, func(netlink.Message) error { return nil })
			c.Close()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// drain reads until there are no more events.
func drain(t testing.TB, e *Events, f func(*Flow)) {
	t.Helper()
	for more := true; more; {
		var err error
		if more, err = e.Read(f); err != nil {
			t.Fatal(err)
		}
	}
}

// TestEvents ends flows and checks that each end is received: with a large buffer, and with a
// small one with Keep. With a small one without Keep, the overrun must be reported.
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
			ns.Do(func() { e, err = Subscribe(k.buffer) })
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
			for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline) && len(seen) < n; {
				drain(t, e, func(f *Flow) {
					if f.Protocol != unix.IPPROTO_UDP {
						return
					}
					seen[f.Original.Destination]++
					if f.End.Before(f.Start) || f.Start.IsZero() || f.Sent.Packets != 1 || f.Status&SourceNAT == 0 {
						t.Errorf("%+v", f)
					}
				})
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
				t.Errorf("received %d of %d ends, %d overruns", len(seen), n, e.Overruns())
			}
		})
	}
}

// TestEventsWithoutTranslation ends translated flows among untranslated ones, whose ends must not
// be received.
func TestEventsWithoutTranslation(t *testing.T) {
	ns := tracking(t)
	var e *Events
	var err error
	ns.Do(func() { e, err = Subscribe(8 << 10) }) // no room for the others
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	ns.Run("nft insert rule inet t out accept")
	send(t, ns, 1000)
	forget(t, ns)
	ns.Run("nft flush chain inet t out\nnft add rule inet t out ip daddr 198.16.0.0/12 snat ip to 192.0.2.9")
	send(t, ns, 2)
	forget(t, ns)
	heard := 0
	drain(t, e, func(f *Flow) {
		heard++
		if f.Status&SourceNAT == 0 {
			t.Errorf("%+v", f)
		}
	})
	if heard != 2 || e.Overruns() > 0 || e.Damaged() > 0 {
		t.Errorf("received %d ends, %d overruns, %d damaged", heard, e.Overruns(), e.Damaged())
	}
}

// TestDamagedEvents puts damaged messages between the ends of flows: a damaged message must not
// affect others.
func TestDamagedEvents(t *testing.T) {
	packet := func(kind uint16, body []byte) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
		b = binary.NativeEndian.AppendUint16(b, kind)
		return append(append(b, make([]byte, unix.SizeofNlMsghdr-len(b))...), body...)
	}
	const end = subsystem | messageDelete
	good := packet(end, append(make([]byte, 4), example()...))
	garbage := packet(end, append(make([]byte, 4), "no attribute"...))
	longer := packet(end, make([]byte, 4))
	longer[0]++
	for _, k := range []struct {
		name          string
		datagram      []byte
		ends, damaged int
	}{
		{"good", good, 1, 0},
		{"shorter than a header", good[:10], 0, 1},
		{"cut", good[:len(good)-1], 0, 1},
		{"longer than its datagram", longer, 0, 1},
		{"shorter than its header says it is", append([]byte{8, 0, 0, 0}, good[4:]...), 0, 1},
		{"without struct nfgenmsg", packet(end, nil), 0, 1},
		{"garbage", garbage, 0, 1},
		{"without tuples", packet(end, make([]byte, 4)), 0, 1},
		{"of another kind", packet(subsystem|messageNew, append(make([]byte, 4), example()...)), 0, 1},
		{"of another subsystem", packet(unix.NLMSG_ERROR, make([]byte, 20)), 0, 1},
		{"larger than a buffer", packet(end, append(append(make([]byte, 4), example()...), attr(99, make([]byte, eventSize)...)...)), 0, 1},
		{"between two that are good", slices.Concat(good, garbage, good), 2, 1},
	} {
		t.Run(k.name, func(t *testing.T) {
			ns := tracking(t)
			var e *Events
			var err error
			ns.Do(func() { e, err = Subscribe(1 << 20) })
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			const n = eventBatch // so that the injected messages come in the next batch
			for range 2 {
				send(t, ns, n)
				forget(t, ns)
				if err := inject(ns, e, k.datagram); err != nil {
					t.Fatal(err)
				}
			}
			seen, examples := map[netip.AddrPort]int{}, 0
			drain(t, e, func(f *Flow) {
				switch f.Protocol {
				case unix.IPPROTO_UDP:
					seen[f.Original.Destination]++
				case unix.IPPROTO_TCP:
					examples++
				}
			})
			for to, times := range seen {
				if times != 2 {
					t.Errorf("received the end of the flow to %v %d times", to, times)
				}
			}
			if len(seen) != n || examples != 2*k.ends || e.Damaged() != uint64(2*k.damaged) {
				t.Errorf("%d flows, %d injected and %d damaged; want %d, %d and %d", len(seen), examples, e.Damaged(), n, 2*k.ends, 2*k.damaged)
			}
		})
	}
}

// inject sends a datagram to the socket of e, as the kernel does.
func inject(ns *netns.NS, e *Events, datagram []byte) (err error) {
	ns.Do(func() {
		var to unix.Sockaddr
		if to, err = unix.Getsockname(e.fd); err != nil {
			return
		}
		var fd int
		if fd, err = open(1 << 20); err == nil {
			err = unix.Sendto(fd, datagram, 0, to)
			unix.Close(fd)
		}
	})
	return err
}

// BenchmarkEvents ends flows without a subscription, and with one: translated and untranslated
// flows.
func BenchmarkEvents(b *testing.B) {
	const n = 20_000
	for _, translated := range []bool{true, false} {
		b.Run(fmt.Sprint("translated=", translated), func(b *testing.B) {
			ns := tracking(b)
			if !translated {
				ns.Run("nft insert rule inet t out accept")
			}
			var e *Events
			var err error
			ns.Do(func() { e, err = Subscribe(64 << 20) })
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
			var heard, rounds int
			for b.Loop() {
				unheard := end(false)
				made += end(true) - unheard
				start := threadTime()
				drain(b, e, func(*Flow) { heard++ })
				read += threadTime() - start
				rounds++
			}
			if translated && heard < n*rounds || !translated && heard > 0 {
				b.Fatalf("received %d of %d ends", heard, n*rounds)
			}
			b.ReportMetric(float64(made.Nanoseconds())/float64(n*rounds), "ns/made")
			b.ReportMetric(float64(read.Nanoseconds())/float64(n*rounds), "ns/read")
		})
	}
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
