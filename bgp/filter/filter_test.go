package filter

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// msg returns a message of a type.
func msg(kind byte, body ...byte) []byte { return end(append(header(nil, kind), body...), 0) }

// attr returns an attribute of less than 256 bytes.
func attr(flag, kind byte, v ...byte) []byte { return append([]byte{flag, kind, byte(len(v))}, v...) }

func concat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// upd returns an UPDATE message.
func upd(withdrawn, attrs, nlri []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(len(withdrawn)))
	b = append(b, withdrawn...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(attrs)))
	return msg(Update, concat(b, attrs, nlri)...)
}

func capability(code byte, v ...byte) []byte { return append([]byte{code, byte(len(v))}, v...) }

var (
	cap4   = capability(1, 0, 1, 0, 1)
	cap6   = capability(1, 0, 2, 0, 1)
	capAS4 = capability(65, 0, 0, 0xfd, 0xe9)
)

func openMsg(caps ...[]byte) []byte {
	c := concat(caps...)
	fixed := []byte{4, 0xfd, 0xe9, 0, 90, 169, 254, 0, 11}
	if len(c) == 0 {
		return msg(Open, append(fixed, 0)...)
	}
	return msg(Open, concat(fixed, []byte{byte(len(c) + 2), 2, byte(len(c))}, c)...)
}

// pass passes messages to a filter, and returns its output.
func pass(f *Filter, msgs ...[]byte) (out []byte, err error) {
	for _, m := range msgs {
		n, err := f.Length(m[:HeaderLength])
		if err != nil {
			return out, err
		}
		if n != len(m) {
			return out, fmt.Errorf("length %d instead of %d", n, len(m))
		}
		if out, err = f.Message(out, m); err != nil {
			return out, err
		}
	}
	return out, nil
}

// up returns a filter after the handshake.
func up(t *testing.T, o Options, caps ...[]byte) *Filter {
	t.Helper()
	o.Counters = &Counters{}
	f := New(o)
	if caps == nil {
		caps = [][]byte{cap4, cap6, capAS4}
	}
	if _, err := pass(f, openMsg(caps...), msg(Keepalive)); err != nil || !f.Established() {
		t.Fatalf("handshake: %v", err)
	}
	return f
}

var (
	origin  = attr(0x40, 1, 0)
	path    = attr(0x40, 2, 2, 1, 0, 0, 0xfd, 0xe9)
	hop     = attr(0x40, 3, 10, 0, 0, 1)
	base    = concat(origin, path, hop)
	p10     = []byte{8, 10}
	p11     = []byte{8, 11}
	nothing = msg(Keepalive)
	hop6    = []byte{0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}
	local6  = []byte{0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}
	p6      = []byte{32, 0x20, 1, 0x0d, 0xb8}
)

func reach(afi byte, hop, prefixes []byte) []byte {
	return attr(0x80, 14, concat([]byte{0, afi, 1, byte(len(hop))}, hop, []byte{0}, prefixes)...)
}

func unreach(afi byte, prefixes ...byte) []byte {
	return attr(0x80, 15, append([]byte{0, afi, 1}, prefixes...)...)
}

// ext is attr with a length field of two bytes.
func ext(flag, kind byte, v ...byte) []byte {
	return append(binary.BigEndian.AppendUint16([]byte{flag | 0x10, kind}, uint16(len(v))), v...)
}

func reach6(prefixes ...byte) []byte {
	return ext(0x80, 14, concat([]byte{0, 2, 1, 16}, hop6, []byte{0}, prefixes)...)
}

func unreach6(prefixes ...byte) []byte {
	return ext(0x80, 15, append([]byte{0, 2, 1}, prefixes...)...)
}

