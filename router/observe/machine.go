package observe

import (
	"context"
	"reflect"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/router/fib"
)

const (
	// lookPause is the time to gather changes before the machine is read, lookRetry the delay after
	// a failure.
	lookPause = 50 * time.Millisecond
	lookRetry = 5 * time.Second
)

// around is the last read state of the machine. A failed read keeps it.
type around struct {
	mu   sync.Mutex
	seen fib.Surroundings
	read bool
}

func (a *around) get() (fib.Surroundings, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.seen, a.read
}

// Machine returns the last read state of the machine.
func (o *Observer) Machine() fib.Surroundings {
	seen, _ := o.around.get()
	return seen
}

// WatchMachine follows the machine's own addresses, interfaces and routes until ctx is done.
func (o *Observer) WatchMachine(ctx context.Context) error {
	nudge := make(chan struct{}, 1)
	go func() {
		for ctx.Err() == nil {
			err := o.o.Machine.Around(ctx, func() {
				select {
				case nudge <- struct{}{}:
				default:
				}
			})
			if ctx.Err() != nil {
				return
			}
			o.o.Log.Warn("changes of the machine's addresses cannot be watched; trying again", "err", err)
			pause(ctx, lookRetry)
		}
	}()
	for {
		_, read := o.around.get()
		select {
		case <-ctx.Done():
			return nil
		case <-nudge:
		case <-retry(read):
		}
		pause(ctx, lookPause)
		o.ReadMachine()
	}
}

// retry fires after a while if the machine has not been read.
func retry(read bool) <-chan time.Time {
	if read {
		return nil
	}
	return time.After(lookRetry)
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// ReadMachine reads the machine, and triggers the jobs that depend on it if it changed.
func (o *Observer) ReadMachine() {
	now, err := o.o.Machine.Surroundings()
	if err != nil {
		o.o.Log.Warn("the machine's addresses and routes could not be read; the former ones stay in use", "err", err)
		return
	}
	o.around.mu.Lock()
	same := o.around.read && reflect.DeepEqual(now, o.around.seen)
	appeared := false
	for name := range now.Devices {
		_, known := o.around.seen.Devices[name]
		appeared = appeared || o.around.read && !known
	}
	o.around.seen, o.around.read = now, true
	o.around.mu.Unlock()
	if appeared {
		// Jobs may wait for this: an underlay gets its kernel parameters, and a tunnel can be
		// created on it.
		o.o.Nudge("host")
		o.o.Retry()
	}
	if !same {
		o.o.Nudge("nat", "routes", "transit")
		o.o.Bell.Ring()
	}
}
