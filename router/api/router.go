// Package api serves the gRPC API. It checks requests, pages lists, follows changes and turns
// errors into status codes. The Router behind it carries requests out, and router/auth authorizes
// them.
package api

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/isthmus-net/isthmus/bgp"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/fault"
)

// Router carries out the calls of the API. Methods may be called from several goroutines.
//
// Status returns the present state, and a channel that is closed when the state has changed;
// router/bell makes such channels. Messages are never modified after they are returned.
//
// Errors wrap ErrNotFound, ErrInvalid, ErrPrecondition, store.ErrStale, secret.ErrNotFound or
// bgp.ErrNotFound where one of them applies, and are a *Refused for a document with problems.
type Router interface {
	// Validate returns the problems of a document. The error is about the check itself.
	Validate(ctx context.Context, source *isthmusv1.Source) (*isthmusv1.ValidateResponse, error)
	Plan(ctx context.Context, source *isthmusv1.Source) (*isthmusv1.PlanResponse, error)
	Apply(ctx context.Context, author string, r *isthmusv1.ApplyRequest) (*isthmusv1.ApplyResponse, error)
	EditPolicies(ctx context.Context, author string, r *isthmusv1.EditPoliciesRequest) (*isthmusv1.ApplyResponse, error)
	SetDisabled(ctx context.Context, author string, r *isthmusv1.SetDisabledRequest) (*isthmusv1.ApplyResponse, error)
	Confirm(ctx context.Context, author string, generation uint64) error
	Rollback(ctx context.Context, author string, r *isthmusv1.RollbackRequest) (*isthmusv1.ApplyResponse, error)
	// Progress returns the present generation and the one that is carried out. The error wraps
	// fault.ErrNoGeneration if the node has not accepted the generation, and fault.ErrNotConfirmed
	// if it was reverted.
	Progress(generation uint64) (present, applied uint64, err error)
	// Spec returns an accepted document; generation 0 is the present one.
	Spec(ctx context.Context, generation uint64) (*isthmusv1.GetSpecResponse, error)
	// EffectiveSpec returns the present document with the values that it leaves out.
	EffectiveSpec(ctx context.Context) (*isthmusv1.GetSpecResponse, error)

	// Nouns returns the objects that can be listed and watched. It is called once.
	Nouns() []Noun
	// Changed returns a channel that is closed when an object of a noun may have changed.
	Changed() <-chan struct{}

	ResetTunnel(ctx context.Context, name string) error
	ResetPeer(ctx context.Context, name string, soft bool) error
	// Paths returns a page of the paths of a peer, and the query for the next page, whose Start is
	// 0 if there is none.
	Paths(ctx context.Context, q bgp.Query) (*isthmusv1.ListPathsResponse, bgp.Query, error)
	// LookUp returns the route and the BGP paths to a prefix, or for a single address those of the
	// longest match.
	LookUp(ctx context.Context, destination netip.Prefix) (*isthmusv1.ListPathsResponse, error)
	// EndFlows ends present flows through the node.
	EndFlows(ctx context.Context, r *isthmusv1.EndFlowsRequest) (*isthmusv1.EndFlowsResponse, error)
	// ProveEgress returns the addresses under which flows may be seen, and the violations.
	ProveEgress(ctx context.Context, r *isthmusv1.ProveEgressRequest) (*isthmusv1.EgressProof, error)
	// Who returns the flows that used a public address and port.
	Who(ctx context.Context, r *isthmusv1.WhoRequest) (*isthmusv1.WhoResponse, error)
	// Ping sends echo requests from the node, and calls a function with the end of each until all
	// have ended, or until the function or ctx returns an error. The request has no missing values.
	Ping(ctx context.Context, q *isthmusv1.PingRequest, reply func(*isthmusv1.PingReply) error) error
	// Capture calls a function with packets of an interface until the capture has ended, or until
	// the function or ctx returns an error. Only the filter of the request may have missing values.
	Capture(ctx context.Context, q *isthmusv1.CaptureRequest, reply func(*isthmusv1.CaptureReply) error) error
	Status() (*isthmusv1.SystemStatus, <-chan struct{})
	// Generation returns the generation of the present document.
	Generation() uint64
	// Health returns the services of the health service, and whether each serves: "", which is the
	// whole node with all its objects; "node", without the objects; "tunnel/NAME", "peer/NAME" and
	// "pool/NAME"; and "condition/TYPE" for each condition that is present.
	Health() map[string]bool

	SetSecret(ctx context.Context, author, name string, value []byte) (*isthmusv1.SecretInfo, error)
	// AddSecret stores a secret, and refuses to replace another value.
	AddSecret(ctx context.Context, author, name string, value []byte) (*isthmusv1.SecretInfo, error)
	// RollbackSecret restores the former value of a secret.
	RollbackSecret(ctx context.Context, author, name string) (*isthmusv1.SecretInfo, error)
	DeleteSecret(ctx context.Context, author, name string) error
}

// Errors that callers distinguish.
var (
	ErrNotFound     = fault.ErrNotFound
	ErrInvalid      = fault.ErrInvalid
	ErrPrecondition = fault.ErrPrecondition
)

// Refused is the error for a document that was not accepted, with all of its problems.
type Refused struct{ Problems []*isthmusv1.Problem }

func (e *Refused) Error() string {
	switch len(e.Problems) {
	case 0:
		return "document refused"
	case 1:
		return fmt.Sprintf("document refused: %s: %s", e.Problems[0].Path, e.Problems[0].Rule)
	}
	return fmt.Sprintf("document refused: %d problems", len(e.Problems))
}
