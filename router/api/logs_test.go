package api_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
)

func TestListLogs(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	began := time.Now()
	for i := range 20 {
		s.Log.With("room", []string{"nat", "ipsec"}[i%2]).Info("line", "n", i)
	}
	s.Log.Debug("a debug line")
	s.Log.Warn("strange \x1b[31m\xff\n", "peer", "aws-0", "list", []string{"a", "b"})
	s.Log.Error("last", "value", []byte("hunter2-very-secret"))

	_, err := isthmusv1.NewLogServiceClient(dialRole(t, s, auth.Reader)).ListLogs(soon(t), &isthmusv1.ListLogsRequest{})
	wantCode(t, "a list of a reader", err, codes.PermissionDenied)
	client := isthmusv1.NewLogServiceClient(dialRole(t, s, auth.Operator))
	list := func(r *isthmusv1.ListLogsRequest) []*isthmusv1.LogEntry {
		t.Helper()
		var all []*isthmusv1.LogEntry
		for {
			page, err := client.ListLogs(soon(t), r)
			if err != nil {
				t.Fatal(err)
			}
			if len(page.Entries) > int(r.PageSize) && r.PageSize > 0 {
				t.Errorf("a page of %d entries", len(page.Entries))
			}
			all = append(all, page.Entries...)
			if r.PageToken = page.NextPageToken; r.PageToken == "" {
				return all
			}
		}
	}
	// Newest first, in pages.
	all := list(&isthmusv1.ListLogsRequest{PageSize: 5})
	if len(all) != 22 || strings.Contains(fmt.Sprint(all), "hunter2") || strings.Contains(fmt.Sprint(all), "debug line") {
		t.Fatalf("%d entries: %v", len(all), all)
	}
	for i, e := range all {
		if e.Sequence != uint64(22-i) || e.Time.AsTime().Before(began) || e.Time.AsTime().After(time.Now()) {
			t.Errorf("entry %d: %v", i, e)
		}
	}
	if e := all[1]; e.Level != "warn" || e.Message != `strange \x1b[31m\xff\n` || len(e.Attributes) != 2 || e.Attributes[0].Key != "peer" || e.Attributes[1].Value != "[a b]" {
		t.Errorf("%v", e)
	}
	for what, c := range map[string]struct {
		f    *isthmusv1.LogFilter
		want int
	}{
		"warnings":         {&isthmusv1.LogFilter{MinLevel: "warn"}, 2},
		"errors":           {&isthmusv1.LogFilter{MinLevel: "error"}, 1},
		"a room":           {&isthmusv1.LogFilter{Room: "ipsec"}, 10},
		"a part of a room": {&isthmusv1.LogFilter{Room: "ips"}, 0},
		"warnings of it":   {&isthmusv1.LogFilter{Room: "ipsec", MinLevel: "warn"}, 0},
		"since":            {&isthmusv1.LogFilter{Since: timestamppb.New(began)}, 22},
		"since the last":   {&isthmusv1.LogFilter{Since: all[0].Time}, 1},
		"later":            {&isthmusv1.LogFilter{Since: timestamppb.New(time.Now().Add(time.Minute))}, 0},
		"debug":            {&isthmusv1.LogFilter{MinLevel: "debug"}, 22},
	} {
		if got := list(&isthmusv1.ListLogsRequest{Filter: c.f, PageSize: 7}); len(got) != c.want {
			t.Errorf("%s: %v", what, got)
		}
	}
	page, err := client.ListLogs(soon(t), &isthmusv1.ListLogsRequest{PageSize: 5})
	if err != nil {
		t.Fatal(err)
	}
	for what, r := range map[string]*isthmusv1.ListLogsRequest{
		"a page that is too large":    {PageSize: 1001},
		"a token of another filter":   {PageToken: page.NextPageToken, Filter: &isthmusv1.LogFilter{MinLevel: "error"}},
		"a token of a watch":          {PageToken: page.ResumeToken},
		"a token that is not one":     {PageToken: "?"},
		"an unknown level":            {Filter: &isthmusv1.LogFilter{MinLevel: "fatal"}},
		"a room that is too long":     {Filter: &isthmusv1.LogFilter{Room: strings.Repeat("x", 1000)}},
		"a time that is not possible": {Filter: &isthmusv1.LogFilter{Since: &timestamppb.Timestamp{Nanos: -1}}},
	} {
		_, err := client.ListLogs(soon(t), r)
		wantCode(t, what, err, codes.InvalidArgument)
	}
	// A page continues where the one before it ended, although there are more lines.
	s.Log.Info("newer")
	next, err := client.ListLogs(soon(t), &isthmusv1.ListLogsRequest{PageSize: 5, PageToken: page.NextPageToken})
	if err != nil || len(next.Entries) != 5 || next.Entries[0].Sequence != 17 {
		t.Errorf("%v, %v", next, err)
	}
	// The largest page fits into a message.
	for range 3000 {
		s.Log.Info(strings.Repeat("x", 10<<10))
	}
	for range 1000 {
		s.Log.Info(strings.Repeat("x", 2000))
	}
	if page, err = client.ListLogs(soon(t), &isthmusv1.ListLogsRequest{PageSize: 1000}); err != nil || len(page.Entries) != 1000 {
		t.Errorf("%d entries, %v", len(page.GetEntries()), err)
	}
}

