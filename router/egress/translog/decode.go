package translog

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"net/netip"
	"slices"
	"sort"
)

func decodeHeader(b []byte) (h header, err error) {
	if len(b) < headerSize || string(b[:4]) != magic || binary.LittleEndian.Uint32(b[headerSize-4:]) != crc32.Checksum(b[:headerSize-4], castagnoli) {
		return h, errDamaged
	}
	for i, p := range []*uint32{&h.size, &h.rows, &h.journal, &h.index, &h.names} {
		*p = binary.LittleEndian.Uint32(b[4+4*i:])
	}
	h.from, h.to = int64(binary.LittleEndian.Uint64(b[24:])), int64(binary.LittleEndian.Uint64(b[32:]))
	if int64(h.size) < headerSize+int64(h.index)+int64(h.names) {
		return h, errDamaged
	}
	return h, nil
}

func checkPart(b []byte) ([]byte, error) {
	if len(b) < 4 || binary.LittleEndian.Uint32(b) != crc32.Checksum(b[4:], castagnoli) {
		return nil, errDamaged
	}
	return b[4:], nil
}

// index is the decoded index of a run. Among the names, it has only the outside addresses.
type index struct {
	names
	base                           int64
	inside, destinations, policies uint64 // numbers of names
	pages                          []pageAt
}

// pageAt is where a page is, and its first key.
type pageAt struct {
	key          uint64
	offset, size int64
}

// cursor reads numbers and strings until there is a failure.
type cursor struct {
	b   []byte
	err error
}

func (c *cursor) take(n uint64) []byte {
	if c.err != nil || n > uint64(len(c.b)) {
		c.err = errDamaged
		return nil
	}
	b := c.b[:n]
	c.b = c.b[n:]
	return b
}

func (c *cursor) uvarint() uint64 {
	v, n := binary.Uvarint(c.b)
	if n <= 0 {
		c.err = errDamaged
		return 0
	}
	c.b = c.b[n:]
	return v
}

func (c *cursor) varint() int64 {
	v, n := binary.Varint(c.b)
	if n <= 0 {
		c.err = errDamaged
		return 0
	}
	c.b = c.b[n:]
	return v
}

func (c *cursor) byte() byte {
	if b := c.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (c *cursor) addr() netip.Addr {
	a, ok := netip.AddrFromSlice(c.take(uint64(c.byte())))
	if !ok {
		c.err = errDamaged
	}
	return a
}

// maxIndex bounds the decompressed size of an index, in bytes.
const maxIndex = 64 << 20

// decompress checks and decompresses a part.
func decompress(b []byte, limit int64) (cursor, error) {
	b, err := checkPart(b)
	if err == nil {
		b, err = io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(b)), limit))
	}
	if err != nil {
		return cursor{}, errDamaged
	}
	return cursor{b: b}, nil
}

// decodeIndex decodes the index that follows a header.
func decodeIndex(h header, b []byte) (x index, err error) {
	c, err := decompress(b, maxIndex)
	if err != nil {
		return x, err
	}
	for n := c.uvarint(); n > 0 && c.err == nil; n-- {
		x.outside = append(x.outside, c.addr())
	}
	x.inside, x.destinations, x.policies = c.uvarint(), c.uvarint(), c.uvarint()
	x.base = c.varint()
	offset := int64(headerSize) + int64(h.index) + int64(h.names)
	for c.err == nil && len(c.b) > 0 {
		p := pageAt{key: c.uvarint(), offset: offset, size: int64(c.uvarint())}
		if p.size < 4 || p.size > int64(h.size) {
			return x, errDamaged
		}
		offset += p.size
		x.pages = append(x.pages, p)
	}
	if c.err != nil || offset != int64(h.size) {
		return x, errDamaged
	}
	return x, nil
}

