package main

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// TestLogIsSparing checks that frequent messages are counted, and take no lines from other
// messages.
func TestLogIsSparing(t *testing.T) {
	var out strings.Builder
	now := time.Date(2026, 11, 29, 0, 0, 0, 0, time.UTC)
	h := newSparing(slog.NewTextHandler(&out, nil), func() time.Time { return now })
	log := slog.New(h)
	count := func(part string) int { return strings.Count(out.String(), part) }
	for range 10_000 {
		log.With("peer", "a").WithGroup("g").Warn("often", "n", 1)
	}
	log.Warn("seldom")
	if count("msg=often") != logBurst || count("msg=seldom") != 1 {
		t.Errorf("%d and %d lines, want %d and 1", count("msg=often"), count("msg=seldom"), logBurst)
	}
	now = now.Add(logEvery)
	log.Warn("often")
	log.Warn("often")
	if count("msg=often") != logBurst+1 || count("left_out=9950") != 1 {
		t.Errorf("%d lines after a while; the last: %s", count("msg=often"), out.String()[out.Len()-100:])
	}
	now = now.Add(-time.Hour) // a clock that was set back gives nothing
	log.Warn("often")
	if count("msg=often") != logBurst+1 {
		t.Error("a clock that was set back gives lines")
	}
	for i := range 10 * logMessages {
		log.Warn(fmt.Sprint("message ", i))
	}
	if n := len(h.lines.said); n > logMessages {
		t.Errorf("%d messages are counted", n)
	}
}

// TestLogIsKept checks that the lines for the API are those of the journal: of the enabled levels,
// without the omitted ones, and without secrets.
func TestLogIsKept(t *testing.T) {
	for _, debug := range []bool{false, true} {
		var journal strings.Builder
		now := time.Date(2026, 11, 29, 0, 0, 0, 0, time.UTC)
		log, kept := newLog(&journal, debug, func() time.Time { return now })
		log = log.With("room", "bgp")
		log.Debug("a debug line")
		log.Info("value", "psk", []byte("hunter2-very-secret"))
		for i := range 10 * logBurst {
			log.Warn("often", "i", i)
		}
		now = now.Add(logEvery)
		log.Warn("often")
		entries, _ := kept.After(0, 10*logBurst)
		var text strings.Builder
		for _, e := range entries {
			fmt.Fprintln(&text, e.Room, e.Level, e.Message, e.Attributes)
		}
		want := logBurst + 2
		if debug {
			want++
		}
		if len(entries) != want || strings.Count(journal.String(), "\n") != want || strings.Contains(text.String(), "a debug line") != debug || !strings.Contains(text.String(), fmt.Sprintf("bgp WARN often [{room bgp} {left_out %d}]", 9*logBurst)) {
			t.Errorf("with -debug=%v: %d entries, %d lines, want %d:\n%s", debug, len(entries), strings.Count(journal.String(), "\n"), want, text.String())
		}
		if strings.Contains(text.String()+journal.String(), "hunter2") {
			t.Errorf("a secret is in the log: %s", journal.String())
		}
	}
}
