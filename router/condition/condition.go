// Package condition has every kind of condition that a node can report, with what it means and what
// to do about it. A condition is made from its kind, so that none is shown which cannot be looked
// up: `isthmus describe condition` and docs/conditions.md are made from this list.
package condition

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// Severity says how much a condition matters.
type Severity string

// The severities. With an error something does not work, or will stop working without help. With a
// warning everything works, perhaps with less reserve.
const (
	Error   Severity = "error"
	Warning Severity = "warning"
)

// Kind is a kind of condition. Its texts are sentences of their own.
type Kind struct {
	Name       string
	Severities []Severity // that it can have, the worst first
	Meaning    string     // what is so
	Cause      string     // why that may be
	Remedy     string     // what to do
	// Of is the object that has it: "node", "tunnel", "peer" or "route".
	Of string
}

// Error returns a condition of the kind, with the severity error. The zero time leaves since open.
func (k *Kind) Error(since time.Time, format string, args ...any) *isthmusv1.Condition {
	return k.make(Error, since, fmt.Sprintf(format, args...))
}

// Warning returns a condition of the kind, with the severity warning.
func (k *Kind) Warning(since time.Time, format string, args ...any) *isthmusv1.Condition {
	return k.make(Warning, since, fmt.Sprintf(format, args...))
}

// With returns a condition of the kind with one of its severities.
func (k *Kind) With(s Severity, since time.Time, format string, args ...any) *isthmusv1.Condition {
	return k.make(s, since, fmt.Sprintf(format, args...))
}

func (k *Kind) make(s Severity, since time.Time, message string) *isthmusv1.Condition {
	if !slices.Contains(k.Severities, s) {
		panic(fmt.Sprintf("condition %s is not to have the severity %s", k.Name, s))
	}
	c := &isthmusv1.Condition{Type: k.Name, Severity: string(s), Message: message}
	if !since.IsZero() {
		c.Since = timestamppb.New(since)
	}
	return c
}

// Lookup returns the kind of a name, in any case of letters, and false when there is none.
func Lookup(name string) (*Kind, bool) {
	i := slices.IndexFunc(All, func(k *Kind) bool { return strings.EqualFold(k.Name, name) })
	if i < 0 {
		return nil, false
	}
	return All[i], true
}
