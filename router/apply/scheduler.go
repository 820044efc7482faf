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

// stepPace is the interval at which alive polls.
const stepPace = 10 * time.Millisecond

// parallel is the number of objects of one stage that run at a time: enough to hide the latency of
// charon and netlink, few enough that a pass over thousands of tunnels leaves capacity for other
// work.
const parallel = 8

// object is reconciled on its own and has its own result: a failure does not stop others.
type object struct {
	key   string // such as "tunnel/aws-0"
	stage Stage  // stages run in order; objects of one stage run in parallel
	apply func(context.Context) error
	// same reports whether the object has no new work, because its part of a former target was the
	// same. Nil: it has work.
	same func(former *plan.Target) bool
	// done means that apply has succeeded and nothing has changed since.
	done     bool
	last     bool // one-shot: removed when done
	failures int
	due      time.Time
	err      error
	since    time.Time // of err
}

// scheduler runs each object until it is done, and retries failures.
type scheduler struct {
	now  func() time.Time
	kick chan struct{}
	// steps counts passes and runs of objects.
	steps atomic.Uint64

	mu      sync.Mutex
	objects map[string]*object
}

func newScheduler() *scheduler {
	return &scheduler{now: time.Now, kick: make(chan struct{}, 1), objects: map[string]*object{}}
}

// replace replaces the objects. Those for which same is true keep their state, the others run soon.
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

// again runs a known object once more.
func (s *scheduler) again(key string) {
	s.mu.Lock()
	if o := s.objects[key]; o != nil {
		o.done, o.due = false, time.Time{}
	}
	s.mu.Unlock()
	s.wake()
}

// has reports whether an object is known, done or not.
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

// alive returns nil as soon as a pass begins or an object has run, and the cause of ctx if neither
// happens before it is done.
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

// run works until ctx is done. It calls pass after each pass that did work.
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

// pass runs everything that is due, stage by stage, and returns the time of the next retry. A later
// stage runs even if an earlier one failed, so that everything that can work does. New work of an
// earlier stage comes first.
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

// due returns the due objects of the first stage that has any.
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
			// Set before the work: changes during the work run the object again.
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
	if o.done { // otherwise it was requested again meanwhile, and may succeed now
		o.done, o.due = false, s.now().Add(delay)
	}
}
