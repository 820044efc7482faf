package event

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sort"
	"sync"
	"time"

	"golang.org/x/time/rate"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/bell"
	"github.com/isthmus-net/isthmus/router/condition"
)

// Bounds of the log. An event takes some 250 bytes on disk, at most 2 KiB.
const (
	maxFile = 4 << 20 // of each of two files
	maxRing = 10_000  // events in memory, which the API shows
	maxLine = 64 << 10
)

// Bounds of the pace. Changes of the node's state and calls have an allowance each, so that neither
// a caller nor a stranger who is refused keeps a change from the log. A change that is beyond the
// allowance is looked at again later, and a call is not.
const (
	stateBurst, statesPerSecond = 1000, 10
	callBurst                   = 200
	callsEvery                  = 10 * time.Second
	// suppressedEvery is how often the number of suppressed events is an event.
	suppressedEvery = time.Minute
)

// gap is by how much the sequence moves on after a run that did not record its stop. The tail of
// the file may be lost with the power, and a number that a client has seen must not come again.
const gap = 1 << 20

// retryPace is how often a failed write is tried again.
const retryPace = 5 * time.Second

// header is the first line of each file.
type header struct {
	Log string `json:"log"` // identity; the same in both files
}

// Log is a bounded log of events, in memory and in two files: name and name.1, which is the older
// one.
type Log struct {
	name  string
	limit int64
	now   func() time.Time
	bell  bell.Bell

	mu     sync.Mutex
	id     string
	seq    uint64  // of the newest event
	ring   []Event // the newest events, in order
	state  *State
	states *rate.Limiter
	calls  *rate.Limiter
	// waiting are the keys of changes that were held back at the last look.
	waiting    map[string]bool
	suppressed uint64
	tell       time.Time // of the next event with their number

	file    *os.File
	size    int64
	stored  uint64 // newest event in the file
	failed  error  // of the last write; nil: everything is stored
	since   time.Time
	next    time.Time // of the next attempt
	damaged uint64    // lines of the files that cannot be read
	// wrap replaces the writer of the file in tests.
	wrap func(io.Writer) io.Writer
}

// Open opens the log, and creates it if it is missing. With an error it returns a log that is only
// in memory until the files can be written: a full or read-only disk must not stop a router.
func Open(name string, now func() time.Time) (*Log, error) {
	l := &Log{
		name: name, limit: maxFile, now: now, state: newState(), waiting: map[string]bool{},
		states: rate.NewLimiter(statesPerSecond, stateBurst), calls: rate.NewLimiter(rate.Every(callsEvery), callBurst),
	}
	former := l.read(name + ".1")
	present := l.read(name)
	// Files with two identities are not of one log: the older one was left behind.
	if l.id = present.id; l.id == "" {
		l.id = former.id
	}
	if former.id == l.id {
		l.take(former.events)
	}
	l.take(present.events)
	if l.id == "" {
		l.id = newID()
	}
	if l.state.running {
		l.seq += gap
	}
	l.stored = l.seq
	if err := l.openFile(); err != nil {
		l.fail(err)
		return l, fmt.Errorf("opening the event log: %w", err)
	}
	return l, nil
}

func newID() string {
	id := make([]byte, 8)
	rand.Read(id)
	return hex.EncodeToString(id)
}

// content is what a file holds.
type content struct {
	id     string
	events []Event
}

// read reads a file: no more of it than its bound, and of that the end.
func (l *Log) read(name string) (c content) {
	f, err := os.Open(name)
	if err != nil {
		return c
	}
	defer f.Close()
	bound := l.limit + maxLine
	if info, err := f.Stat(); err == nil && info.Size() > bound {
		head, _ := bufio.NewReader(io.LimitReader(f, maxLine)).ReadBytes('\n')
		c.id = idOf(head)
		if _, err := f.Seek(-bound, io.SeekEnd); err != nil {
			return c
		}
	}
	r := bufio.NewReaderSize(io.LimitReader(f, bound), maxLine)
	for {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) { // longer than any line of ours
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = r.ReadSlice('\n')
			}
			l.damaged++
			continue
		}
		if line = bytes.TrimSpace(line); len(line) > 0 {
			var e Event
			if id := idOf(line); id != "" {
				c.id = id
			} else if jerr := json.Unmarshal(line, &e); jerr == nil && e.Seq > 0 && e.Type != "" {
				c.events = append(c.events, e.bounded())
			} else {
				l.damaged++
			}
		}
		if err != nil {
			return c
		}
	}
}

