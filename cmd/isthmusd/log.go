package main

import (
	"context"
	"io"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/isthmus-net/isthmus/router/logs"
)

// newLog returns the daemon's logger, which writes to w, and the log with its last lines. The same
// lines are omitted in both.
func newLog(w io.Writer, debug bool, now func() time.Time) (*slog.Logger, *logs.Log) {
	level := slog.LevelInfo
	if debug {
		level = slog.LevelDebug
	}
	kept := logs.New()
	text := slog.NewTextHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: logs.Hide})
	return slog.New(newSparing(kept.Handler(text), now)), kept
}

// Peers, spokes and callers determine how often some events happen that are logged. Each message
// may have logBurst lines at once and then one in each logEvery; the next line has the number of
// omitted ones.
const (
	logBurst = 50
	logEvery = time.Second
	// messages that are counted; a message is a constant of the program, except for those of
	// libraries
	logMessages = 1000
)

// sparing is a log handler that omits lines of messages that are too frequent.
type sparing struct {
	next  slog.Handler
	now   func() time.Time
	lines *lines
}

// lines are counted in one place for a handler and those derived from it.
type lines struct {
	mu   sync.Mutex
	said map[string]*said
}

// said counts the lines of a message.
type said struct {
	rate    *rate.Limiter
	omitted int
}

func newSparing(next slog.Handler, now func() time.Time) *sparing {
	return &sparing{next, now, &lines{said: map[string]*said{}}}
}

// Enabled implements slog.Handler.
func (s *sparing) Enabled(ctx context.Context, l slog.Level) bool { return s.next.Enabled(ctx, l) }

// WithAttrs implements slog.Handler.
func (s *sparing) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &sparing{s.next.WithAttrs(attrs), s.now, s.lines}
}

// WithGroup implements slog.Handler.
func (s *sparing) WithGroup(name string) slog.Handler {
	return &sparing{s.next.WithGroup(name), s.now, s.lines}
}

// Handle implements slog.Handler.
func (s *sparing) Handle(ctx context.Context, r slog.Record) error {
	omitted, pass := s.lines.take(r.Message, s.now())
	if !pass {
		return nil
	}
	if omitted > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("left_out", omitted))
	}
	return s.next.Handle(ctx, r)
}

// take reports whether a message may be written now, and how many equal ones were omitted since the
// last.
func (l *lines) take(message string, now time.Time) (omitted int, pass bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.said[message]
	if m == nil {
		if len(l.said) >= logMessages {
			clear(l.said)
		}
		m = &said{rate: rate.NewLimiter(rate.Every(logEvery), logBurst)}
		l.said[message] = m
	}
	if !m.rate.AllowN(now, 1) {
		m.omitted++
		return 0, false
	}
	omitted, m.omitted = m.omitted, 0
	return omitted, true
}
