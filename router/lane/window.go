package lane

// window has the last 128 sequence numbers of the other node's requests.
type window struct {
	begun       bool
	first, last uint32
	seen        [2]uint64 // bit N: last - N
}

// windowSize is the number of packets in a window.
const windowSize = 128

// add adds a number. One that is too far ahead is that of another sender, and begins again.
func (w *window) add(n uint32) {
	ahead := int32(n - w.last)
	switch {
	case !w.begun || ahead > 1<<16 || ahead < -1<<16:
		*w = window{begun: true, first: n, last: n, seen: [2]uint64{1}}
	case ahead > 0:
		w.shift(uint(ahead))
		w.seen[0] |= 1
		w.last = n
	case -ahead < windowSize:
		w.seen[-ahead/64] |= 1 << (-ahead % 64)
	}
}

func (w *window) shift(n uint) {
	switch {
	case n >= windowSize:
		w.seen = [2]uint64{}
	case n >= 64:
		w.seen = [2]uint64{0, w.seen[0] << (n - 64)}
	default:
		w.seen = [2]uint64{w.seen[0] << n, w.seen[1]<<n | w.seen[0]>>(64-n)}
	}
}
