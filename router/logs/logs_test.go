package logs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/isthmus-net/isthmus/router/secret"
)

func every(*Entry) bool { return true }

// all returns all entries, oldest first.
func (l *Log) all() []*Entry {
	out, _ := l.After(0, maxEntries)
	return out
}

// line returns an entry as one line.
func line(e *Entry) string {
	out := LevelName(e.Level) + " " + e.Message
	for _, a := range e.Attributes {
		out += " " + a.Key + "=" + a.Value
	}
	return out
}

// quiet is a log whose handler writes nothing.
func quiet(level slog.Level) (*Log, *slog.Logger) {
	l := New()
	return l, slog.New(l.Handler(slog.NewTextHandler(nowhere{}, &slog.HandlerOptions{Level: level})))
}

type nowhere struct{}

func (nowhere) Write(p []byte) (int, error) { return len(p), nil }

// TestCount: the oldest entries go first when there are too many of them.
func TestCount(t *testing.T) {
	l, log := quiet(slog.LevelInfo)
	if l.ID() == New().ID() {
		t.Error("two logs have one identity")
	}
	if got, gone := l.After(0, 10); len(got) != 0 || gone != 0 || l.Newest() != 0 {
		t.Errorf("an empty log has %d entries, %d gone", len(got), gone)
	}
	const n = maxEntries + 123
	for i := range n {
		log.Info("line", "n", i+1)
	}
	all := l.all()
	if len(all) != maxEntries || l.Newest() != n {
		t.Fatalf("%d entries, newest %d", len(all), l.Newest())
	}
	for i, e := range all {
		if want := uint64(n - maxEntries + 1 + i); e.Seq != want || e.Attributes[0].Value != fmt.Sprint(want) {
			t.Fatalf("entry %d is %d: %s", i, e.Seq, line(e))
		}
	}
	for _, k := range []struct {
		after           uint64
		n, want         int
		first, gone     uint64
		afterDescribing string
	}{
		{0, 10, 10, 124, 123, "the beginning"},
		{100, 10, 10, 124, 23, "one that is gone"},
		{122, 10, 10, 124, 1, "the newest that is gone"},
		{123, 10, 10, 124, 0, "the one before the oldest"},
		{200, 10, 10, 201, 0, "one in the middle"},
		{n - 1, 10, 1, n, 0, "the last but one"},
		{n, 10, 0, 0, 0, "the newest"},
	} {
		got, gone := l.After(k.after, k.n)
		if len(got) != k.want || gone != k.gone || k.want > 0 && got[0].Seq != k.first {
			t.Errorf("after %s: %d entries, %d gone", k.afterDescribing, len(got), gone)
		}
	}
	if got, more := l.Before(0, 2, every); len(got) != 2 || !more || got[0].Seq != n || got[1].Seq != n-1 {
		t.Errorf("the last two: %v, %v", got, more)
	}
	if got, more := l.Before(126, 2, every); len(got) != 2 || more || got[1].Seq != 124 {
		t.Errorf("the oldest two: %v, %v", got, more)
	}
}

// TestBytes: the texts of all entries together are bounded, and one huge record takes a small part
// of that.
func TestBytes(t *testing.T) {
	l, log := quiet(slog.LevelInfo)
	sum := func() (n int) {
		for _, e := range l.all() {
			n += e.size()
		}
		return n
	}
	for i := range 1000 {
		log.Info(strings.Repeat("m", 4000), "n", i)
	}
	if got := sum(); got > maxText || got < maxText-5000 || got != l.text {
		t.Errorf("%d bytes, counted as %d", got, l.text)
	}
	huge := strings.Repeat("x", 10<<20)
	before := len(l.all())
	log.Info("a huge attribute", "room", "ipsec", "value", huge, "another", 1)
	log.Info(huge)
	log.Info("many", func() (attrs []any) {
		for i := range 1000 {
			attrs = append(attrs, fmt.Sprint("key", i), i)
		}
		return attrs
	}()...)
	log.Info("huge key", huge, 1)
	log.Info("escaped", "value", strings.Repeat("\x00", maxEntry))
	all := l.all()
	if got := sum(); got > maxText || got != l.text || len(all) < before-20 {
		t.Errorf("%d bytes, counted as %d; %d entries of %d", got, l.text, len(all), before)
	}
	for i, e := range all[len(all)-5:] {
		if e.size() > maxEntry || len(e.Attributes) > maxAttributes+1 || !strings.Contains(line(e), "cut") {
			t.Errorf("record %d has %d bytes and %d attributes: %.100s", i, e.size(), len(e.Attributes), line(e))
		}
	}
	if e := all[len(all)-5]; e.Room != "ipsec" || !strings.HasSuffix(line(e), "x"+cutMark+" cut=true") || e.size() < maxEntry-len(cutMark) {
		t.Errorf("%d bytes, of room %q", e.size(), e.Room)
	}
	if e := all[len(all)-4]; !strings.HasSuffix(line(e), "x"+cutMark) {
		t.Errorf("...%s", e.Message[len(e.Message)-20:])
	}
	// Small entries after large ones: as many as before.
	for range maxEntries {
		log.Info("small")
	}
	if got := sum(); len(l.all()) != maxEntries || got != l.text || got != maxEntries*len("small") {
		t.Errorf("%d entries, %d bytes, counted as %d", len(l.all()), got, l.text)
	}
}

