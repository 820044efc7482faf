package auth

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// everything reads all pages of a query.
func everything(t *testing.T, l *Audit, q Query) (out []Entry, pages int, damaged uint32) {
	t.Helper()
	for {
		p, err := l.List(q)
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Entries) > q.Limit {
			t.Fatalf("%d entries on a page of %d", len(p.Entries), q.Limit)
		}
		out, damaged, pages = append(out, p.Entries...), damaged+p.Damaged, pages+1
		if q.Token = p.Next; q.Token == "" {
			return out, pages, damaged
		}
	}
}

// TestListAudit: all files of both logs are read, newest entry first, each entry once, also while
// the log is rotated.
func TestListAudit(t *testing.T) {
	name := filepath.Join(t.TempDir(), "audit.log")
	at := time.Now().UTC().Truncate(time.Second).Add(-time.Hour) // the files are younger
	l, err := OpenAudit(name, func() time.Time { at = at.Add(time.Second); return at })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.limit, l.files, l.other.limit = 2000, 100, 500
	for i := range 100 {
		who := "root (alice)"
		if i%2 == 0 {
			who = "bob"
		}
		if err := l.write(Entry{Event: End, Who: who, Method: "/isthmus.v1.SpecService/Apply", Object: fmt.Sprint(i), Result: "OK"}); err != nil {
			t.Fatal(err)
		}
		if i%25 == 0 {
			if err := l.refuse("", Entry{Address: fmt.Sprint(i), Error: "no certificate"}); err != nil {
				t.Fatal(err)
			}
		}
	}
	all, pages, _ := everything(t, l, Query{Limit: 7})
	var objects []string
	refused := 0
	for i, e := range all {
		if i > 0 && !e.Time.Before(all[i-1].Time) {
			t.Fatalf("%v is not before %v", e.Time, all[i-1].Time)
		}
		if e.Event == Refused {
			refused++
		} else {
			objects = append(objects, e.Object)
		}
	}
	// The refused log has kept its last two files.
	if len(objects) != 100 || objects[0] != "99" || objects[99] != "0" || refused < 2 || pages != (len(all)+6)/7 {
		t.Errorf("%d entries, %d refused, on %d pages: %q", len(objects), refused, pages, objects)
	}
	for what, c := range map[string]struct {
		q    Query
		want int
	}{
		"alice":       {Query{Who: "alice"}, 50},
		"the whole":   {Query{Who: "root (alice)"}, 50},
		"root":        {Query{Who: "root"}, 0},
		"a method":    {Query{Method: "apply", Who: "bob"}, 50},
		"full method": {Query{Method: "/isthmus.v1.SpecService/Apply"}, 100},
		"another":     {Query{Method: "SetSecret"}, 0},
		"since":       {Query{Since: all[9].Time}, 10},
		"until":       {Query{Until: all[len(all)-3].Time}, 2},
		"now":         {Query{Since: at.Add(time.Hour)}, 0},
	} {
		c.q.Limit = 1000
		got, _, _ := everything(t, l, c.q)
		if len(got) != c.want {
			t.Errorf("%s: %d entries, want %d", what, len(got), c.want)
		}
	}
	// A page after a rotation continues where the one before ended.
	p, err := l.List(Query{Limit: 10})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		if err := l.write(Entry{Event: End, Object: fmt.Sprint("later ", i)}); err != nil {
			t.Fatal(err)
		}
	}
	rest, _, _ := everything(t, l, Query{Limit: 10, Token: p.Next})
	if len(rest) != len(all)-10 || !rest[0].Time.Equal(all[10].Time) {
		t.Errorf("%d entries after a rotation, want %d", len(rest), len(all)-10)
	}
	for _, q := range []Query{{Token: "?"}, {Token: "e30"}, {Token: p.Next, Who: "bob"}} {
		q.Limit = 10
		if _, err := l.List(q); !errors.Is(err, ErrInvalid) {
			t.Errorf("token %q: %v", q.Token, err)
		}
	}
}

// TestListAuditBounds: one call reads a bounded part of the log, and damaged and endless lines are
// counted.
func TestListAuditBounds(t *testing.T) {
	name := filepath.Join(t.TempDir(), "audit.log")
	line := `{"time":"2030-01-01T00:00:00Z","event":"end","who":"bob","address":"unix"}` + "\n"
	var b strings.Builder
	for b.Len() < auditRead+auditRead/2 {
		b.WriteString(line)
	}
	b.WriteString("not JSON\n" + strings.Repeat("x", 3*auditLine) + "\n{}\n" + line + line[:20])
	if err := os.WriteFile(name, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	l := &Audit{name: name, files: auditFiles, now: time.Now}
	p, err := l.List(Query{Limit: 10, Who: "ann"})
	if err != nil || len(p.Entries) != 0 || p.Next == "" {
		t.Errorf("%+v, %v", p, err)
	}
	got, pages, damaged := everything(t, l, Query{Limit: 1 << 20})
	if want := strings.Count(b.String(), line); len(got) != want || pages < 2 || pages > 3 || damaged < 4 || damaged > 8 {
		t.Errorf("%d entries of %d, on %d pages, %d damaged", len(got), want, pages, damaged)
	}
	if slices.ContainsFunc(got, func(e Entry) bool { return e.Who != "bob" }) {
		t.Error("a damaged line is an entry")
	}
}