// TestUpdate checks the result of an UPDATE for each rule of RFC 7606, and for our own rules.
func TestUpdate(t *testing.T) {
	plain := upd(nil, base, p10)
	withdraw := upd(p10, nil, nil)
	withdraw6 := upd(nil, unreach6(p6...), nil)
	long := func(n int) []byte {
		b := ext(0x40, 2)
		for n > 0 {
			k := min(n, 255)
			b = append(b, 2, byte(k))
			for range k {
				b = append(b, 0, 0, 0xfd, 0xe9)
			}
			n -= k
		}
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)-4))
		return b
	}
	many := func(kind byte, n, size int) []byte {
		return ext(0xc0, kind, bytes.Repeat([]byte{1}, n*size)...)
	}
	for name, c := range map[string]struct {
		o         Options
		caps      [][]byte
		in        []byte
		want      []byte // nil: want err
		err       string // code/subcode
		bad       string // part of the note
		discarded []byte // types
	}{
		"plain":                      {in: plain, want: plain},
		"withdrawal":                 {in: withdraw, want: withdraw},
		"both":                       {in: upd(p11, base, p10), want: concat(upd(p11, nil, nil), plain)},
		"End-of-RIB":                 {in: upd(nil, nil, nil), want: upd(nil, nil, nil)},
		"End-of-RIB by MP":           {in: upd(nil, unreach(1), nil), want: upd(nil, nil, nil)},
		"End-of-RIB of IPv6":         {o: Options{IPv6: true}, in: upd(nil, unreach(2), nil), want: upd(nil, unreach6(), nil)},
		"End-of-RIB of another":      {in: upd(nil, unreach(2), nil), want: nothing, discarded: []byte{15}},
		"End-of-RIB of IPv4 in IPv6": {o: Options{IPv6: true}, in: upd(nil, nil, nil), want: nothing},
		"no End-of-RIB":              {in: upd(nil, concat(unreach(1), attr(0xc0, 99)), nil), want: nothing, discarded: []byte{99}},
		"attributes alone":           {in: upd(nil, base, nil), want: nothing},
		"host bits":                  {in: upd([]byte{9, 11, 0xff}, base, []byte{4, 0x1f}), want: concat(upd([]byte{9, 11, 0x80}, nil, nil), upd(nil, base, []byte{4, 0x10}))},
		"default route":              {in: upd(nil, base, []byte{0}), want: upd(nil, base, []byte{0})},
		"other order":                {in: upd(nil, concat(hop, path, origin), p10), want: plain},
		"extended length":            {in: upd(nil, concat(ext(0x40, 1, 0), path, hop), p10), want: plain},

		// Lists and prefixes.
		"withdrawn too long":    {in: msg(Update, 0, 3, 8, 10, 0, 0), err: "3/1"},
		"attributes too long":   {in: msg(Update, 0, 0, 0, 9, 0x40, 1, 1, 0), err: "3/1"},
		"prefix of 33 bits":     {in: upd(nil, base, []byte{33, 10, 0, 0, 0, 0}), err: "3/10"},
		"prefix truncated":      {in: upd(nil, base, []byte{24, 10, 0}), err: "3/10"},
		"withdrawal truncated":  {in: upd([]byte{24, 10, 0}, nil, nil), err: "3/10"},
		"attribute overruns":    {in: upd(nil, concat(base, []byte{0x80, 4, 9, 0}), p10), want: withdraw, bad: "longer than all"},
		"attribute header":      {in: upd(nil, concat(base, []byte{0x80, 4}), p10), want: withdraw, bad: "truncated"},
		"MP overruns":           {in: upd(nil, concat(base, []byte{0x80, 14, 9, 0}), p10), err: "3/1"},
		"MP twice":              {in: upd(nil, concat(unreach(1), unreach(1)), nil), err: "3/1"},
		"error without a reach": {in: upd(p11, attr(0x40, 1, 7), nil), err: "3/1"},
		"twice":                 {in: upd(nil, concat(base, attr(0x40, 1, 2)), p10), want: plain, discarded: []byte{1}},

		// Attributes that are not parsed.
		"unknown optional":       {in: upd(nil, concat(base, attr(0xc0, 40, 5, 0, 6, 0, 9), attr(0x80, 9, 1, 1, 1, 1)), p10), want: plain, discarded: []byte{9, 40}},
		"tunnel encapsulation":   {in: upd(nil, concat(attr(0xc0, 23, 0, 15, 0, 0), base), p10), want: plain, discarded: []byte{23}},
		"unknown and well-known": {in: upd(nil, concat(base, attr(0x40, 40)), p10), err: "3/2"},
		"reserved":               {in: upd(nil, concat(base, attr(0xc0, 0)), p10), want: plain, discarded: []byte{0}},

		// Flags.
		"ORIGIN optional":      {in: upd(nil, concat(attr(0xc0, 1, 0), path, hop), p10), want: withdraw, bad: "flags"},
		"MED transitive":       {in: upd(nil, concat(base, attr(0xc0, 4, 0, 0, 0, 1)), p10), want: withdraw, bad: "flags"},
		"partial ORIGIN":       {in: upd(nil, concat(attr(0x60, 1, 0), path, hop), p10), want: plain},
		"partial communities":  {in: upd(nil, concat(base, attr(0xe0, 8, 0, 1, 0, 1)), p10), want: upd(nil, concat(base, attr(0xe0, 8, 0, 1, 0, 1)), p10)},
		"MP flags":             {o: Options{IPv6: true}, in: upd(nil, concat(origin, path, attr(0xc0, 14, concat([]byte{0, 2, 1, 16}, hop6, []byte{0}, p6)...)), nil), want: withdraw6, bad: "flags"},
		"communities not opt.": {in: upd(nil, concat(base, attr(0x40, 8, 0, 1, 0, 1)), p10), want: withdraw, bad: "flags"},

		// Values.
		"ORIGIN 3":             {in: upd(nil, concat(attr(0x40, 1, 3), path, hop), p10), want: withdraw, bad: "ORIGIN"},
		"ORIGIN of two":        {in: upd(nil, concat(attr(0x40, 1, 0, 0), path, hop), p10), want: withdraw, bad: "length"},
		"no ORIGIN":            {in: upd(nil, concat(path, hop), p10), want: withdraw, bad: "attribute 1 is missing"},
		"no AS_PATH":           {in: upd(nil, concat(origin, hop), p10), want: withdraw, bad: "attribute 2 is missing"},
		"no NEXT_HOP":          {in: upd(nil, concat(origin, path), p10), want: withdraw, bad: "attribute 3 is missing"},
		"empty AS_PATH":        {in: upd(nil, concat(origin, attr(0x40, 2), hop), p10), want: upd(nil, concat(origin, attr(0x40, 2), hop), p10)},
		"AS_PATH segment 0":    {in: upd(nil, concat(origin, attr(0x40, 2, 0, 1, 0, 0, 0, 1), hop), p10), want: withdraw, bad: "segment of type 0"},
		"confederation":        {in: upd(nil, concat(origin, attr(0x40, 2, 3, 1, 0, 0, 0, 1), hop), p10), want: withdraw, bad: "segment of type 3"},
		"empty segment":        {in: upd(nil, concat(origin, attr(0x40, 2, 2, 0), hop), p10), want: withdraw, bad: "empty"},
		"segment truncated":    {in: upd(nil, concat(origin, attr(0x40, 2, 2, 2, 0, 0, 0, 1), hop), p10), want: withdraw, bad: "truncated"},
		"one byte of segment":  {in: upd(nil, concat(origin, attr(0x40, 2, 2, 1, 0, 0, 0, 1, 2), hop), p10), want: withdraw, bad: "truncated"},
		"AS 0":                 {in: upd(nil, concat(origin, attr(0x40, 2, 2, 1, 0, 0, 0, 0), hop), p10), want: withdraw, bad: "AS number 0"},
		"two octets in four":   {in: upd(nil, concat(origin, attr(0x40, 2, 2, 1, 0xfd, 0xe9), hop), p10), want: withdraw, bad: "truncated"},
		"longest path":         {in: upd(nil, concat(origin, long(MaxASPath), hop), p10), want: upd(nil, concat(origin, long(MaxASPath), hop), p10)},
		"path too long":        {in: upd(nil, concat(origin, long(MaxASPath+1), hop), p10), want: withdraw, bad: "more than 512"},
		"NEXT_HOP of five":     {in: upd(nil, concat(origin, path, attr(0x40, 3, 10, 0, 0, 1, 1)), p10), want: withdraw, bad: "length"},
		"NEXT_HOP 0":           {in: upd(nil, concat(origin, path, attr(0x40, 3, 0, 0, 0, 1)), p10), want: withdraw, bad: "NEXT_HOP"},
		"NEXT_HOP loopback":    {in: upd(nil, concat(origin, path, attr(0x40, 3, 127, 0, 0, 1)), p10), want: withdraw, bad: "NEXT_HOP"},
		"NEXT_HOP multicast":   {in: upd(nil, concat(origin, path, attr(0x40, 3, 224, 0, 0, 1)), p10), want: withdraw, bad: "NEXT_HOP"},
		"MED":                  {in: upd(nil, concat(base, attr(0x80, 4, 0, 0, 0, 1)), p10), want: upd(nil, concat(base, attr(0x80, 4, 0, 0, 0, 1)), p10)},
		"MED of three":         {in: upd(nil, concat(base, attr(0x80, 4, 0, 0, 0)), p10), want: withdraw, bad: "length 3 of attribute 4"},
		"LOCAL_PREF":           {o: Options{Internal: true}, in: upd(nil, concat(base, attr(0x40, 5, 0, 0, 0, 1)), p10), want: upd(nil, concat(base, attr(0x40, 5, 0, 0, 0, 1)), p10)},
		"LOCAL_PREF external":  {in: upd(nil, concat(base, attr(0x40, 5, 0, 0, 0, 1)), p10), want: plain, discarded: []byte{5}},
		"LOCAL_PREF of one":    {o: Options{Internal: true}, in: upd(nil, concat(base, attr(0x40, 5, 1)), p10), want: withdraw, bad: "length"},
		"ATOMIC_AGGREGATE":     {in: upd(nil, concat(base, attr(0x40, 6)), p10), want: upd(nil, concat(base, attr(0x40, 6)), p10)},
		"ATOMIC_AGGREGATE of1": {in: upd(nil, concat(base, attr(0x40, 6, 1)), p10), want: plain, discarded: []byte{6}},
		"AGGREGATOR":           {in: upd(nil, concat(base, attr(0xc0, 7, 0, 0, 0, 1, 9, 9, 9, 9)), p10), want: upd(nil, concat(base, attr(0xc0, 7, 0, 0, 0, 1, 9, 9, 9, 9)), p10)},
		"AGGREGATOR of six":    {in: upd(nil, concat(base, attr(0xc0, 7, 0, 1, 9, 9, 9, 9)), p10), want: plain, discarded: []byte{7}},
		"AGGREGATOR 0":         {in: upd(nil, concat(base, attr(0xc0, 7, 0, 0, 0, 0, 9, 9, 9, 9)), p10), want: plain, discarded: []byte{7}},
		"no communities":       {in: upd(nil, concat(base, attr(0xc0, 8)), p10), want: withdraw, bad: "length 0 of attribute 8"},
		"communities of five":  {in: upd(nil, concat(base, attr(0xc0, 8, 1, 2, 3, 4, 5)), p10), want: withdraw, bad: "length 5"},
		"most communities":     {in: upd(nil, concat(base, many(8, MaxCommunities, 4)), p10), want: upd(nil, concat(base, many(8, MaxCommunities, 4)), p10)},
		"too many communities": {in: upd(nil, concat(base, many(8, MaxCommunities+1, 4)), p10), want: withdraw, bad: "at most 512"},
		"extended of seven":    {in: upd(nil, concat(base, attr(0xc0, 16, 1, 2, 3, 4, 5, 6, 7)), p10), want: withdraw, bad: "length"},
		"extended":             {in: upd(nil, concat(base, attr(0xc0, 16, 0, 2, 0xfd, 0xe9, 0, 0, 0, 1, 6, 8, 1, 2, 3, 4, 5, 6, 0x43, 0, 0, 0, 0, 0, 0, 1)), p10), want: upd(nil, concat(base, attr(0xc0, 16, 0, 2, 0xfd, 0xe9, 0, 0, 0, 1, 0x43, 0, 0, 0, 0, 0, 0, 1)), p10), discarded: []byte{16}},
		"extended, EVPN alone": {in: upd(nil, concat(base, attr(0xc0, 16, 6, 8, 1, 2, 3, 4, 5, 6)), p10), want: plain, discarded: []byte{16}},
		"large of eight":       {in: upd(nil, concat(base, attr(0xc0, 32, 1, 2, 3, 4, 5, 6, 7, 8)), p10), want: withdraw, bad: "length"},
		"AS4_PATH of a new":    {in: upd(nil, concat(base, attr(0xc0, 17, 2, 1, 0, 0, 0, 1), attr(0xc0, 18, 0, 0, 0, 1, 9, 9, 9, 9)), p10), want: plain, discarded: []byte{17, 18}},

		// Multiprotocol.
		"IPv6":                {o: Options{IPv6: true}, in: upd(nil, concat(origin, path, reach(2, hop6, p6)), nil), want: upd(nil, concat(origin, path, reach6(p6...)), nil)},
		"IPv6, two hops":      {o: Options{IPv6: true}, in: upd(nil, concat(origin, path, reach(2, concat(hop6, local6), p6)), nil), want: upd(nil, concat(origin, path, reach6(p6...)), nil)},
		"IPv6, both":          {o: Options{IPv6: true}, in: upd(nil, concat(origin, path, reach(2, hop6, p6), unreach(2, 0)), nil), want: concat(upd(nil, unreach6(0), nil), upd(nil, concat(origin, path, reach6(p6...)), nil))},
		"IPv6 withdrawn":      {o: Options{IPv6: true}, in: upd(nil, unreach(2, p6...), nil), want: withdraw6},
		"IPv6, ORIGIN 3":      {o: Options{IPv6: true}, in: upd(nil, concat(attr(0x40, 1, 3), path, reach(2, hop6, p6)), nil), want: withdraw6, bad: "ORIGIN"},
		"IPv6, no hop":        {o: Options{IPv6: true}, in: upd(nil, concat(origin, path, reach(2, nil, p6)), nil), err: "3/9"},
		"IPv6, hop of 4":      {o: Options{IPv6: true}, in: upd(nil, concat(origin, path, reach(2, hop6[:4], p6)), nil), err: "3/9"},
		"IPv6, hop ::":        {o: Options{IPv6: true}, in: upd(nil, concat(origin, path, reach(2, make([]byte, 16), p6)), nil), want: withdraw6, bad: "next hop"},
		"IPv6, :: and fe80":   {o: Options{IPv6: true}, in: upd(nil, concat(origin, path, reach(2, concat(make([]byte, 16), local6), p6)), nil), want: upd(nil, concat(origin, path, ext(0x80, 14, concat([]byte{0, 2, 1, 16}, local6, []byte{0}, p6)...)), nil)},
		"IPv6, 129 bits":      {o: Options{IPv6: true}, in: upd(nil, concat(origin, path, reach(2, hop6, append([]byte{129}, make([]byte, 17)...))), nil), err: "3/9"},
		"IPv6, truncated":     {o: Options{IPv6: true}, in: upd(nil, concat(origin, path, reach(2, hop6, []byte{64, 1})), nil), err: "3/9"},
		"IPv6, empty":         {o: Options{IPv6: true}, in: upd(nil, concat(origin, path, attr(0x80, 14, 0, 2, 1)), nil), err: "3/9"},
		"IPv6 hop overruns":   {o: Options{IPv6: true}, in: upd(nil, concat(origin, path, attr(0x80, 14, 0, 2, 1, 16, 0, 0)), nil), err: "3/9"},
		"unreach truncated":   {o: Options{IPv6: true}, in: upd(nil, attr(0x80, 15, 0, 2), nil), err: "3/9"},
		"unreach, 129 bits":   {o: Options{IPv6: true}, in: upd(nil, attr(0x80, 15, 0, 2, 1, 129), nil), err: "3/9"},
		"two":                 {o: Options{Both: true}, in: upd(nil, concat(base, reach(2, hop6, p6)), p10), want: concat(plain, upd(nil, concat(origin, path, reach6(p6...)), nil))},
		"two withdrawn":       {o: Options{Both: true}, in: upd(p10, unreach(2, p6...), nil), want: concat(withdraw, withdraw6)},
		"two, one withdrawn":  {o: Options{Both: true}, in: upd(nil, concat(base, unreach(2, p6...)), p10), want: concat(withdraw6, plain)},
		"two, malformed":      {o: Options{Both: true}, in: upd(nil, concat(attr(0x40, 1, 3), path, hop, reach(2, hop6, p6)), p10), want: concat(withdraw, withdraw6), bad: "ORIGIN"},
		"two, hop of 4":       {o: Options{Both: true}, in: upd(nil, concat(origin, path, reach(2, hop6[:4], p6)), nil), err: "3/9"},
		"two, IPv4 by hop6":   {o: Options{Both: true}, in: upd(nil, concat(origin, path, reach(1, hop6, p10)), nil), err: "3/9"},
		"two, End-of-RIB":     {o: Options{Both: true}, in: upd(nil, nil, nil), want: upd(nil, nil, nil)},
		"two, End-of-RIB 6":   {o: Options{Both: true}, in: upd(nil, unreach(2), nil), want: upd(nil, unreach6(), nil)},
		"two, multicast":      {o: Options{Both: true}, in: upd(nil, concat(origin, path, attr(0x80, 14, concat([]byte{0, 2, 2, 16}, hop6, []byte{0}, p6)...)), nil), want: nothing, discarded: []byte{14}},
		"IPv4 in IPv6":        {o: Options{IPv6: true}, in: upd(p11, base, p10), want: nothing},
		"IPv6 in IPv4":        {in: upd(nil, concat(base, reach(2, hop6, p6)), p10), want: plain, discarded: []byte{14}},
		"VPN":                 {in: upd(nil, concat(origin, path, attr(0x80, 14, 0, 1, 128, 0, 0)), nil), want: nothing, discarded: []byte{14}},
		"IPv4 by MP":          {in: upd(nil, concat(origin, path, reach(1, []byte{10, 0, 0, 1}, p10)), nil), want: plain},
		"IPv4 by both":        {in: upd(nil, concat(base, reach(1, []byte{10, 0, 0, 2}, p11)), p10), want: concat(plain, upd(nil, concat(origin, path, attr(0x40, 3, 10, 0, 0, 2)), p11))},
		"IPv4 by an IPv6 hop": {in: upd(nil, concat(origin, path, reach(1, hop6, p10)), nil), err: "3/9"},

		// Old speakers, with two octets (RFC 6793).
		"old": {caps: [][]byte{cap4}, in: upd(nil, concat(origin, attr(0x40, 2, 2, 2, 0xfd, 0xe9, 0, 7), hop), p10),
			want: upd(nil, concat(origin, attr(0x40, 2, 2, 2, 0, 0, 0xfd, 0xe9, 0, 0, 0, 7), hop), p10)},
		"old, AS4_PATH": {caps: [][]byte{cap4}, in: upd(nil, concat(origin, attr(0x40, 2, 2, 3, 0xfd, 0xe9, 0x5b, 0xa0, 0x5b, 0xa0), hop, attr(0xc0, 17, 2, 2, 0, 1, 0, 0, 0, 2, 0, 0)), p10),
			want: upd(nil, concat(origin, attr(0x40, 2, 2, 1, 0, 0, 0xfd, 0xe9, 2, 2, 0, 1, 0, 0, 0, 2, 0, 0), hop), p10)},
		"old, AS4_PATH longer": {caps: [][]byte{cap4}, in: upd(nil, concat(origin, attr(0x40, 2, 2, 1, 0xfd, 0xe9), hop, attr(0xc0, 17, 2, 2, 0, 1, 0, 0, 0, 2, 0, 0)), p10),
			want: plain, discarded: []byte{17}},
		"old, AS4_PATH bad": {caps: [][]byte{cap4}, in: upd(nil, concat(origin, attr(0x40, 2, 2, 1, 0xfd, 0xe9), hop, attr(0xc0, 17, 2, 9, 0)), p10),
			want: plain, discarded: []byte{17}},
		"old, set": {caps: [][]byte{cap4}, in: upd(nil, concat(origin, attr(0x40, 2, 2, 1, 0xfd, 0xe9, 1, 2, 0, 7, 0, 8), hop, attr(0xc0, 17, 1, 1, 0, 1, 0, 0)), p10),
			want: upd(nil, concat(origin, attr(0x40, 2, 2, 1, 0, 0, 0xfd, 0xe9, 1, 1, 0, 1, 0, 0), hop), p10)},
		"old, AGGREGATOR": {caps: [][]byte{cap4}, in: upd(nil, concat(origin, attr(0x40, 2, 2, 1, 0xfd, 0xe9), hop, attr(0xc0, 7, 0x5b, 0xa0, 9, 9, 9, 9), attr(0xc0, 18, 0, 1, 0, 0, 9, 9, 9, 8)), p10),
			want: upd(nil, concat(base, attr(0xc0, 7, 0, 1, 0, 0, 9, 9, 9, 8)), p10)},
		"old, AGGREGATOR of two": {caps: [][]byte{cap4}, in: upd(nil, concat(origin, attr(0x40, 2, 2, 1, 0xfd, 0xe9), hop, attr(0xc0, 7, 0, 7, 9, 9, 9, 9), attr(0xc0, 17, 2, 1, 0, 1, 0, 0), attr(0xc0, 18, 0, 1, 0, 0, 9, 9, 9, 8)), p10),
			want: upd(nil, concat(base, attr(0xc0, 7, 0, 0, 0, 7, 9, 9, 9, 9)), p10), discarded: []byte{17, 18}},
		"old, AS4_AGGREGATOR alone": {caps: [][]byte{cap4}, in: upd(nil, concat(origin, attr(0x40, 2, 2, 1, 0xfd, 0xe9), hop, attr(0xc0, 18, 0, 1, 0, 0, 9, 9, 9, 8)), p10),
			want: plain, discarded: []byte{18}},
	} {
		t.Run(name, func(t *testing.T) {
			f := up(t, c.o, c.caps...)
			got, err := pass(f, c.in)
			if c.err != "" {
				n, ok := errors.AsType[*Notification](err)
				if !ok || fmt.Sprintf("%d/%d", n.Code, n.Subcode) != c.err {
					t.Errorf("error %v, want %s", err, c.err)
				}
				if len(got) > 0 || f.o.Counters.Resets.Load() != 1 {
					t.Errorf("got %x, %d resets", got, f.o.Counters.Resets.Load())
				}
				if _, err := pass(f, nothing); err == nil {
					t.Error("the session has not ended")
				}
				return
			}
			if err != nil || !bytes.Equal(got, c.want) {
				t.Errorf("got  %s\nwant %s, %v", hex.EncodeToString(got), hex.EncodeToString(c.want), err)
			}
			if !strings.Contains(f.Note(), c.bad) || c.bad == "" && f.Note() != "" {
				t.Errorf("note %q, want %q", f.Note(), c.bad)
			}
			if n := f.o.Counters.Withdrawn.Load(); n != uint64(min(len(c.bad), 1)) {
				t.Errorf("%d treated as withdrawals", n)
			}
			var kinds []byte
			for k := range f.o.Counters.Discarded {
				if f.o.Counters.Discarded[k].Load() > 0 {
					kinds = append(kinds, byte(k))
				}
			}
			if !bytes.Equal(kinds, c.discarded) {
				t.Errorf("discarded %v, want %v", kinds, c.discarded)
			}
			if n := f.o.Counters.Messages.Load(); n != 3 {
				t.Errorf("%d messages", n)
			}
		})
	}
}

