package main

import (
	"bytes"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/isthmus-net/isthmus/test/golden"
)

// TestTerminal compares tables on terminals of some widths. Colours are shown as <red> and so on.
func TestTerminal(t *testing.T) {
	w := newWorld(t)
	marks := strings.NewReplacer("\x1b[31m", "<red>", "\x1b[33m", "<yellow>", "\x1b[0m", "</>")
	plainText := strings.NewReplacer("<red>", "", "<yellow>", "", "</>", "")
	var got strings.Builder
	for _, c := range []struct {
		columns int
		line    string
	}{
		{200, "get tunnels"},
		{90, "get tunnels"},
		{80, "get peers"},
		{80, "get routes"},
		{90, "get events"},
		{80, "get policies"},
		{90, "get names"},
		{100, "get ports"},
		{80, "get pools --no-headers"},
	} {
		var out, errs bytes.Buffer
		a := w.app(nil, &out, &errs)
		a.terminal = func() int { return c.columns }
		if code := a.run(t.Context(), strings.Fields(c.line)); code != 0 {
			t.Errorf("%s: exit %d, %s", c.line, code, errs.String())
		}
		text := marks.Replace(out.String())
		// The terminal wraps the sentences below the table.
		table, _, _ := strings.Cut(plainText.Replace(text), "\n\n")
		for line := range strings.Lines(table) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > c.columns {
				t.Errorf("%s: %d columns on a terminal of %d: %s", c.line, n, c.columns, line)
			}
		}
		for _, whole := range []string{c.line + " -o wide", "nat who 203.0.113.9:21877"} {
			var out, errs bytes.Buffer
			a := w.app(nil, &out, &errs)
			a.terminal = func() int { return c.columns }
			if code := a.run(t.Context(), strings.Fields(whole)); code != 0 || strings.Contains(out.String(), "…") {
				t.Errorf("%s is cut: exit %d, %s%s", whole, code, out.String(), errs.String())
			}
		}
		got.WriteString("$ " + c.line + "\n" + text)
	}
	golden.Check(t, "testdata/terminal.golden", got.String())
}

// TestNoColour: NO_COLOR and a dumb terminal get no colours, and other output never does.
func TestNoColour(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		key, value string
		columns    int
		coloured   bool
	}{{"", "", 80, true}, {"NO_COLOR", "1", 80, false}, {"TERM", "dumb", 80, false}, {"", "", 0, false}} {
		var out, errs bytes.Buffer
		a := w.app(nil, &out, &errs)
		a.terminal = func() int { return c.columns }
		getenv := a.getenv
		a.getenv = func(k string) string {
			if k == c.key {
				return c.value
			}
			return getenv(k)
		}
		if a.run(t.Context(), []string{"get", "tunnels"}); strings.Contains(out.String(), "\x1b[") != c.coloured {
			t.Errorf("%+v: %q, %s", c, out.String(), errs.String())
		}
	}
}
