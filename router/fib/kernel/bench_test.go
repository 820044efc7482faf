package kernel

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/fib"
)

// Run with: go test -run - -bench . -benchtime 3x ./router/fib/kernel

func prefixes(n int, hops ...fib.NextHop) []fib.Route {
	routes := make([]fib.Route, n)
	for i := range routes {
		a := netip.AddrFrom4([4]byte{byte(20 + i>>16), byte(i >> 8), byte(i), 0})
		routes[i] = fib.Route{Key: fib.Main(netip.PrefixFrom(a, 24)), NextHops: hops}
	}
	return routes
}

// BenchmarkFIB measures for routes with two next hops the time from Update to the kernel, the death
// of one next hop, a restart with the routes present, and the withdrawal. "raw" is the same number
// of routes with one next hop through the driver alone.
func BenchmarkFIB(b *testing.B) {
	for _, n := range []int{10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var load, dead, adopt, withdraw, raw time.Duration
			var writes uint64
			for range b.N {
				ns := newNamespace(b, "t0", "t1")
				d := newDriver(b, ns)
				f, stop := run(b, d)
				f.Synced()
				settle(b, f)
				routes := prefixes(n, hop("t0", ""), hop("t1", ""))
				measure := func(sum *time.Duration, do func()) {
					start := time.Now()
					do()
					settle(b, f)
					*sum += time.Since(start)
				}
				measure(&load, func() { f.Update(routes) })
				writes = d.Writes()
				measure(&dead, func() { f.SetAlive(fib.NextHop{Interface: "t1"}, false) })
				writes = d.Writes() - writes
				f.SetAlive(fib.NextHop{Interface: "t1"}, true)
				settle(b, f)
				stop()
				measure(&adopt, func() {
					f, stop = run(b, d)
					f.Update(routes)
					f.Synced()
				})
				measure(&withdraw, func() { f.Update(prefixes(n)) })
				stop()

				ops := []fib.Op{{Kind: fib.SetNextHop, ID: 0x49f00001, Object: fib.Object{Link: observe(b, d).Links[1].Index}},
					{Kind: fib.SetGroup, ID: 0x49f00002, Members: []uint32{0x49f00001}}}
				for _, r := range routes {
					ops = append(ops, fib.Op{Kind: fib.AddRoute, ID: 0x49f00002, Key: r.Key})
				}
				start := time.Now()
				if errs := d.Execute(b.Context(), ops); errs != nil {
					b.Fatal(errs)
				}
				raw += time.Since(start)
			}
			b.ReportMetric(0, "ns/op")
			for _, m := range []struct {
				name string
				sum  time.Duration
			}{{"load", load}, {"raw", raw}, {"failover", dead}, {"adopt", adopt}, {"withdraw", withdraw}} {
				b.ReportMetric(float64(m.sum.Microseconds())/1000/float64(b.N), m.name+"-ms")
			}
			b.ReportMetric(float64(writes), "failover-writes")
		})
	}
}
