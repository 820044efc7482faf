package api

import (
	"context"
	"log/slog"
	"runtime/debug"

	"google.golang.org/grpc"

	"github.com/isthmus-net/isthmus/router/reason"
)

// A panic in a handler ends its call, not the daemon: BGP sessions and embedded WireGuard devices
// would end with the daemon, and a client could repeat the call.

func recoverUnary(log *slog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, request any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (_ any, err error) {
		defer recovered(log, info.FullMethod, &err)
		return next(ctx, request)
	}
}

func recoverStream(log *slog.Logger) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
		defer recovered(log, info.FullMethod, &err)
		return next(srv, stream)
	}
}

// recovered turns a panic into the error of a call. It must be deferred itself.
func recovered(log *slog.Logger, method string, err *error) {
	if p := recover(); p != nil {
		log.Error("a request caused a panic; please report it", "method", method, "panic", p, "stack", string(debug.Stack()))
		*err = reason.PanicOfTheDaemon.Errorf("the call caused a panic in isthmusd, which continues to run; please report it with the lines of its log")
	}
}
