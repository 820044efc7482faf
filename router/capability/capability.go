// Package capability holds what a node can do besides tunnels, routes and rules: one file for each
// capability, with its section of the document, its part of the plan, its jobs, its goroutines, its
// conditions and its part of the API. A new capability is a file here, and a line in the list of
// package router.
package capability

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/condition"
)

// Capability is the interface of one capability to the rest of a node.
type Capability struct {
	Name    string
	Section string // field of the document that configures it, as "egress.log"
	// Nouns are its objects in the API; none: only its conditions are shown.
	Nouns []api.Noun
	// Kinds are the conditions that it can report, and Conditions returns the present ones.
	Kinds      []*condition.Kind
	Conditions func() []*isthmusv1.Condition
	// Summarize adds its objects to the numbers of the node. Nil: it has none.
	Summarize func(*isthmusv1.Summary)
	// Jobs apply its part of the plan.
	Jobs []apply.Job
	// Run works until ctx is done. Nil: not needed.
	Run func(context.Context) error
	// Rules is called with the configuration in force. Nil: not needed.
	Rules func(nat.Config)
}

// stamp leaves the zero time unset.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// texts turns values into their text forms.
func texts[T fmt.Stringer](list []T) []string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = v.String()
	}
	return out
}