// decodeNames decodes the names that follow the index.
func (x *index) decodeNames(b []byte) error {
	c, err := decompress(b, maxIndex)
	if err != nil {
		return err
	}
	for n := x.inside; n > 0 && c.err == nil; n-- {
		x.names.inside = append(x.names.inside, c.addr())
	}
	for n := x.destinations; n > 0 && c.err == nil; n-- {
		a := c.addr()
		if port := c.take(2); port != nil {
			x.names.destinations = append(x.names.destinations, netip.AddrPortFrom(a, binary.LittleEndian.Uint16(port)))
		}
	}
	for n := x.policies; n > 0 && c.err == nil; n-- {
		x.names.policies = append(x.names.policies, string(c.take(c.uvarint())))
	}
	if c.err != nil || len(c.b) > 0 {
		return errDamaged
	}
	return nil
}

// pagesOf returns the pages that may have rows with the outside address and port of a query.
func (x *index) pagesOf(q Query) []pageAt {
	number, ok := slices.BinarySearchFunc(x.outside, q.Outside.Addr(), netip.Addr.Compare)
	if !ok {
		return nil
	}
	first := uint64(number)<<16 | uint64(q.Outside.Port())
	last := first
	if q.AnyPort {
		first, last = uint64(number)<<16, uint64(number)<<16|0xffff
	}
	after := sort.Search(len(x.pages), func(i int) bool { return x.pages[i].key > last })
	from := sort.Search(len(x.pages), func(i int) bool { return x.pages[i].key >= first })
	return x.pages[max(from-1, 0):after]
}

// decodePage returns the rows of a page.
func (x *index) decodePage(p pageAt, b []byte) ([]row, error) {
	c, err := decompress(b, pageRows*columns*8+64)
	if err != nil {
		return nil, err
	}
	n := c.uvarint()
	widths := c.take(columns)
	if c.err != nil || n > pageRows {
		return nil, errDamaged
	}
	var cols [columns][]uint64
	for i, width := range widths {
		cols[i] = make([]uint64, n)
		for shift := range width {
			for j, v := range c.take(n) {
				cols[i][j] |= uint64(v) << (8 * (shift & 7))
			}
		}
	}
	if c.err != nil || len(c.b) > 0 {
		return nil, errDamaged
	}
	rows := make([]row, n)
	key := p.key
	for i := range rows {
		key += cols[colKey][i]
		w := &rows[i]
		w.outside, w.outsidePort = uint32(key>>16), uint16(key)
		w.start = x.base + int64(cols[colStart][i])
		w.end = w.start + int64(cols[colDuration][i])
		w.inside, w.insidePort = uint32(cols[colInside][i]), uint16(cols[colInsidePort][i])+w.outsidePort
		w.destination, w.protocol, w.policy = uint32(cols[colDestination][i]), uint8(cols[colProtocol][i]), uint32(cols[colPolicy][i])
		w.sent.Bytes, w.sent.Packets = cols[colSentBytes][i], cols[colSentPackets][i]
		w.received.Bytes, w.received.Packets = cols[colReceivedBytes][i], cols[colReceivedPackets][i]
		w.flags = uint8(cols[colFlags][i])
		if int(w.outside) >= len(x.outside) || uint64(w.inside) >= x.inside || uint64(w.destination) >= x.destinations || uint64(w.policy) >= x.policies {
			return nil, errDamaged
		}
	}
	return rows, nil
}

// decodeRun returns all rows of a run.
func decodeRun(b []byte) (names, []row, error) {
	h, err := decodeHeader(b)
	if err != nil || int64(h.size) > int64(len(b)) {
		return names{}, nil, errDamaged
	}
	x, err := decodeIndex(h, b[headerSize:headerSize+h.index])
	if err == nil {
		err = x.decodeNames(b[headerSize+h.index : headerSize+h.index+h.names])
	}
	if err != nil {
		return names{}, nil, err
	}
	var all []row
	for _, p := range x.pages {
		rows, err := x.decodePage(p, b[p.offset:p.offset+p.size])
		if err != nil {
			return names{}, nil, err
		}
		all = append(all, rows...)
	}
	if len(all) != int(h.rows) {
		return names{}, nil, fmt.Errorf("%w: %d rows instead of %d", errDamaged, len(all), h.rows)
	}
	return x.names, all, nil
}
