package backoff

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

func TestDelay(t *testing.T) {
	for _, tt := range []struct {
		b    Backoff
		want []time.Duration // before 0, 1, ... others, and of all numbers after those
	}{
		{Backoff{time.Second, time.Minute}, []time.Duration{1e9, 2e9, 4e9, 8e9, 16e9, 32e9, 60e9}},
		{Backoff{500 * time.Millisecond, 15 * time.Second}, []time.Duration{0.5e9, 1e9, 2e9, 4e9, 8e9, 15e9}},
		{Backoff{time.Second, 8 * time.Second}, []time.Duration{1e9, 2e9, 4e9, 8e9}},
		{Backoff{time.Second, time.Second}, []time.Duration{1e9}},
		{Backoff{time.Minute, time.Second}, []time.Duration{1e9}},
	} {
		for i, want := range tt.want {
			if got := tt.b.Delay(i); got != want {
				t.Errorf("%+v: %v before %d others, want %v", tt.b, got, i, want)
			}
		}
		for _, i := range []int{len(tt.want), 20, 62, 64, math.MaxInt} {
			if got := tt.b.Delay(i); got != tt.b.Last {
				t.Errorf("%+v: %v before %d others, want %v", tt.b, got, i, tt.b.Last)
			}
		}
	}
	// A limit near the largest duration does not wrap.
	for i := range 100 {
		if got := (Backoff{time.Second, math.MaxInt64}).Delay(i); got < time.Second {
			t.Errorf("%v before %d others", got, i)
		}
	}
}

func TestJitter(t *testing.T) {
	const delay = 10 * time.Second
	least := func(int64) int64 { return 0 }
	most := func(n int64) int64 { return n - 1 }
	if a, b := Below(delay, least), Below(delay, most); a != delay/2 || b != delay {
		t.Errorf("below: %v to %v", a, b)
	}
	if a, b := Around(delay, least), Around(delay, most); a != delay/2 || b != delay*3/2-1 {
		t.Errorf("around: %v to %v", a, b)
	}
	seen := map[time.Duration]bool{}
	for r := rand.New(rand.NewPCG(1, 2)); len(seen) < 100; {
		seen[Below(delay, r.Int64N)] = true
	}
}
