package main

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

func count(n uint64) string { return strconv.FormatUint(n, 10) }

var peerColumns = []column[*isthmusv1.PeerStatus]{
	{header: "PEER", value: func(_ *app, p *isthmusv1.PeerStatus) string { return p.Name }},
	{header: "ASN", style: number, value: func(_ *app, p *isthmusv1.PeerStatus) string { return count(uint64(p.Asn)) }},
	{header: "STATE", style: state, value: func(_ *app, p *isthmusv1.PeerStatus) string { return p.State }},
	{header: "PREFIXES", style: number, value: func(_ *app, p *isthmusv1.PeerStatus) string {
		return fmt.Sprintf("%d/%d", p.PrefixesAccepted, p.PrefixesReceived)
	}},
	{header: "MESSAGES", style: number, value: func(_ *app, p *isthmusv1.PeerStatus) string {
		return fmt.Sprintf("%d/%d", p.MessagesReceived, p.MessagesSent)
	}},
	{header: "SINCE", style: age, value: func(a *app, p *isthmusv1.PeerStatus) string { return a.since(p.Since) }},
	{header: "TUNNEL", wide: true, value: func(_ *app, p *isthmusv1.PeerStatus) string { return p.Tunnel }},
	{header: "ADDRESS", wide: true, value: func(_ *app, p *isthmusv1.PeerStatus) string { return p.Address }},
	{header: "ANNOUNCED", style: number, wide: true, value: func(_ *app, p *isthmusv1.PeerStatus) string { return count(uint64(p.PrefixesAnnounced)) }},
	{header: "TIMES-UP", style: number, wide: true, value: func(_ *app, p *isthmusv1.PeerStatus) string { return count(p.TimesUp) }},
	{header: "NEXT-TRY", style: age, wide: true, value: func(a *app, p *isthmusv1.PeerStatus) string { return a.until(p.NextTry) }},
	{header: "CONDITIONS", wide: true, value: func(_ *app, p *isthmusv1.PeerStatus) string { return conditions(p.Conditions) }},
	{header: "WHY", value: func(_ *app, p *isthmusv1.PeerStatus) string {
		return why(p.Conditions, p.State == "established", p.LastError)
	}},
}

func (a *app) addPeers(root, get, describe, watch *cobra.Command) {
	nounCommands[*isthmusv1.PeerStatus]{
		singular: "peer", plural: "peers", columns: peerColumns,
		samples:  [2]string{"aws-0", "azure-1"},
		list:     "List the BGP sessions, with prefixes accepted/received and messages received/sent",
		describe: "Show everything about BGP sessions",
		watch:    "Follow the BGP sessions",
	}.add(a, get, describe, watch)

	var soft bool
	reset := a.group("reset", "Restart a session or a tunnel")
	peer := &cobra.Command{Use: "peer NAME", Short: "Close and reopen a BGP session, and end its quarantine", Args: cobra.ExactArgs(1),
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
			_, err := isthmusv1.NewBGPServiceClient(conn).ResetPeer(ctx, &isthmusv1.ResetPeerRequest{Name: args[0], Soft: soft})
			return err
		})}
	peer.ValidArgsFunction = names(a, true, named((*isthmusv1.PeerStatus).GetName))
	peer.Flags().BoolVar(&soft, "soft", false, "keep the session; apply the import policy to the peer's routes again, and send our routes again")
	tunnel := &cobra.Command{Use: "tunnel NAME", Short: "Negotiate the keys of a tunnel again, which interrupts its traffic", Args: cobra.ExactArgs(1),
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
			_, err := isthmusv1.NewTunnelServiceClient(conn).ResetTunnel(ctx, &isthmusv1.ResetTunnelRequest{Name: args[0]})
			return err
		})}
	tunnel.ValidArgsFunction = names(a, true, named((*isthmusv1.TunnelStatus).GetName))
	reset.AddCommand(peer, tunnel)
	root.AddCommand(reset)
}
