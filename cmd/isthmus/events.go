package main

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/event"
)

// localTime formats a time in the time zone of the user, to the second.
func (a *app) localTime(t *timestamppb.Timestamp) string {
	return t.AsTime().In(a.now().Location()).Format(time.DateTime)
}

var eventColumns = []column[*isthmusv1.Event]{
	{header: "TIME", style: moments, value: func(a *app, e *isthmusv1.Event) string { return a.localTime(e.Time) }},
	{header: "TYPE", style: kind, value: func(_ *app, e *isthmusv1.Event) string { return e.Type }},
	{header: "SEVERITY", style: state, wide: true, value: func(_ *app, e *isthmusv1.Event) string { return e.Severity }},
	{header: "OBJECT", style: object, value: func(_ *app, e *isthmusv1.Event) string { return e.Object }},
	{header: "WHO", wide: true, value: func(_ *app, e *isthmusv1.Event) string { return e.Who }},
	{header: "LASTED", style: age, wide: true, value: func(_ *app, e *isthmusv1.Event) string {
		if e.Lasted == nil {
			return ""
		}
		return short(e.Lasted.AsDuration())
	}},
	{header: "MESSAGE", value: func(a *app, e *isthmusv1.Event) string {
		if e.Who != "" && a.output != "wide" {
			return e.Message + ", by " + e.Who
		}
		return e.Message
	}},
}

// eventsQuery has the flags of "get events".
type eventsQuery struct {
	past
	tunnels, peers, pools, types []string
	severity                     string
	follow                       bool
}

// maxEvents is how many events a node shows.
const maxEvents = 10_000

func (a *app) addEvents(_, get, _, _ *cobra.Command) {
	q := eventsQuery{}
	cmd := &cobra.Command{Use: "events", Aliases: []string{"event"}, Short: "List what has happened on the node, and follow what happens", Args: cobra.NoArgs,
		Long: `List the events of the node, the last one at the end: changes of tunnels, sessions, conditions, pools and documents, and calls that
changed something. docs/events.md lists all types. Only admins see the events about access.

With --follow the command then prints each event as it happens, until interrupted. If the node restarts, the command connects again
and continues where it was. It prints a warning if events are missing.`}
	f := cmd.Flags()
	f.BoolVarP(&q.follow, "follow", "f", false, "then print each event as it happens")
	q.flagsOf(f, "events", maxEvents)
	f.StringArrayVar(&q.tunnels, "tunnel", nil, "only events of this tunnel (may be repeated)")
	f.StringArrayVar(&q.peers, "peer", nil, "only events of the BGP session with this peer (may be repeated)")
	f.StringArrayVar(&q.pools, "pool", nil, "only events of this pool (may be repeated)")
	f.StringArrayVar(&q.types, "type", nil, "only events of this type, or about conditions of this type (may be repeated)")
	f.StringVar(&q.severity, "severity", "", "only events of this severity or a worse one: info, warning or error")
	completeFlag(cmd, "tunnel", names(a, false, named((*isthmusv1.TunnelStatus).GetName)))
	completeFlag(cmd, "peer", names(a, false, named((*isthmusv1.PeerStatus).GetName)))
	completeFlag(cmd, "pool", names(a, false, named((*isthmusv1.PoolStatus).GetName)))
	completeFlag(cmd, "severity", oneOf("info", "warning", "error"))
	var types []string
	for _, k := range event.All {
		types = append(types, k.Name)
	}
	for _, k := range condition.All {
		types = append(types, k.Name)
	}
	slices.Sort(types)
	completeFlag(cmd, "type", oneOf(slices.Compact(types)...))
	cmd.RunE = runs(func(cmd *cobra.Command, _ []string) error {
		filter, err := q.filter(a.now())
		if err != nil {
			return err
		}
		if q.follow {
			return a.followEvents(cmd.Context(), filter, q.limit)
		}
		conn, err := a.connect()
		if err != nil {
			return err
		}
		defer conn.Close()
		events, err := lastEvents(cmd.Context(), conn, filter, q.limit)
		if err != nil {
			return err
		}
		heads, rows := rowsOf(a, eventColumns, events)
		return a.print(a.newTable(heads...).fitting(), rows, &isthmusv1.ListEventsResponse{Events: events})
	})
	a.outputFlag(cmd)
	a.headersFlag(cmd)
	get.AddCommand(cmd)
}