// TestSplit checks that expanding AS numbers from two octets to four, which needs room, loses no
// prefix.
func TestSplit(t *testing.T) {
	f := up(t, Options{}, cap4)
	asPath := ext(0x40, 2)
	for range 2 {
		asPath = append(append(asPath, 2, 200), bytes.Repeat([]byte{0xfd, 0xe9}, 200)...)
	}
	binary.BigEndian.PutUint16(asPath[2:], uint16(len(asPath)-4))
	var prefixes []byte
	for i := range 780 {
		prefixes = append(prefixes, 24, 10, byte(i>>8), byte(i))
	}
	got, err := pass(f, upd(nil, concat(origin, asPath, hop), prefixes))
	if err != nil {
		t.Fatal(err)
	}
	var all []byte
	messages := 0
	for len(got) > 0 {
		n := int(binary.BigEndian.Uint16(got[16:]))
		if n > MaxLength {
			t.Fatalf("length %d", n)
		}
		attrs := int(binary.BigEndian.Uint16(got[21:]))
		all = append(all, got[23+attrs:n]...)
		got = got[n:]
		messages++
	}
	if !bytes.Equal(all, prefixes) || messages != 2 {
		t.Errorf("%d bytes of prefixes in %d messages, want %d in 2", len(all), messages, len(prefixes))
	}
	// Prefixes without room are withdrawn.
	big := concat(origin, asPath, hop, ext(0xc0, 8, make([]byte, 4*MaxCommunities)...), ext(0xc0, 32, make([]byte, 12*60)...))
	if got, err := pass(f, upd(nil, big, p10)); err != nil || !bytes.Equal(got, upd(p10, nil, nil)) {
		t.Errorf("%x, %v", got, err)
	}
	if !strings.Contains(f.Note(), "no room") {
		t.Errorf("note %q", f.Note())
	}
}

