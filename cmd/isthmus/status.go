package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
)

func (a *app) addStatus(root, _, _, _ *cobra.Command) {
	var check, watch bool
	show := a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
		s, err := getStatus(ctx, conn)
		switch {
		case err != nil:
			return err
		case check:
			return a.check(s)
		case !a.tables():
			return a.showMessage(s)
		}
		return a.printStatus(s)
	})
	cmd := &cobra.Command{
		Use: "status", Short: "Show what is wrong with the node and what to do about it, and the numbers of its objects", Args: cobra.NoArgs,
		Long: `Show what is wrong with the node and what to do about it, the worst first, and then the numbers of its objects.

With --check, print one line for a monitor, and exit with 1 if anything has the severity error.`,
		Example: `  isthmus status                # one screen
  isthmus status --check        # for Nagios, Icinga or a cron job
  isthmus status --watch        # again each time that something changes
  isthmus status -o json        # for programs`,
		RunE: runs(func(cmd *cobra.Command, args []string) error {
			if watch {
				return a.watchStatus(cmd.Context())
			}
			return show(cmd, args)
		}),
	}
	cmd.Flags().BoolVar(&check, "check", false, "print one line, and exit with 1 if something is wrong")
	cmd.Flags().BoolVar(&watch, "watch", false, "print it again each time that something changes, until interrupted")
	cmd.MarkFlagsMutuallyExclusive("check", "watch")
	a.outputFlag(cmd)
	root.AddCommand(cmd)
}

// watchStatus prints the status, and then again each time it changes, until ctx ends. On a terminal
// each one takes the place of the former one.
func (a *app) watchStatus(ctx context.Context) error {
	token, lost := "", false
	return a.keep(ctx, &lost, func() bool { return token != "" }, func(ctx context.Context) error {
		conn, err := a.connect()
		if err != nil {
			return err
		}
		defer conn.Close()
		stream, err := isthmusv1.NewSystemServiceClient(conn).WatchStatus(ctx, &isthmusv1.WatchStatusRequest{ResumeToken: token})
		if err != nil {
			return err
		}
		if _, err := stream.Header(); err == nil {
			a.back(&lost)
		}
		for {
			m, err := stream.Recv()
			if err != nil {
				return ended(err)
			}
			if err := a.showStatus(m.Status, token == ""); err != nil {
				return err
			}
			token = m.ResumeToken
		}
	})
}

// showStatus prints one status of a watch.
func (a *app) showStatus(s *isthmusv1.SystemStatus, first bool) error {
	switch {
	case !a.tables():
		return a.showEvent(s)
	case a.terminal != nil && a.terminal() > 0:
		// The cursor goes to the top, and the screen is empty (ECMA-48).
		fmt.Fprint(a.stdout, "\x1b[H\x1b[2J")
	case !first:
		fmt.Fprintln(a.stdout)
	}
	if err := a.printStatus(s); err != nil {
		return err
	}
	_, err := fmt.Fprintf(a.stdout, "\nas of %s\n", a.clock())
	return err
}

// worstFirst orders conditions: errors first, those of the node before those of its objects, which
// they may have caused, and then the oldest first.
func worstFirst(all []*isthmusv1.Condition) []*isthmusv1.Condition {
	rank := func(c *isthmusv1.Condition) int {
		n := 0
		if c.Severity != string(condition.Error) {
			n += 2
		}
		if c.Object != "" {
			n++
		}
		return n
	}
	out := slices.Clone(all)
	slices.SortStableFunc(out, func(x, y *isthmusv1.Condition) int {
		return cmp.Or(cmp.Compare(rank(x), rank(y)), x.Since.AsTime().Compare(y.Since.AsTime()))
	})
	return out
}

// health returns the numbers of errors and warnings.
func health(s *isthmusv1.SystemStatus) (bad, warnings int) {
	for _, c := range s.Conditions {
		if c.Severity == string(condition.Error) {
			bad++
		} else {
			warnings++
		}
	}
	return bad, warnings
}

// numbers are the objects in one line.
func numbers(s *isthmusv1.SystemStatus) string {
	n := s.GetSummary()
	return fmt.Sprintf("tunnels %d/%d up, peers %d/%d established, pool addresses %d/%d healthy, generation %d",
		n.GetTunnelsUp(), n.GetTunnels(), n.GetPeersEstablished(), n.GetPeers(), n.GetPoolAddressesHealthy(), n.GetPoolAddresses(), s.Generation)
}

// subject names the object of a condition and its type.
func subject(c *isthmusv1.Condition) string {
	if c.Object == "" {
		return c.Type
	}
	return c.Object + " " + c.Type
}

