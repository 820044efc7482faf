package translog

import (
	"bytes"
	"cmp"
	"compress/flate"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/bits"
	"net/netip"
	"slices"
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

// part appends a checksum and its content.
func part(b, content []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(b, crc32.Checksum(content, castagnoli)), content...)
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
