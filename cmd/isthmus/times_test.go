package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestParseMoment(t *testing.T) {
	zone := time.FixedZone("", 2*3600)
	now := time.Date(2026, 11, 29, 11, 20, 30, 0, zone)
	for text, want := range map[string]string{
		"5m":                        "2026-11-29T11:15:30+02:00",
		"1h30m":                     "2026-11-29T09:50:30+02:00",
		"11:20":                     "2026-11-29T11:20:00+02:00",
		"11:20:31":                  "2026-11-28T11:20:31+02:00", // has not come yet today
		"2026-11-29 11:20:00":       "2026-11-29T11:20:00+02:00",
		"2026-11-29 11:20":          "2026-11-29T11:20:00+02:00",
		"2026-11-29T11:20:00Z":      "2026-11-29T11:20:00Z",
		"2026-11-29T11:20:00+01:00": "2026-11-29T11:20:00+01:00",
	} {
		got, err := parseMoment("--at", text, now)
		if err != nil || got.Format(time.RFC3339) != want {
			t.Errorf("%q: %v, %v, want %s", text, got, err, want)
		}
	}
	for _, text := range []string{"", "yesterday", "25:00", "-5m", "2026-13-01 00:00:00", "5"} {
		if got, err := parseMoment("--at", text, now); err == nil {
			t.Errorf("%q: accepted as %v", text, got)
		}
	}
}

// TestLocalTimes: describe shows times of the local zone, to the second, with their ages.
func TestLocalTimes(t *testing.T) {
	w := newWorld(t)
	var out, errs bytes.Buffer
	a := w.app(nil, &out, &errs)
	a.now = func() time.Time { return noon.In(time.FixedZone("", -5*3600)) }
	if code := a.run(t.Context(), []string{"describe", "tunnel", "aws-0"}); code != 0 || !strings.Contains(out.String(), "since: 2026-03-01T03:48:00-05:00 # 3h12m ago\n") {
		t.Errorf("exit %d, %s%s", code, out.String(), errs.String())
	}
}

// TestQuiet: -q leaves notes out, and nothing else.
func TestQuiet(t *testing.T) {
	w := newWorld(t)
	for _, line := range []string{"apply -q -f testdata/lone.yaml", "plan --quiet -f testdata/lone.yaml", "secret set a -q"} {
		out, errs, code := w.run(t.Context(), "0123456789", strings.Fields(line)...)
		if code != 0 || errs != "" {
			t.Errorf("%s: exit %d, %s%s", line, code, out, errs)
		}
	}
	if _, errs, code := w.run(t.Context(), "", "apply", "-q", "-f", "testdata/first.yaml", "--confirm-within", "5m"); code != 0 || !strings.Contains(errs, "unless you run: isthmus confirm") {
		t.Errorf("the warning is missing: exit %d, %s", code, errs)
	}
}
