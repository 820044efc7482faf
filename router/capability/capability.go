// Package capability has what a node can do besides tunnels, routes and rules: one file for each
// capability, with its section of the document, its part of the plan, its jobs, what runs for it,
// its conditions and what the API shows of it. A new one is a file here, and a line in the list of
// package router.
package capability

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/condition"
)

// Capability is how the rest of a node sees one capability.
type Capability struct {
	Name    string
	Section string // field of the document that configures it, as "egress.log"
	// under which the API and the command line show it; empty: they show its conditions alone
	Noun string
	// Kinds are the conditions that it can have, and Conditions returns those that it has.
	Kinds      []*condition.Kind
	Conditions func() []*isthmusv1.Condition
	// Jobs carry out its part of the plan.
	Jobs []apply.Job
	// Run works until ctx is done. Nil: nothing has to.
	Run func(context.Context) error
	// Rules is called with the rules that are in force. Nil: it does not follow them.
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