func TestOpen(t *testing.T) {
	fixed := []byte{4, 0xfd, 0xe9, 0, 90, 169, 254, 0, 11}
	change := func(at int, v ...byte) []byte {
		m := openMsg(cap4, capAS4)
		copy(m[HeaderLength+at:], v)
		return m
	}
	gr := capability(64, 0xc0, 120, 0, 1, 1, 0x80, 0, 1, 128, 0x80, 0, 2, 1, 0x7f)
	for name, c := range map[string]struct {
		o    Options
		in   []byte
		want []byte
		err  string
	}{
		"plain":              {in: openMsg(cap4, capAS4), want: openMsg(cap4, capAS4)},
		"no capability":      {in: openMsg(), want: openMsg()},
		"all":                {in: openMsg(cap4, cap6, capability(2), gr, capAS4), want: openMsg(cap4, cap6, capability(2), capability(64, 0x80, 120, 0, 1, 1, 0x80, 0, 2, 1, 0), capAS4)},
		"what is not used":   {in: openMsg(capability(73, 1, 'x', 0), capability(6), cap4, capability(69, 0, 1, 1, 3), capability(70), capability(5, 0, 1, 0, 1, 0, 2), capability(1, 0, 1, 0, 128), capability(128)), want: openMsg(cap4)},
		"malformed ones":     {in: openMsg(cap4, capability(65, 1), capability(64, 0), capability(2, 1), capability(1, 0)), want: openMsg(cap4)},
		"several parameters": {in: msg(Open, concat(fixed, []byte{16, 2, 6}, cap4, []byte{2, 6}, capAS4)...), want: openMsg(cap4, capAS4)},
		"RFC 9072":           {in: msg(Open, concat(fixed, []byte{255, 255, 0, 9, 2, 0, 6}, cap4)...), want: openMsg(cap4)},
		"other family":       {o: Options{IPv6: true}, in: openMsg(cap4), err: "2/7"},
		"implied family":     {o: Options{IPv6: true}, in: openMsg(capAS4), err: "2/7"},
		"VPN alone":          {in: openMsg(capability(1, 0, 1, 0, 128)), err: "2/7"},
		"version 3":          {in: change(0, 3), err: "2/1"},
		"AS 0":               {in: change(1, 0, 0), err: "2/2"},
		"AS 0 of four":       {in: openMsg(cap4, capability(65, 0, 0, 0, 0)), err: "2/2"},
		"hold time 2":        {in: change(3, 0, 2), err: "2/6"},
		"identifier 0":       {in: change(5, 0, 0, 0, 0), err: "2/3"},
		"unknown parameter":  {in: msg(Open, concat(fixed, []byte{3, 1, 1, 9})...), err: "2/4"},
		"parameters too few": {in: change(9, 99), err: "2/0"},
		"parameter overruns": {in: msg(Open, concat(fixed, []byte{4, 2, 9, 1, 4})...), err: "2/0"},
		"capability overrun": {in: msg(Open, concat(fixed, []byte{4, 2, 2, 1, 4})...), err: "2/0"},
		"one byte of one":    {in: msg(Open, concat(fixed, []byte{1, 2})...), err: "2/0"},
		"RFC 9072 cut":       {in: msg(Open, concat(fixed, []byte{255, 255, 0})...), err: "2/0"},
	} {
		t.Run(name, func(t *testing.T) {
			c.o.Counters = &Counters{}
			f := New(c.o)
			got, err := pass(f, c.in)
			if c.err != "" {
				if n, ok := errors.AsType[*Notification](err); !ok || fmt.Sprintf("%d/%d", n.Code, n.Subcode) != c.err {
					t.Errorf("error %v, want %s", err, c.err)
				}
				return
			}
			if err != nil || !bytes.Equal(got, c.want) {
				t.Errorf("got  %x\nwant %x, %v", got, c.want, err)
			}
			if f.Identifier().String() != "169.254.0.11" || f.Established() {
				t.Errorf("identifier %v", f.Identifier())
			}
		})
	}
}

