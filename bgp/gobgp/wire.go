package gobgp

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"github.com/isthmus-net/isthmus/bgp"
)

// Daemon and child exchange frames over a socket pair: the length of the rest as 4 bytes
// big-endian, one byte of type, and the body. Paths and answers have a binary body, all others
// JSON. The daemon does not trust the child, which parses data from strangers: sizes are limited,
// every field is checked, and an invalid frame ends the child.
type frameType uint8

const (
	frameConfig   frameType = iota + 1 // to the child: configMessage
	frameReset                         // to the child: resetMessage
	frameRelease                       // to the child: all peers that were expected back have come
	frameReply                         // from the child: replyMessage
	frameState                         // from the child: stateMessage
	frameCounters                      // from the child: []countersMessage
	framePaths                         // from the child: updates
	frameEnd                           // from the child: endMessage
	frameLog                           // from the child: logMessage
	frameAsk                           // to the child: askMessage
	frameAnswer                        // from the child: answer
	frameAlive                         // from the child, every aliveInterval: empty
)

const (
	maxToChild   = 64 << 20 // a configuration of some ten thousand peers
	maxFromChild = 1 << 20
	pathsFrame   = 48 << 10 // size at which the child closes a frame of paths

	maxPaths  = 256       // fits a configuration of tens of thousands of peers
	maxASPath = 2048      // numbers; more do not fit into a BGP message (RFC 4271 section 4.1)
	maxBlock  = 256 << 10 // bytes for the paths of one prefix
)

type configMessage struct {
	ID       uint64
	ASN      uint32
	RouterID netip.Addr
	Peers    []peerConfig
	Announce []netip.Prefix
	// Restarting means that the FIB already holds routes of these peers (RFC 4724 section 4.1). It
	// is only evaluated when BGP starts.
	Restarting bool
}

// peerConfig is a peer with the additional values that the child needs. ID replaces the name in
// messages from the child. The addresses are those in the child's network namespace; Outside holds
// the real ones. Key changes whenever the TCP-MD5 key does; the key itself stays in the daemon.
type peerConfig struct {
	ID      uint32
	Peer    bgp.Peer
	Outside [2]netip.Addr
	Key     uint64
}

// password does not reveal itself when it is printed.
type password []byte

func (password) String() string   { return "(password)" }
func (password) GoString() string { return "(password)" }

type resetMessage struct {
	ID   uint64
	Peer uint32
	Soft bool
}

type replyMessage struct {
	ID      uint64
	Changes uint64
	Errors  []string
}

type stateMessage struct {
	Peer  uint32
	State bgp.SessionState // empty: unchanged
	// Down means that the session has ended, and Restarting that its paths are kept nevertheless.
	// Expired means that they are no longer kept.
	Down, Restarting, Expired bool
	Error                     string
}

type countersMessage struct {
	Peer            uint32
	RouterID        netip.Addr
	Received        uint32
	In, Out         uint64
	HoldTime        uint32 // seconds
	GracefulRestart bool
	BothFamilies    bool
}

type endMessage struct {
	Peer uint32
}

type logMessage struct {
	Level string // as log/slog names it
	Text  string
	Peer  uint32 // 0: none
}

// path and update are bgp.Path and bgp.Update with numbers instead of names.
type path struct {
	peer    uint32
	nextHop netip.Addr
	asPath  []uint32
	kept    bool
}

type update struct {
	prefix netip.Prefix
	paths  []path
}

var errMalformed = errors.New("malformed frame")

func writeFrame(w io.Writer, t frameType, body []byte) error {
	b := make([]byte, 5, 5+len(body))
	binary.BigEndian.PutUint32(b, uint32(1+len(body)))
	b[4] = byte(t)
	_, err := w.Write(append(b, body...))
	return err
}

func writeJSON(w io.Writer, t frameType, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding frame %d: %w", t, err)
	}
	return writeFrame(w, t, body)
}

// readFrame reads one frame of at most limit bytes.
func readFrame(r io.Reader, limit uint32) (frameType, []byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n < 1 || n > limit {
		return 0, nil, fmt.Errorf("%w: length %d", errMalformed, n)
	}
	body := make([]byte, n-1)
	_, err := io.ReadFull(r, body)
	return frameType(head[4]), body, err
}

