package proof

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/lane"
	"github.com/isthmus-net/isthmus/router/lane/stamp"
	"github.com/isthmus-net/isthmus/test/netns"
)

// bench is two nodes with two lanes between them, one of each family.
type bench struct {
	*testing.T
	spaces  [2]*netns.NS
	provers [2]*Prober
	stops   [2]func()
	changes atomic.Int64
}

func newBench(t *testing.T) *bench {
	b := &bench{T: t, spaces: [2]*netns.NS{netns.New(t), netns.New(t)}}
	netns.Veth(b.spaces[0], "one", b.spaces[1], "one")
	netns.Veth(b.spaces[0], "two", b.spaces[1], "two")
	for n, s := range b.spaces {
		s.Run(fmt.Sprintf(`ip addr add 169.254.0.%d/31 dev one
			ip -6 addr add fd00::%d/127 dev two nodad
			nft add table inet cut
			nft add chain inet cut in { type filter hook prerouting priority -400 ; }`, n, n))
		b.start(n)
	}
	return b
}

func links(n int) []lane.Link {
	four, six := netip.MustParseAddr("169.254.0.0"), netip.MustParseAddr("fd00::")
	all := []lane.Lane{
		{Name: "pair-1", Number: 1, Interface: "one", Local: four, Remote: four.Next(), MTU: 1500},
		{Name: "pair-2", Number: 2, Interface: "two", Local: six, Remote: six.Next(), MTU: 1500},
	}
	if n == 1 {
		for i := range all {
			all[i].Local, all[i].Remote = all[i].Remote, all[i].Local
		}
	}
	return []lane.Link{{Name: "pair", Node: []string{"b", "a"}[n], Lanes: all}}
}

// start runs a prober in the namespace of a node.
func (b *bench) start(n int) {
	p := New(Options{Changed: func() { b.changes.Add(1) }, Log: slog.New(slog.DiscardHandler)})
	p.Use(links(n))
	ctx, cancel := context.WithCancel(b.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread() // and it ends with the goroutine
		space, err := os.Open(b.spaces[n].Path)
		if err == nil {
			defer space.Close()
			err = unix.Setns(int(space.Fd()), unix.CLONE_NEWNET)
		}
		if err != nil {
			b.Errorf("entering a namespace: %v", err)
			return
		}
		_ = p.Run(ctx)
	})
	b.provers[n], b.stops[n] = p, func() { cancel(); wg.Wait() }
	b.Cleanup(b.stops[n])
}

// until waits until a lane of a node has the states out, in and usable.
func (b *bench) until(n, number int, want string) {
	b.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		l := b.provers[n].State()[0].Lanes[number-1]
		got := fmt.Sprintf("%s %s %v", l.Out.Status, l.In.Status, l.Usable)
		if got == want {
			return
		}
		if time.Now().After(end) {
			b.Fatalf("node %d, lane %d: %s, want %s: %+v", n, number, got, want, b.provers[n].State())
		}
	}
}

func (b *bench) good(numbers ...int) {
	b.Helper()
	for _, number := range numbers {
		b.until(0, number, "ok ok true")
		b.until(1, number, "ok ok true")
	}
}

// TestProof proves lanes of both families while one is cut one way, a daemon stops, an interface is
// replaced and large packets are dropped. Ring: namespace.
func TestProof(t *testing.T) {
	b := newBench(t)
	b.good(1, 2)
	for number, name := range []string{"one", "two"} {
		b.spaces[1].Run("nft add rule inet cut in iifname " + name + " drop")
		b.until(0, number+1, "dead ok false")
		b.until(1, number+1, "ok dead false")
		b.good(2 - number)
		b.spaces[1].Run("nft flush chain inet cut in")
		b.good(1, 2)
	}
	b.stops[1]()
	for end := time.Now().Add(time.Minute); b.provers[0].State()[0].Silent.IsZero(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the link is not silent")
		}
	}
	b.until(0, 1, "ok ok true")
	b.until(0, 2, "ok ok true")
	b.start(1)
	b.good(1, 2)

	b.spaces[0].Run("ip link del one")
	b.until(1, 1, "dead dead false")
	netns.Veth(b.spaces[0], "one", b.spaces[1], "one")
	b.spaces[0].Run("ip addr add 169.254.0.0/31 dev one")
	b.spaces[1].Run("ip addr add 169.254.0.1/31 dev one")
	b.good(1, 2)

	b.spaces[1].Run("nft add rule inet cut in iifname two meta length > 1333 drop")
	b.until(0, 2, "mtu ok false")
	b.until(1, 2, "ok mtu false")
	for end := time.Now().Add(time.Minute); b.provers[0].State()[0].Lanes[1].PathMTU != 1333; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%+v", b.provers[0].State()[0].Lanes[1])
		}
	}
	b.good(1)
	if b.changes.Load() == 0 {
		t.Error("no change was reported")
	}
	for _, p := range b.provers {
		p.Use(nil)
		if len(p.State()) != 0 {
			t.Error("a removed link has a state")
		}
	}
}

