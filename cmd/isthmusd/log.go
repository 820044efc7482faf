package main

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Peers, spokes and callers choose how often some things happen that are worth a line. Each message has logBurst lines at once and then one in
// each logEvery; the next line says how many were left out.
const (
	logBurst    = 50
	logEvery    = time.Second
	logMessages = 1000 // messages that are counted; a message is a constant of the program, but for those of libraries
)

// sparing is a log handler that leaves out lines of messages that come too often.
type sparing struct {
	next  slog.Handler
	now   func() time.Time
	lines *lines
}

// lines are counted in one place for a handler and those that were made from it.
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

// take says whether a message may be written now, and how many like it were not since the last one.
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