// appendUpdate appends the prefix (bits, number of address bytes, address) and the paths (peer,
// next hop, whether it is kept from external peers, AS path). The paths form one block preceded by
// its length, so that equal blocks can be recognized without parsing.
func appendUpdate(b []byte, u update) []byte {
	a := u.prefix.Addr().AsSlice()
	b = append(b, byte(u.prefix.Bits()), byte(len(a)))
	b = append(b, a...)
	var block [512]byte
	p := block[:0]
	for _, x := range u.paths {
		if len(p) > maxBlock/2 {
			break
		}
		p = binary.AppendUvarint(p, uint64(x.peer))
		h := x.nextHop.AsSlice()
		p = append(p, byte(len(h)))
		p = append(p, h...)
		kept := byte(0)
		if x.kept {
			kept = 1
		}
		p = append(p, kept)
		p = binary.AppendUvarint(p, uint64(len(x.asPath)))
		for _, n := range x.asPath {
			p = binary.AppendUvarint(p, uint64(n))
		}
	}
	b = binary.AppendUvarint(b, uint64(len(p)))
	return append(b, p...)
}

// pathDecoder turns the bodies of path frames into updates. Many prefixes share their paths, so it
// returns the same slice for the same bytes.
type pathDecoder struct {
	name func(uint32) (string, bool)
	seen map[string][]bgp.Path
}

// maxSeen is the number of entries at which the cache of a pathDecoder is dropped.
const maxSeen = 1 << 16

func (d *pathDecoder) decode(b []byte) ([]bgp.Update, error) {
	us := make([]bgp.Update, 0, len(b)/32+1)
	for r := (reader{b: b}); len(r.b) > 0; {
		bits := r.byte()
		a := r.addr()
		block := r.bytes(r.uvarint(maxBlock))
		if r.bad || !a.IsValid() {
			return nil, fmt.Errorf("%w: truncated update", errMalformed)
		}
		p := netip.PrefixFrom(a, int(bits))
		if !p.IsValid() || p != p.Masked() || a.Is4In6() {
			return nil, fmt.Errorf("%w: prefix %v/%d", errMalformed, a, bits)
		}
		paths, ok := d.seen[string(block)]
		if !ok {
			var err error
			if paths, err = d.paths(block); err != nil {
				return nil, fmt.Errorf("%w of %v", err, p)
			}
			if d.seen == nil || len(d.seen) >= maxSeen {
				d.seen = make(map[string][]bgp.Path)
			}
			d.seen[string(block)] = paths
		}
		us = append(us, bgp.Update{Prefix: p, Paths: paths})
	}
	return us, nil
}

func (d *pathDecoder) paths(b []byte) ([]bgp.Path, error) {
	var ps []bgp.Path
	for r := (reader{b: b}); len(r.b) > 0; {
		id := r.uvarint(1<<32 - 1)
		hop := r.addr()
		kept := r.byte()
		n := r.uvarint(maxASPath)
		if r.bad || kept > 1 || n > len(r.b) || len(ps) == maxPaths {
			return nil, fmt.Errorf("%w: paths", errMalformed)
		}
		as := make([]uint32, n)
		for i := range as {
			as[i] = uint32(r.uvarint(1<<32 - 1))
		}
		name, ok := d.name(uint32(id))
		if r.bad || !ok {
			return nil, fmt.Errorf("%w: path of peer %d", errMalformed, id)
		}
		ps = append(ps, bgp.Path{Peer: name, NextHop: hop, ASPath: as, Kept: kept == 1})
	}
	return ps, nil
}

// reader takes fields from b. After the first missing field, bad is set and all further fields are
// zero.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) bytes(n int) []byte {
	if r.bad || n > len(r.b) {
		r.bad, r.b = true, nil
		return nil
	}
	x := r.b[:n]
	r.b = r.b[n:]
	return x
}

func (r *reader) byte() byte {
	if x := r.bytes(1); x != nil {
		return x[0]
	}
	return 0
}

func (r *reader) uvarint(limit uint64) int {
	x, n := binary.Uvarint(r.b)
	if n <= 0 || x > limit {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return int(x)
}

// addr reads an address of 4 or 16 bytes preceded by their number; 0 stands for the invalid
// address.
func (r *reader) addr() netip.Addr {
	n := int(r.byte())
	x := r.bytes(n)
	a, ok := netip.AddrFromSlice(x)
	if !ok && n != 0 {
		r.bad, r.b = true, nil
	}
	return a
}
