// Package spec turns the text of a document into checked values: a prefix becomes a netip.Prefix,
// and references are resolved. It finds all problems of a document at once, each with its field
// path.
package spec

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Problem is one thing that is wrong with a document.
type Problem struct {
	Path   string // such as "tunnels[2].ipsec.psk"; empty for the document itself
	Value  string // the offending value; empty when something is missing
	Rule   string // that is broken
	Remedy string // how to fix it
	Line   int    // in the text, from 1; 0 when the document was not text
	// Meant is the path of the field that an unknown field is a misspelling of, empty if there is
	// none. Checks take it for unread instead of missing.
	Meant string
	// More counts the problems that are not listed, in the last of Problems. It is 0 in all others.
	More int
}

// MaxProblems bounds the listed problems. Further ones are counted.
const MaxProblems = 100

// maxShown bounds each part of a problem that repeats text of a document, in bytes.
const maxShown = 256

// shorten cuts a text to maxShown bytes at the end of a character.
func shorten(s string) string {
	if len(s) <= maxShown {
		return s
	}
	n := maxShown
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "..."
}

// Join merges lists of problems in the order of the document's lines, and lists at most
// MaxProblems.
func Join(lists ...Problems) Problems {
	var all Problems
	more := 0
	for _, list := range lists {
		for _, p := range list {
			if p.More > 0 {
				more += p.More
				continue
			}
			all = append(all, p)
		}
	}
	all = all.byLine()
	if n := len(all) - MaxProblems; n > 0 {
		all, more = all[:MaxProblems], more+n
	}
	if more > 0 {
		digits := strconv.Itoa(more)
		for i := len(digits) - 3; i > 0; i -= 3 {
			digits = digits[:i] + "," + digits[i:]
		}
		noun := " more problems"
		if more == 1 {
			noun = " more problem"
		}
		all = append(all, Problem{Rule: "and " + digits + noun, Remedy: "fix the listed ones first", More: more})
	}
	return all
}

// collector keeps the first problems and counts the others: their number depends on the document.
type collector struct {
	found Problems
	more  int
}

func (c *collector) add(p Problem) {
	if len(c.found) >= MaxProblems {
		c.more++
		return
	}
	p.Path, p.Value, p.Rule, p.Remedy = shorten(p.Path), shorten(p.Value), shorten(p.Rule), shorten(p.Remedy)
	c.found = append(c.found, p)
}

// problems returns the problems in the order of lines.
func (c *collector) problems() Problems {
	if c.more > 0 {
		return Join(c.found, Problems{{More: c.more}})
	}
	return c.found.byLine()
}

// String returns the problem on one line.
func (p Problem) String() string {
	var b strings.Builder
	if p.Line > 0 {
		fmt.Fprintf(&b, "line %d: ", p.Line)
	}
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	if p.Value != "" {
		fmt.Fprintf(&b, "%q ", p.Value)
	}
	b.WriteString(p.Rule)
	if p.Remedy != "" {
		b.WriteString("; " + p.Remedy)
	}
	return b.String()
}

// Problems has all problems of a document, as an error.
type Problems []Problem

// Error returns one problem a line.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// paths returns the paths of the problems.
func (ps Problems) paths() map[string]bool {
	out := make(map[string]bool, len(ps))
	for _, p := range ps {
		out[p.Path] = true
		if p.Meant != "" {
			out[p.Meant] = true
		}
	}
	return out
}

// byLine sorts the problems by line, and keeps the order of those on one line or without a line.
func (ps Problems) byLine() Problems {
	slices.SortStableFunc(ps, func(a, b Problem) int { return cmp.Compare(a.Line, b.Line) })
	return ps
}