// idOf returns the identity in a header line, "" if it is another line.
func idOf(line []byte) string {
	var h header
	if !bytes.HasPrefix(line, []byte(`{"log":`)) || json.Unmarshal(line, &h) != nil || len(h.Log) > 64 {
		return ""
	}
	return h.Log
}

// take adds events of a file, leaving out those that are not in ascending order.
func (l *Log) take(events []Event) {
	for _, e := range events {
		if e.Seq <= l.seq {
			l.damaged++
			continue
		}
		l.seq = e.Seq
		l.state.apply(e)
		l.push(e)
	}
}

func (l *Log) push(e Event) {
	if len(l.ring) >= maxRing+maxRing/4 { // seldom, since it copies
		l.ring = append(make([]Event, 0, maxRing+maxRing/4+1), l.ring[len(l.ring)-maxRing+1:]...)
	}
	l.ring = append(l.ring, e)
}

// shown returns the events that the API shows.
func (l *Log) shown() []Event { return l.ring[max(0, len(l.ring)-maxRing):] }

// openFile opens the present file, with its header.
func (l *Log) openFile() error {
	f, err := os.OpenFile(l.name, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	if !info.Mode().IsRegular() {
		return errors.Join(fmt.Errorf("%s is not a regular file", l.name), f.Close())
	}
	l.file, l.size = f, info.Size()
	head, _ := json.Marshal(header{l.id})
	head = append(head, '\n')
	if l.size > 0 {
		first, _ := bufio.NewReader(io.NewSectionReader(f, 0, maxLine)).ReadBytes('\n')
		if idOf(first) == l.id {
			head = nil
		}
		// A line cut short by a loss of power must not swallow the next one.
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, l.size-1); err == nil && last[0] != '\n' {
			head = append([]byte("\n"), head...)
		}
	}
	if err := l.put(head); err != nil {
		l.file = nil
		return errors.Join(err, f.Close())
	}
	return nil
}

// put appends data to the file, all of it or nothing. There is no fsync: a storm would wait for the
// disk with each event, and the state is read again after a loss of power anyway. The last seconds
// of the log may be lost with the power; see gap.
func (l *Log) put(data []byte) error {
	if len(data) == 0 {
		return nil
	}
	var w io.Writer = l.file
	if l.wrap != nil {
		w = l.wrap(w)
	}
	n, err := w.Write(data)
	if err == nil && n < len(data) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return errors.Join(err, l.file.Truncate(l.size))
	}
	l.size += int64(n)
	return nil
}

// store writes the events that are not in the file yet.
func (l *Log) store() {
	if l.failed != nil && l.now().Before(l.next) {
		return
	}
	if err := l.storeAll(); err != nil {
		l.fail(err)
		return
	}
	l.failed = nil
}

// batch bounds the bytes of one write.
const batch = 64 << 10

func (l *Log) storeAll() error {
	if l.file != nil && l.moved() {
		_ = l.file.Close() // its lines are written
		l.file = nil
	}
	if l.file == nil {
		if err := l.openFile(); err != nil {
			return err
		}
	}
	rest := l.ring[sort.Search(len(l.ring), func(i int) bool { return l.ring[i].Seq > l.stored }):]
	for len(rest) > 0 {
		var data []byte
		n := 0
		for n < len(rest) && len(data) < batch {
			line, err := json.Marshal(rest[n])
			if err != nil {
				return err
			}
			data = append(append(data, line...), '\n')
			n++
		}
		if l.size+int64(len(data)) > l.limit && l.size > maxLine {
			if err := l.rotate(); err != nil {
				return err
			}
		}
		if err := l.put(data); err != nil {
			return err
		}
		l.stored = rest[n-1].Seq
		rest = rest[n:]
	}
	return nil
}

// moved reports whether the open file is no longer the one under its name.
func (l *Log) moved() bool {
	open, err := l.file.Stat()
	if err != nil {
		return true
	}
	named, err := os.Lstat(l.name)
	return errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(open, named)
}

func (l *Log) rotate() error {
	if err := errors.Join(l.file.Sync(), os.Rename(l.name, l.name+".1")); err != nil {
		return err
	}
	_ = l.file.Close() // it is on disk
	l.file = nil
	return l.openFile()
}

func (l *Log) fail(err error) {
	if l.failed == nil {
		l.since = l.now()
	}
	l.failed, l.next = err, l.now().Add(retryPace)
}