func TestOwnOpen(t *testing.T) {
	got, id, err := OwnOpen(openMsg(capability(2), capability(73, 4, 'h', 'o', 's', 't', 0), cap4, capAS4, capability(5, 0, 1, 0, 1, 0, 2)))
	if err != nil || !bytes.Equal(got, openMsg(cap4, capability(2), capAS4)) || id.String() != "169.254.0.11" {
		t.Errorf("%x, %v, %v", got, id, err)
	}
	for _, m := range [][]byte{nothing, msg(Keepalive, make([]byte, 20)...), openMsg()[:20], msg(Open, make([]byte, 12)...)} {
		if _, _, err := OwnOpen(m); err == nil {
			t.Errorf("%x is accepted as an OPEN", m)
		}
	}
}

// TestHeader checks that invalid headers are refused.
func TestHeader(t *testing.T) {
	for name, c := range map[string]struct {
		kind   byte
		length int
		marker byte
		err    string
	}{
		"marker": {Keepalive, 19, 0xfe, "1/1"}, "short": {Keepalive, 18, 0xff, "1/2"}, "long": {Update, 4097, 0xff, "1/2"},
		"long KEEPALIVE": {Keepalive, 20, 0xff, "1/2"}, "short OPEN": {Open, 28, 0xff, "1/2"}, "short UPDATE": {Update, 22, 0xff, "1/2"},
		"short NOTIFICATION": {NotificationType, 20, 0xff, "1/2"}, "ROUTE-REFRESH with ORF": {RouteRefresh, 30, 0xff, "1/2"},
		"type 0": {0, 19, 0xff, "1/3"}, "type 6": {6, 19, 0xff, "1/3"},
	} {
		f := New(Options{Counters: &Counters{}})
		h := header(nil, c.kind)
		h[7] = c.marker
		binary.BigEndian.PutUint16(h[16:], uint16(c.length))
		_, err := f.Length(h)
		n, ok := errors.AsType[*Notification](err)
		if !ok || fmt.Sprintf("%d/%d", n.Code, n.Subcode) != c.err {
			t.Errorf("%s: %v, want %s", name, err, c.err)
			continue
		}
		if b := n.Message(); int(binary.BigEndian.Uint16(b[16:])) != len(b) || b[18] != NotificationType || b[19] != n.Code {
			t.Errorf("%s: message %x", name, b)
		}
	}
}

