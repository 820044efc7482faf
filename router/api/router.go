// Package api serves the gRPC API. It checks requests, pages lists, follows changes and turns errors into status codes;
// what a request means is decided by the Router behind it, and who may make it by router/auth.
package api

import (
	"context"
	"fmt"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/fault"
)

// Router is what the API stands in front of. Methods may be called from several goroutines.
//
// Methods that return a channel return what is true now, and a channel that is closed when it no longer is;
// router/bell makes such channels. Lists are in ascending order of name (routes: CompareRoutes), each name once. The slices and messages
// they return are never modified afterwards; an unchanged object should be the same message again, which makes watches
// cheap.
//
// Errors wrap ErrNotFound, ErrInvalid, ErrPrecondition, store.ErrStale, secret.ErrNotFound or bgp.ErrNotFound where one
// of them applies, and are a *Refused for a document with problems.
type Router interface {
	// Validate returns what is wrong with a document. The error is about the check itself.
	Validate(ctx context.Context, source *isthmusv1.Source) (*isthmusv1.ValidateResponse, error)
	Plan(ctx context.Context, source *isthmusv1.Source) (*isthmusv1.PlanResponse, error)
	Apply(ctx context.Context, author string, r *isthmusv1.ApplyRequest) (*isthmusv1.ApplyResponse, error)
	EditPolicies(ctx context.Context, author string, r *isthmusv1.EditPoliciesRequest) (*isthmusv1.ApplyResponse, error)
	Confirm(ctx context.Context, author string, generation uint64) error
	Rollback(ctx context.Context, author string, r *isthmusv1.RollbackRequest) (*isthmusv1.ApplyResponse, error)
	// Spec returns an accepted document; generation 0 is the present one.
	Spec(ctx context.Context, generation uint64) (*isthmusv1.GetSpecResponse, error)
	// History returns the accepted documents, newest first.
	History() []*isthmusv1.Revision

	Tunnels() ([]*isthmusv1.TunnelStatus, <-chan struct{})
	// Strays returns the tunnels that are not in the document.
	Strays() []*isthmusv1.StrayTunnel
	Peers() ([]*isthmusv1.PeerStatus, <-chan struct{})
	ResetPeer(ctx context.Context, name string, soft bool) error
	Routes() ([]*isthmusv1.Route, <-chan struct{})
	Policies() ([]*isthmusv1.PolicyStatus, <-chan struct{})
	Pools() ([]*isthmusv1.PoolStatus, <-chan struct{})
	Names() ([]*isthmusv1.NameStatus, <-chan struct{})
	// Guard returns what the guard kept from leaving.
	Drops() []*isthmusv1.Drop
	// EndFlows ends flows under way through the node.
	EndFlows(ctx context.Context, r *isthmusv1.EndFlowsRequest) (*isthmusv1.EndFlowsResponse, error)
	// ProveEgress says under which addresses flows may be seen, and what is wrong with that.
	ProveEgress(ctx context.Context, r *isthmusv1.ProveEgressRequest) (*isthmusv1.EgressProof, error)
	// Ports returns what was last counted of the ports of pool addresses, in the order of ComparePorts. Recount has
	// them counted and waits for that, for a moment.
	Ports() ([]*isthmusv1.PortUse, <-chan struct{})
	Recount(ctx context.Context)
	// PortTotals returns a response without ports: what was counted beside them.
	PortTotals() *isthmusv1.ListPortsResponse
	// Who says who had a public address and port.
	Who(ctx context.Context, r *isthmusv1.WhoRequest) (*isthmusv1.WhoResponse, error)
	Status() (*isthmusv1.SystemStatus, <-chan struct{})

	SetSecret(ctx context.Context, author, name string, value []byte) (*isthmusv1.SecretInfo, error)
	// RollbackSecret brings the former value of a secret back.
	RollbackSecret(ctx context.Context, author, name string) (*isthmusv1.SecretInfo, error)
	Secrets() []*isthmusv1.SecretInfo
	DeleteSecret(ctx context.Context, author, name string) error
}

// Errors that callers tell apart.
var (
	ErrNotFound     = fault.ErrNotFound
	ErrInvalid      = fault.ErrInvalid
	ErrPrecondition = fault.ErrPrecondition
)

// Refused is a document that was not accepted, and everything that is wrong with it.
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
