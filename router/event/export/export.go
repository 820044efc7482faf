// Package export sends the events of a node to receivers outside of it: syslog servers (RFC 5424)
// and webhooks. It follows the log of events, so that a receiver that is away for a time misses
// none, and a slow one delays nobody. Each event arrives at least once.
package export

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/backoff"
	"github.com/isthmus-net/isthmus/router/bell"
	"github.com/isthmus-net/isthmus/router/disk"
	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/router/secret"
)

const (
	// batch bounds the events of one delivery.
	batch = 100
	// sendTime bounds one delivery, with the connection that it needs.
	sendTime = 10 * time.Second
	// savePace is the interval of storing how far each target is. What was delivered since is
	// delivered again when the daemon is killed.
	savePace = 5 * time.Second
	maxFile  = 64 << 10
)

var retry = backoff.Backoff{First: time.Second, Last: time.Minute}

// Source is the log of events.
type Source interface {
	ID() string
	Newest() uint64
	After(seq uint64, n int, match func(event.Event) bool) (out []event.Event, last uint64, whole bool)
	Changed() <-chan struct{}
}

// Target is a receiver.
type Target struct {
	Name string
	// Syslog is a syslog server, by TCP or by UDP. It is not valid when Webhook is set.
	Syslog netip.AddrPort
	UDP    bool
	// Webhook is an URL that receives the events by POST.
	Webhook string
	// Secret signs the body for a webhook. Without a name it is not signed.
	Secret secret.Ref
	// Severity is the least that is sent.
	Severity event.Severity
}

// String returns it as "syslog tcp 10.20.0.5:514", and of a URL the host alone, because the rest may
// have a key in it.
func (t Target) String() string {
	switch {
	case t.Webhook != "":
		u, err := url.Parse(t.Webhook)
		if err != nil {
			return "webhook"
		}
		return "webhook " + u.Scheme + "://" + u.Host
	case t.UDP:
		return "syslog udp " + t.Syslog.String()
	}
	return "syslog tcp " + t.Syslog.String()
}

// Options are the dependencies of an Exporter.
type Options struct {
	Log Source
	// File keeps how far each target is. It cannot be derived: only the receiver knows what it has.
	File    string
	Secrets secret.Lookup
	// Changed is called when the state of a target has changed.
	Changed func()
	Logger  *slog.Logger
	// Reach returns why an address must not be a receiver. Default: nat.Outside.
	Reach func(netip.Addr) error
}

// Exporter sends events to targets.
type Exporter struct {
	o    Options
	bell bell.Bell

	mu     sync.Mutex
	node   string
	wanted []Target
	states map[string]*state // by name
	saved  map[string]position
	told   string // failure of the file that was logged
}

// position is how far a target is: the number of the last event that it needs no more, and the log
// that the number is of.
type position struct {
	Log string `json:"log"`
	Seq uint64 `json:"seq"`
}

// State is the state of a target.
type State struct {
	Target
	// Delivered counts the events that the receiver has taken, and Failed the attempts that failed,
	// since the start of the daemon.
	Delivered, Failed uint64
	// Gaps counts how often events may be missing, because the log did not have them any more.
	Gaps uint64
	// Since is the time of the first of the failures in a row; zero: the last attempt succeeded.
	// Failures is their number.
	Since    time.Time
	Failures int
	// Error is the last failure.
	Error string
}

type state struct {
	State
	at   position
	gap  bool // has yet to be told to the receiver
	stop context.CancelFunc
	done chan struct{}
	node string
}

// New returns an Exporter without targets.
func New(o Options) *Exporter {
	if o.Reach == nil {
		o.Reach = nat.Outside
	}
	return &Exporter{o: o, states: map[string]*state{}}
}

// Set sets the name of the node and the targets, whose names differ.
func (x *Exporter) Set(node string, targets []Target) {
	x.mu.Lock()
	x.node, x.wanted = node, slices.Clone(targets)
	x.mu.Unlock()
	x.bell.Ring()
}

// States returns the states of the targets, by name.
func (x *Exporter) States() []State {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out []State
	for _, name := range slices.Sorted(maps.Keys(x.states)) {
		out = append(out, x.states[name].State)
	}
	return out
}

// Run sends events until ctx is done.
func (x *Exporter) Run(ctx context.Context) error {
	x.load()
	var workers sync.WaitGroup
	tick := time.NewTicker(savePace)
	defer tick.Stop()
	for {
		changed := x.bell.Wait()
		x.reconcile(ctx, &workers)
		x.save()
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			workers.Wait()
			x.save()
			return nil
		}
	}
}

// reconcile starts and ends workers as the targets say.
func (x *Exporter) reconcile(ctx context.Context, workers *sync.WaitGroup) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for name, s := range x.states {
		if !slices.ContainsFunc(x.wanted, func(t Target) bool { return t.Name == name }) {
			s.stop()
			delete(x.states, name)
		}
	}
	for _, t := range x.wanted {
		former := x.states[t.Name]
		if former != nil && former.Target == t && former.node == x.node {
			continue
		}
		s := &state{State: State{Target: t}, node: x.node, done: make(chan struct{})}
		var before chan struct{}
		if former != nil {
			former.stop()
			before = former.done
			s.Delivered, s.Failed, s.Gaps = former.Delivered, former.Failed, former.Gaps
		}
		var own context.Context
		own, s.stop = context.WithCancel(ctx)
		x.states[t.Name] = s
		workers.Go(func() {
			defer close(s.done)
			if before != nil {
				<-before
			}
			x.begin(s, former)
			x.work(own, s)
		})
	}
}