// TestOrder checks messages in states in which they must not come.
func TestOrder(t *testing.T) {
	open := openMsg(cap4, capAS4)
	bye := msg(NotificationType, 6, 2)
	for name, c := range map[string]struct {
		msgs [][]byte
		err  string
	}{
		"KEEPALIVE first":    {[][]byte{nothing}, "5/1"},
		"UPDATE first":       {[][]byte{upd(nil, nil, nil)}, "5/1"},
		"OPEN twice":         {[][]byte{open, open}, "5/2"},
		"UPDATE too early":   {[][]byte{open, upd(nil, nil, nil)}, "5/2"},
		"OPEN in a session":  {[][]byte{open, nothing, open}, "5/3"},
		"after NOTIFICATION": {[][]byte{open, bye, nothing}, "6/0"},
	} {
		f := New(Options{Counters: &Counters{}})
		_, err := pass(f, c.msgs...)
		if n, ok := errors.AsType[*Notification](err); !ok || fmt.Sprintf("%d/%d", n.Code, n.Subcode) != c.err {
			t.Errorf("%s: %v, want %s", name, err, c.err)
		}
	}
}

func TestOtherMessages(t *testing.T) {
	f := up(t, Options{})
	refresh := msg(RouteRefresh, 0, 1, 0, 1)
	long := append([]byte{6, 9}, make([]byte, 1000)...)
	for name, c := range map[string]struct{ in, want []byte }{
		"KEEPALIVE":          {nothing, nothing},
		"refresh":            {refresh, refresh},
		"of another family":  {msg(RouteRefresh, 0, 2, 0, 1), nothing},
		"begin of RFC 7313":  {msg(RouteRefresh, 0, 1, 1, 1), nothing},
		"NOTIFICATION":       {msg(NotificationType, 4, 0), msg(NotificationType, 4, 0)},
		"shutdown":           {msg(NotificationType, 6, 2, 2, 'h', 'i'), msg(NotificationType, 6, 2, 2, 'h', 'i')},
		"shutdown that lies": {msg(NotificationType, 6, 2, 9, 'h', 'i'), msg(NotificationType, 6, 2)},
		"not ended here":     {msg(NotificationType, 6, 255, 'h', 'i'), msg(NotificationType, 6, 0, 'h', 'i')},
		"long data":          {msg(NotificationType, long...), msg(NotificationType, long[:2+maxData]...)},
	} {
		f.state = established
		if got, err := pass(f, c.in); err != nil || !bytes.Equal(got, c.want) {
			t.Errorf("%s: %x, %v", name, got, err)
		}
		if f.Established() == (c.in[18] == NotificationType) {
			t.Errorf("%s: established is %v", name, f.Established())
		}
	}
	if got, want := Cease("why"), msg(NotificationType, 6, 255, 'w', 'h', 'y'); !bytes.Equal(got, want) {
		t.Errorf("%x", got)
	}
	if got := Cease(strings.Repeat("x", 5000)); len(got) != MaxLength {
		t.Errorf("a NOTIFICATION of %d bytes", len(got))
	}
}