// hiding hides itself as types with keys do.
type hiding []byte

func (hiding) String() string { return "(password)" }

type valuer struct{ v slog.Value }

func (v valuer) LogValue() slog.Value { return v.v }

type panicking struct{}

func (panicking) String() string { panic("no text") }

// TestTexts: an entry has what the line of the journal has, as one printable line.
func TestTexts(t *testing.T) {
	var text strings.Builder
	l := New()
	log := slog.New(l.Handler(slog.NewTextHandler(&text, &slog.HandlerOptions{ReplaceAttr: Hide})))
	at := time.Date(2026, 3, 1, 12, 0, 0, 7e6, time.UTC)
	log.With("room", "nat", "a", 1).WithGroup("g").With("b", 2.5).Warn("all kinds", "at", at, "for", 90*time.Second, "err", fmt.Errorf("x: %w", errors.New("y")),
		slog.Group("h", "c", true, slog.Group("", "inline", "d")), "level", slog.LevelError, slog.Attr{},
		"address", netip.MustParseAddr("192.0.2.1"), "ip", net.ParseIP("192.0.2.2"), "struct", struct{ A, B int }{1, 2}, "valuer", valuer{slog.StringValue("of it")},
		"nil", nil, "pointer", (*netip.Prefix)(nil), "panic", panicking{})
	want := "warn all kinds room=nat a=1 g.b=2.5 g.at=2026-03-01T12:00:00.007Z g.for=1m30s g.err=x: y g.h.c=true g.h.inline=d g.level=ERROR " +
		"g.address=192.0.2.1 g.ip=192.0.2.2 g.struct={A:1 B:2} g.valuer=of it g.nil=<nil> g.pointer=<nil> g.panic=%!v(PANIC=String method: no text)"
	e := l.all()[0]
	if got := line(e); got != want || e.Room != "nat" || time.Since(e.Time).Abs() > time.Minute {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for _, a := range e.Attributes {
		if !strings.Contains(text.String(), a.Key+"="+a.Value) && !strings.Contains(text.String(), a.Key+"="+fmt.Sprintf("%q", a.Value)) {
			t.Errorf("the journal has another %s than %q: %s", a.Key, a.Value, text.String())
		}
	}
	log.Info("two\nlines \x1b[31m\xff \u202e\ufffd", "stack\t", "a\n\tb\x00")
	if got, want := line(l.all()[1]), `info two\nlines \x1b[31m\xff \u202e`+"\ufffd"+` stack\t=a\n\tb\x00`; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	// A cut within a character, and within an escape.
	for i := range 4 {
		for _, s := range []string{"ü", "€", "😀", "\n", "\xff"} {
			log.Info(strings.Repeat("a", i) + strings.Repeat(s, maxEntry))
		}
	}
	for _, e := range l.all() {
		if text := line(e); !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%.100q", text)
		}
	}
}

// TestSecrets: the value of a secret that is given as an attribute is neither in the log nor in the
// journal.
func TestSecrets(t *testing.T) {
	const value = "hunter2-very-secret"
	var journal strings.Builder
	l := New()
	log := slog.New(l.Handler(slog.NewTextHandler(&journal, &slog.HandlerOptions{ReplaceAttr: Hide})))
	var lookup secret.Lookup = func(secret.Ref) ([]byte, error) { return []byte(value), nil }
	v, _ := lookup(secret.Ref{Name: "psk"})
	log.With("value", v).Info("used", "secret", secret.Ref{Name: "psk", Fingerprint: "1a2b"}, "own", hiding(v), "array", [19]byte(v), slog.Group("g", "v", v, "valuer", valuer{slog.AnyValue(v)}))
	got := line(l.all()[0])
	want := "info used value=(19 bytes) secret=psk#1a2b own=(password) array=(19 bytes) g.v=(19 bytes) g.valuer=(19 bytes)"
	if got != want {
		t.Errorf("got %s", got)
	}
	for _, where := range []string{got, journal.String()} {
		for _, form := range []string{value, fmt.Sprint([]byte(value))} {
			if strings.Contains(where, form) {
				t.Errorf("the secret is in %s", where)
			}
		}
	}
}

