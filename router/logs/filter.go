package logs

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// Levels are the names of the levels, in ascending order.
var Levels = []string{"debug", "info", "warn", "error"}

// levels are the lowest levels with each name.
var levels = []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError}

// LevelName returns the name of a level. A level between two names has that of the lower one.
func LevelName(l slog.Level) string {
	for i := len(levels) - 1; i > 0; i-- {
		if l >= levels[i] {
			return Levels[i]
		}
	}
	return Levels[0]
}

// maxRoom bounds the room of a filter, in bytes.
const maxRoom = 100

// Filter selects entries. An empty field selects all.
type Filter struct {
	Since    time.Time
	MinLevel string // one of Levels
	Room     string
}

// Check returns an error for a filter that cannot select anything.
func (f Filter) Check() error {
	if f.MinLevel != "" && !slices.Contains(Levels, f.MinLevel) {
		return fmt.Errorf("min_level %q: must be debug, info, warn or error", clean(f.MinLevel, maxRoom))
	}
	if len(f.Room) > maxRoom || strings.ContainsFunc(f.Room, unprintable) {
		return fmt.Errorf("room %q: must be printable, at most %d bytes", clean(f.Room, maxRoom), maxRoom)
	}
	return nil
}

// Match reports whether the filter selects an entry.
func (f Filter) Match(e *Entry) bool {
	switch {
	case !f.Since.IsZero() && e.Time.Before(f.Since), f.Room != "" && e.Room != f.Room:
		return false
	case f.MinLevel != "":
		return e.Level >= levels[slices.Index(Levels, f.MinLevel)]
	}
	return true
}
