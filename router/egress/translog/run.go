package translog

import (
	"bytes"
	"cmp"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"net/netip"
	"slices"
	"sort"
)

// A run is rows on disk, in order of outside address and port: a header, an index of the pages, the
// other names, and the pages. A page stores each column separately, and each column byte by byte
// from the lowest, because only like bytes compress well. Each part has a checksum (CRC-32C) and
// can be read without the others.

const (
	magic      = "IFR1"
	headerSize = 48
	pageRows   = 8192
	maxRunRows = 1 << 20 // the limit of the sort key of encode
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errDamaged means that the data read is not the data written.
var errDamaged = errors.New("damaged")

// header is the beginning of a run.
type header struct {
	size    uint32 // of the whole run in bytes
	rows    uint32
	journal uint32 // the newest journal whose rows it has
	index   uint32 // size of the index in bytes, which comes next
	names   uint32 // size of the other names, after the index
	// Times between which the rows lie, in ms since 1970. If a start is unknown, from is the
	// smallest number.
	from, to int64
}

func (h header) append(b []byte) []byte {
	start := len(b)
	b = append(b, magic...)
	for _, v := range []uint32{h.size, h.rows, h.journal, h.index, h.names} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	b = binary.LittleEndian.AppendUint64(b, uint64(h.from))
	b = binary.LittleEndian.AppendUint64(b, uint64(h.to))
	b = append(b, make([]byte, headerSize-4-(len(b)-start))...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

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

// part appends a checksum and its content.
func part(b, content []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(b, crc32.Checksum(content, castagnoli)), content...)
}

func checkPart(b []byte) ([]byte, error) {
	if len(b) < 4 || binary.LittleEndian.Uint32(b) != crc32.Checksum(b[4:], castagnoli) {
		return nil, errDamaged
	}
	return b[4:], nil
}

// The columns of a page.
const (
	colKey   = iota // outside address and port, less those of the previous row
	colStart        // less the smallest of the run
	colDuration
	colInside
	colInsidePort // less the outside port
	colDestination
	colProtocol
	colPolicy
	colSentBytes
	colSentPackets
	colReceivedBytes
	colReceivedPackets
	colFlags
	columns
)

// encoder makes runs and keeps the buffers that are expensive to allocate. It does not look for
// repetitions, which would cost four times the CPU time for a hundredth of the size.
type encoder struct {
	compressor   *flate.Writer
	out          bytes.Buffer
	order        []uint64          // keys of rows, and their places
	cols         [columns][]uint64 // of a page
	plane, pages []byte
}

// newEncoder makes an encoder with a level of flate: HuffmanOnly for runs that stay, NoCompression
// for those that last a minute.
func newEncoder(level int) *encoder {
	c, err := flate.NewWriter(nil, level)
	if err != nil {
		panic(err) // the level is valid
	}
	return &encoder{compressor: c}
}

// begin and end surround writes to e.compressor; end returns the compressed data, which is valid
// until the next begin.
func (e *encoder) begin() { e.out.Reset(); e.compressor.Reset(&e.out) }

func (e *encoder) end() []byte {
	if err := e.compressor.Close(); err != nil {
		panic(err) // a bytes.Buffer accepts everything
	}
	return e.out.Bytes()
}

// rank orders the used ones of n values by less. It returns their new numbers, and the old ones by
// new number.
func rank(n int, counts []uint32, less func(a, b uint32) int) (number []uint32, order []uint32) {
	for i := range uint32(n) {
		if counts[i] > 0 {
			order = append(order, i)
		}
	}
	slices.SortFunc(order, less)
	number = make([]uint32, n)
	for i, old := range order {
		number[old] = uint32(i)
	}
	return number, order
}

// encode makes a run of at most maxRunRows rows.
func (e *encoder) encode(n names, rows []row, journal uint32) []byte {
	h := header{rows: uint32(len(rows)), journal: journal, from: rows[0].start, to: rows[0].end}
	outside, inside := make([]uint32, len(n.outside)), make([]uint32, len(n.inside))
	destinations, policies := make([]uint32, len(n.destinations)), make([]uint32, len(n.policies))
	base := rows[0].start
	var flags uint8
	for i := range rows {
		w := &rows[i]
		outside[w.outside]++
		inside[w.inside]++
		destinations[w.destination]++
		policies[w.policy]++
		from, to := w.bounds()
		base = min(base, from)
		h.to = max(h.to, to)
		flags |= w.flags
	}
	h.from = base
	if flags&startUnknown != 0 {
		h.from = -1 << 63
	}
	frequent := func(counts []uint32) func(a, b uint32) int {
		return func(a, b uint32) int { return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b)) }
	}
	outsideNumber, outsideOrder := rank(len(n.outside), outside, func(a, b uint32) int { return n.outside[a].Compare(n.outside[b]) })
	insideNumber, insideOrder := rank(len(n.inside), inside, frequent(inside))
	destinationNumber, destinationOrder := rank(len(n.destinations), destinations, frequent(destinations))
	policyNumber, policyOrder := rank(len(n.policies), policies, frequent(policies))

	var index, others []byte
	index = binary.AppendUvarint(index, uint64(len(outsideOrder)))
	for _, i := range outsideOrder {
		index = appendAddr(index, n.outside[i])
	}
	for _, order := range [][]uint32{insideOrder, destinationOrder, policyOrder} {
		index = binary.AppendUvarint(index, uint64(len(order)))
	}
	index = binary.AppendVarint(index, base)
	for _, i := range insideOrder {
		others = appendAddr(others, n.inside[i])
	}
	for _, i := range destinationOrder {
		others = binary.LittleEndian.AppendUint16(appendAddr(others, n.destinations[i].Addr()), n.destinations[i].Port())
	}
	for _, i := range policyOrder {
		others = append(binary.AppendUvarint(others, uint64(len(n.policies[i]))), n.policies[i]...)
	}

	key := func(w *row) uint64 { return uint64(outsideNumber[w.outside])<<16 | uint64(w.outsidePort) }
	order, pages, cols := e.order[:0], e.pages[:0], &e.cols
	for i := range rows {
		order = append(order, key(&rows[i])<<20|uint64(i))
	}
	slices.Sort(order)
	for chunk := range slices.Chunk(order, pageRows) {
		for c := range cols {
			cols[c] = slices.Grow(cols[c][:0], len(chunk))[:len(chunk)]
		}
		first := chunk[0] >> 20
		before := first
		for i, o := range chunk {
			w := &rows[o&(maxRunRows-1)]
			cols[colKey][i] = o>>20 - before
			cols[colStart][i] = uint64(w.start - base)
			cols[colDuration][i] = uint64(w.end - w.start) // modulo 2^64
			cols[colInside][i] = uint64(insideNumber[w.inside])
			cols[colInsidePort][i] = uint64(w.insidePort - w.outsidePort)
			cols[colDestination][i] = uint64(destinationNumber[w.destination])
			cols[colProtocol][i] = uint64(w.protocol)
			cols[colPolicy][i] = uint64(policyNumber[w.policy])
			cols[colSentBytes][i], cols[colSentPackets][i] = w.sent.Bytes, w.sent.Packets
			cols[colReceivedBytes][i], cols[colReceivedPackets][i] = w.received.Bytes, w.received.Packets
			cols[colFlags][i] = uint64(w.flags)
			before = o >> 20
		}
		page := e.page(cols)
		size := len(pages)
		pages = part(pages, page)
		index = binary.AppendUvarint(index, first)
		index = binary.AppendUvarint(index, uint64(len(pages)-size))
	}
	index, others = e.compress(index), e.compress(others)
	h.index, h.names = uint32(len(index)), uint32(len(others))
	h.size = uint32(headerSize + len(index) + len(others) + len(pages))
	e.order, e.pages = order, pages
	return slices.Concat(h.append(nil), index, others, pages)
}

func appendAddr(b []byte, a netip.Addr) []byte {
	s := a.AsSlice()
	return append(append(b, byte(len(s))), s...)
}

// compress makes a part.
func (e *encoder) compress(content []byte) []byte {
	e.begin()
	_, _ = e.compressor.Write(content)
	return part(nil, e.end())
}

// page encodes columns. The result is valid until the next call.
func (e *encoder) page(cols *[columns][]uint64) []byte {
	n := len(cols[0])
	e.begin()
	head := binary.AppendUvarint(nil, uint64(n))
	for _, col := range cols {
		var all uint64
		for _, v := range col {
			all |= v
		}
		head = append(head, byte((bits.Len64(all)+7)/8))
	}
	_, _ = e.compressor.Write(head)
	e.plane = slices.Grow(e.plane[:0], n)[:n]
	for c, width := range head[len(head)-columns:] {
		for shift := range width {
			for i, v := range cols[c] {
				e.plane[i] = byte(v >> (8 * shift))
			}
			_ = e.compressor.Flush() // the next plane has its own distribution
			_, _ = e.compressor.Write(e.plane)
		}
	}
	return e.end()
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