// Conditions reports that events cannot be stored.
func (l *Log) Conditions() []*isthmusv1.Condition {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failed == nil {
		return nil
	}
	return []*isthmusv1.Condition{condition.EventsNotStored.Warning(l.since, "events are only in memory since they cannot be written, the last %d of them: %v", maxRing, l.failed)}
}

// add gives an event its number, applies it, and puts it into the log.
func (l *Log) add(e Event) {
	e = e.bounded()
	l.seq++
	e.Seq = l.seq
	l.state.apply(e)
	l.push(e)
}

// node returns an event of the node.
func (l *Log) node(k *Kind, format string, args ...any) Event {
	return Event{Time: l.now().UTC(), Type: k.Name, Object: "node", Severity: k.Severity, Message: fmt.Sprintf(format, args...)}
}

// flush adds the number of suppressed events once there is an allowance for it, stores, and wakes
// watches.
func (l *Log) flush() {
	if now := l.now(); l.suppressed > 0 && len(l.waiting) == 0 && !now.Before(l.tell) && l.states.AllowN(now, 1) {
		l.tell = now.Add(suppressedEvery)
		l.add(l.node(Suppressed, "%d events were not recorded: they came faster than %d per second", l.suppressed, statesPerSecond))
		l.suppressed = 0
	}
	l.store()
	l.bell.Ring()
}

// Start records the start of the daemon.
func (l *Log) Start(version string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.node(NodeStarted, "isthmusd %s has started", version)
	if l.state.running {
		e.Severity = Warning
		e.Message += "; the run before ended without a stop"
	}
	if l.damaged > 0 {
		e.Message += fmt.Sprintf("; %d lines of the event log are damaged", l.damaged)
	}
	l.add(e)
	l.flush()
}

// Stop records the stop of the daemon.
func (l *Log) Stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.add(l.node(NodeStopped, "isthmusd was stopped"))
	l.next = time.Time{} // there is not another attempt
	l.flush()
}

// Look compares a snapshot with the recorded state, and records the differences: as many as the
// pace allows. The others are found again at the next look.
func (l *Log) Look(s Snapshot) {
	l.mu.Lock()
	defer l.mu.Unlock()
	events := Compare(l.state, s)
	held := map[string]bool{}
	for _, e := range events {
		if !l.states.AllowN(s.Now, 1) {
			held[e.key()] = true
			continue
		}
		delete(l.waiting, e.key())
		l.add(e)
	}
	for key := range l.waiting {
		if !held[key] {
			l.suppressed++ // it has ended unseen
		}
	}
	l.waiting = held
	l.state.look(s)
	if len(events) > 0 || l.suppressed > 0 || l.failed != nil {
		l.flush()
	}
}

// Record adds events of calls.
func (l *Log) record(e Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.calls.AllowN(l.now(), 1) {
		l.suppressed++
		return
	}
	l.add(e)
	l.flush()
}

// Changed returns a channel that is closed when there are more events.
func (l *Log) Changed() <-chan struct{} { return l.bell.Wait() }

// ID returns the identity of the log.
func (l *Log) ID() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.id
}

// Newest returns the number of the newest event.
func (l *Log) Newest() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seq
}

// Before returns at most n matching events before a number, newest first, and whether there may be
// more. Number 0 stands for the end of the log.
func (l *Log) Before(seq uint64, n int, match func(Event) bool) (out []Event, more bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.shown()
	if seq > 0 {
		all = all[:sort.Search(len(all), func(i int) bool { return all[i].Seq >= seq })]
	}
	for i := len(all) - 1; i >= 0; i-- {
		if !match(all[i]) {
			continue
		}
		if len(out) == n {
			return out, true
		}
		out = append(out, all[i])
	}
	return out, false
}

// After returns at most n matching events after a number, oldest first, and the number to continue
// from. whole is false when events right after the number may be missing.
func (l *Log) After(seq uint64, n int, match func(Event) bool) (out []Event, last uint64, whole bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.shown()
	all = all[sort.Search(len(all), func(i int) bool { return all[i].Seq > seq }):]
	whole = len(all) == 0 && seq == l.seq || len(all) > 0 && all[0].Seq == seq+1
	last = max(seq, l.seq)
	for _, e := range all {
		if !match(e) {
			continue
		}
		if len(out) == n {
			return out, out[n-1].Seq, whole
		}
		out = append(out, e)
	}
	return out, last, whole
}

// Close closes the file.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	err := errors.Join(l.file.Sync(), l.file.Close())
	l.file = nil
	return err
}
