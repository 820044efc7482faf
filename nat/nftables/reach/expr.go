package reach

import (
	"bytes"
	"fmt"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// expr follows a way through a rule, from its expression i on.
func (w *walk) expr(p way, c *Chain, n, i int, end end) error {
	if i == len(c.Rules[n]) {
		return w.chain(p, c, n+1, end)
	}
	next := func(p way) error { return w.expr(p, c, n, i+1, end) }
	skip := func(p way) error { return w.chain(p, c, n+1, end) }
	both := func() error { return either(p, next, skip) }
	switch e := c.Rules[n][i].(type) {
	case *expr.Counter, *expr.Log, *expr.Objref:
		return next(p)
	case *expr.Limit, *expr.Dynset: // the rate may be exceeded, or the set full
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
			p.constant(e.Register, []byte{w.header.nfproto})
		case expr.MetaKeyOIF:
			p.constant(e.Register, native(w.index))
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
			return w.write(p, e, c.Rules[n][i-1], next)
		}
		w.payload(&p, e)
		return next(p)
	case *expr.Fib: // only packets that leave by the underlay are considered
		p.constant(e.Register, w.underlay)
		return next(p)
	case *expr.Ct:
		if e.SourceRegister {
			return next(p) // sets a mark
		}
		switch e.Key {
		case expr.CtKeySTATE:
			p.constant(e.Register, native(expr.CtStateBitNEW))
		case expr.CtKeySTATUS: // no answer has been seen
			status := uint32(0)
			if p.redirected {
				status = destinationTranslated
			}
			p.constant(e.Register, native(status))
		default:
			p.unknown(e.Register, 16)
		}
		return next(p)
	// Encrypted packets are not followed: they leave as ESP, with the node's own source.
	case *expr.Rt:
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
		return w.verdict(p, *e, c, n, end)
	case *expr.NAT:
		a := p.registers[offset(e.RegAddrMin):][:w.header.size]
		address := make([]byte, len(a))
		for i, c := range a {
			if c.field != known {
				return fmt.Errorf("a rule translates to an unknown address")
			}
			address[i] = c.value
		}
		if e.Type == expr.NATTypeSourceNAT {
			p.translated = string(address)
			return end(p, true)
		}
		p.redirected = true
		p.first[destination], p.last[destination] = string(address), string(address)
		if e.RegProtoMin != 0 { // the port itself is not tracked
			p.first[port], p.last[port] = "\x00\x00", "\xff\xff"
		}
		return end(p, true)
	default:
		return fmt.Errorf("unknown expression in a rule: %T", e)
	}
}

func (w *walk) verdict(p way, v expr.Verdict, c *Chain, n int, end end) error {
	switch v.Kind {
	case expr.VerdictAccept:
		return end(p, true)
	case expr.VerdictDrop:
		return nil
	case expr.VerdictReturn:
		return end(p, false)
	case expr.VerdictGoto, expr.VerdictJump:
		next := w.rules.Chains[v.Chain]
		if next == nil {
			return fmt.Errorf("a rule leads to chain %q, which does not exist", v.Chain)
		}
		return w.chain(p, next, 0, func(p way, accepted bool) error {
			if accepted || v.Kind == expr.VerdictGoto {
				return end(p, accepted)
			}
			return w.chain(p, c, n+1, end)
		})
	}
	return fmt.Errorf("unknown verdict in a rule: %d", v.Kind)
}

// compare splits a way by a test for equality, or follows both results.
func (w *walk) compare(p way, e *expr.Cmp, next, skip func(way) error) error {
	if e.Op == expr.CmpOpNeq {
		next, skip = skip, next
	} else if e.Op != expr.CmpOpEq {
		return either(p, next, skip)
	}
	cells := p.registers[offset(e.Register):][:len(e.Data)]
	f := cells[0].field
	if f == unset && bytes.Equal(e.Data, []byte{1}) {
		// a comparison of routing information, whose load cannot be read back; see Rt above
		return skip(p)
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
	// The comparison must cover the first bits of a field, or bits that follow bits with the same
	// value in the whole box.
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

func (w *walk) split(p way, f field, first, last string, inside, outside func(way) error) error {
	hit, ok := p.meet(f, first, last)
	if !ok {
		return outside(p)
	}
	q := p
	q.box = hit
	err := inside(q)
	for _, rest := range p.without(hit) {
		if err == nil {
			q.box = rest
			err = outside(q)
		}
	}
	return err
}

// either follows both results.
func either(p way, next, skip func(way) error) error {
	if err := next(p); err != nil {
		return err
	}
	return skip(p)
}

// lookup splits a way by the elements of a set.
func (w *walk) lookup(p way, e *expr.Lookup, c *Chain, n int, next, skip func(way) error, end end) error {
	s := w.rules.Sets[e.SetName]
	if s == nil {
		return fmt.Errorf("a rule looks up set %q, which does not exist", e.SetName)
	}
	if e.Invert {
		next, skip = skip, next
	}
	if s.IsDynamic { // rules fill it
		if e.IsDestRegSet {
			return fmt.Errorf("a rule looks up map %q, which other rules fill", e.SetName)
		}
		return either(p, next, skip)
	}
	var err error
	rest := []box{p.box}
	type answer struct {
		box
		data    string
		verdict expr.Verdict
	}
	had := map[answer]bool{}
	for _, el := range s.Elements {
		hit, exact, ok := p.within(offset(e.SourceRegister), s.IsInterval, el.Key)
		if !ok {
			continue
		}
		q := p
		q.box = hit
		a := answer{hit, el.Data, el.Verdict}
		if had[a] {
			continue // not exact either: exact elements differ
		}
		had[a] = true
		switch {
		case !e.IsDestRegSet:
			err = next(q)
		case s.IsVerdict:
			err = w.verdict(q, el.Verdict, c, n, end)
		default:
			q.constant(e.DestRegister, []byte(el.Data))
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

// write follows a rule that replaces the prefix of an address. Changes of the packets that ICMP
// errors quote have no effect here.
func (w *walk) write(p way, e *expr.Payload, before expr.Any, next func(way) error) error {
	b, ok := before.(*expr.Bitwise)
	var f field
	switch {
	case e.Base == expr.PayloadBaseTransportHeader && e.Offset >= 8:
		return next(p)
	case !ok || e.Base != expr.PayloadBaseNetworkHeader || e.Len != w.header.size || p.translated != "":
		return fmt.Errorf("a rule writes unknown data into packets")
	case e.Offset == w.header.source:
		f = source
	case e.Offset == w.header.destination:
		f = destination
	default:
		return fmt.Errorf("a rule writes into packets")
	}
	first, last := []byte(p.first[f]), []byte(p.last[f])
	within := true // only the prefix changes, and all addresses have the same
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
	case e.Base == expr.PayloadBaseNetworkHeader && e.Offset >= w.header.source && e.Offset+e.Len <= w.header.source+w.header.size:
		p.load(e.DestRegister, source, e.Offset-w.header.source, e.Len)
	case e.Base == expr.PayloadBaseNetworkHeader && e.Offset >= w.header.destination && e.Offset+e.Len <= w.header.destination+w.header.size:
		p.load(e.DestRegister, destination, e.Offset-w.header.destination, e.Len)
	case e.Base == expr.PayloadBaseTransportHeader && e.Offset == 2 && e.Len == 2:
		p.load(e.DestRegister, port, 0, 2)
	default:
		p.unknown(e.DestRegister, e.Len)
	}
}

// destinationTranslated is the status bit of a flow with a translated destination (IPS_DST_NAT).
const destinationTranslated = 1 << 5
