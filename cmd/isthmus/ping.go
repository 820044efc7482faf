package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// errNoAnswer makes ping exit with 1. The reasons are in its output.
var errNoAnswer = errors.New("no request was answered")

func (a *app) addPing(root, _, _, _ *cobra.Command) {
	q := &isthmusv1.PingRequest{}
	var interval time.Duration
	cmd := &cobra.Command{Use: "ping ADDRESS", Short: "Ping a host from the node", Args: cobra.ExactArgs(1),
		Long: `Send echo requests from the node to an address, print a line for each as it ends, and then a summary. The command waits one second
for each answer. It exits with 1 if no request was answered.

With --tunnel the packets leave by the interface of the tunnel, whatever the routes are, with the node's inside address as their
source, so that the host needs a route back to that address. Without it the routes of the node decide, and the kernel chooses the
source.

To find the largest packet that a path carries, add --dont-fragment and try sizes: an error names the path MTU. The packet is 28
bytes larger than --size with IPv4, 48 with IPv6.

The audit log records the request.`}
	f := cmd.Flags()
	f.StringVar(&q.Tunnel, "tunnel", "", "name of the tunnel by which the packets leave (default: as the routes say)")
	f.Uint32VarP(&q.Count, "count", "c", 5, "number of requests, 1 to 100")
	f.DurationVar(&interval, "interval", time.Second, "time between two requests, 200ms to 10s")
	f.Uint32Var(&q.Size, "size", 56, "bytes of data in a request, 8 to 8972")
	f.BoolVar(&q.DontFragment, "dont-fragment", false, "forbid fragments, so that a packet that does not fit the path is an error")
	completeFlag(cmd, "tunnel", names(a, false, named((*isthmusv1.TunnelStatus).GetName)))
	cmd.RunE = a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
		// The node would take 0 for its default.
		switch {
		case q.Count == 0:
			return usageError{errors.New("--count 0: must be 1 to 100")}
		case q.Size == 0:
			return usageError{errors.New("--size 0: must be 8 to 8972 bytes")}
		}
		q.Address, q.Interval = args[0], durationpb.New(interval)
		stream, err := isthmusv1.NewDiagnosticServiceClient(conn).Ping(ctx, q)
		if err != nil {
			return err
		}
		var s pingSummary
		for {
			m, err := stream.Recv()
			if err == io.EOF || ctx.Err() != nil && s.sent > 0 { // interrupted
				break
			}
			if err != nil {
				return err
			}
			s.add(m)
			if err := a.showReply(m); err != nil {
				return err
			}
		}
		if a.tables() {
			fmt.Fprintln(a.stdout, s)
		}
		if s.answered == 0 {
			return errNoAnswer
		}
		return nil
	})
	a.formatFlag(cmd, "table", "json")
	root.AddCommand(cmd)
}

// showReply prints the end of a request; programs get the message on a line.
func (a *app) showReply(m *isthmusv1.PingReply) error {
	if !a.tables() {
		return a.showEvent(m)
	}
	text := fmt.Sprintf("answer from %s: sequence %d, %s", m.Address, m.Sequence, milliseconds(m.RoundTrip.AsDuration()))
	if m.Error != "" {
		text = fmt.Sprintf("sequence %d: %s", m.Sequence, m.Error)
		if m.Address != "" {
			text += ", reported by " + m.Address
		}
	}
	_, err := fmt.Fprintln(a.stdout, clean(text))
	return err
}

// milliseconds returns a duration with three digits.
func milliseconds(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	return fmt.Sprintf("%.*f ms", max(0, min(3, 2-int(math.Floor(math.Log10(max(ms, 0.001)))))), ms)
}

// pingSummary counts requests and their answers.
type pingSummary struct {
	sent, answered  int
	least, most, in time.Duration // of the round trips, and their sum
}

func (s *pingSummary) add(m *isthmusv1.PingReply) {
	s.sent++
	if m.Error != "" {
		return
	}
	d := m.RoundTrip.AsDuration()
	if s.answered == 0 {
		s.least = d
	}
	s.answered++
	s.least, s.most, s.in = min(s.least, d), max(s.most, d), s.in+d
}

// String returns the summary on one line.
func (s pingSummary) String() string {
	text := fmt.Sprintf("%s, %s", plural(s.sent, "request"), plural(s.answered, "answer"))
	if s.answered == 0 {
		return text
	}
	return fmt.Sprintf("%s, round trip: least %s, average %s, most %s", text, milliseconds(s.least), milliseconds(s.in/time.Duration(s.answered)), milliseconds(s.most))
}
