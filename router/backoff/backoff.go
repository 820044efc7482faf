// Package backoff says how long to wait before what has failed is tried again.
package backoff

import "time"

// Backoff is a delay that doubles with each failure in a row.
type Backoff struct {
	First, Last time.Duration // the shortest delay and the longest
}

// Delay returns the delay after a failure, before which there were so many others in a row: First,
// doubled with each of them, but at most Last.
func (b Backoff) Delay(before int) time.Duration {
	for d := b.First; d < b.Last; d *= 2 {
		if before <= 0 {
			return d
		}
		if d > b.Last/2 {
			break
		}
		before--
	}
	return b.Last
}

// Below returns a time from half of a delay to all of it, so that what failed together is not tried
// together. n is as rand.Int64N of math/rand/v2.
func Below(delay time.Duration, n func(int64) int64) time.Duration {
	return delay/2 + time.Duration(n(int64(delay/2)+1))
}

// Around returns a time from half of a delay to one and a half times it, as Below does.
func Around(delay time.Duration, n func(int64) int64) time.Duration {
	return delay/2 + time.Duration(n(int64(delay)))
}
