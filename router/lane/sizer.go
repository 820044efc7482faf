package lane

import "time"

const (
	// sizeEvery is the time between two probes of the full size.
	sizeEvery = 10 * time.Second
	// sizeWait is how long an answer to a probe may take, and sizeTries how often it is sent.
	sizeWait  = 500 * time.Millisecond
	sizeTries = 2
)

// sizer finds the largest packets that arrive at the other node. It probes the full size, and
// searches by halves when this fails.
type sizer struct {
	small, full int // sizes of IP packets; full 0: nothing is probed
	next        time.Time
	size        int // of the probe that waits for an answer; 0: none does
	sequence    uint32
	sent        time.Time
	tries       int
	low, high   int // arrives, does not arrive; high 0: no search
	proved      bool
	path        int // the result, if smaller than full; 0: full arrives, or it is unknown
	since       time.Time
}

// probe returns the size of a probe to send now; 0: none. ok says whether small packets
// are answered; otherwise a missing answer says nothing about the size.
func (z *sizer) probe(now time.Time, ok bool) int {
	if z.full <= z.small || !ok {
		z.size, z.high = 0, 0
		return 0
	}
	if z.size != 0 {
		if now.Sub(z.sent) < sizeWait {
			return 0
		}
		if z.tries >= sizeTries {
			z.failed(now)
		}
	}
	if z.size == 0 {
		if now.Before(z.next) {
			return 0
		}
		z.size, z.tries = z.full, 0
	}
	z.tries++
	z.sent = now
	return z.size
}

// failed records that packets of the size do not arrive.
func (z *sizer) failed(now time.Time) {
	if z.high == 0 {
		z.low = z.small
		if z.path == 0 {
			z.path, z.since = z.small, now
		}
	}
	z.high = z.size
	z.search(now)
}

// answered records that a packet with a sequence number has arrived.
func (z *sizer) answered(sequence uint32, now time.Time) {
	if z.size == 0 || sequence != z.sequence {
		return
	}
	if z.size == z.full {
		z.path, z.high, z.size, z.proved = 0, 0, 0, true
		z.next = now.Add(sizeEvery)
		return
	}
	z.low = z.size
	z.search(now)
}

// search chooses the next size, or ends the search.
func (z *sizer) search(now time.Time) {
	if z.high-z.low > 1 {
		z.size, z.tries = (z.low+z.high)/2, 0
		return
	}
	z.path, z.high, z.size = z.low, 0, 0
	z.next = now.Add(sizeEvery)
}
