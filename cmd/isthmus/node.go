package main

import (
	"context"
	"fmt"
	"runtime/debug"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// buildVersion is set by the linker: -X main.buildVersion=v1.2.3.
var buildVersion string

func version() string {
	if buildVersion != "" {
		return buildVersion
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

var statusColumns = []column[*isthmusv1.SystemStatus]{
	{header: "NODE", value: func(_ *app, s *isthmusv1.SystemStatus) string { return s.Node }},
	{header: "VERSION", value: func(_ *app, s *isthmusv1.SystemStatus) string { return s.Version }},
	{header: "UP", style: age, value: func(a *app, s *isthmusv1.SystemStatus) string { return a.since(s.Started) }},
	{header: "GENERATION", style: number, value: func(_ *app, s *isthmusv1.SystemStatus) string { return count(s.Generation) }},
	{header: "APPLIED", style: number, value: func(_ *app, s *isthmusv1.SystemStatus) string { return count(s.AppliedGeneration) }},
	{header: "CONFIRM-WITHIN", value: func(a *app, s *isthmusv1.SystemStatus) string { return a.until(s.ConfirmUntil) }},
	{header: "PLATFORM", wide: true, value: func(_ *app, s *isthmusv1.SystemStatus) string { return s.GetPlatform().GetPlatform() }},
	{header: "ZONE", wide: true, value: func(_ *app, s *isthmusv1.SystemStatus) string { return s.GetPlatform().GetZone() }},
	{header: "INSTANCE", wide: true, value: func(_ *app, s *isthmusv1.SystemStatus) string { return s.GetPlatform().GetInstance() }},
	{header: "CONDITIONS", value: func(_ *app, s *isthmusv1.SystemStatus) string { return conditions(s.Conditions) }},
}

func getStatus(ctx context.Context, conn *grpc.ClientConn) (*isthmusv1.SystemStatus, error) {
	return isthmusv1.NewSystemServiceClient(conn).GetStatus(ctx, &isthmusv1.GetStatusRequest{})
}

func (a *app) addNode(root, get, describe, _ *cobra.Command) {
	state := nounCommands[*isthmusv1.SystemStatus]{
		singular: "node", columns: statusColumns,
		list: "Show the node's state and conditions",
		read: func(ctx context.Context, conn *grpc.ClientConn) (proto.Message, []*isthmusv1.SystemStatus, error) {
			s, err := getStatus(ctx, conn)
			return s, []*isthmusv1.SystemStatus{s}, err
		},
	}.get(a, "status")
	state.Use, state.Args, state.ValidArgsFunction, state.Aliases = "status", cobra.NoArgs, nil, []string{"node"}
	get.AddCommand(state)
	node := describeCommand(a, "node [NAME]", "Show everything about the node", func(ctx context.Context, conn *grpc.ClientConn, names []string) ([]*isthmusv1.SystemStatus, error) {
		s, err := getStatus(ctx, conn)
		if err != nil {
			return nil, err
		}
		if len(names) > 0 && names[0] != s.Node {
			return nil, fmt.Errorf("node %q: not found; this is %q", names[0], s.Node)
		}
		return []*isthmusv1.SystemStatus{s}, nil
	})
	node.Args, node.Aliases = cobra.MaximumNArgs(1), []string{"status"}
	describe.AddCommand(node)

	a.addSystem(root)

	var clientOnly bool
	v := &cobra.Command{Use: "version", Short: "Show the versions of this program and of the node's daemon", Args: cobra.NoArgs,
		RunE: runs(func(cmd *cobra.Command, args []string) error {
			out := versions{Client: version()}
			if a.tables() {
				fmt.Fprintf(a.stdout, "isthmus  %s\n", out.Client)
			}
			if !clientOnly {
				err := a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
					s, err := getStatus(ctx, conn)
					out.Daemon = s.GetVersion()
					return err
				})(cmd, args)
				if err != nil {
					return err
				}
			}
			if !a.tables() {
				return a.showValue(out)
			}
			if !clientOnly {
				fmt.Fprintf(a.stdout, "isthmusd %s\n", clean(out.Daemon))
			}
			return nil
		})}
	v.Flags().BoolVar(&clientOnly, "client", false, "show only the version of this program")
	a.formatFlag(v, "table", "json", "yaml")
	root.AddCommand(v)
	root.Version = version()
	root.SetVersionTemplate("isthmus {{.Version}}\n")
}

// versions is what version prints as JSON and YAML.
type versions struct {
	Client string `json:"client"`
	Daemon string `json:"daemon,omitempty"`
}
