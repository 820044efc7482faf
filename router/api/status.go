package api

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-net/isthmus/bgp"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/fault"
	"github.com/isthmus-net/isthmus/router/reason"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/store"
)

var reasonsByError = []struct {
	err    error
	reason *reason.Reason
}{
	{store.ErrStale, reason.GenerationChanged},
	{store.ErrTaken, reason.SecretExists},
	{store.ErrFull, reason.TooMany},
	{syscall.ENOSPC, reason.StateFull},
	{secret.ErrNotFound, reason.NotFoundSecret},
	{bgp.ErrNotFound, reason.NotFoundPeer},
	{bgp.ErrNotRunning, reason.BGPDown},
	{bgp.ErrRestarted, reason.BGPRestarted},
	{bgp.ErrSilent, reason.BGPSilent},
	{fault.ErrNoGeneration, reason.NotFoundGeneration},
	{fault.ErrNoTunnel, reason.NotFoundTunnel},
	{fault.ErrTooSoon, reason.RateLimited},
	{ErrNotFound, reason.NotFound},
	{store.ErrNotFound, reason.NotFound},
	{ErrInvalid, reason.RequestInvalid},
	{auth.ErrInvalid, reason.RequestInvalid},
	{auth.ErrClock, reason.ClockWrong},
	{fault.ErrNoDocument, reason.NoDocument},
	{fault.ErrNotConfirmed, reason.NotConfirmed},
	{ErrPrecondition, reason.NotPossibleNow},
	{store.ErrNewer, reason.StateNewer},
	{store.ErrSealed, reason.SecretsSealed},
	{store.ErrDamaged, reason.StateDamaged},
	{context.Canceled, reason.Canceled},
	{context.DeadlineExceeded, reason.DeadlineExceeded},
}

// statusOf turns an error into a gRPC status with a reason. Nil stays nil.
func statusOf(err error) error {
	if err == nil {
		return nil
	}
	if refused, ok := errors.AsType[*Refused](err); ok {
		var fields [][2]string
		for _, p := range refused.Problems {
			fields = append(fields, [2]string{p.Path, p.Rule})
		}
		return reason.DocumentInvalid.Detailed(err.Error(), &isthmusv1.Problems{Problems: fit(refused.Problems)}, reason.Violations(fields))
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	for _, c := range reasonsByError {
		if errors.Is(err, c.err) {
			return c.reason.Errorf("%v", err)
		}
	}
	return reason.Internal.Errorf("%v", err)
}

// notFound returns the error for a name that no object of a kind has.
func notFound(kind, name string) error {
	r := reason.NotFound
	switch kind {
	case "tunnel":
		r = reason.NotFoundTunnel
	case "peer":
		r = reason.NotFoundPeer
	case "pool":
		r = reason.NotFoundPool
	}
	return r.With(map[string]string{"name": name}, "%s %q: not found", kind, name)
}

// Errors that gRPC makes itself, such as those of a request that is too large, have no reason yet.

func reasonUnary(ctx context.Context, request any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	response, err := next(ctx, request)
	return response, reason.Ensure(err)
}

func reasonStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	return reason.Ensure(next(srv, stream))
}

// maxDetailBytes bounds the details of a status: they travel in the trailers of a response, whose
// size clients limit.
const maxDetailBytes = 64 << 10

func fit(problems []*isthmusv1.Problem) []*isthmusv1.Problem {
	size := 0
	for i, p := range problems {
		if size += proto.Size(p); size > maxDetailBytes {
			return append(problems[:i:i], &isthmusv1.Problem{
				Rule:   fmt.Sprintf("%d more problems", len(problems)-i),
				Remedy: "fix these first, or call SpecService.Validate, which returns all of them",
			})
		}
	}
	return problems
}
