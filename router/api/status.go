package api

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-net/isthmus/bgp"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/store"
)

var codesByError = []struct {
	err  error
	code codes.Code
}{
	{store.ErrStale, codes.Aborted},
	{store.ErrTaken, codes.FailedPrecondition},
	{store.ErrFull, codes.ResourceExhausted},
	{ErrNotFound, codes.NotFound},
	{store.ErrNotFound, codes.NotFound},
	{secret.ErrNotFound, codes.NotFound},
	{bgp.ErrNotFound, codes.NotFound},
	{bgp.ErrNotRunning, codes.Unavailable},
	{bgp.ErrRestarted, codes.Aborted},
	{bgp.ErrSilent, codes.DeadlineExceeded},
	{ErrInvalid, codes.InvalidArgument},
	{auth.ErrInvalid, codes.InvalidArgument},
	{auth.ErrClock, codes.FailedPrecondition},
	{ErrPrecondition, codes.FailedPrecondition},
	{store.ErrNewer, codes.FailedPrecondition},
	{store.ErrSealed, codes.FailedPrecondition},
	{store.ErrDamaged, codes.DataLoss},
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
}

// statusOf turns an error into a gRPC status. Nil stays nil.
func statusOf(err error) error {
	if err == nil {
		return nil
	}
	if refused, ok := errors.AsType[*Refused](err); ok {
		s, derr := status.New(codes.InvalidArgument, err.Error()).WithDetails(&isthmusv1.Problems{Problems: fit(refused.Problems)})
		if derr != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		return s.Err()
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	for _, c := range codesByError {
		if errors.Is(err, c.err) {
			return status.Error(c.code, err.Error())
		}
	}
	return status.Error(codes.Internal, err.Error())
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
