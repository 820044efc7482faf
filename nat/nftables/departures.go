package nftables

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

// maxPaths bounds how many ways through the rules are followed.
const maxPaths = 1 << 20

// errTooMany says that a question is too wide.
var errTooMany = fmt.Errorf("more than %d ways through the rules: ask for fewer sources or destinations", maxPaths)

// Departures follows each way through the rules with sets of packets in place of packets: what decides on addresses,
// protocol or port splits the set, what decides on anything else is taken both ways. A rule that it does not understand is
// an error. See nat.Driver.
func (d *Driver) Departures(ctx context.Context, underlay string, sources, destinations []netip.Prefix) ([]nat.Departure, error) {
	have, _, err := d.read(ctx)
	if err != nil {
		return nil, err
	}
	if have == nil {
		return nil, errors.New("there are no rules")
	}
	var index uint32
	d.mu.Lock()
	if d.config != nil {
		index = d.config.Links.Of(underlay)
	}
	d.mu.Unlock()
	return have.departures(underlay, index, sources, destinations)
}

// Predict is Departures for the rules that a configuration leads to.
func (d *Driver) Predict(c nat.Config, sources, destinations []netip.Prefix) ([]nat.Departure, error) {
	r, err := compile(c)
	if err != nil {
		return nil, fmt.Errorf("compiling rules: %w", err)
	}
	return r.departures(c.Underlay, c.Links.Of(c.Underlay), sources, destinations)
}

// Differences says how the kernel's rules differ from a configuration's. See nat.Driver.
func (d *Driver) Differences(ctx context.Context, c nat.Config) ([]string, error) {
	want, err := compile(c)
	if err != nil {
		return nil, fmt.Errorf("compiling rules: %w", err)
	}
	d.mu.Lock() // what is placed and refused stays the same meanwhile
	have, _, err := d.read(ctx)
	placed, overload := d.placed, d.overload
	d.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if have == nil {
		return []string{"there are no rules"}, nil
	}
	if placed == nil {
		placed = have.placements()
	}
	want.place(c, placed)
	want.refuse(c, overload)
	var out []string
	names := func(what string, have, want map[string]bool) {
		for _, name := range slices.Sorted(maps.Keys(want)) {
			if !have[name] {
				out = append(out, fmt.Sprintf("%s %s is missing", what, name))
			}
		}
		for _, name := range slices.Sorted(maps.Keys(have)) {
			if !want[name] {
				out = append(out, fmt.Sprintf("%s %s is not in the compiled rules", what, name))
			}
		}
	}
	names("chain", keys(have.chains), keys(want.chains))
	names("set", keys(have.sets), keys(want.sets))
	for _, name := range slices.Sorted(maps.Keys(want.chains)) {
		if have.chains[name] != nil && !sameChain(have.chains[name], want.chains[name]) {
			out = append(out, fmt.Sprintf("chain %s is not as compiled", name))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want.sets)) {
		h, w := have.sets[name], want.sets[name]
		if h == nil {
			continue
		}
		wrong := 0
		for key, e := range w.elements {
			if f, ok := h.elements[key]; !ok || !e.wants(f) {
				wrong++
			}
		}
		for key := range h.elements {
			if _, ok := w.elements[key]; !ok {
				wrong++
			}
		}
		if h.shape != w.shape || wrong > 0 {
			out = append(out, fmt.Sprintf("set %s differs in %d elements", name, wrong))
		}
	}
	return out, nil
}

func keys[V any](m map[string]V) map[string]bool {
	out := make(map[string]bool, len(m))
	for k := range m {
		out[k] = true
	}
	return out
}

// The fields of a packet that ways are told apart by.
type field int8

const (
	source field = iota
	destination
	l4proto
	port
	fieldCount

	known  field = -1 // a constant, not a field
	opaque field = -2 // anything
	unset  field = -3 // not loaded by this rule
)

// box is a set of packets: an interval for each field, as big-endian bytes.
type box struct{ first, last [fieldCount]string }

func (b *box) empty() bool {
	for f := range fieldCount {
		if b.first[f] > b.last[f] {
			return true
		}
	}
	return false
}

// meet returns what is in b with a field in an interval.
func (b box) meet(f field, first, last string) (box, bool) {
	b.first[f], b.last[f] = max(b.first[f], first), min(b.last[f], last)
	return b, b.first[f] <= b.last[f]
}

