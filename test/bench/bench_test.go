package main

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/test/peer"
)

// TestUpdates reads the table back from the bytes: each prefix once, in messages of a size that BGP
// allows.
func TestUpdates(t *testing.T) {
	const size = 10_000
	for name, table := range map[string][]byte{"updates": updates(size, netip.MustParseAddr("192.0.2.1")), "withdrawals": withdrawals(size)} {
		var seen [size]int
		attributes := map[string]bool{}
		for len(table) > 0 {
			n := int(binary.BigEndian.Uint16(table[16:]))
			if n > 4096 || table[18] != peer.BGPUpdate {
				t.Fatalf("%s: message of %d bytes and type %d", name, n, table[18])
			}
			body := table[19:n]
			table = table[n:]
			withdrawn := body[2 : 2+binary.BigEndian.Uint16(body)]
			body = body[2+len(withdrawn):]
			path := body[2 : 2+binary.BigEndian.Uint16(body)]
			attributes[string(path)] = true
			for b := append(withdrawn, body[2+len(path):]...); len(b) > 0; b = b[4:] {
				seen[binary.BigEndian.Uint32(b)&0xffffff-firstPrefix>>8]++
			}
		}
		if slices.Min(seen[:]) != 1 || slices.Max(seen[:]) != 1 {
			t.Errorf("%s: prefixes are named %d to %d times", name, slices.Min(seen[:]), slices.Max(seen[:]))
		}
		if want := size/20 + 1; name == "updates" && len(attributes) != want {
			t.Errorf("%d attribute sets, want %d with that of the End-of-RIB", len(attributes), want)
		}
	}
}

func TestTable(t *testing.T) {
	tab := newTable("title")
	for i, v := range []float64{1, 30, 2} {
		tab.add("ours", "s", v)
		tab.add("theirs", "s", float64(i+1))
	}
	var out bytes.Buffer
	tab.print(&out, "theirs")
	want := `
title
               s
ours           2.00 (1.00-30.0)
theirs         2.00 (1.00-3.00)
ours / theirs  1.00 (0.67-15.0)
`
	if out.String() != want {
		t.Errorf("printed %s, want %s", out.String(), want)
	}
}

// TestDecodeVici reads a message with every kind of element.
func TestDecodeVici(t *testing.T) {
	short := func(s string) string { return string(rune(len(s))) + s }
	long := func(s string) string { return "\x00" + short(s) }
	text := "\x01" + short("conn") + "\x03" + short("version") + long("2") + "\x04" + short("addrs") + "\x05" + long("a") + "\x05" + long("b") + "\x06" +
		"\x01" + short("children") + "\x02\x02\x03" + short("id") + long("x")
	m, err := decodeVici([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(strings.Fields(m.String()), " "), "{ conn { version = 2 addrs = a,b children { } } id = x }"; got != want {
		t.Errorf("read %s, want %s", got, want)
	}
}
