package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

func (a *app) addFlows(root, _, _, _ *cobra.Command) {
	group := a.group("flow", "End established flows")
	group.AddCommand(a.flowEnd())
	root.AddCommand(group)
}

func (a *app) flowEnd() *cobra.Command {
	q := &isthmusv1.EndFlowsRequest{}
	cmd := &cobra.Command{Use: "end --from PREFIX", Short: "End flows of a host or a prefix", Args: cobra.NoArgs,
		Long: `End established flows through this node, selected by their original source and destination. A client may reconnect at once:
deny it first, by a policy with "action: deny". A policy that also has "flows: end" does both. Flows of the node itself
stay. The audit log records the request.`}
	f := cmd.Flags()
	f.StringVar(&q.Source, "from", "", "address or prefix of the clients (required)")
	f.StringVar(&q.Destination, "to", "", "address or prefix of the destinations (default: all destinations)")
	f.StringVar(&q.Protocol, "protocol", "", "tcp, udp or icmp (default: every protocol)")
	completeFlag(cmd, "protocol", oneOf("tcp", "udp", "icmp"))
	f.Uint32Var(&q.Port, "port", 0, "destination port, for tcp and udp (default: every port)")
	cmd.RunE = a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
		r, err := isthmusv1.NewNATServiceClient(conn).EndFlows(ctx, q)
		if err != nil {
			return err
		}
		if !a.tables() {
			return a.showMessage(r)
		}
		_, err = fmt.Fprintf(a.stdout, "%s ended.\n", plural(int(r.Flows), "flow"))
		return err
	})
	a.outputFlag(cmd)
	return cmd
}
