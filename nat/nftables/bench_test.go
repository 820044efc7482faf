package nftables

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

// Run with: go test -run - -bench . -benchtime 5x ./nat/nftables

// many returns a configuration with n policies for as many sources and destinations, and one for everything else.
func many(n int) nat.Config {
	c := nat.Config{Underlay: "up0", Own: []netip.Addr{addr("192.0.2.1")}, Pools: []nat.Pool{pool("p", "192.0.2.11")}}
	for i := range n {
		src := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)
		dst := netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 4), byte(i << 4)}), 28)
		c.Policies = append(c.Policies, nat.Policy{Name: fmt.Sprintf("p%d", i), Action: nat.SNAT, Sources: []netip.Prefix{src}, Destinations: []netip.Prefix{dst}, Pool: "p"})
	}
	c.Policies = append(c.Policies, nat.Policy{Name: "rest", Action: nat.SNAT, Sources: pfx("10.0.0.0/8"), Pool: "p"})
	return c
}

// BenchmarkEdit adds and removes one of 10,000 policies.
func BenchmarkEdit(b *testing.B) {
	for _, n := range []int{1, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := newSite(b)
			d := newDriver(b, s.router)
			apply(b, d, many(n))
			more := many(n + 1)
			for b.Loop() {
				apply(b, d, more)
				apply(b, d, many(n))
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/1000/float64(2*b.N), "ms/edit")
			b.ReportMetric(0, "ns/op")
			start := time.Now()
			apply(b, d, many(n))
			b.ReportMetric(float64(time.Since(start).Microseconds())/1000, "ms/nothing")
		})
	}
}

// BenchmarkNewFlows sends first packets of UDP flows through the router, with rule sets side by side in every round: one policy,
// 10,000, and 10,000 as linear rules. The ratios are those of packets per CPU second of the sending thread, which
// carries each packet all the way; "linear" shows what the maps save.
func BenchmarkNewFlows(b *testing.B) {
	const flows = 20_000
	s := newSite(b)
	unix.Close(s.catch) // nobody listens
	d := newDriver(b, s.router)
	var linear strings.Builder
	linear.WriteString("table inet linear {\nchain post {\ntype nat hook postrouting priority srcnat;\n")
	for i := range 10_000 {
		fmt.Fprintf(&linear, "oifname up0 ip saddr 172.16.%d.%d ip daddr 198.18.0.0/15 snat ip to 192.0.2.11\n", i>>8, i&255)
	}
	linear.WriteString("oifname up0 snat ip to 192.0.2.11\n}\n}\n")
	script := b.TempDir() + "/linear.nft"
	if err := os.WriteFile(script, []byte(linear.String()), 0o600); err != nil {
		b.Fatal(err)
	}
	one, ten := many(1), many(10_000)
	rates := map[string]float64{}
	packet := make([]byte, 28)
	send := func(name string) {
		s.forgetFlows()
		var cpu time.Duration
		s.inside.Do(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			start := threadTime()
			for i := range flows {
				// Sources and destinations of every policy in turn, with ports of their own.
				p := i % 10_000
				copy(packet, []byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0, 10, byte(p >> 8), byte(p), 1, 198, 51, byte(p >> 4), byte(p<<4) | 1})
				binary.BigEndian.PutUint16(packet[20:], uint16(1024+i))
				binary.BigEndian.PutUint16(packet[22:], 443)
				binary.BigEndian.PutUint16(packet[24:], 8)
				to := &unix.SockaddrInet4{Addr: [4]byte(packet[16:20])}
				if err := unix.Sendto(s.send4, packet, 0, to); err != nil {
					b.Error(err)
					return
				}
			}
			cpu = threadTime() - start
		})
		rates[name] += flows / cpu.Seconds()
	}
	for b.Loop() {
		apply(b, d, one)
		send("one")
		apply(b, d, ten)
		send("ten")
		apply(b, d, one)
		send("one")
		if _, err := s.router.Try("nft delete table inet isthmus"); err != nil {
			b.Fatal(err)
		}
		s.router.Run("nft -f " + script)
		send("linear")
		s.router.Run("nft delete table inet linear")
	}
	b.ReportMetric(0, "ns/op")
	base := rates["one"] / 2
	b.ReportMetric(base/float64(b.N), "one-flows/s")
	b.ReportMetric(rates["ten"]/base, "ratio-10000")
	b.ReportMetric(rates["linear"]/base, "ratio-linear")
	state, err := d.Observe(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	_ = state
}

// threadTime returns the CPU time of the calling thread.
func threadTime() time.Duration {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t)
	return time.Duration(t.Nano())
}
