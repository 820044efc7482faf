// Package reach determines which flows may leave by the rules of an nftables table. It follows
// each way through the rules with sets of packets instead of packets: a comparison of addresses,
// protocol or port splits the set; any other is assumed to have both results. A rule that it
// cannot interpret is an error. Therefore the result may contain too much, but never too little.
package reach

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

// Ruleset is the content of a table that affects forwarded packets.
type Ruleset struct {
	Chains map[string]*Chain
	Sets   map[string]*Set
}

// Chain is a chain with its rules, in the form in which they are read back. The library omits the
// expression that loads routing information; the comparison after it is handled.
type Chain struct {
	// Base chains have a Hook and a Priority; other chains are only reached by jump or goto.
	Base     bool
	Hook     nftables.ChainHook
	Priority nftables.ChainPriority
	Rules    [][]expr.Any
}

// Set is a set or a map.
type Set struct {
	IsVerdict  bool // a verdict map
	IsInterval bool // keys are the first and the last key, concatenated
	IsDynamic  bool // filled by rules, so that its elements are unknown
	Elements   []Element
}

// Element is an element of a set.
type Element struct {
	Key     string
	Data    string       // value in a data map
	Verdict expr.Verdict // verdict in a verdict map
}

// maxPaths bounds how many ways through the rules are followed.
const maxPaths = 1 << 20

// errTooMany means that there are too many ways to follow.
var errTooMany = fmt.Errorf("more than %d ways through the rules: give fewer sources or destinations", maxPaths)

// walk follows ways through the rules.
type walk struct {
	rules    Ruleset
	header   header
	underlay []byte
	index    uint32   // of the underlay
	bases    []*Chain // those that a forwarded packet passes, in order
	paths    int
	been     map[stop]bool
	out      []nat.Departure
}

// stop is a way at a base chain, or at a rule of one. Nothing else affects how it continues.
type stop struct {
	box
	translated string
	redirected bool
	base       int
	rules      *Chain
	rule       int
}

// header holds the offsets of the addresses in the network header of a family, and their size.
type header struct {
	nfproto                   byte
	source, destination, size uint32
}

var headers = []header{{unix.NFPROTO_IPV4, 12, 16, 4}, {unix.NFPROTO_IPV6, 8, 24, 16}}

// Departures returns the source addresses with which new flows may leave by the interface underlay
// with this index (0: unknown), from any of the sources to any of the destinations. The incoming
// interface is not considered.
func (r Ruleset) Departures(underlay string, index uint32, sources, destinations []netip.Prefix) ([]nat.Departure, error) {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, underlay)
	var out []nat.Departure
	for _, h := range headers {
		w := &walk{rules: r, header: h, underlay: name, index: index, been: map[stop]bool{}}
		for _, name := range slices.Sorted(maps.Keys(r.Chains)) {
			if c := r.Chains[name]; c.Base && c.Hook != *nftables.ChainHookInput && c.Hook != *nftables.ChainHookOutput {
				w.bases = append(w.bases, c)
			}
		}
		slices.SortStableFunc(w.bases, func(a, b *Chain) int {
			return cmp.Or(cmp.Compare(a.Hook, b.Hook), cmp.Compare(a.Priority, b.Priority))
		})
		for _, src := range sources {
			for _, dst := range destinations {
				if src.Addr().BitLen() != int(h.size)*8 || dst.Addr().BitLen() != int(h.size)*8 {
					continue
				}
				p := way{box: box{
					first: [fieldCount]string{l4proto: "\x00", port: "\x00\x00"},
					last:  [fieldCount]string{l4proto: "\xff", port: "\xff\xff"},
				}}
				p.first[source], p.last[source] = bounds(src)
				p.first[destination], p.last[destination] = bounds(dst)
				if err := w.base(p, 0); err != nil {
					return nil, err
				}
			}
		}
		out = append(out, w.out...)
	}
	return out, nil
}

// base follows a way from base chain n on.
func (w *walk) base(p way, n int) error {
	at := stop{box: p.box, translated: p.translated, redirected: p.redirected, base: n}
	if w.been[at] {
		return nil
	}
	w.been[at] = true
	if n == len(w.bases) {
		d := nat.Departure{
			Sources:      addresses(p.first[source], p.last[source]),
			Destinations: addresses(p.first[destination], p.last[destination]),
			Protocols:    [2]uint8{p.first[l4proto][0], p.last[l4proto][0]},
			Ports:        nat.PortRange{First: binary.BigEndian.Uint16([]byte(p.first[port])), Last: binary.BigEndian.Uint16([]byte(p.last[port]))},
		}
		if p.translated != "" {
			d.Address, _ = netip.AddrFromSlice([]byte(p.translated))
		}
		w.out = append(w.out, d)
		return nil
	}
	return w.chain(p, w.bases[n], 0, func(p way, accepted bool) error { return w.base(p, n+1) })
}

// end continues a way after a chain: with accepted after a verdict, which no other rule of its
// base chain changes, otherwise at the end of the chain.
type end func(p way, accepted bool) error

// chain follows a way through a chain, from its rule n on.
func (w *walk) chain(p way, c *Chain, n int, end end) error {
	if w.paths++; w.paths > maxPaths {
		return errTooMany
	}
	if n == len(c.Rules) {
		return end(p, false)
	}
	if c.Base {
		at := stop{box: p.box, translated: p.translated, redirected: p.redirected, rules: c, rule: n}
		if w.been[at] {
			return nil
		}
		w.been[at] = true
	}
	for i := range p.registers {
		p.registers[i] = cell{field: unset}
	}
	return w.expr(p, c, n, 0, end)
}
