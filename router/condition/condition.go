// Package condition lists every kind of condition that a node can report, with its meaning, cause
// and remedy. Conditions are made from their kinds only, so that each can be looked up:
// `isthmus describe condition` and docs/conditions.md are made from this list.
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

// The severities. Error: a function does not work, or will stop working without help. Warning:
// everything works, perhaps with less reserve.
const (
	Error   Severity = "error"
	Warning Severity = "warning"
)

// Kind is a kind of condition. Its texts are complete sentences.
type Kind struct {
	Name       string
	Severities []Severity // possible severities, the worst first
	Meaning    string
	Cause      string // possible causes
	Remedy     string
	// Of is the object that has the condition: "node", "tunnel", "link", "peer" or "route".
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

// Lookup returns the kind with a name, ignoring case, and false if the name is unknown.
func Lookup(name string) (*Kind, bool) {
	i := slices.IndexFunc(All, func(k *Kind) bool { return strings.EqualFold(k.Name, name) })
	if i < 0 {
		return nil, false
	}
	return All[i], true
}
