// Package logs keeps the last lines of the daemon's log in memory, for callers of the API. They are
// not on disk: the journal of the machine has every line, and keeps it for longer than this
// process. A second copy would write to the disk of the state with each line, and without a bound
// of the journal. Readers copy what they need, so that a slow one never delays a line.
package logs

import (
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/router/bell"
)

// Bounds of the entries in memory. Some texts are from peers and callers.
const (
	maxEntries    = 5000
	maxText       = 2 << 20 // bytes of text of all entries
	maxEntry      = 8 << 10 // bytes of text of an entry
	maxAttributes = 64      // of an entry
)

// Entry is one line of the log. It does not change after it was added. Its texts are valid UTF-8
// without control characters.
type Entry struct {
	Seq        uint64 // ascending without gaps, from 1
	Time       time.Time
	Level      slog.Level
	Room       string // the attribute "room", empty: none
	Message    string
	Attributes []Attribute // with room, in the order of the line
}

// Attribute is a key with its value as text.
type Attribute struct{ Key, Value string }

// size is the number of bytes of the attribute's text.
func (a Attribute) size() int { return len(a.Key) + len(a.Value) + len("= ") }

// size is the number of bytes of the entry's text.
func (e *Entry) size() int {
	n := len(e.Message)
	for _, a := range e.Attributes {
		n += a.size()
	}
	return n
}

// Log has the last entries of one run of the daemon.
type Log struct {
	id   string
	bell bell.Bell

	mu    sync.Mutex
	ring  [maxEntries]*Entry
	first int // index of the oldest entry
	count int
	text  int // bytes of text of all entries
	seq   uint64
}

// New returns an empty log.
func New() *Log {
	id := make([]byte, 8)
	rand.Read(id)
	return &Log{id: hex.EncodeToString(id)}
}

// ID returns the identity of the log. Each run of the daemon has another one.
func (l *Log) ID() string { return l.id }

// Changed returns a channel that is closed when there are more entries.
func (l *Log) Changed() <-chan struct{} { return l.bell.Wait() }

// add gives an entry its number and puts it into the log, in the place of the oldest ones.
func (l *Log) add(e *Entry) {
	size := e.size()
	l.mu.Lock()
	for l.count == maxEntries || l.count > 0 && l.text+size > maxText {
		l.text -= l.ring[l.first].size()
		l.ring[l.first] = nil
		l.first = (l.first + 1) % maxEntries
		l.count--
	}
	l.seq++
	e.Seq = l.seq
	l.ring[(l.first+l.count)%maxEntries] = e
	l.count++
	l.text += size
	l.mu.Unlock()
	l.bell.Ring()
}

// Newest returns the number of the newest entry.
func (l *Log) Newest() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seq
}

// After returns the oldest entries after a number, at most n, and how many between the number and
// the first of them are gone.
func (l *Log) After(seq uint64, n int) (out []*Entry, gone uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	oldest := l.seq - uint64(l.count) + 1
	if seq+1 < oldest {
		gone, seq = oldest-seq-1, oldest-1
	}
	for i := seq + 1; i <= l.seq && len(out) < n; i++ {
		out = append(out, l.ring[(l.first+int(i-oldest))%maxEntries])
	}
	return out, gone
}

// Before returns at most n matching entries before a number, newest first, and whether there are
// more. Number 0 stands for the end of the log.
func (l *Log) Before(seq uint64, n int, match func(*Entry) bool) (out []*Entry, more bool) {
	all, _ := l.After(0, maxEntries) // match runs without the lock
	for i := len(all) - 1; i >= 0; i-- {
		if seq > 0 && all[i].Seq >= seq || !match(all[i]) {
			continue
		}
		if len(out) == n {
			return out, true
		}
		out = append(out, all[i])
	}
	return out, false
}
