package store

import (
	"fmt"
	"unicode/utf8"
)

// A document of ten thousand policies is a megabyte, and an edit of one of them is not worth
// writing all of it. The revision of an edit is a delta from the whole text of another revision;
// Compact writes the whole text later.

const (
	// maxSplices bounds the revisions that rest on the same text.
	maxSplices = 256
	// spliceShare bounds the size of all deltas together, as a share of the text.
	spliceShare = 16
)

// splice is a change of a text: it replaces Cut bytes from At on by Put.
type splice struct {
	At  int    `json:"at"`
	Cut int    `json:"cut,omitzero"`
	Put string `json:"put,omitempty"`
}

// whole is a text that is stored as a whole.
type whole struct {
	generation uint64
	text       string
}

// changedLocked returns how to write a text that follows the present one: as deltas from the text
// of a generation, or with base 0 as a whole.
func (s *Store) changedLocked(text string) (base uint64, splices []splice) {
	base = s.current.Base
	if base == 0 {
		base = s.current.Generation
	}
	size := 0
	splices = append(splices, s.current.Splices...)
	splices = append(splices, between(s.current.Text, text))
	for _, c := range splices {
		size += len(c.Put)
	}
	if len(splices) > maxSplices || size*spliceShare > len(text) {
		return 0, nil
	}
	return base, splices
}

// between returns the splice that turns a into b.
func between(a, b string) splice {
	head := common(a, b, func(s string, from, to int) string { return s[from:to] })
	for head > 0 && head < len(a) && !utf8.RuneStart(a[head]) {
		head-- // do not split a character: JSON cannot represent halves
	}
	a, b = a[head:], b[head:]
	tail := common(a, b, func(s string, from, to int) string { return s[len(s)-to : len(s)-from] })
	for tail > 0 && !utf8.RuneStart(a[len(a)-tail]) {
		tail--
	}
	return splice{At: head, Cut: len(a) - tail, Put: b[:len(b)-tail]}
}

// common returns the number of common bytes of two texts, counted from one end. part returns the
// bytes from and to a count.
func common(a, b string, part func(s string, from, to int) string) int {
	same, high := 0, min(len(a), len(b))
	for same < high {
		n := same + (high-same+1)/2
		if part(a, same, n) == part(b, same, n) {
			same = n
		} else {
			high = n - 1
		}
	}
	return same
}

// spliced returns a text with the splices applied.
func spliced(text string, splices []splice) (string, error) {
	for _, c := range splices {
		if c.At < 0 || c.Cut < 0 || c.At > len(text) || c.Cut > len(text)-c.At {
			return "", fmt.Errorf("%w: a change is beyond the text", ErrDamaged)
		}
		text = text[:c.At] + c.Put + text[c.At+c.Cut:]
	}
	return text, nil
}
