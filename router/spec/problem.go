// Package spec turns the text of a document into checked values: after it, a prefix is a netip.Prefix and a reference
// has been resolved. Every problem of a document is found in one go, each with its field path.
package spec

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Problem is one thing that is wrong with a document.
type Problem struct {
	Path   string // such as "tunnels[2].ipsec.psk"; empty for the document itself
	Value  string // the offending value; empty when something is missing
	Rule   string // what rule is broken
	Remedy string // what to do about it
	Line   int    // in the text, from 1; 0 when the document was not text
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

// Problems is everything that is wrong with a document, as an error.
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
	}
	return out
}

// byLine puts the problems into the order of the document's lines, and keeps the order of those without one.
func (ps Problems) byLine() Problems {
	slices.SortStableFunc(ps, func(a, b Problem) int { return cmp.Compare(a.Line, b.Line) })
	return ps
}
