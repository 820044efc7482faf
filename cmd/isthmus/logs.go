package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/logs"
)

// logColumns has the message together with the attributes: a line of the log is read as a whole.
var logColumns = []column[*isthmusv1.LogEntry]{
	{header: "TIME", style: moments, value: func(a *app, e *isthmusv1.LogEntry) string {
		return e.Time.AsTime().In(a.now().Location()).Format("2006-01-02 15:04:05.000")
	}},
	{header: "LEVEL", style: level, value: func(_ *app, e *isthmusv1.LogEntry) string { return e.Level }},
	{header: "MESSAGE", value: func(_ *app, e *isthmusv1.LogEntry) string {
		var b strings.Builder
		b.WriteString(e.Message)
		for _, a := range e.Attributes {
			value := a.Value
			if value == "" || strings.ContainsAny(value, ` ="`) {
				value = `"` + strings.ReplaceAll(value, `"`, `\"`) + `"`
			}
			b.WriteString(" " + a.Key + "=" + value)
		}
		return b.String()
	}},
}

// logsQuery has the flags of "get logs".
type logsQuery struct {
	past
	level, room string
	follow      bool
}

// maxLogs is how many entries a node keeps.
const maxLogs = 5000

func (a *app) addLogs(_, get, _, _ *cobra.Command) {
	q := logsQuery{}
	cmd := &cobra.Command{Use: "logs", Aliases: []string{"log"}, Short: "List the last lines of the daemon's log, and follow it", Args: cobra.NoArgs,
		Long: `List the last lines of the daemon's log, the newest at the end. It needs the role operator. The daemon keeps up to 5000 lines in
memory; journalctl -u isthmusd on the node also has those before its last start. Lines of level debug exist only with isthmusd -debug.

With --follow the command then prints each line as it is written, until interrupted. If the node restarts, the command connects again
and continues with the first line of the new daemon. It prints a warning if lines are missing.`}
	f := cmd.Flags()
	f.BoolVarP(&q.follow, "follow", "f", false, "then print each line as it is written")
	q.flagsOf(f, "lines", maxLogs)
	f.StringVar(&q.level, "level", "", "only lines of this level or a higher one: "+orList(logs.Levels))
	f.StringVar(&q.room, "room", "", "only lines of this part of the daemon, the value of room= in a line, such as ipsec")
	completeFlag(cmd, "level", oneOf(logs.Levels...))
	completeFlag(cmd, "room", a.rooms)
	cmd.RunE = runs(func(cmd *cobra.Command, _ []string) error {
		filter, err := q.filter(a.now())
		if err != nil {
			return err
		}
		if q.follow {
			return a.followLogs(cmd.Context(), filter, q.limit)
		}
		conn, err := a.connect()
		if err != nil {
			return err
		}
		defer conn.Close()
		entries, _, err := lastLogs(cmd.Context(), conn, filter, q.limit)
		if err != nil {
			return err
		}
		heads, rows := rowsOf(a, logColumns, entries)
		return a.print(a.newTable(heads...), rows, &isthmusv1.ListLogsResponse{Entries: entries})
	})
	a.formatFlag(cmd, "table", "json", "yaml")
	a.headersFlag(cmd)
	get.AddCommand(cmd)
}

// filter returns the entries that the flags select.
func (q *logsQuery) filter(now time.Time) (*isthmusv1.LogFilter, error) {
	since, err := q.read(now)
	if err != nil {
		return nil, err
	}
	if q.level != "" && !slices.Contains(logs.Levels, q.level) {
		return nil, usageError{fmt.Errorf("--level %s: must be %s", q.level, orList(logs.Levels))}
	}
	return &isthmusv1.LogFilter{MinLevel: q.level, Room: q.room, Since: since}, nil
}