// begin sets where a worker begins: where the former one ended, where the last run of the daemon
// did, or, with a new target, at the present.
func (x *Exporter) begin(s, former *state) {
	x.mu.Lock()
	defer x.mu.Unlock()
	saved, ok := x.saved[s.Name]
	switch {
	case former != nil:
		s.at, s.gap = former.at, former.gap
	case ok:
		s.at = saved
	default:
		s.at = position{x.o.Log.ID(), x.o.Log.Newest()}
	}
}

// work sends events to a target until ctx is done.
func (x *Exporter) work(ctx context.Context, s *state) {
	out := x.sender(s.Target, s.node)
	defer out.close()
	filter := event.Filter{Severity: s.Severity} // without the events that only admins see
	for ctx.Err() == nil {
		changed := x.o.Log.Changed()
		events, next, gap := x.next(s, filter)
		if len(events) == 0 {
			x.reached(s, next, 0)
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		err := out.send(ctx, next.Log, gap, events)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			x.reached(s, next, len(events))
			continue
		}
		pause := backoff.Below(retry.Delay(x.failed(s, err)), rand.Int64N)
		if l, ok := errors.AsType[laterError](err); ok {
			pause = min(max(pause, l.after), retry.Last)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// next returns the next events of a target, where they end, and whether events before them may be
// missing.
func (x *Exporter) next(s *state, f event.Filter) (events []event.Event, to position, gap bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	id := x.o.Log.ID()
	lost := s.at.Log != id
	if lost {
		s.at = position{Log: id}
	}
	events, last, whole := x.o.Log.After(s.at.Seq, batch, f.Match)
	if (lost || !whole) && !s.gap {
		s.gap = true
		s.Gaps++
	}
	return events, position{id, last}, s.gap
}

// reached records that a target needs no event up to a position.
func (x *Exporter) reached(s *state, to position, delivered int) {
	x.mu.Lock()
	s.at = to
	was := s.Failures
	if delivered > 0 {
		s.Delivered += uint64(delivered)
		s.gap = false
		s.Since, s.Failures, s.Error = time.Time{}, 0, ""
	}
	x.mu.Unlock()
	if delivered > 0 && was > 0 {
		x.o.Logger.Info("events are delivered again", "target", s.Name)
		x.o.Changed()
	}
}

// failed records a failure, and returns how many others in a row were before it.
func (x *Exporter) failed(s *state, err error) (before int) {
	x.mu.Lock()
	s.Failed++
	if s.Failures == 0 {
		s.Since = time.Now()
	}
	before = s.Failures
	s.Failures++
	text := err.Error()
	told := text == s.Error
	s.Error = text
	x.mu.Unlock()
	if !told {
		x.o.Logger.Warn("events are not delivered", "target", s.Name, "err", text)
	}
	x.o.Changed()
	return before
}

// load reads the positions of the last run. Without them, targets begin at the present.
func (x *Exporter) load() {
	saved := map[string]position{}
	data, err := os.ReadFile(x.o.File)
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("has more than %d bytes", maxFile)
	}
	if err == nil {
		err = json.Unmarshal(data, &saved)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		x.o.Logger.Warn("the export of events begins with new ones", "file", x.o.File, "err", err)
		saved = map[string]position{}
	}
	x.mu.Lock()
	x.saved = saved
	x.mu.Unlock()
}

// save writes the positions when they have changed.
func (x *Exporter) save() {
	x.mu.Lock()
	defer x.mu.Unlock()
	now := map[string]position{}
	for name, s := range x.states {
		if at := cmp.Or(s.at, x.saved[name]); at != (position{}) {
			now[name] = at
		}
	}
	if maps.Equal(now, x.saved) {
		return
	}
	data, err := json.Marshal(now)
	if err == nil {
		err = disk.Replace(x.o.File, data, 0o600)
	}
	text := ""
	if err != nil {
		text = err.Error()
	} else {
		x.saved = now
	}
	if text != x.told && text != "" {
		x.o.Logger.Warn("storing how far the export of events is", "err", text)
	}
	x.told = text
}

// sender delivers events to one target.
type sender interface {
	// send returns nil when the receiver has taken all events. gap says that events before them may
	// be missing.
	send(ctx context.Context, log string, gap bool, events []event.Event) error
	close()
}

func (x *Exporter) sender(t Target, node string) sender {
	if t.Webhook != "" {
		return newWebhook(t, node, x.o.Secrets, x.o.Reach)
	}
	return newSyslog(t, node, x.o.Reach)
}

// laterError is a failure whose receiver says when to come again.
type laterError struct {
	error
	after time.Duration
}
