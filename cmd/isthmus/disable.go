package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

func (a *app) addDisable(root, _, _, _ *cobra.Command) {
	tunnel := a.group("tunnel", "Shut tunnels down, and take them back")
	peer := a.group("peer", "Shut BGP sessions down, and take them back")
	for _, disabled := range []bool{true, false} {
		of := func(r *isthmusv1.SetDisabledRequest, names []string) { r.Tunnels = names }
		tunnel.AddCommand(a.disableCommand("tunnel", disabled, of, names(a, false, named((*isthmusv1.TunnelStatus).GetName))))
		of = func(r *isthmusv1.SetDisabledRequest, names []string) { r.Peers = names }
		peer.AddCommand(a.disableCommand("peer", disabled, of, names(a, false, named((*isthmusv1.PeerStatus).GetName))))
	}
	root.AddCommand(tunnel, peer)
}

func (a *app) disableCommand(kind string, disabled bool, of func(*isthmusv1.SetDisabledRequest, []string), complete cobra.CompletionFunc) *cobra.Command {
	use, doing, short := "enable NAME...", "enabling", "Take "+kind+"s back that are disabled"
	long := `Remove the field "disabled" of %[1]ss from the present document: an edit with a generation of its own. The rest of the
document keeps its text and comments.`
	if disabled {
		use, doing, short = "disable NAME...", "disabling", "Shut "+kind+"s down until they are enabled"
		long = `Set the field "disabled" of %[1]ss in the present document: an edit with a generation of its own. The %[1]ss stay down over
restarts and further changes until they are enabled. The rest of the document keeps its text and comments.`
		if kind == "peer" {
			long += "\n\nThe peer receives a NOTIFICATION (Cease, Administrative Shutdown) with the message of -m."
		} else {
			long += "\n\nStatic routes and BGP sessions leave the tunnel first. Its number and its inside addresses stay."
		}
	}
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.MinimumNArgs(1), Long: fmt.Sprintf(long, kind), ValidArgsFunction: complete}
	plan := cmd.Flags().Bool("plan", false, "show the changes and make none; exit with 3 if there are any")
	expected, confirm, message, wait := expectedFlag(cmd), confirmFlag(cmd), messageFlag(cmd), a.waitFlag(cmd)
	a.outputFlag(cmd)
	cmd.RunE = a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
		r := &isthmusv1.SetDisabledRequest{Disabled: disabled, ExpectedGeneration: expected(), ConfirmWithin: confirm(), DryRun: *plan, Message: *message}
		of(r, args)
		answer, err := isthmusv1.NewSpecServiceClient(conn).SetDisabled(ctx, r)
		if err != nil {
			return fmt.Errorf("%s %s: %w", doing, strings.Join(args, ", "), err)
		}
		return a.outcome(ctx, conn, answer, *plan, wait())
	})
	return cmd
}
