package api

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// Ping checks over a new connection to its unix socket that the API of this process answers,
// whatever the health is. It calls the health service, which never waits at a gate that clients
// could fill.
func Ping(ctx context.Context, socket string) error {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("pinging the API: %w", err)
	}
	defer conn.Close()
	_, err = grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	switch status.Code(err) {
	case codes.OK, codes.NotFound, codes.ResourceExhausted:
		return nil
	}
	return fmt.Errorf("pinging the API: %w", err)
}