// TestStrangers sends packets to a node whose peer does not send: forged reports that were
// forwarded, come from another address or from another port, packets that are none, and two that a
// reflector must and must not answer. None of them proves the lane.
func TestStrangers(t *testing.T) {
	b := newBench(t)
	b.good(1)
	b.stops[1]()
	// Without echo replies, the lane is dead.
	b.spaces[1].Run("sysctl -qw net.ipv4.icmp_echo_ignore_all=1")
	b.until(0, 1, "unknown dead false")
	b.spaces[1].Run("ip addr add 169.254.0.9/32 dev one")
	b.spaces[0].Run("ip route add 169.254.0.9/32 dev one")
	to := &unix.SockaddrInet4{Addr: [4]byte{169, 254, 0, 0}, Port: stamp.Port}
	report := stamp.AppendRequest(nil, &stamp.Packet{Report: &stamp.Report{ID: 9, Lanes: []stamp.LaneReport{{Lane: 1, Heard: stamp.Hears}}}}, 0)
	plain := stamp.AppendRequest(nil, &stamp.Packet{Stamp: stamp.Stamp{Sequence: 77}}, 60)
	for _, k := range []struct {
		name   string
		from   string
		port   int
		ttl    int
		packet []byte
		answer bool
	}{
		{"another address", "169.254.0.9", stamp.Port, 255, report, false},
		{"forwarded", "169.254.0.1", stamp.Port, 254, report, false},
		{"another port", "169.254.0.1", 4000, 255, report, false},
		{"no packet", "169.254.0.1", stamp.Port, 255, report[:43], false},
		{"a reflector", "169.254.0.1", stamp.Port, 255, plain, false},
		{"another sender", "169.254.0.1", 4000, 64, plain, true},
	} {
		t.Run(k.name, func(t *testing.T) {
			var fd int
			var err error
			b.spaces[1].Do(func() {
				if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
					err = unix.Bind(fd, &unix.SockaddrInet4{Addr: netip.MustParseAddr(k.from).As4(), Port: k.port})
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TTL, k.ttl); err != nil {
				t.Fatal(err)
			}
			wait := unix.Timeval{Usec: 300_000}
			if k.answer {
				wait = unix.Timeval{Sec: 30}
			}
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
				t.Fatal(err)
			}
			for range 20 { // in each interval, as a living peer sends
				if err := unix.Sendto(fd, k.packet, 0, to); err != nil {
					t.Fatal(err)
				}
			}
			// The node's own requests arrive as well, where the port is that of a reflector.
			answer := make([]byte, 200)
			answered := false
			for end := time.Now().Add(time.Second); time.Now().Before(end); {
				n, _, err := unix.Recvfrom(fd, answer, 0)
				if err != nil {
					break
				}
				if q, err := stamp.Parse(answer[:n]); err == nil && (q.Reply || k.answer && q.Sender.Sequence == 77 && n == len(k.packet)) {
					answered = true
					break
				}
			}
			if answered != k.answer {
				t.Errorf("answered: %v", answered)
			}
			if l := b.provers[0].State()[0].Lanes[0]; l.In.Status != lane.Dead {
				t.Errorf("the lane is proved: %+v", l)
			}
		})
	}
}

// TestNoInterface proves a lane whose interface is missing, and says so.
func TestNoInterface(t *testing.T) {
	p := New(Options{Log: slog.New(slog.DiscardHandler)})
	p.Use([]lane.Link{{Name: "pair", Node: "b", Lanes: []lane.Lane{{Name: "pair-1", Number: 1, Interface: "none-here", Local: netip.MustParseAddr("127.0.0.1"), Remote: netip.MustParseAddr("127.0.0.2")}}}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = p.Run(ctx) }()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if err := p.State()[0].Lanes[0].Err; err != nil {
			if !strings.Contains(err.Error(), "interface none-here") {
				t.Error(err)
			}
			break
		}
		if time.Now().After(end) {
			t.Fatal("no error")
		}
	}
	cancel()
	<-done
}
