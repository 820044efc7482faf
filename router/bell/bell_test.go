package bell

import "testing"

func TestBell(t *testing.T) {
	var b Bell
	b.Ring() // without a waiter
	first, second := b.Wait(), b.Wait()
	b.Ring()
	for _, c := range []<-chan struct{}{first, second} {
		select {
		case <-c:
		default:
			t.Error("a ring did not wake a waiter")
		}
	}
	select {
	case <-b.Wait():
		t.Error("a ring before waiting woke a waiter")
	default:
	}
}