// TestLevels: the next handler decides which records there are, and a filter which of them match.
func TestLevels(t *testing.T) {
	for _, k := range []struct {
		level slog.Level
		want  []string
	}{{slog.LevelInfo, []string{"info", "info", "warn", "error"}}, {slog.LevelDebug, []string{"debug", "info", "info", "warn", "error"}}} {
		l, log := quiet(k.level)
		for _, level := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelInfo + 1, slog.LevelWarn, slog.LevelError} {
			log.Log(context.Background(), level, "line")
		}
		var got []string
		for _, e := range l.all() {
			got = append(got, LevelName(e.Level))
		}
		if !slices.Equal(got, k.want) {
			t.Errorf("with %v: %v", k.level, got)
		}
	}
	e := &Entry{Time: time.Unix(1000, 0), Level: slog.LevelWarn, Room: "nat"}
	for _, k := range []struct {
		f    Filter
		want bool
	}{
		{Filter{}, true}, {Filter{MinLevel: "warn"}, true}, {Filter{MinLevel: "error"}, false}, {Filter{MinLevel: "debug"}, true},
		{Filter{Room: "nat"}, true}, {Filter{Room: "na"}, false}, {Filter{Since: time.Unix(1000, 0)}, true}, {Filter{Since: time.Unix(1001, 0)}, false},
	} {
		if k.f.Match(e) != k.want || k.f.Check() != nil {
			t.Errorf("%+v: %v, %v", k.f, k.f.Match(e), k.f.Check())
		}
	}
	for _, f := range []Filter{{MinLevel: "WARN"}, {MinLevel: "fatal"}, {Room: strings.Repeat("x", maxRoom+1)}, {Room: "a\nb"}} {
		if f.Check() == nil {
			t.Errorf("%+v is accepted", f)
		}
	}
}

// TestConcurrent: writers and readers at the same time. Each reader sees every entry once and in
// order, or how many are gone, and a reader that takes nothing does not stop the writers.
func TestConcurrent(t *testing.T) {
	l, log := quiet(slog.LevelInfo)
	const writers, each = 8, 3000
	_ = l.Changed() // of a reader that never looks
	var readers, done sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			var seen, lost, from uint64
			for from < writers*each {
				changed := l.Changed()
				entries, gone := l.After(from, 64)
				lost += gone
				from += gone
				for _, e := range entries {
					if e.Seq != from+1 {
						t.Errorf("%d comes after %d", e.Seq, from)
						return
					}
					from = e.Seq
					seen++
				}
				if len(entries) == 0 && from < writers*each {
					<-changed
				}
			}
			if seen+lost != writers*each {
				t.Errorf("%d seen and %d gone of %d", seen, lost, writers*each)
			}
		})
	}
	shared := log.With("a", 1, "b", 2, "c", 3) // with attributes that leave room in their slice
	for w := range writers {
		done.Go(func() {
			for i := range each {
				shared.Info("line", "writer", w, "i", i)
				if i%100 == 0 {
					l.Before(0, 10, every)
				}
			}
		})
	}
	done.Wait()
	readers.Wait()
	last := map[string]int{}
	for _, e := range l.all() {
		var i int
		fmt.Sscan(e.Attributes[4].Value, &i)
		if was, ok := last[e.Attributes[3].Value]; ok && i <= was {
			t.Fatalf("line %d of writer %s comes after %d", i, e.Attributes[3].Value, was)
		}
		last[e.Attributes[3].Value] = i
	}
	one, other := shared.With("d", 4), shared.With("d", 5)
	one.Info("one")
	other.Info("other")
	if all := l.all(); line(all[len(all)-2]) != "info one a=1 b=2 c=3 d=4" || line(all[len(all)-1]) != "info other a=1 b=2 c=3 d=5" {
		t.Errorf("loggers share attributes: %s, %s", line(all[len(all)-2]), line(all[len(all)-1]))
	}
}
