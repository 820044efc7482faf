package apply

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/isthmus-net/isthmus/router/backoff"
	"github.com/isthmus-net/isthmus/router/plan"
)

// Delays between attempts at an object that fails.
const (
	firstRetry = time.Second
	lastRetry  = time.Minute
)

var retry = backoff.Backoff{First: firstRetry, Last: lastRetry}

// stepPace is how often alive looks.
const stepPace = 10 * time.Millisecond

// parallel is how many objects of one stage are worked on at a time: enough to hide the latency of
// charon and netlink, few enough that a pass over thousands of tunnels leaves room for everything
// else.
const parallel = 8

// object is one thing that is reconciled on its own, with its own result: one that fails stops no
// other.
type object struct {
	key   string // such as "tunnel/aws-0"
	stage Stage  // stages run in order; within one, objects run beside each other
	apply func(context.Context) error
	// same reports whether the object has nothing new to do, since its part of a former target was
	// the same. Nil: it has.
	same func(former *plan.Target) bool
	// done means that apply succeeded and that nothing has changed since.
	done     bool
	last     bool // it goes when it is done: a removal
	failures int
	due      time.Time
	err      error
	since    time.Time // of err
}

// scheduler works on objects until each is done, again and again where that fails.
type scheduler struct {
	now  func() time.Time
	kick chan struct{}
	// steps counts passes and objects that were worked on.
	steps atomic.Uint64

	mu      sync.Mutex
	objects map[string]*object
}

func newScheduler() *scheduler {
	return &scheduler{now: time.Now, kick: make(chan struct{}, 1), objects: map[string]*object{}}
}

// replace makes these be the objects. Those for which same is true go on as they are, the others
// are worked on soon.
func (s *scheduler) replace(objects []*object, same func(*object) bool) {
	s.mu.Lock()
	wanted := make(map[string]*object, len(objects))
	for _, o := range objects {
		wanted[o.key] = o
		if known := s.objects[o.key]; known != nil {
			settled := same(o)
			known.stage, known.apply, known.same, known.last = o.stage, o.apply, o.same, o.last
			wanted[o.key] = known
			if !settled {
				known.done, known.due, known.failures, known.err = false, time.Time{}, 0, nil
			}
		}
	}
	s.objects = wanted
	s.mu.Unlock()
	s.wake()
}

// again has a known object worked on once more.
func (s *scheduler) again(key string) {
	s.mu.Lock()
	if o := s.objects[key]; o != nil {
		o.done, o.due = false, time.Time{}
	}
	s.mu.Unlock()
	s.wake()
}

// has says whether an object is known, done or not.
func (s *scheduler) has(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.objects[key] != nil
}

func (s *scheduler) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// failed returns the objects whose last attempt failed, by key.
func (s *scheduler) failed() []object {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []object
	for _, o := range s.objects {
		if o.err != nil {
			out = append(out, *o)
		}
	}
	slices.SortFunc(out, func(a, b object) int { return cmp.Compare(a.key, b.key) })
	return out
}

// settled reports whether every object is done.
func (s *scheduler) settled() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range s.objects {
		if !o.done {
			return false
		}
	}
	return true
}

// alive returns nil as soon as there is a pass, or an object was worked on, and the cause of ctx
// when there is neither until it is done.
func (s *scheduler) alive(ctx context.Context) error {
	before := s.steps.Load()
	s.wake()
	for s.steps.Load() == before {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(stepPace):
		}
	}
	return nil
}

// run works until ctx is done. pass is called after each pass that worked on something.
func (s *scheduler) run(ctx context.Context, pass func()) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		s.steps.Add(1)
		next, worked := s.pass(ctx)
		if worked {
			pass()
		}
		wait := lastRetry
		if !next.IsZero() {
			wait = max(0, next.Sub(s.now()))
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return
		case <-s.kick:
		case <-timer.C:
		}
	}
}

// pass works on everything that is due, stage by stage, and returns when the next retry is due. A
// later stage runs although an earlier one failed: what can work shall work. What comes meanwhile
// for an earlier stage is worked on first.
func (s *scheduler) pass(ctx context.Context) (next time.Time, worked bool) {
	for ctx.Err() == nil {
		due := s.due()
		if len(due) == 0 {
			break
		}
		worked = true
		s.work(ctx, due)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range s.objects {
		if !o.done && (next.IsZero() || o.due.Before(next)) {
			next = o.due
		}
	}
	return next, worked
}

// due returns the objects that are to be worked on now, of the first stage that has some.
func (s *scheduler) due() (due []*object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	for _, o := range s.objects {
		if o.done || o.due.After(now) || len(due) > 0 && o.stage > due[0].stage {
			continue
		}
		if len(due) > 0 && o.stage < due[0].stage {
			due = due[:0]
		}
		due = append(due, o)
	}
	slices.SortFunc(due, func(a, b *object) int { return cmp.Compare(a.key, b.key) })
	return due
}

func (s *scheduler) work(ctx context.Context, due []*object) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, parallel)
	for _, o := range due {
		wg.Add(1)
		slots <- struct{}{}
		go func() {
			defer wg.Done()
			defer func() { <-slots }()
			// Before the work: what changes meanwhile is worked on again.
			s.mu.Lock()
			gone := s.objects[o.key] != o || o.done
			apply := o.apply
			o.done = true
			s.mu.Unlock()
			if gone {
				return
			}
			s.result(o, apply(ctx))
			s.steps.Add(1)
		}()
	}
	wg.Wait()
}

func (s *scheduler) result(o *object, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		o.failures, o.err, o.since = 0, nil, time.Time{}
		if o.last && o.done && s.objects[o.key] == o {
			delete(s.objects, o.key)
		}
		return
	}
	if o.err == nil {
		o.since = s.now()
	}
	o.err = err
	delay := backoff.Around(retry.Delay(o.failures), rand.Int64N)
	o.failures++
	if o.done { // else it is asked for again since, and what has changed may let it succeed
		o.done, o.due = false, s.now().Add(delay)
	}
}
