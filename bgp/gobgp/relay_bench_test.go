package gobgp

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/bgp/filter"
)

// benchTable returns UPDATE messages for this number of prefixes, with a twentieth as many sets of
// attributes.
func benchTable(size int) (messages []byte, count int) {
	for i := 0; i < size; i += 20 {
		var ps []netip.Prefix
		for j := i; j < min(i+20, size); j++ {
			ps = append(ps, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(j >> 12), byte(j >> 4), byte(j << 4)}), 28))
		}
		med := binary.BigEndian.AppendUint32(nil, uint32(i/20))
		more := append(attr(0x80, 4, med...), attr(0xc0, 8, 0xfd, 0xe9, 0, 1, 0xfd, 0xe9, 0, 2)...)
		messages = append(messages, announcement(addr("169.254.0.11"), []uint32{65001, 65100, 65200}, more, ps...)...)
		count++
	}
	return messages, count
}

// BenchmarkFilter measures the filter alone, on 100,000 prefixes.
func BenchmarkFilter(b *testing.B) {
	table, count := benchTable(100_000)
	f := filter.New(filter.Options{Counters: &filter.Counters{}})
	pass := func(m, out []byte) []byte {
		out, err := f.Message(out[:0], m)
		if err != nil {
			b.Fatal(err)
		}
		return out
	}
	out := pass(fuzzOpen(0), nil)
	out = pass(message(msgKeepalive), out)
	b.ReportAllocs()
	for b.Loop() {
		for m := table; len(m) > 0; {
			n, err := f.Length(m[:19])
			if err != nil {
				b.Fatal(err)
			}
			out = pass(m[:n], out)
			m = m[n:]
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*count), "ns/message")
}

// BenchmarkRelay makes a peer send 100,000 prefixes twice in each round, to a new node each time:
// through the relay and its filter, and to GoBGP directly. It reports the medians of both times,
// from the first UPDATE to the last prefix in Reporter.Paths, and of their ratio.
func BenchmarkRelay(b *testing.B) {
	const size = 100_000
	table, _ := benchTable(size)
	load := func(around bool) float64 {
		n := startNode(b, Options{}, config(loPeer("a", "169.254.0.11", 65001)))
		defer n.stop()
		var conn net.Conn
		eventually(b, 20*time.Second, "a connection", func() (ok bool) {
			var err error
			if p := n.process(); around && p != nil && n.state("a").State == bgp.Active {
				conn, err = p.dial(b.Context(), addr("169.254.0.11"), addr("169.254.0.1"))
				return err == nil
			} else if around {
				return false
			}
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("169.254.0.11")}}
			conn, err = d.Dial("tcp4", "169.254.0.1:179")
			return err == nil
		})
		defer conn.Close()
		if _, err := conn.Write(slices.Concat(fuzzOpen(0), message(msgKeepalive))); err != nil {
			b.Fatal(err)
		}
		go func() { // reads the node's messages
			for {
				if _, _, err := readMessage(conn); err != nil {
					return
				}
			}
		}()
		eventually(b, 20*time.Second, "a session", func() bool { return n.state("a").State == bgp.Established })
		start := time.Now()
		if _, err := conn.Write(table); err != nil {
			b.Fatal(err)
		}
		eventually(b, 60*time.Second, "all prefixes", func() (all bool) { n.get(func() { all = len(n.routes) == size }); return all })
		return time.Since(start).Seconds()
	}
	var relayed, direct, ratio []float64
	for b.Loop() {
		d, r := load(true), load(false)
		relayed, direct, ratio = append(relayed, r), append(direct, d), append(ratio, r/d)
	}
	median := func(v []float64) float64 { slices.Sort(v); return v[len(v)/2] }
	b.ReportMetric(median(relayed), "relayed-s")
	b.ReportMetric(median(direct), "direct-s")
	b.ReportMetric(median(ratio), "ratio")
	b.Logf("ratios from %.2f to %.2f", ratio[0], ratio[len(ratio)-1])
}
