package netlink

import (
	"bytes"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// example is a datagram of two messages: attributes with and without bytes behind them, one in
// another, an empty one.
func example() []byte {
	b, start := Begin(nil, unix.RTM_NEWLINK, unix.NLM_F_ACK, 7)
	b = append(b, 1, 2, 3, 4)
	b = AppendUint32(b, 1, 0x01020304)
	b = append(b, NewText(2, "abc")...)
	b = append(b, NewText(3, "abcd")...)
	b = append(AppendHeader(b, 4, 0), Nest(5, New(6, 9), New(7|unix.NLA_F_NET_BYTEORDER, 8, 8))...)
	b = End(b, start)
	return append(b, Request(unix.RTM_DELLINK, 0, 8, []byte{1}, []byte{2, 3})...)
}

func TestRoundTrip(t *testing.T) {
	first, rest, ok := Next(example())
	if !ok || first.Kind != unix.RTM_NEWLINK || first.Flags != unix.NLM_F_REQUEST|unix.NLM_F_ACK || first.Sequence != 7 || first.PortID != 0 {
		t.Fatalf("%+v, %v", first, ok)
	}
	second, rest, ok := Next(rest)
	if !ok || second.Kind != unix.RTM_DELLINK || second.Flags != unix.NLM_F_REQUEST || second.Sequence != 8 || !bytes.Equal(second.Body, []byte{1, 2, 3}) || len(rest) > 0 {
		t.Fatalf("%+v, %v, %v", second, rest, ok)
	}
	if _, _, ok := Next(rest); ok {
		t.Error("a message of nothing")
	}
	var kinds []uint16
	for kind, value := range Attributes(first.Body[4:]) {
		kinds = append(kinds, kind)
		switch kind {
		case 1:
			if Uint32(value) != 0x01020304 || len(value) != 4 {
				t.Errorf("number % x", value)
			}
		case 2:
			if Text(value) != "abc" || len(value) != 4 {
				t.Errorf("text % x", value)
			}
		case 3:
			if Text(value) != "abcd" || len(value) != 5 {
				t.Errorf("text % x", value)
			}
		case 4:
			if len(value) > 0 || Uint32(value) != 0 {
				t.Errorf("empty % x", value)
			}
		case 5:
			for kind, value := range Attributes(value) {
				kinds = append(kinds, kind)
				if want := map[uint16][]byte{6: {9}, 7: {8, 8}}[kind]; !bytes.Equal(value, want) {
					t.Errorf("attribute %d in another: % x", kind, value)
				}
			}
		}
	}
	if !slices.Equal(kinds, []uint16{1, 2, 3, 4, 5, 6, 7}) {
		t.Errorf("kinds %v", kinds)
	}
	for kind := range Attributes(first.Body[4:]) {
		if kind == 2 {
			break // a reader may stop
		}
	}
}

// TestBytes compares what is written with what the kernel expects.
func TestBytes(t *testing.T) {
	half := func(v uint16) []byte { return native.AppendUint16(nil, v) }
	want := slices.Concat(half(16), half(5|0x8000), half(5), half(6), []byte{9, 0, 0, 0}, half(4), half(7))
	if got := Nest(5, New(6, 9), New(7)); !bytes.Equal(got, want) {
		t.Errorf("% x, want % x", got, want)
	}
	// A message that ends between multiples of four is followed by zeros.
	b := append(Request(1, 0, 1, []byte{1, 2, 3}), 0)
	_, rest, _ := Next(append(b, Request(2, 0, 2)...))
	if m, _, ok := Next(rest); !ok || m.Kind != 2 {
		t.Errorf("%+v, %v behind a message of 19 bytes", m, ok)
	}
}

// TestCut: of a datagram that was cut off, what is whole is read, and nothing else.
func TestCut(t *testing.T) {
	whole := example()
	first, after, _ := Next(whole)
	edge := len(whole) - len(after)
	for n := range whole {
		_, rest, ok := Next(whole[:n:n])
		if ok != (n >= edge) {
			t.Errorf("%d of %d bytes: a message: %v", n, edge, ok)
		}
		if _, _, ok := Next(rest); ok {
			t.Errorf("%d of %d bytes: another message", n, len(whole))
		}
	}
	ends := []int{8, 16, 28, 32} // of the attributes before the last
	ends = append(ends, len(first.Body)-4)
	for n := range len(first.Body) - 4 {
		got := 0
		for range Attributes(first.Body[4 : 4+n : 4+n]) {
			got++
		}
		want := 0
		for i, end := range ends {
			if i == 2 {
				end -= 3 // the last need not have what follows it
			}
			if n >= end {
				want++
			}
		}
		if got != want {
			t.Errorf("%d bytes: %d attributes, want %d", n, got, want)
		}
	}
}

// TestLengths: lengths that cannot be are refused.
func TestLengths(t *testing.T) {
	for _, n := range []uint32{0, 1, 15, 21, 1 << 16, 1<<31 - 1, 1 << 31, 1<<32 - 1} {
		b := Request(1, 0, 1, []byte{1, 2, 3, 4})
		native.PutUint32(b, n)
		if m, rest, ok := Next(b); ok || rest != nil {
			t.Errorf("message of length %d: %+v", n, m)
		}
	}
	for _, n := range []uint16{0, 3, 9, 1 << 15, 1<<16 - 1} {
		b := New(1, 1, 2, 3, 4)
		native.PutUint16(b, n)
		if _, value, rest, ok := Attribute(b); ok || rest != nil {
			t.Errorf("attribute of length %d: % x", n, value)
		}
	}
}

// TestAnswer: an answer has the messages with its sequence number up to its end, and any of them
// may say that it is inconsistent.
func TestAnswer(t *testing.T) {
	one := func(kind, flags uint16, sequence uint32) []byte {
		return Request(kind, flags, sequence, []byte{1, 2, 3, 4})
	}
	const intr = unix.NLM_F_DUMP_INTR
	for name, tt := range map[string]struct {
		datagrams          [][]byte
		kinds              []uint16
		interrupted, ended bool
	}{
		"dump":                {[][]byte{slices.Concat(one(20, 0, 7), one(21, 0, 7)), one(22, 0, 7), one(unix.NLMSG_DONE, 0, 7)}, []uint16{20, 21, 22}, false, true},
		"going on":            {[][]byte{one(20, 0, 7)}, []uint16{20}, false, false},
		"interrupted":         {[][]byte{slices.Concat(one(20, 0, 7), one(21, intr, 7)), one(unix.NLMSG_DONE, 0, 7)}, []uint16{20, 21}, true, true},
		"interrupted at end":  {[][]byte{one(20, 0, 7), one(unix.NLMSG_DONE, intr, 7)}, []uint16{20}, true, true},
		"error":               {[][]byte{one(unix.NLMSG_ERROR, 0, 7)}, nil, false, true},
		"after a former one":  {[][]byte{slices.Concat(one(20, intr, 6), one(unix.NLMSG_DONE, intr, 6), one(21, 0, 7))}, []uint16{21}, false, false},
		"before a former one": {[][]byte{slices.Concat(one(unix.NLMSG_DONE, 0, 7), one(21, intr, 7))}, nil, false, true},
	} {
		a := Answer{Sequence: 7}
		var kinds []uint16
		for _, b := range tt.datagrams {
			if !a.Read(b, func(m Message) { kinds = append(kinds, m.Kind) }) {
				t.Errorf("%s: not whole", name)
			}
		}
		if !slices.Equal(kinds, tt.kinds) || a.Interrupted != tt.interrupted || a.Ended != tt.ended {
			t.Errorf("%s: messages %v, %+v", name, kinds, a)
		}
	}
	a := Answer{Sequence: 7}
	if b := one(20, 0, 7); a.Read(b[:len(b)-1], func(Message) {}) {
		t.Error("a message that is not whole")
	}
}

func TestErrno(t *testing.T) {
	for _, tt := range []struct {
		body []byte
		want unix.Errno
	}{
		{nil, 0},
		{[]byte{1, 2, 3}, 0},
		{native.AppendUint32(nil, 0), 0},
		{native.AppendUint32(nil, 5), 0},
		{native.AppendUint32(nil, ^uint32(0)), unix.EPERM},
		{append(native.AppendUint32(nil, ^uint32(unix.ENOENT)+1), 1, 2), unix.ENOENT},
		{native.AppendUint32(nil, 1<<31), 1 << 31},
	} {
		if got := (&Message{Body: tt.body}).Errno(); got != tt.want {
			t.Errorf("% x: %v, want %v", tt.body, got, tt.want)
		}
	}
}

// FuzzRead: what is read lies within the datagram, and reading ends.
func FuzzRead(f *testing.F) {
	f.Add(example())
	f.Add(example()[:40])
	f.Add(Request(unix.NLMSG_ERROR, unix.NLM_F_ACK_TLVS, 1, []byte{0xea, 0xff, 0xff, 0xff, 0, 0, 0}))
	f.Add(append(Request(1, 0, 1, New(1, 2)), 0xff, 0xff, 0xff, 0xff))
	f.Fuzz(func(t *testing.T, b []byte) {
		var read func(b []byte, depth int)
		read = func(b []byte, depth int) {
			size := 0
			for kind, value := range Attributes(b) {
				if kind&flags != 0 {
					t.Errorf("kind %#x", kind)
				}
				size += unix.SizeofNlAttr + len(value)
				if depth < 4 {
					read(value, depth+1)
				}
				Uint32(value)
				Text(value)
			}
			if size > len(b) {
				t.Errorf("%d bytes of %d", size, len(b))
			}
		}
		read(b, 0)
		size := 0
		for m, rest, ok := Next(b); ok; m, rest, ok = Next(rest) {
			size += unix.SizeofNlMsghdr + len(m.Body)
			m.Errno()
			read(m.Body, 0)
		}
		if size > len(b) {
			t.Errorf("messages of %d bytes in %d", size, len(b))
		}
	})
}
