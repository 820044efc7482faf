package nftables

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
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

// BenchmarkNewFlows opens TCP connections through the router, with rule sets side by side in every round: one policy, 10,000, and
// 10,000 linear rules. Counted is the CPU time of the connecting thread, which carries every packet through the
// router; the ratios are connections per CPU second to those with one policy, of which a round has two.
func BenchmarkNewFlows(b *testing.B) {
	s := newSite(b)
	unix.Close(s.catch) // nobody listens
	d := newDriver(b, s.router)
	s.inside.Run("ip route add local 10.0.0.0/8 dev lo")
	s.outside.Run("ip route add local 198.51.0.0/16 dev lo\nip route add 192.0.2.0/24 dev out0")
	var listener net.Listener
	var err error
	s.outside.Do(func() { listener, err = net.Listen("tcp4", "0.0.0.0:443") })
	if err != nil {
		b.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			c.Close() // the other side's reset soon ends the rest of it
		}
	}()

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
	round, n := map[string]float64{}, 0
	ratios := map[string][]float64{}
	open := func(name string, connections int) {
		s.forgetFlows()
		s.inside.Do(func() {
			start := threadTime()
			for range connections {
				n++
				p := n % 10_000 // the policies in turn
				if err := connectOnce([4]byte{10, byte(p >> 8), byte(p), 1}, [4]byte{198, 51, byte(p >> 4), byte(p<<4) | 1}); err != nil {
					b.Errorf("%s: %v", name, err)
					return
				}
			}
			round[name] += float64(connections) / (threadTime() - start).Seconds()
		})
	}
	for b.Loop() {
		clear(round)
		apply(b, d, one)
		open("one", 5000)
		apply(b, d, ten)
		open("10000", 10_000)
		apply(b, d, one)
		open("one", 5000)
		s.router.Run("nft delete table inet isthmus\nnft -f " + script)
		open("linear", 500)
		s.router.Run("nft delete table inet linear")
		for name, rate := range round {
			ratios[name] = append(ratios[name], 2*rate/round["one"])
		}
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(round["one"]/2, "conn/cpu-s")
	for _, name := range []string{"10000", "linear"} {
		r := slices.Sorted(slices.Values(ratios[name]))
		b.ReportMetric(r[0], name+"-min")
		b.ReportMetric(r[len(r)/2], name+"-median")
		b.ReportMetric(r[len(r)-1], name+"-max")
	}
}

// connectOnce opens a TCP connection and resets it.
func connectOnce(from, to [4]byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
		unix.Bind(fd, &unix.SockaddrInet4{Addr: from}),
		unix.Connect(fd, &unix.SockaddrInet4{Addr: to, Port: 443}),
	)
}

// threadTime returns the CPU time of the calling thread.
func threadTime() time.Duration {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t)
	return time.Duration(t.Nano())
}
