package gobgp

import (
	"encoding/json"
	"io"
	"net/netip"
	"os"
	"sync"
	"time"
)

// outbox holds the messages that the child has not sent to the daemon yet. Adding never blocks,
// because GoBGP's goroutines do it, some with locks held. While the daemon is slow, later paths of
// a prefix replace earlier ones, so that the outbox holds at most one entry per prefix. All other
// messages overtake paths, except a peer's End-of-RIB.
type outbox struct {
	wake chan struct{} // capacity 1

	mu      sync.Mutex
	frames  []frame
	index   map[netip.Prefix]int // in updates
	updates []update
	ends    []uint32 // peers whose End-of-RIB is sent after updates
}

type frame struct {
	t    frameType
	body []byte
}

// maxFrames is how many frames other than paths may be queued. A daemon that lets more of them
// accumulate has stopped reading.
const maxFrames = 1 << 16

// gather is how long paths are gathered, unless none was sent for as long. GoBGP reports each
// prefix by itself, and a frame for each would wake two goroutines and take a system call.
const gather = 5 * time.Millisecond

func newOutbox() *outbox {
	return &outbox{wake: make(chan struct{}, 1), index: make(map[netip.Prefix]int)}
}

func (o *outbox) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

func (o *outbox) put(t frameType, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		panic(err) // our own message types can always be encoded
	}
	o.putRaw(t, body)
}

// putRaw is put for a body that is encoded already.
func (o *outbox) putRaw(t frameType, body []byte) {
	o.mu.Lock()
	o.frames = append(o.frames, frame{t, body})
	n := len(o.frames)
	o.mu.Unlock()
	if n > maxFrames {
		os.Exit(exitStuck)
	}
	o.signal()
}

func (o *outbox) putUpdates(us []update) {
	if len(us) == 0 {
		return
	}
	o.mu.Lock()
	for _, u := range us {
		if i, ok := o.index[u.prefix]; ok {
			o.updates[i] = u
			continue
		}
		o.index[u.prefix] = len(o.updates)
		o.updates = append(o.updates, u)
	}
	o.mu.Unlock()
	o.signal()
}

func (o *outbox) putEnd(peer uint32) {
	o.mu.Lock()
	o.ends = append(o.ends, peer)
	o.mu.Unlock()
	o.signal()
}

func (o *outbox) takeFrames() []frame {
	o.mu.Lock()
	defer o.mu.Unlock()
	f := o.frames
	o.frames = nil
	return f
}

func (o *outbox) takeUpdates() ([]update, []uint32) {
	o.mu.Lock()
	defer o.mu.Unlock()
	us, ends := o.updates, o.ends
	o.updates, o.ends = nil, nil
	if len(us) > 0 {
		o.index = make(map[netip.Prefix]int)
	}
	return us, ends
}

// run writes to w until a write fails.
func (o *outbox) run(w io.Writer) error {
	frames := func() error {
		for _, f := range o.takeFrames() {
			if err := writeFrame(w, f.t, f.body); err != nil {
				return err
			}
		}
		return nil
	}
	var b []byte
	var pause <-chan time.Time // nil: paths need not wait
	for {
		select {
		case <-o.wake:
		case <-pause:
			pause = nil
		}
		if err := frames(); err != nil {
			return err
		}
		if pause != nil {
			continue
		}
		us, ends := o.takeUpdates()
		if len(us) > 0 {
			pause = time.After(gather)
		}
		for i, u := range us {
			b = appendUpdate(b, u)
			if len(b) < pathsFrame && i < len(us)-1 {
				continue
			}
			if err := writeFrame(w, framePaths, b); err != nil {
				return err
			}
			b = b[:0]
			if err := frames(); err != nil {
				return err
			}
		}
		for _, id := range ends {
			body, _ := json.Marshal(endMessage{id})
			if err := writeFrame(w, frameEnd, body); err != nil {
				return err
			}
		}
	}
}
