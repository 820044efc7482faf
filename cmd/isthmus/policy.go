package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

func (a *app) addPolicy(root, _, _, _ *cobra.Command) {
	group := a.group("policy", "Set and delete single egress policies of the present document")
	group.AddCommand(a.policySet(), a.policyDelete())
	root.AddCommand(group)
}

func (a *app) policySet() *cobra.Command {
	var d document
	cmd := &cobra.Command{Use: "set -f FILE", Short: "Add egress policies to the present document, or replace them", Args: cobra.NoArgs,
		Long: `Add egress policies to the present document, or replace those with the same names: all of them or none. The file has a list as
in a document:

  policies:
  - name: partner
    sources: [10.1.0.0/16]
    destinations: [198.51.100.0/24]
    pool: main

The rest of the document keeps its text and comments. The command takes a few milliseconds, whatever the number of policies.`}
	send := a.editFlags(cmd)
	cmd.RunE = a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
		source, err := a.read(&d)
		if err != nil {
			return err
		}
		return send(ctx, conn, "setting policies of "+d.name(), &isthmusv1.EditPoliciesRequest{Text: source.GetText()})
	})
	d.flag(cmd)
	return cmd
}

func (a *app) policyDelete() *cobra.Command {
	cmd := &cobra.Command{Use: "delete NAME...", Short: "Remove egress policies from the present document", Args: cobra.MinimumNArgs(1)}
	cmd.ValidArgsFunction = names(a, false, named((*isthmusv1.PolicyStatus).GetName))
	send := a.editFlags(cmd)
	cmd.RunE = a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
		return send(ctx, conn, "deleting "+strings.Join(args, ", "), &isthmusv1.EditPoliciesRequest{Delete: args})
	})
	return cmd
}

// editFlags adds the flags of an edit and returns the function that sends it.
func (a *app) editFlags(cmd *cobra.Command) func(ctx context.Context, conn *grpc.ClientConn, doing string, r *isthmusv1.EditPoliciesRequest) error {
	plan := cmd.Flags().Bool("plan", false, "show the changes and make none; exit with 3 if there are any")
	expected, confirm, message, wait := expectedFlag(cmd), confirmFlag(cmd), messageFlag(cmd), a.waitFlag(cmd)
	a.outputFlag(cmd)
	return func(ctx context.Context, conn *grpc.ClientConn, doing string, r *isthmusv1.EditPoliciesRequest) error {
		r.ExpectedGeneration, r.ConfirmWithin, r.DryRun, r.Message = expected(), confirm(), *plan, *message
		answer, err := isthmusv1.NewSpecServiceClient(conn).EditPolicies(ctx, r)
		if err != nil {
			return fmt.Errorf("%s: %w", doing, err)
		}
		return a.outcome(ctx, conn, answer, *plan, wait())
	}
}
