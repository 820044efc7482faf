package conntrack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	library "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/netlink"
	"github.com/isthmus-net/isthmus/test/netns"
)

// attr appends an attribute.
func attr(kind uint16, data ...byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(data)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), data...)
	return append(b, make([]byte, -len(data)&3)...)
}

func nest(kind uint16, parts ...[]byte) []byte {
	return attr(kind|unix.NLA_F_NESTED, slices.Concat(parts...)...)
}

func be(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

// example returns a flow as the kernel encodes it: TCP from 10.0.0.5:40000 to 198.51.100.7:443,
// leaving as 192.0.2.9:40001.
func example() []byte {
	tuple := func(kind uint16, src, dst netip.AddrPort) []byte {
		return nest(kind,
			nest(tupleIP, attr(ip4Source, src.Addr().AsSlice()...), attr(ip4Destination, dst.Addr().AsSlice()...)),
			nest(tupleProtocol, attr(protocolNumber, unix.IPPROTO_TCP),
				attr(sourcePort, binary.BigEndian.AppendUint16(nil, src.Port())...), attr(destinationPort, binary.BigEndian.AppendUint16(nil, dst.Port())...)))
	}
	ap := netip.MustParseAddrPort
	return slices.Concat(
		tuple(attrOriginal, ap("10.0.0.5:40000"), ap("198.51.100.7:443")),
		tuple(attrReply, ap("198.51.100.7:443"), ap("192.0.2.9:40001")),
		attr(attrStatus, 0, 0, 1, 0x9e), attr(attrTimeout, 0, 0, 0, 120), attr(attrMark, 0, 0, 0, 7), attr(attrID, 1, 2, 3, 4),
		attr(attrZone, 0, 9),
		nest(attrProtocolInfo, nest(infoTCP, attr(tcpState, 3))),
		nest(attrCounterOriginal, attr(pairFirst, be(3)...), attr(pairSecond, be(300)...)),
		nest(attrCounterReply, attr(pairFirst, be(4)...), attr(pairSecond, be(1<<40)...)),
		nest(attrTimestamp, attr(pairFirst, be(1_000_000_000)...), attr(pairSecond, be(3_500_000_000)...)),
	)
}

func TestDecode(t *testing.T) {
	ap := netip.MustParseAddrPort
	want := Flow{
		Original: Tuple{ap("10.0.0.5:40000"), ap("198.51.100.7:443")}, Reply: Tuple{ap("198.51.100.7:443"), ap("192.0.2.9:40001")},
		Protocol: unix.IPPROTO_TCP, TCPState: 3, Status: 0x19e, Mark: 7, ID: 0x01020304, Zone: 9, Timeout: 2 * time.Minute,
		Sent: Counter{3, 300}, Received: Counter{4, 1 << 40}, Start: time.Unix(1, 0), End: time.Unix(3, 500_000_000),
	}
	var f Flow
	if err := decode(example(), &f); err != nil || f != want {
		t.Errorf("%v\n got %+v\nwant %+v", err, f, want)
	}
	if n := testing.AllocsPerRun(100, func() { _ = decode(example(), &f) }); n > testing.AllocsPerRun(100, func() { example() }) {
		t.Errorf("%v allocations, want none", n)
	}
	for n := range example() {
		// Cut between two attributes, the rest is well-formed but may lack a tuple.
		if err := decode(example()[:n], &f); err == nil && !f.Reply.Source.IsValid() {
			t.Errorf("%d bytes are decoded as a flow", n)
		}
	}
	// A nested attribute that is shorter than its header, or longer than the outer one.
	for _, kind := range []uint16{attrOriginal, attrReply, attrProtocolInfo, attrCounterOriginal, attrCounterReply, attrTimestamp} {
		for _, size := range []byte{3, 9} {
			if err := decode(append(example(), nest(kind, []byte{size, 0, 1, 0, 0, 0, 0, 0})...), &f); !errors.Is(err, errDamaged) {
				t.Errorf("attribute %d with a damaged one of size %d in it: %v", kind, size, err)
			}
		}
	}
	for _, outer := range []uint16{attrOriginal, attrProtocolInfo} {
		if err := decode(append(example(), nest(outer, nest(1, []byte{3, 0, 1, 0}))...), &f); !errors.Is(err, errDamaged) {
			t.Errorf("attribute %d with a damaged one two levels below: %v", outer, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(example())
	f.Fuzz(func(t *testing.T, b []byte) {
		var flow Flow
		if err := decode(b, &flow); err == nil && (!flow.Original.Destination.IsValid() || !flow.Reply.Destination.IsValid()) {
			t.Errorf("a flow without addresses: %+v", flow)
		}
		for rest := b; len(rest) > 0; {
			m, after, ok := netlink.Next(rest)
			if !ok {
				break
			}
			if len(after) >= len(rest) {
				t.Fatal("no progress")
			}
			rest = after
			var s Stats
			_, _ = failure(m), decodeStats(m, &s)
		}
	})
}

// tracking returns a namespace that tracks connections with timestamps and counters, and in which
// all sent packets are dropped.
func tracking(t testing.TB) *netns.NS {
	ns := netns.New(t)
	ns.Run(`nft add table inet t
		nft add chain inet t out { type nat hook postrouting priority 100 ; }
		nft add rule inet t out ip daddr 198.16.0.0/12 snat ip to 192.0.2.9
		sysctl -qw net.netfilter.nf_conntrack_acct=1 net.netfilter.nf_conntrack_timestamp=1
		ip link add sink arp off type veth peer name drain
		ip link set drain up
		ip addr add 192.0.2.1/24 dev sink
		ip addr add 10.0.0.5/32 dev sink
		ip link set sink up
		ip route add default dev sink src 10.0.0.5
		ip -6 addr add 2001:db8::1/64 dev sink nodad
		ip -6 route add default dev sink`)
	return ns
}

// send creates n flows: one UDP packet from one port to each of n addresses.
func send(t testing.TB, ns *netns.NS, n int) {
	t.Helper()
	var err error
	ns.Do(func() {
		var fd int
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0); err != nil {
			return
		}
		defer unix.Close(fd)
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: 3000})
		for i := range n {
			to := &unix.SockaddrInet4{Port: 53, Addr: [4]byte{198, 16 + byte(i>>16), byte(i >> 8), byte(i)}}
			if err == nil {
				err = unix.Sendto(fd, []byte("hello"), 0, to)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

func dial(t testing.TB, ns *netns.NS) (c *Conn) {
	t.Helper()
	var err error
	ns.Do(func() { c, err = Open() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestDump(t *testing.T) {
	ns := tracking(t)
	c := dial(t, ns)
	before := time.Now()
	const n = 3000
	send(t, ns, n)
	seen := map[netip.AddrPort]Flow{}
	if err := c.Dump(t.Context(), unix.AF_INET, func(f *Flow) bool { seen[f.Original.Destination] = *f; return true }); err != nil {
		t.Fatal(err)
	}
	if len(seen) != n {
		t.Errorf("%d flows, want %d", len(seen), n)
	}
	for to, f := range seen {
		if f.Protocol != unix.IPPROTO_UDP || f.Original.Source != netip.MustParseAddrPort("10.0.0.5:3000") || f.Reply.Source != to ||
			f.Reply.Destination.Addr() != netip.MustParseAddr("192.0.2.9") || f.Status&SourceNAT == 0 || f.Sent != (Counter{1, 33}) ||
			f.Start.Before(before.Add(-time.Second)) || f.Start.After(time.Now()) || !f.End.IsZero() || f.Timeout == 0 {
			t.Fatalf("%+v", f)
		}
	}
	stats, err := c.Stats(t.Context())
	if err != nil || stats.Entries < n || stats.Entries > n+20 || stats.Limit == 0 {
		t.Errorf("%+v, %v", stats, err)
	}

	// The connection stays usable after a dump that f has stopped.
	calls := 0
	if err := c.Dump(t.Context(), unix.AF_UNSPEC, func(*Flow) bool { calls++; return calls < 5 }); err != nil || calls != 5 {
		t.Errorf("%d calls, %v", calls, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if err := c.Dump(ctx, unix.AF_UNSPEC, func(*Flow) bool { cancel(); return true }); !errors.Is(err, context.Canceled) {
		t.Errorf("a dump that is interrupted: %v", err)
	}
	if err := c.Dump(t.Context(), unix.AF_INET6, func(f *Flow) bool {
		if f.Original.Source.Addr().Is4() {
			t.Errorf("IPv4 among IPv6: %+v", f)
		}
		return true
	}); err != nil {
		t.Error(err)
	}
}

// TestEnd deletes some flows from the table and leaves the others.
func TestEnd(t *testing.T) {
	ns := tracking(t)
	c := dial(t, ns)
	const n = 1000
	send(t, ns, n)
	third := func(f *Flow) bool {
		return f.Original.Destination.Port() == 53 && f.Original.Destination.Addr().As4()[3]%3 == 0
	}
	count := func() (thirds, others int) {
		t.Helper()
		if err := c.Dump(t.Context(), unix.AF_INET, func(f *Flow) bool {
			if third(f) {
				thirds++
			} else if f.Original.Destination.Port() == 53 {
				others++
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
		return thirds, others
	}
	thirds, others := count()
	if thirds+others != n {
		t.Fatalf("%d flows", thirds+others)
	}
	if ended, err := c.End(t.Context(), unix.AF_UNSPEC, third); err != nil || ended != thirds {
		t.Errorf("%d of %d flows ended: %v", ended, thirds, err)
	}
	if left, same := count(); left != 0 || same != others {
		t.Errorf("%d flows are left, and of %d others %d", left, others, same)
	}
	if ended, err := c.End(t.Context(), unix.AF_UNSPEC, third); err != nil || ended != 0 {
		t.Errorf("%d flows ended again: %v", ended, err)
	}

	// A flow that has disappeared by the time of its deletion does not cause an error.
	twin := dial(t, ns)
	if ended, err := c.End(t.Context(), unix.AF_INET, func(f *Flow) bool {
		if others > 0 {
			others = 0
			if _, err := twin.End(t.Context(), unix.AF_INET, func(*Flow) bool { return true }); err != nil {
				t.Error(err)
			}
		}
		return f.Original.Destination.Port() == 53
	}); err != nil || ended > 0 {
		t.Errorf("%d flows ended: %v", ended, err)
	}
}

// TestDeletion checks that a request for a deletion has everything that identifies the flow:
// without the tuple, the kernel would delete all flows.
func TestDeletion(t *testing.T) {
	b := appendDeletion([]byte("what was before"), netlink.Message{Body: append([]byte{unix.AF_INET6, 0, 0, 0}, example()...)})
	m, rest, ok := netlink.Next(b[len("what was before"):])
	if !ok || len(rest) > 0 || m.Kind != subsystem|messageDelete || m.Body[0] != unix.AF_INET6 {
		t.Fatalf("%+v, %x behind, %v", m, rest, ok)
	}
	attributesOf := func(b []byte, kinds ...uint16) (found [][]byte) {
		for len(b) > 0 {
			kind, data, rest, _ := netlink.Attribute(b)
			if b = rest; kinds == nil || slices.Contains(kinds, kind) {
				found = append(found, data)
			}
		}
		return found
	}
	if got, want := attributesOf(m.Body[4:]), attributesOf(example(), attrOriginal, attrID, attrZone); len(want) != 3 || !slices.EqualFunc(got, want, bytes.Equal) {
		t.Errorf("%x, want %x", got, want)
	}
}

func threadTime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t)
	return time.Duration(t.Nano())
}

// BenchmarkDump reads 240,000 flows, with this package and with the general netlink library of the
// tree.
func BenchmarkDump(b *testing.B) {
	const n = 240_000
	ns := tracking(b)
	c := dial(b, ns)
	send(b, ns, n/2)
	ns.Run("ip addr add 10.0.0.6/32 dev sink\nip route replace default dev sink src 10.0.0.6")
	send(b, ns, n/2)
	for b.Loop() {
		runtime.GC()
		flows, start, cpu := 0, time.Now(), threadTime()
		if err := c.Dump(b.Context(), unix.AF_INET, func(*Flow) bool { flows++; return true }); err != nil {
			b.Fatal(err)
		}
		wall, cpu := time.Since(start), threadTime()-cpu
		if flows < n {
			b.Fatalf("%d flows", flows)
		}
		b.ReportMetric(wall.Seconds(), "s")
		b.ReportMetric(cpu.Seconds(), "cpu-s")
		runtime.GC()
		var err error
		var list []*library.ConntrackFlow
		other := threadTime()
		ns.Do(func() { list, err = library.ConntrackTableList(library.ConntrackTable, unix.AF_INET) })
		if err != nil || len(list) < n {
			b.Fatal(len(list), err)
		}
		b.ReportMetric((threadTime()-other).Seconds()/cpu.Seconds(), "library/ours")
	}
}

// TestLostFlowsAreCountedOnce checks that a failed insertion, which the kernel also counts as a
// dropped packet, is counted once.
func TestLostFlowsAreCountedOnce(t *testing.T) {
	for _, k := range []struct{ failed, dropped, want uint64 }{{24, 24, 0}, {24, 30, 6}, {24, 0, 0}, {0, 7, 7}} {
		s := Stats{InsertFailed: k.failed, Dropped: k.dropped}
		s.correct()
		if s.Dropped != k.want || s.InsertFailed != k.failed {
			t.Errorf("%+v: %+v", k, s)
		}
	}
}