// FuzzMessages passes arbitrary bytes to a filter, which must return messages with correct
// lengths.
func FuzzMessages(f *testing.F) {
	f.Add(concat(openMsg(cap4, capAS4), nothing, upd(p11, base, p10)), false, false, false)
	f.Add(concat(openMsg(cap6), nothing, upd(nil, concat(origin, path, reach(2, hop6, p6), unreach(2, 0)), nil)), true, false, true)
	f.Add(concat(openMsg(cap4, cap6), nothing, upd(p11, concat(base, reach(2, hop6, p6), unreach(2, 0)), p10)), false, true, false)
	f.Fuzz(func(t *testing.T, b []byte, v6, both, internal bool) {
		x := New(Options{IPv6: v6, Both: both, Internal: internal, Counters: &Counters{}})
		for len(b) >= HeaderLength {
			n, err := x.Length(b[:HeaderLength])
			if err != nil || n > len(b) {
				return
			}
			out, err := x.Message(nil, b[:n])
			if err != nil {
				if _, ok := errors.AsType[*Notification](err); !ok || len(out) > 0 {
					t.Fatalf("%x, %v", out, err)
				}
				return
			}
			b = b[n:]
			for first := true; first || len(out) > 0; first = false {
				if len(out) < HeaderLength || int(binary.BigEndian.Uint16(out[16:])) > min(len(out), MaxLength) {
					t.Fatalf("%x", out)
				}
				out = out[binary.BigEndian.Uint16(out[16:]):]
			}
		}
	})
}

// TestShutdown checks the length and the characters of the text of an administrative shutdown.
func TestShutdown(t *testing.T) {
	for what, c := range map[string]struct{ text, want string }{
		"none":                   {"", ""},
		"short":                  {"NET-1", "\x05NET-1"},
		"longest":                {strings.Repeat("x", 255), "\xff" + strings.Repeat("x", 255)},
		"too long":               {strings.Repeat("x", 500), "\xff" + strings.Repeat("x", 255)},
		"cut within a character": {strings.Repeat("x", 254) + "ä", "\xfe" + strings.Repeat("x", 254)},
		"not UTF-8":              {"a\xffb", "\x03a?b"},
	} {
		n := Shutdown(c.text)
		if n.Code != 6 || n.Subcode != 2 || string(n.Data) != c.want {
			t.Errorf("%s: %d/%d %q, want %q", what, n.Code, n.Subcode, n.Data, c.want)
		}
	}
}