// without returns boxes that hold what is in b and not in c, which must be within b.
func (b box) without(c box) (rest []box) {
	for f := range fieldCount {
		if b.first[f] < c.first[f] {
			low := b
			low.last[f] = step(c.first[f], -1)
			rest = append(rest, low)
		}
		if c.last[f] < b.last[f] {
			high := b
			high.first[f] = step(c.last[f], 1)
			rest = append(rest, high)
		}
		b.first[f], b.last[f] = c.first[f], c.last[f]
	}
	return rest
}

// step adds 1 or -1 to a big-endian number that has room for it.
func step(s string, by int) string {
	b := []byte(s)
	for i := len(b) - 1; i >= 0; i-- {
		b[i] += byte(by)
		if by > 0 && b[i] != 0 || by < 0 && b[i] != 0xff {
			break
		}
	}
	return string(b)
}

// cell is what is known of a byte in a register: it is value, or the byte at index of a field under mask.
type cell struct {
	field field
	index uint8
	mask  byte
	value byte
}

// way is a set of packets on their way through the rules.
type way struct {
	box
	translated string // the source, once it is
	redirected bool   // its destination was translated
	registers  [64]cell
}

// walk follows ways.
type walk struct {
	rules    *ruleset
	family   family
	underlay []byte
	index    uint32   // of the underlay
	bases    []*chain // that a forwarded packet passes, in order
	paths    int
	been     map[stop]bool
	out      []nat.Departure
}

// stop is a way that has come to a base chain, or to a rule of one. From there on nothing else counts.
type stop struct {
	box
	translated string
	redirected bool
	base       int
	rules      *chain
	rule       int
}

