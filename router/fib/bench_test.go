package fib

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
)

// Run with: go test -run - -bench . ./router/fib

// BenchmarkUpdate adds 100,000 routes, with one reserved outside address for each tunnel.
func BenchmarkUpdate(b *testing.B) {
	for _, peers := range []int{2, 2000} {
		b.Run(fmt.Sprint(peers, "-tunnels"), func(b *testing.B) {
			var outside []netip.Addr
			for i := range peers {
				outside = append(outside, netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}))
			}
			routes := make([]Route, 100_000)
			for i := range routes {
				a := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 20<<24+uint32(i)<<8)))
				routes[i] = Route{Key: Main(netip.PrefixFrom(a, 24)), NextHops: []NextHop{hop("a")}}
			}
			for b.Loop() {
				t := NewTable()
				t.SetLinks([]Link{{"a", 10, true}})
				t.SetReserved(covered(outside))
				t.Update(routes)
				for ops := t.Ops(2048); len(ops) > 0; ops = t.Ops(2048) {
					t.Done(ops, nil)
				}
			}
		})
	}
}
