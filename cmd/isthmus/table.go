package main

import (
	"io"
	"strings"
	"unicode/utf8"

	"github.com/isthmus-net/isthmus/router/event"
)

// style says how the cells of a column look on a terminal.
type style int

const (
	plain  style = iota
	number       // aligned to the right
	size         // the same, with a unit
	age
	state // coloured when it is bad
	change
	moments // a date and a time
	kind    // of an event, coloured by its severity
	object  // as tunnel/aws-0
	level   // of a line of the log, coloured when it is bad
)

// reserved is the least width of a column of a watch, so that later rows keep to the columns.
var reserved = map[style]int{number: 5, size: 10, age: 6, state: 12, change: 7, moments: 19, kind: 16, object: 16, level: 5}

// look is the head of a column.
type look struct {
	header string
	style  style
}

// cell is one field of a table. brief is a shorter form for a narrow terminal, if there is one.
type cell struct{ text, brief string }

// need is the width that a column needs for its cells, and for their brief forms.
type need struct {
	text, brief int
	hasBrief    bool
}

// table writes rows under headers, each column as wide as its widest cell so far.
type table struct {
	w        io.Writer
	terminal int // columns of the terminal; 0: the output is not for a terminal
	colour   bool
	fits     bool // cells are cut to the width of the terminal
	steady   bool // rows follow the first ones, and keep their widths
	wide     bool // -o wide
	headless bool
	columns  []look
	needs    []need
	widths   []int
	begun    bool
	rows     [][]cell
}

// newTable returns a table for the output of a command.
func (a *app) newTable(columns ...look) *table {
	t := &table{w: a.stdout, columns: columns, needs: make([]need, len(columns)), widths: make([]int, len(columns)), headless: a.noHeaders, wide: a.output == "wide"}
	if a.terminal != nil {
		t.terminal = a.terminal()
		t.colour = a.colours()
	}
	return t
}

// colours reports whether standard output is a terminal that shows colours (no-color.org).
func (a *app) colours() bool {
	return a.terminal != nil && a.terminal() > 0 && a.getenv("NO_COLOR") == "" && a.getenv("TERM") != "dumb"
}

// fitting makes the table keep to the width of the terminal, unless -o wide asks for everything. It
// is for lists of objects, where describe shows what is cut. A plan or an answer to a query is
// shown whole.
func (t *table) fitting() *table {
	t.fits = t.terminal > 0 && !t.wide
	return t
}

func (t *table) add(row ...cell) {
	for i := range row {
		row[i].text, row[i].brief = clean(row[i].text), clean(row[i].brief)
	}
	t.rows = append(t.rows, row)
}

// flush writes the rows that were added since the last flush.
func (t *table) flush() error {
	if !t.begun && !t.headless {
		heads := make([]cell, len(t.columns))
		for i, c := range t.columns {
			heads[i].text = c.header
		}
		t.rows = append([][]cell{heads}, t.rows...)
	}
	for i, c := range t.columns {
		n := &t.needs[i]
		n.brief = max(n.brief, minCell, len(c.header))
		if t.steady {
			n.text = max(n.text, reserved[c.style], len(c.header))
		}
		for _, row := range t.rows {
			long, short := utf8.RuneCountInString(row[i].text), utf8.RuneCountInString(row[i].brief)
			n.text = max(n.text, long)
			if n.hasBrief = n.hasBrief || short > 0; short > 0 {
				n.brief = max(n.brief, short)
			}
		}
		t.widths[i] = n.text
	}
	if t.fits {
		t.fit()
	}
	var b strings.Builder
	for n, row := range t.rows {
		t.write(&b, row, n == 0 && !t.begun && !t.headless)
	}
	t.rows, t.begun = nil, true
	_, err := io.WriteString(t.w, b.String())
	return err
}

// minCell is the width to which columns are cut before the terminal wraps the line, and minLast
// that of the last column, which has the reason, as long as others can be cut.
const minCell, minLast = 10, 16

// fit makes columns narrower, the last ones first, until a row fits the terminal: first by the
// brief forms of their cells, then by cutting. The first column has the name and stays.
func (t *table) fit() {
	over := func() int {
		sum := 2*len(t.widths) - 2 - t.terminal
		for _, w := range t.widths {
			sum += w
		}
		return sum
	}
	last := len(t.columns) - 1
	cut := func(lists bool, least func(i int) int) {
		for i := last; i > 0 && over() > 0; i-- {
			if w := t.widths[i]; t.columns[i].style == plain && w > least(i) && (!lists || t.needs[i].hasBrief) {
				t.widths[i] = max(least(i), w-over())
			}
		}
	}
	brief := func(i int) int { return t.needs[i].brief }
	cut(true, brief)
	cut(false, func(i int) int {
		if i == last {
			return max(minLast, brief(i))
		}
		return brief(i)
	})
	cut(false, brief)
}

func (t *table) write(b *strings.Builder, row []cell, heads bool) {
	var line strings.Builder
	for i, c := range row {
		text, last := c.text, i == len(row)-1
		n := utf8.RuneCountInString(text)
		if n > t.widths[i] && c.brief != "" {
			text, n = c.brief, utf8.RuneCountInString(c.brief)
		}
		if n > t.widths[i] {
			text, n = string([]rune(text)[:t.widths[i]-1])+"…", t.widths[i]
		}
		space := strings.Repeat(" ", t.widths[i]-n)
		if s := t.columns[i].style; t.colour && !heads && (s == state || s == level) {
			text = coloured(text)
		}
		if k, ok := event.Lookup(text); ok && t.colour && !heads && t.columns[i].style == kind {
			text = painted(text, string(k.Severity))
		}
		if s := t.columns[i].style; t.terminal > 0 && (s == number || s == size) {
			text, space = space+text, ""
		}
		line.WriteString(text)
		if !last {
			line.WriteString(space + "  ")
		}
	}
	b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
}

// Sequences of terminals (ECMA-48 section 8.3.117).
const red, green, yellow, end = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"

// painted returns a text in the colour of a severity.
func painted(text, severity string) string {
	switch severity {
	case "error":
		return red + text + end
	case "warning":
		return yellow + text + end
	}
	return text
}

// coloured returns a state in red when something does not work, and in yellow when it may not.
func coloured(word string) string {
	switch first, _, _ := strings.Cut(word, " "); first {
	case "down", "dead", "error", "refused", "exhausted", "revoked", "expired", "quarantined", "prefix-limit", "no":
		return red + word + end
	case "connecting", "suspect", "mtu", "warning", "warn", "low", "returning", "unknown", "idle", "connect", "active", "opensent", "openconfirm":
		return yellow + word + end
	}
	return word
}