// rooms completes with the rooms of the last lines. Errors are silent, as with names.
func (a *app) rooms(cmd *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completeWithin)
	defer cancel()
	silent := *a
	silent.stderr, silent.timeout = io.Discard, completeWithin
	conn, err := silent.connect()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer conn.Close()
	entries, _, err := lastLogs(ctx, conn, nil, 1000)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, e := range entries {
		for _, a := range e.Attributes {
			if a.Key == "room" && strings.HasPrefix(a.Value, word) {
				out = append(out, a.Value)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out), cobra.ShellCompDirectiveNoFileComp
}

// lastLogs returns the last entries, oldest first, and the token with which a watch continues after
// them.
func lastLogs(ctx context.Context, conn *grpc.ClientConn, filter *isthmusv1.LogFilter, limit int) (all []*isthmusv1.LogEntry, token string, err error) {
	request := &isthmusv1.ListLogsRequest{Filter: filter}
	for {
		request.PageSize = uint32(min(limit-len(all), 1000))
		page, err := isthmusv1.NewLogServiceClient(conn).ListLogs(ctx, request)
		if err != nil {
			return nil, "", err
		}
		if token == "" {
			token = page.ResumeToken // entries after the first page are not in the others
		}
		all = append(all, page.Entries...)
		if page.NextPageToken == "" || len(all) >= limit {
			slices.Reverse(all)
			return all, token, nil
		}
		if page.NextPageToken == request.PageToken {
			return nil, "", errors.New("the node sends the same page again and again")
		}
		request.PageToken = page.NextPageToken
	}
}

// logFollower prints lines, over one connection after the other.
type logFollower struct {
	a      *app
	filter *isthmusv1.LogFilter
	limit  int
	table  *table
	token  string // to continue; empty: nothing was printed yet
	lost   bool   // the connection was lost, and is not back yet
}

// followLogs prints the last lines, and then each one as it is written, until ctx ends.
func (a *app) followLogs(ctx context.Context, filter *isthmusv1.LogFilter, limit int) error {
	f := &logFollower{a: a, filter: filter, limit: limit, table: a.newTable(looks(a, logColumns)...)}
	f.table.steady = true
	return a.keep(ctx, &f.lost, func() bool { return f.token != "" }, f.connection)
}

// connection follows the log over one connection, until it ends.
func (f *logFollower) connection(ctx context.Context) error {
	conn, err := f.a.connect()
	if err != nil {
		return err
	}
	defer conn.Close()
	if f.token == "" {
		entries, token, err := lastLogs(ctx, conn, f.filter, f.limit)
		if err != nil {
			return err
		}
		if err := f.show(entries, true); err != nil {
			return err
		}
		f.token = token
	}
	stream, err := isthmusv1.NewLogServiceClient(conn).WatchLogs(ctx, &isthmusv1.WatchLogsRequest{ResumeToken: f.token, Filter: f.filter})
	if err != nil {
		return err
	}
	if head, err := stream.Header(); err == nil && head != nil {
		f.a.back(&f.lost)
	}
	for {
		e, err := stream.Recv()
		if status.Code(err) == codes.ResourceExhausted && f.lost {
			// The node may not have noticed yet that former connections are gone.
			return status.Error(codes.Unavailable, err.Error())
		}
		if err != nil {
			return ended(err)
		}
		if e.Lost != "" {
			missing := "lines"
			if e.LostEntries > 0 {
				missing = plural(int(e.LostEntries), "line")
			}
			fmt.Fprintf(f.a.stderr, "isthmus: warning: %s may be missing: %s\n", missing, clean(e.Lost))
		}
		f.token = e.ResumeToken
		e.ResumeToken, e.Lost, e.LostEntries = "", "", 0
		if err := f.show([]*isthmusv1.LogEntry{e}, false); err != nil {
			return err
		}
	}
}

// show prints entries: programs get one on a line. The first table has its headers even if it is
// empty.
func (f *logFollower) show(entries []*isthmusv1.LogEntry, first bool) error {
	for _, e := range entries {
		if !f.a.tables() {
			if err := f.a.showEvent(e); err != nil {
				return err
			}
			continue
		}
		f.table.add(cells(f.a, logColumns, e)...)
	}
	if f.a.tables() && (first || len(entries) > 0) {
		return f.table.flush()
	}
	return nil
}