func (r *ruleset) departures(underlay string, index uint32, sources, destinations []netip.Prefix) ([]nat.Departure, error) {
	var out []nat.Departure
	for _, f := range families {
		w := &walk{rules: r, family: f, underlay: interfaceName(underlay), index: index, been: map[stop]bool{}}
		for _, name := range slices.Sorted(maps.Keys(r.chains)) {
			// By which interface a packet came is not asked for: whether its source may come there decides nothing here.
			if c := r.chains[name]; name != "sources" && c.kind != "" && c.hook != *nftables.ChainHookInput && c.hook != *nftables.ChainHookOutput {
				w.bases = append(w.bases, c)
			}
		}
		slices.SortStableFunc(w.bases, func(a, b *chain) int {
			return cmp.Or(cmp.Compare(a.hook, b.hook), cmp.Compare(a.priority, b.priority))
		})
		for _, src := range sources {
			for _, dst := range destinations {
				if src.Addr().Is6() != f.ipv6 || dst.Addr().Is6() != f.ipv6 {
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

// bounds returns the first and the last address of a prefix.
func bounds(p netip.Prefix) (first, last string) {
	a := p.Masked().Addr().AsSlice()
	first = string(a)
	for bit := p.Bits(); bit < len(a)*8; bit++ {
		a[bit/8] |= 0x80 >> (bit % 8)
	}
	return first, string(a)
}

// base follows a way from the base chain of a number on.
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

func addresses(first, last string) nat.Range {
	a, _ := netip.AddrFromSlice([]byte(first))
	b, _ := netip.AddrFromSlice([]byte(last))
	return nat.Range{First: a, Last: b}
}

// end goes on with a way that has come through a chain: because of a verdict, which no other rule of its base chain
// changes, or because the chain is over.
type end func(p way, accepted bool) error

// chain follows a way through a chain, from its rule n on.
func (w *walk) chain(p way, c *chain, n int, end end) error {
	if w.paths++; w.paths > maxPaths {
		return errTooMany
	}
	if n == len(c.rules) {
		return end(p, false)
	}
	if c.kind != "" {
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

// expr follows a way through a rule, from its expression i on.
func (w *walk) expr(p way, c *chain, n, i int, end end) error {
	if i == len(c.rules[n]) {
		return w.chain(p, c, n+1, end)
	}
	next := func(p way) error { return w.expr(p, c, n, i+1, end) }
	skip := func(p way) error { return w.chain(p, c, n+1, end) }
	both := func() error { return either(p, next, skip) }
	switch e := c.rules[n][i].(type) {
	case *expr.Counter, *expr.Log, *expr.Objref:
		return next(p)
	case *expr.Limit, *expr.Dynset: // the rate may be exceeded, the set full
		return both()
	case *expr.Reject:
		return nil
	case *expr.Immediate:
		p.constant(e.Register, e.Data)
		return next(p)
	case *expr.Meta:
		if e.SourceRegister {
			return next(p) // sets a mark
		}
		switch e.Key {
		case expr.MetaKeyNFPROTO:
			p.constant(e.Register, []byte{w.family.nfproto})
		case expr.MetaKeyOIF:
			p.constant(e.Register, nativeUint32(w.index))
		case expr.MetaKeyOIFNAME:
			p.constant(e.Register, w.underlay)
		case expr.MetaKeyL4PROTO:
			p.load(e.Register, l4proto, 0, 1)
		default:
			p.unknown(e.Register, unix.IFNAMSIZ)
		}
		return next(p)
	case *expr.Payload:
		if e.OperationType != expr.PayloadLoad {
			return w.write(p, e, c.rules[n][i-1], next)
		}
		w.payload(&p, e)
		return next(p)
	case *expr.Fib: // only what leaves by the underlay is asked for
		p.constant(e.Register, w.underlay)
		return next(p)
	case *expr.Ct:
		if e.SourceRegister {
			return next(p) // sets a mark
		}
		switch e.Key {
		case expr.CtKeySTATE:
			p.constant(e.Register, nativeUint32(expr.CtStateBitNEW))
		case expr.CtKeySTATUS: // no answer was seen
			status := uint32(0)
			if p.redirected {
				status = destinationTranslated
			}
			p.constant(e.Register, nativeUint32(status))
		default:
			p.unknown(e.Register, 16)
		}
		return next(p)
	case *expr.Rt: // is it encrypted next? What is leaves as ESP, with the node's own source.
		p.constant(e.Register, []byte{0})
		return next(p)
	case *expr.Hash:
		p.unknown(e.DestRegister, 4)
		return next(p)
	case *expr.Exthdr:
		if e.DestRegister != 0 {
			p.unknown(e.DestRegister, e.Len)
			return both() // the option may be missing
		}
		return next(p)
	case *expr.Bitwise:
		p.bitwise(e)
		return next(p)
	case *expr.Cmp:
		return w.compare(p, e, next, skip)
	case *expr.Lookup:
		return w.lookup(p, e, c, n, next, skip, end)
	case *expr.Verdict:
		return w.verdict(p, e, c, n, end)
	case *expr.NAT:
		a := p.registers[offset(e.RegAddrMin):][:w.family.size]
		to := make([]byte, len(a))
		for i, c := range a {
			if c.field != known {
				return fmt.Errorf("a rule translates to an address that cannot be told")
			}
			to[i] = c.value
		}
		if e.Type == expr.NATTypeSourceNAT {
			p.translated = string(to)
			return end(p, true)
		}
		p.redirected = true
		p.first[destination], p.last[destination] = string(to), string(to)
		if e.RegProtoMin != 0 { // which one, is not followed
			p.first[port], p.last[port] = "\x00\x00", "\xff\xff"
		}
		return end(p, true)
	default:
		return fmt.Errorf("a rule that is not understood: %T", e)
	}
}

func (w *walk) verdict(p way, v *expr.Verdict, c *chain, n int, end end) error {
	switch v.Kind {
	case expr.VerdictAccept:
		return end(p, true)
	case expr.VerdictDrop:
		return nil
	case expr.VerdictReturn:
		return end(p, false)
	case expr.VerdictGoto, expr.VerdictJump:
		to := w.rules.chains[v.Chain]
		if to == nil {
			return fmt.Errorf("a rule leads to chain %q, which is not there", v.Chain)
		}
		return w.chain(p, to, 0, func(p way, accepted bool) error {
			if accepted || v.Kind == expr.VerdictGoto {
				return end(p, accepted)
			}
			return w.chain(p, c, n+1, end)
		})
	}
	return fmt.Errorf("a verdict that is not understood: %d", v.Kind)
}

// compare splits a way by a comparison for equality, or goes both ways.
func (w *walk) compare(p way, e *expr.Cmp, next, skip func(way) error) error {
	if e.Op == expr.CmpOpNeq {
		next, skip = skip, next
	} else if e.Op != expr.CmpOpEq {
		return either(p, next, skip)
	}
	cells := p.registers[offset(e.Register):][:len(e.Data)]
	f := cells[0].field
	if f == unset && bytes.Equal(e.Data, []byte{1}) {
		return skip(p) // routing information, which cannot be read back; see Rt above and readable
	}
	if f == known {
		for i, c := range cells {
			if c.field != known {
				return either(p, next, skip)
			} else if c.value != e.Data[i] {
				return skip(p)
			}
		}
		return next(p)
	}
	if f < 0 {
		return either(p, next, skip)
	}
	// The first bits of a field, or those that follow bits that are the same all over the box.
	from := int(cells[0].index)
	first, last := make([]byte, from, 16), make([]byte, from, 16)
	copy(first, p.first[f])
	copy(last, p.last[f])
	whole := bytes.Equal(first, last)
	for i, c := range cells {
		whole = whole && c.field == f && int(c.index) == from+i && (i == 0 || cells[i-1].mask == 0xff || c.mask == 0) && (^c.mask+1)&^c.mask == 0
		if e.Data[i]&^c.mask != 0 {
			whole = false
		}
		first, last = append(first, e.Data[i]), append(last, e.Data[i]|^c.mask)
	}
	if !whole {
		return either(p, next, skip)
	}
	size := len(p.first[f])
	return w.split(p, f, string(append(first, make([]byte, size-len(first))...)), string(append(last, bytes.Repeat([]byte{0xff}, size-len(last))...)), next, skip)
}

func (w *walk) split(p way, f field, first, last string, in, out func(way) error) error {
	hit, ok := p.meet(f, first, last)
	if !ok {
		return out(p)
	}
	q := p
	q.box = hit
	err := in(q)
	for _, rest := range p.without(hit) {
		if err == nil {
			q.box = rest
			err = out(q)
		}
	}
	return err
}

// either goes both ways.
func either(p way, next, skip func(way) error) error {
	if err := next(p); err != nil {
		return err
	}
	return skip(p)
}

// lookup splits a way by the elements of a set.
func (w *walk) lookup(p way, e *expr.Lookup, c *chain, n int, next, skip func(way) error, end end) error {
	s := w.rules.sets[e.SetName]
	if s == nil {
		return fmt.Errorf("a rule asks set %q, which is not there", e.SetName)
	}
	if e.Invert {
		next, skip = skip, next
	}
	if s.shape.isDynamic { // rules fill it
		if e.IsDestRegSet {
			return fmt.Errorf("a rule goes by what other rules have put into map %q", e.SetName)
		}
		return either(p, next, skip)
	}
	var err error
	rest := []box{p.box}
	type answer struct {
		box
		data, chain string
		kind        int32
	}
	had := map[answer]bool{}
	for _, key := range slices.Sorted(maps.Keys(s.elements)) {
		el := s.elements[key]
		hit, exact, ok := p.within(offset(e.SourceRegister), s.shape, key)
		if !ok {
			continue
		}
		q := p
		q.box = hit
		a := answer{hit, el.data, el.chain, el.kind}
		if had[a] {
			continue // and not exact either: those differ
		}
		had[a] = true
		switch {
		case !e.IsDestRegSet:
			err = next(q)
		case s.shape.isVerdict:
			err = w.verdict(q, &expr.Verdict{Kind: expr.VerdictKind(el.kind), Chain: el.chain}, c, n, end)
		default:
			q.constant(e.DestRegister, []byte(el.data))
			err = next(q)
		}
		if err != nil {
			return err
		}
		if !exact {
			continue
		}
		var left []box
		for _, b := range rest {
			if cut, ok := b.common(hit); ok {
				left = append(left, b.without(cut)...)
			} else {
				left = append(left, b)
			}
		}
		if rest = left; len(rest) > maxPaths {
			return errTooMany
		}
	}
	for _, b := range rest {
		q := p
		q.box = b
		if err := skip(q); err != nil {
			return err
		}
	}
	return nil
}

func (b box) common(c box) (box, bool) {
	for f := range fieldCount {
		b.first[f], b.last[f] = max(b.first[f], c.first[f]), min(b.last[f], c.last[f])
	}
	return b, !b.empty()
}

// within returns what of a way has a key in an element, exact when that is all that does and not only what may.
func (p *way) within(at int, s shape, key string) (hit box, exact, ok bool) {
	first, last := key, key
	if s.isInterval {
		first, last = key[:len(key)/2], key[len(key)/2:]
	}
	hit, exact = p.box, true
	cells := p.registers[at:]
	for i := 0; i < len(first); {
		c := cells[i]
		if c.field < 0 {
			if c.field == opaque {
				exact = false
			} else if c.value < first[i] || c.value > last[i] {
				return hit, false, false
			}
			i++
			continue
		}
		size := len(p.first[c.field])
		for j := range size {
			if cells[i+j] != (cell{field: c.field, index: uint8(j), mask: 0xff}) {
				return p.box, false, true // part of a field
			}
		}
		if hit, ok = hit.meet(c.field, first[i:i+size], last[i:i+size]); !ok {
			return hit, false, false
		}
		i += size
	}
	return hit, exact, true
}

// offset returns where in the registers' bytes a register begins.
func offset(reg uint32) int {
	if reg >= unix.NFT_REG32_00 {
		return int(reg-unix.NFT_REG32_00) * 4
	}
	return int(reg-unix.NFT_REG_1) * 16
}

// fill sets a register. The kernel fills what is left of the last four bytes with zeros.
func (p *way) fill(reg uint32, cells []cell) {
	at := offset(reg)
	n := copy(p.registers[at:], cells)
	for i := n; i%4 != 0; i++ {
		p.registers[at+i] = cell{field: known}
	}
}

func (p *way) constant(reg uint32, data []byte) {
	cells := make([]cell, len(data))
	for i, b := range data {
		cells[i] = cell{field: known, value: b}
	}
	p.fill(reg, cells)
}

func (p *way) unknown(reg uint32, size uint32) {
	p.fill(reg, slices.Repeat([]cell{{field: opaque}}, int(size)))
}

// load sets a register to bytes of a field.
func (p *way) load(reg uint32, f field, from, size uint32) {
	if f == source && p.translated != "" {
		p.constant(reg, []byte(p.translated[from:from+size]))
		return
	}
	cells := make([]cell, size)
	for i := range cells {
		cells[i] = cell{field: f, index: uint8(from) + uint8(i), mask: 0xff}
	}
	p.fill(reg, cells)
}

// write follows a rule that replaces the prefix of an address. What it writes into the packets that ICMP errors quote changes
// nothing here.
func (w *walk) write(p way, e *expr.Payload, before expr.Any, next func(way) error) error {
	b, ok := before.(*expr.Bitwise)
	var f field
	switch {
	case e.Base == expr.PayloadBaseTransportHeader && e.Offset >= 8:
		return next(p)
	case !ok || e.Base != expr.PayloadBaseNetworkHeader || e.Len != w.family.size || p.translated != "":
		return fmt.Errorf("a rule writes into packets what cannot be told")
	case e.Offset == w.family.source:
		f = source
	case e.Offset == w.family.dst:
		f = destination
	default:
		return fmt.Errorf("a rule writes into packets")
	}
	first, last := []byte(p.first[f]), []byte(p.last[f])
	within := true // what changes is the prefix alone, and all have the same
	for i := range first {
		within = within && first[i]&^b.Mask[i] == last[i]&^b.Mask[i]
	}
	for i := range first {
		if !within {
			first[i], last[i] = 0, 0xff
		}
		first[i], last[i] = first[i]&b.Mask[i]^b.Xor[i], last[i]&b.Mask[i]^b.Xor[i]
	}
	p.first[f], p.last[f] = string(first), string(last)
	return next(p)
}

func (w *walk) payload(p *way, e *expr.Payload) {
	switch {
	case e.Base == expr.PayloadBaseNetworkHeader && e.Offset >= w.family.source && e.Offset+e.Len <= w.family.source+w.family.size:
		p.load(e.DestRegister, source, e.Offset-w.family.source, e.Len)
	case e.Base == expr.PayloadBaseNetworkHeader && e.Offset >= w.family.dst && e.Offset+e.Len <= w.family.dst+w.family.size:
		p.load(e.DestRegister, destination, e.Offset-w.family.dst, e.Len)
	case e.Base == expr.PayloadBaseTransportHeader && e.Offset == 2 && e.Len == 2:
		p.load(e.DestRegister, port, 0, 2)
	default:
		p.unknown(e.DestRegister, e.Len)
	}
}

func (p *way) bitwise(e *expr.Bitwise) {
	cells := slices.Clone(p.registers[offset(e.SourceRegister):][:e.Len])
	for i := range cells {
		switch c := &cells[i]; {
		case c.field == known:
			c.value = c.value&e.Mask[i] ^ e.Xor[i]
		case c.field >= 0 && e.Xor[i] == 0:
			c.mask &= e.Mask[i]
		default:
			c.field = opaque
		}
	}
	p.fill(e.DestRegister, cells)
}
