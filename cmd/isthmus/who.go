package main

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

func (a *app) addWho(root, _, _, _ *cobra.Command) {
	group := a.group("nat", "Find the host behind a public address")
	group.AddCommand(a.natWho())
	root.AddCommand(group)
}

var whoColumns = []column[*isthmusv1.TranslatedFlow]{
	{header: "START", value: func(_ *app, f *isthmusv1.TranslatedFlow) string { return moment(f.Start, "unknown") }},
	{header: "END", value: func(_ *app, f *isthmusv1.TranslatedFlow) string {
		if f.Vanished {
			return "by " + moment(f.End, "")
		}
		return moment(f.End, "lives")
	}},
	{header: "PROTOCOL", value: func(_ *app, f *isthmusv1.TranslatedFlow) string { return f.Protocol }},
	{header: "INSIDE", value: func(_ *app, f *isthmusv1.TranslatedFlow) string { return f.Inside }},
	{header: "DESTINATION", value: func(_ *app, f *isthmusv1.TranslatedFlow) string { return f.Destination }},
	{header: "POLICY", value: func(_ *app, f *isthmusv1.TranslatedFlow) string { return f.Policy }},
	{header: "SENT", style: size, value: func(_ *app, f *isthmusv1.TranslatedFlow) string { return bytesText(f.BytesSent) }},
	{header: "RECEIVED", style: size, value: func(_ *app, f *isthmusv1.TranslatedFlow) string { return bytesText(f.BytesReceived) }},
	{header: "OUTSIDE", wide: true, value: func(_ *app, f *isthmusv1.TranslatedFlow) string { return f.Outside }},
}

// moment formats a time to the millisecond, in UTC.
func moment(t *timestamppb.Timestamp, unset string) string {
	if t == nil {
		return unset
	}
	return t.AsTime().Format("2006-01-02T15:04:05.000Z")
}

// parseMoment returns the time of a flag: one of RFC 3339, one of the time zone of now, or a
// duration before now.
func parseMoment(flag, text string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02T15:04:05"} {
		if t, err := time.ParseInLocation(layout, text, now.Location()); err == nil {
			return t, nil
		}
	}
	for _, layout := range []string{"15:04:05", "15:04"} {
		clock, err := time.Parse(layout, text)
		if err != nil {
			continue
		}
		t := time.Date(now.Year(), now.Month(), now.Day(), clock.Hour(), clock.Minute(), clock.Second(), clock.Nanosecond(), now.Location())
		if t.After(now) {
			t = t.AddDate(0, 0, -1)
		}
		return t, nil
	}
	return time.Time{}, usageError{fmt.Errorf(`%s %q: must be a time as 5m (ago), 11:20, "2026-11-20 11:20:05" or 2026-11-20T11:20:05Z`, flag, text)}
}

func (a *app) natWho() *cobra.Command {
	var at string
	var within time.Duration
	q := &isthmusv1.WhoRequest{}
	cmd := &cobra.Command{Use: "who ADDRESS[:PORT]", Short: "Find the flows that had a public address and port at a time", Args: cobra.ExactArgs(1),
		Long: `Find the flows that had a public address and port at a time: live flows, and those in the log of translations (egress.log in the
document). If the pool has blocks, the source also follows from the port by a formula, without any log. One port may serve flows to
several destinations at once; --to selects one. Without a port, --to is required, and the answer lists all flows to that destination
from the address. The audit log records the query.`}
	f := cmd.Flags()
	f.StringVar(&at, "at", "", "time: 5m ago as 5m, 11:20 of the last 24 hours, 2026-11-20 11:20:05 in local time, or RFC 3339 (default: now)")
	f.DurationVar(&within, "within", time.Second, "maximum error of the clock that --at is from")
	f.StringVar(&q.Protocol, "protocol", "", "tcp, udp or icmp (default: every protocol)")
	f.StringVar(&q.Destination, "to", "", "destination address of the flow (default: all destinations)")
	completeFlag(cmd, "protocol", oneOf("tcp", "udp", "icmp"))
	cmd.RunE = a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
		if address, err := netip.ParseAddr(args[0]); err == nil {
			if q.Destination == "" {
				return usageError{fmt.Errorf("%q: has no port: give one, as %s, or the destination by --to", args[0], netip.AddrPortFrom(address, 21877))}
			}
			q.Address, q.AnyPort = address.String(), true
		} else if outside, err := netip.ParseAddrPort(args[0]); err == nil {
			q.Address, q.Port = outside.Addr().String(), uint32(outside.Port())
		} else {
			return usageError{fmt.Errorf("%q: must be an address and a port, as 203.0.113.9:21877 or [2001:db8::9]:21877", args[0])}
		}
		q.Within = durationpb.New(within)
		if at != "" {
			t, err := parseMoment("--at", at, a.now())
			if err != nil {
				return err
			}
			q.At = timestamppb.New(t)
		}
		r, err := isthmusv1.NewNATServiceClient(conn).Who(ctx, q)
		if err != nil {
			return err
		}
		if !a.tables() {
			err = a.showMessage(r)
		} else {
			err = a.showWho(args[0], r)
		}
		if err == nil && len(r.Flows) == 0 && r.BlockSource == "" {
			when := a.now()
			if q.At != nil {
				when = q.At.AsTime().In(when.Location())
			}
			err = fmt.Errorf("no known flow used %s at %s, give or take %v: see --at and --within", args[0], when.Format(time.RFC3339), within)
		}
		return err
	})
	a.outputFlag(cmd)
	return cmd
}

func (a *app) showWho(outside string, r *isthmusv1.WhoResponse) error {
	var b strings.Builder
	if r.BlockSource != "" {
		fmt.Fprintf(&b, "%s is in the block of %s.\n", outside, r.BlockSource)
	}
	for _, gap := range r.Gaps {
		fmt.Fprintf(a.stderr, "isthmus: warning: the answer may be incomplete: %s\n", clean(gap))
	}
	if r.Truncated {
		fmt.Fprintf(&b, "More than these %d flows match: narrow the query.\n", len(r.Flows))
	}
	if _, err := a.stdout.Write([]byte(b.String())); err != nil {
		return err
	}
	if len(r.Flows) == 0 {
		return nil
	}
	t := a.newTable(looks(a, whoColumns)...)
	for _, f := range r.Flows {
		t.add(cells(a, whoColumns, f)...)
	}
	return t.flush()
}