// filter returns what the flags select.
func (q *eventsQuery) filter(now time.Time) (*isthmusv1.EventFilter, error) {
	since, err := q.read(now)
	if err != nil {
		return nil, err
	}
	out := &isthmusv1.EventFilter{Types: q.types, MinSeverity: q.severity, Since: since}
	for kind, names := range map[string][]string{"tunnel": q.tunnels, "peer": q.peers, "pool": q.pools} {
		for _, name := range names {
			out.Objects = append(out.Objects, kind+"/"+name)
		}
	}
	slices.Sort(out.Objects)
	return out, nil
}

// lastEvents returns the last events, oldest first.
func lastEvents(ctx context.Context, conn *grpc.ClientConn, filter *isthmusv1.EventFilter, limit int) (all []*isthmusv1.Event, err error) {
	request := &isthmusv1.ListEventsRequest{Filter: filter}
	for {
		request.PageSize = uint32(min(limit-len(all), 1000))
		page, err := isthmusv1.NewEventServiceClient(conn).ListEvents(ctx, request)
		if err != nil {
			return nil, err
		}
		all = append(all, page.Events...)
		if page.NextPageToken == "" || len(all) >= limit {
			slices.Reverse(all)
			return all, nil
		}
		if page.NextPageToken == request.PageToken {
			return nil, errors.New("the node sends the same page again and again")
		}
		request.PageToken = page.NextPageToken
	}
}

// eventFollower prints events, over one connection after the other.
type eventFollower struct {
	a       *app
	filter  *isthmusv1.EventFilter
	limit   int
	table   *table
	token   string // to continue; empty: nothing was printed yet
	printed uint64 // number of the last event of the list
	lost    bool   // the connection was lost, and is not back yet
}

// followEvents prints the last events, and then each one as it happens, until ctx ends.
func (a *app) followEvents(ctx context.Context, filter *isthmusv1.EventFilter, limit int) error {
	f := &eventFollower{a: a, filter: filter, limit: limit, table: a.newTable(looks(a, eventColumns)...).fitting()}
	f.table.steady = true
	return a.keep(ctx, &f.lost, func() bool { return f.token != "" }, f.connection)
}

// connection follows the events over one connection, until it ends.
func (f *eventFollower) connection(ctx context.Context) error {
	conn, err := f.a.connect()
	if err != nil {
		return err
	}
	defer conn.Close()
	request := &isthmusv1.WatchEventsRequest{ResumeToken: f.token, Filter: f.filter}
	if f.token == "" { // the list has the events until now
		request.Filter = &isthmusv1.EventFilter{Objects: f.filter.Objects, Types: f.filter.Types, MinSeverity: f.filter.MinSeverity}
	}
	stream, err := isthmusv1.NewEventServiceClient(conn).WatchEvents(ctx, request)
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return ended(err)
		}
		f.a.back(&f.lost)
		if m.Lost != "" {
			fmt.Fprintf(f.a.stderr, "isthmus: warning: events may be missing: %s\n", clean(m.Lost))
			f.printed = 0 // the numbers may be those of another log
		}
		var events []*isthmusv1.Event
		switch {
		case m.Event != nil && m.Event.Sequence > f.printed:
			events = append(events, m.Event)
		case m.Type == isthmusv1.EventType_EVENT_TYPE_MARK && f.token == "":
			// An event between the mark and the list is in both.
			if events, err = lastEvents(ctx, conn, f.filter, f.limit); err != nil {
				return err
			}
			if n := len(events); n > 0 {
				f.printed = events[n-1].Sequence
			}
		}
		if err := f.show(events, m.Type == isthmusv1.EventType_EVENT_TYPE_MARK && f.token == ""); err != nil {
			return err
		}
		f.token = m.ResumeToken
	}
}

// show prints events: programs get one on a line. The first table has its headers even if it is
// empty.
func (f *eventFollower) show(events []*isthmusv1.Event, first bool) error {
	for _, e := range events {
		if !f.a.tables() {
			if err := f.a.showEvent(e); err != nil {
				return err
			}
			continue
		}
		f.table.add(cells(f.a, eventColumns, e)...)
	}
	if f.a.tables() && (first || len(events) > 0) {
		return f.table.flush()
	}
	return nil
}

