package main

import (
	"context"
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
)

const (
	routerASN = 64620
	feederASN = 65001
	// firstPrefix is 20.0.0.0; prefix i is the i-th /24 from there.
	firstPrefix = 20 << 24
)

// address returns the network address of the i-th prefix of the table.
func address(i int) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, firstPrefix+uint32(i)<<8)))
}

// updates returns a table of n /24 prefixes on the wire: as many attribute sets as a table of this
// size has on the Internet (a twentieth, at most 5,000), each in an UPDATE with its prefixes, and
// an End-of-RIB.
func updates(n int, nextHop netip.Addr) []byte {
	sets := min(5000, n/20)
	var out []byte
	for s := range sets {
		path := []byte{0x40, 1, 1, 0, 0x40, 2, 2 + 4*3, 2, 3} // ORIGIN IGP, AS_PATH of three
		for _, as := range []uint32{feederASN, 3356, uint32(100_000 + s)} {
			path = binary.BigEndian.AppendUint32(path, as)
		}
		path = append(path, 0x40, 3, 4)
		path = append(path, nextHop.AsSlice()...)
		path = append(path, 0x80, 4, 4) // MULTI_EXIT_DISC
		path = binary.BigEndian.AppendUint32(path, uint32(s))
		body := binary.BigEndian.AppendUint16([]byte{0, 0}, uint16(len(path)))
		body = append(body, path...)
		out = append(out, update(append(body, nlri(s*n/sets, (s+1)*n/sets)...))...)
	}
	return append(out, update([]byte{0, 0, 0, 0})...)
}

// withdrawals takes the same table back.
func withdrawals(n int) (out []byte) {
	for from := 0; from < n; from += 900 {
		gone := nlri(from, min(n, from+900))
		body := binary.BigEndian.AppendUint16(nil, uint16(len(gone)))
		out = append(out, update(append(append(body, gone...), 0, 0))...)
	}
	return out
}

func nlri(from, to int) (b []byte) {
	for i := from; i < to; i++ {
		b = append(b, 24)
		b = append(b, address(i).AsSlice()[:3]...)
	}
	return b
}

func update(body []byte) []byte {
	b := make([]byte, 19, 19+len(body))
	for i := range 16 {
		b[i] = 0xff
	}
	binary.BigEndian.PutUint16(b[16:], uint16(19+len(body)))
	b[18] = peer.BGPUpdate
	return append(b, body...)
}

// dial opens a session to the router, which may still be starting.
func dial(ctx context.Context, from *lab.Node, router, id netip.Addr) (session *peer.RawBGP, err error) {
	err = lab.Until(ctx, 60*time.Second, func() error {
		session, err = peer.DialRawBGP(ctx, from, netip.AddrPortFrom(router, 179), feederASN, id)
		return err
	})
	return session, err
}