type logWatch = grpc.ServerStreamingClient[isthmusv1.LogEntry]

// TestWatchLogs: a watch sends each line once, and continues after a token of a list or of an entry
// without a gap.
func TestWatchLogs(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	client := isthmusv1.NewLogServiceClient(dialRole(t, s, auth.Operator))
	watch := func(r *isthmusv1.WatchLogsRequest) (logWatch, func()) {
		t.Helper()
		ctx, stop := context.WithCancel(soon(t))
		stream, err := client.WatchLogs(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = stream.Header() // the watch is open; an error comes again at Recv
		return stream, stop
	}
	next := func(stream logWatch, want string) *isthmusv1.LogEntry {
		t.Helper()
		e, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if e.Message != want {
			t.Fatalf("%v, want %s", e, want)
		}
		return e
	}
	s.Log.Info("old")
	began, stop := watch(&isthmusv1.WatchLogsRequest{})
	s.Log.Info("a")
	first := next(began, "a")
	s.Log.Info("b")
	s.Log.With("room", "nat").Warn("c")
	if e := next(began, "b"); e.Lost != "" || e.LostEntries != 0 {
		t.Errorf("%v", e)
	}
	next(began, "c")
	stop()

	list, err := client.ListLogs(soon(t), &isthmusv1.ListLogsRequest{Filter: &isthmusv1.LogFilter{Room: "none"}})
	if err != nil || len(list.Entries) != 0 {
		t.Fatal(list, err)
	}
	s.Log.Info("d")
	for _, k := range []struct {
		what string
		r    *isthmusv1.WatchLogsRequest
		want string
	}{
		{"after an entry", &isthmusv1.WatchLogsRequest{ResumeToken: first.ResumeToken}, "b c d"},
		{"after an entry, with a time", &isthmusv1.WatchLogsRequest{ResumeToken: first.ResumeToken, Filter: &isthmusv1.LogFilter{Since: timestamppb.New(time.Now().Add(time.Hour))}}, "b c d"},
		{"after a list", &isthmusv1.WatchLogsRequest{ResumeToken: list.ResumeToken}, "d"},
		{"since a time", &isthmusv1.WatchLogsRequest{Filter: &isthmusv1.LogFilter{Since: first.Time}}, "a b c d"},
		{"warnings", &isthmusv1.WatchLogsRequest{ResumeToken: first.ResumeToken, Filter: &isthmusv1.LogFilter{MinLevel: "warn"}}, "c"},
		{"a room", &isthmusv1.WatchLogsRequest{ResumeToken: first.ResumeToken, Filter: &isthmusv1.LogFilter{Room: "nat"}}, "c"},
	} {
		stream, stop := watch(k.r)
		for _, want := range strings.Fields(k.want) {
			if e := next(stream, want); e.Lost != "" {
				t.Errorf("%s: %v", k.what, e)
			}
		}
		stop()
	}
	// A token of another run of the daemon.
	stream, stop := watch(&isthmusv1.WatchLogsRequest{ResumeToken: "0123456789abcdef-2"})
	if e := next(stream, "old"); !strings.Contains(e.Lost, "started again") || e.LostEntries != 0 {
		t.Errorf("%v", e)
	}
	if e := next(stream, "a"); e.Lost != "" {
		t.Errorf("%v", e)
	}
	stop()
	for _, bad := range []string{"x", "-", "-1", s.Logs.ID() + "-x", s.Logs.ID() + "-1000", s.Logs.ID() + "--1"} {
		stream, stop := watch(&isthmusv1.WatchLogsRequest{ResumeToken: bad})
		_, err := stream.Recv()
		wantCode(t, "the token "+bad, err, codes.InvalidArgument)
		stop()
	}
	stream, stop = watch(&isthmusv1.WatchLogsRequest{Filter: &isthmusv1.LogFilter{MinLevel: "all"}})
	_, err = stream.Recv()
	wantCode(t, "an unknown level", err, codes.InvalidArgument)
	stop()
	stream, err = isthmusv1.NewLogServiceClient(dialRole(t, s, auth.Reader)).WatchLogs(soon(t), &isthmusv1.WatchLogsRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	wantCode(t, "a watch of a reader", err, codes.PermissionDenied)
	stream, _ = watch(&isthmusv1.WatchLogsRequest{})
	s.Stop()
	_, err = stream.Recv()
	wantCode(t, "when the server stops", err, codes.Unavailable)
}

// TestSlowWatchOfLogs: a watch whose client does not read delays no line. It receives the number of
// lines that it has missed, and the last ones.
func TestSlowWatchOfLogs(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	stream, err := isthmusv1.NewLogServiceClient(dialRole(t, s, auth.Operator)).WatchLogs(soon(t), &isthmusv1.WatchLogsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Header(); err != nil {
		t.Fatal(err)
	}
	const n = 20_000 // of 2 KiB: more than the log and the buffers of the connection have
	for i := range n {
		s.Log.Info("line", "i", i, "text", strings.Repeat("x", 2<<10))
	}
	var seen, lost, last uint64
	for last < n {
		e, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if e.Sequence != last+e.LostEntries+1 || (e.Lost == "") != (e.LostEntries == 0) || e.LostEntries > 0 && !strings.Contains(e.Lost, "faster") {
			t.Fatalf("after entry %d: %d, %d lost, %q", last, e.Sequence, e.LostEntries, e.Lost)
		}
		seen, lost, last = seen+1, lost+e.LostEntries, e.Sequence
	}
	if lost == 0 || seen+lost != n {
		t.Errorf("%d lines, %d seen and %d lost", n, seen, lost)
	}
}

// TestWatchesOfLogsAreBounded: one client has a few, all together more, and root one more. A watch
// that ends makes room.
func TestWatchesOfLogsAreBounded(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	open := func(conn *grpc.ClientConn) (func(), error) {
		ctx, stop := context.WithCancel(soon(t))
		stream, err := isthmusv1.NewLogServiceClient(conn).WatchLogs(ctx, &isthmusv1.WatchLogsRequest{})
		if err != nil {
			return stop, err
		}
		if head, err := stream.Header(); head == nil || err != nil {
			_, err := stream.Recv()
			return stop, err
		}
		return stop, nil
	}
	var stops []func()
	for i := range api.MaxLogWatches / api.MaxLogWatchesPerClient {
		cert, _ := issued(t, s, fmt.Sprint("client-", i), auth.Operator, 0)
		conn := dial(t, s, cert)
		for range api.MaxLogWatchesPerClient {
			stop, err := open(conn)
			if err != nil {
				t.Fatal(err)
			}
			stops = append(stops, stop)
		}
		if i == 0 {
			_, err := open(conn)
			wantCode(t, "one more of a client", err, codes.ResourceExhausted)
		}
	}
	if len(stops) != 16 {
		t.Errorf("%d watches are open", len(stops))
	}
	other := dialRole(t, s, auth.Operator)
	_, err := open(other)
	wantCode(t, "one more of all clients", err, codes.ResourceExhausted)
	root, err := grpc.NewClient("unix:"+s.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	if _, err := open(root); err != nil {
		t.Errorf("a watch of root: %v", err)
	}
	stops[0]()
	stops[1]()
	// The server notices the ends later.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, err := open(other); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("after another one has ended: %v", err)
		}
	}
}