var auditColumns = []column[*isthmusv1.AuditEntry]{
	{header: "TIME", value: func(a *app, e *isthmusv1.AuditEntry) string { return a.localTime(e.Time) }},
	{header: "WHO", value: func(_ *app, e *isthmusv1.AuditEntry) string {
		if e.Who == "" {
			return e.Address // a connection without a certificate
		}
		return e.Who
	}},
	{header: "ROLE", value: func(_ *app, e *isthmusv1.AuditEntry) string { return e.Role }},
	{header: "METHOD", value: func(_ *app, e *isthmusv1.AuditEntry) string {
		if e.Method == "" {
			return ""
		}
		return path.Base(e.Method)
	}},
	{header: "OBJECT", value: func(_ *app, e *isthmusv1.AuditEntry) string {
		if e.Object == "" && e.ToGeneration > 0 {
			return fmt.Sprintf("generation %d", e.ToGeneration)
		}
		return e.Object
	}},
	{header: "RESULT", style: state, value: func(_ *app, e *isthmusv1.AuditEntry) string {
		text := e.Result
		switch e.Event {
		case "begin":
			return "no result: it is under way, or the daemon died"
		case "refused":
			text = "refused"
			if e.Suppressed > 0 {
				text += fmt.Sprintf(", and %d before it", e.Suppressed)
			}
		case "replaced":
			text = e.Event
		}
		if e.Error != "" {
			text += ": " + e.Error
		}
		return text
	}},
	{header: "ADDRESS", wide: true, value: func(_ *app, e *isthmusv1.AuditEntry) string { return e.Address }},
	{header: "SERIAL", wide: true, value: func(_ *app, e *isthmusv1.AuditEntry) string { return e.Serial }},
	{header: "GENERATION", wide: true, value: func(_ *app, e *isthmusv1.AuditEntry) string {
		if e.FromGeneration == 0 && e.ToGeneration == 0 {
			return ""
		}
		return fmt.Sprintf("%d to %d", e.FromGeneration, max(e.FromGeneration, e.ToGeneration))
	}},
	{header: "DIGEST", wide: true, value: func(_ *app, e *isthmusv1.AuditEntry) string { return e.Digest }},
}

func (a *app) addAudit(_, get, _, _ *cobra.Command) {
	var q past
	request := &isthmusv1.ListAuditRequest{}
	cmd := &cobra.Command{Use: "audit", Short: "List who changed what, and which calls were refused", Args: cobra.NoArgs,
		Long: `List the audit log of the node, the last entry at the end: each call that changes something, with its caller and its result, and
refused calls and connections. It needs the role admin.

Over the unix socket the caller is root, or "root (alice)" for the user alice who logged in and used sudo or su. It is not a proof
against root. A container, or a machine without pam_loginuid, has no login user.`}
	f := cmd.Flags()
	q.flagsOf(f, "calls", 100_000)
	f.StringVar(&request.Who, "who", "", `only calls of this caller: the name in the certificate, root, or alice for "root (alice)"`)
	f.StringVar(&request.Method, "method", "", "only calls of this method, such as Apply")
	cmd.RunE = a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
		var err error
		if request.Since, err = q.read(a.now()); err != nil {
			return err
		}
		calls, all, err := a.lastCalls(ctx, conn, request, q.limit)
		if err != nil {
			return err
		}
		heads, rows := rowsOf(a, auditColumns, calls)
		return a.print(a.newTable(heads...).fitting(), rows, all)
	})
	a.outputFlag(cmd)
	a.headersFlag(cmd)
	get.AddCommand(cmd)
}

// lastCalls returns the last calls, oldest first, and all of their entries as one response. A call
// has one entry when it begins and another one with its result; a table has only the latter.
func (a *app) lastCalls(ctx context.Context, conn *grpc.ClientConn, request *isthmusv1.ListAuditRequest, limit int) (calls []*isthmusv1.AuditEntry, all *isthmusv1.ListAuditResponse, err error) {
	all = &isthmusv1.ListAuditResponse{}
	ended := map[uint64]bool{}
	request.PageSize = uint32(min(2*limit, 1000))
	for {
		page, err := isthmusv1.NewAccessServiceClient(conn).ListAudit(ctx, request)
		if err != nil {
			return nil, nil, err
		}
		all.Damaged += page.Damaged
		for _, e := range page.Entries { // newest first
			if e.Event == "begin" && ended[e.Call] {
				delete(ended, e.Call)
				all.Entries = append(all.Entries, e)
				continue
			}
			if len(calls) >= limit {
				if len(ended) == 0 {
					break
				}
				continue // the entry of a call that began before others ended may follow
			}
			if e.Event == "end" {
				ended[e.Call] = true
			}
			calls, all.Entries = append(calls, e), append(all.Entries, e)
		}
		if page.NextPageToken == "" || len(calls) >= limit {
			break
		}
		if page.NextPageToken == request.PageToken {
			return nil, nil, errors.New("the node sends the same page again and again")
		}
		request.PageToken = page.NextPageToken
	}
	if all.Damaged > 0 {
		fmt.Fprintf(a.stderr, "isthmus: warning: %d lines of the audit log are damaged\n", all.Damaged)
	}
	slices.Reverse(calls)
	slices.Reverse(all.Entries)
	return calls, all, nil
}