// check prints one line, and returns an error when something is wrong.
func (a *app) check(s *isthmusv1.SystemStatus) error {
	bad, warnings := health(s)
	var worst []string
	for _, c := range worstFirst(s.Conditions)[:min(3, len(s.Conditions))] {
		worst = append(worst, subject(c)+": "+c.Message)
	}
	switch {
	case bad > 0:
		if _, err := fmt.Fprintf(a.stdout, "ERROR: %s: %s\n", plural(bad, "error"), clean(strings.Join(worst, " | "))); err != nil {
			return err
		}
		return errUnwell
	case warnings > 0:
		_, err := fmt.Fprintf(a.stdout, "WARNING: %s: %s\n", plural(warnings, "warning"), clean(strings.Join(worst, " | ")))
		return err
	}
	_, err := fmt.Fprintf(a.stdout, "OK: %s\n", clean(numbers(s)))
	return err
}

// printStatus prints one screen.
func (a *app) printStatus(s *isthmusv1.SystemStatus) error {
	var b strings.Builder
	bad, warnings := health(s)
	verdict := "well"
	switch {
	case bad > 0 && warnings > 0:
		verdict = plural(bad, "error") + ", " + plural(warnings, "warning")
	case bad > 0:
		verdict = plural(bad, "error")
	case warnings > 0:
		verdict = plural(warnings, "warning")
	}
	node := s.Node
	if node == "" {
		node = "(no document)"
	}
	fmt.Fprintf(&b, "%s: %s (%s, up %s)\n", clean(node), verdict, clean(s.Version), a.age(s.Started))
	for _, c := range worstFirst(s.Conditions) {
		since := ""
		if c.Since != nil {
			since = fmt.Sprintf(" for %s, since %s", a.age(c.Since), c.Since.AsTime().In(a.now().Location()).Format(time.DateTime))
		}
		fmt.Fprintf(&b, "\n%-8s%s%s\n        %s\n", c.Severity, clean(subject(c)), since, clean(c.Message))
		if k, ok := condition.Lookup(c.Type); ok {
			_, name, _ := strings.Cut(c.Object, " ")
			remedy := k.Remedy
			if name != "" {
				remedy = strings.ReplaceAll(remedy, "NAME", clean(name))
			}
			fmt.Fprintf(&b, "        -> %s\n", remedy)
		}
	}
	n := s.GetSummary()
	b.WriteString("\n")
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-10s%s\n", name, clean(fmt.Sprintf(format, args...)))
	}
	document := fmt.Sprintf("generation %d, applied", s.Generation)
	switch {
	case s.Generation == 0:
		document = "none: isthmus apply -f FILE"
	case s.AppliedGeneration != s.Generation:
		document = fmt.Sprintf("generation %d, not yet applied (last: %d)", s.Generation, s.AppliedGeneration)
	}
	if s.ConfirmUntil != nil {
		document += fmt.Sprintf("; reverts in %s unless `isthmus confirm %d` is called", a.left(s.ConfirmUntil), s.Generation)
	}
	line("document", "%s", document)
	disabled := func(n uint32) string {
		if n == 0 {
			return ""
		}
		return fmt.Sprintf(", %d disabled", n)
	}
	line("tunnels", "%d/%d up%s", n.GetTunnelsUp(), n.GetTunnels(), disabled(n.GetTunnelsDisabled()))
	line("peers", "%d/%d established%s, %d prefixes accepted, %d announced", n.GetPeersEstablished(), n.GetPeers(), disabled(n.GetPeersDisabled()), n.GetPrefixesAccepted(), n.GetPrefixesAnnounced())
	line("routes", "%d/%d installed", n.GetRoutesInstalled(), n.GetRoutes())
	line("pools", "%d with %d/%d addresses healthy", n.GetPools(), n.GetPoolAddressesHealthy(), n.GetPoolAddresses())
	if p := n.GetPorts(); p != nil {
		line("ports", "%.0f %% used at most: %s to %s port %d (%s)", p.Percent, p.PublicAddress, p.Destination, p.Port, p.Protocol)
	} else {
		line("ports", "none used")
	}
	guard := "not in the kernel"
	if n.GetGuard() {
		guard = fmt.Sprintf("active, %d packets dropped", n.GetGuardPackets())
	}
	line("guard", "%s", guard)
	if end, ok := a.certificateEnd(); ok {
		line("access", "the certificate of this client expires in %s, %s", short(end.Sub(a.wall())), end.In(a.wall().Location()).Format(time.DateOnly))
	}
	_, err := a.stdout.Write([]byte(b.String()))
	return err
}

// certificateEnd returns the end of this client's certificate, and false over the unix socket.
func (a *app) certificateEnd() (end time.Time, ok bool) {
	if a.socketPath() != "" {
		return end, false
	}
	c, err := readContext(a.contextPath())
	if err != nil {
		return end, false
	}
	config, err := tlsConfig(c)
	if err != nil || config.Certificates[0].Leaf == nil {
		return end, false
	}
	return config.Certificates[0].Leaf.NotAfter, true
}
