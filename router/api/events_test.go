package api_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/event"
)

// look has a log record that a tunnel is in a state.
func look(l *event.Log, name, state string) {
	l.Look(event.Snapshot{Now: time.Now(), Started: time.Now().Add(-time.Hour), Tunnels: []*isthmusv1.TunnelStatus{
		{Name: name, State: state, Conditions: []*isthmusv1.Condition{{Type: "TunnelDown"}}},
	}})
}

// fillEvents has a log record 20 events of tunnel a, and one of tunnel b.
func fillEvents(l *event.Log) {
	for i := range 20 {
		look(l, "a", []string{"up", "down"}[i%2])
	}
	look(l, "b", "up")
}

func eventTypes(all []*isthmusv1.Event) string {
	var out []string
	for _, e := range all {
		out = append(out, e.Type+" "+e.Object)
	}
	return strings.Join(out, ", ")
}

func TestListEvents(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	began := time.Now()
	fillEvents(s.Events)
	operator := dialRole(t, s, auth.Operator)
	if _, err := isthmusv1.NewSecretServiceClient(operator).SetSecret(soon(t), &isthmusv1.SetSecretRequest{Name: "psk", Value: []byte("hunter2-very-secret")}); err != nil {
		t.Fatal(err)
	}
	reader := dialRole(t, s, auth.Reader)
	_, err := isthmusv1.NewAccessServiceClient(reader).ListClients(soon(t), &isthmusv1.ListClientsRequest{})
	wantCode(t, "a call that needs another role", err, codes.PermissionDenied)

	list := func(role auth.Role, r *isthmusv1.ListEventsRequest) []*isthmusv1.Event {
		t.Helper()
		client := isthmusv1.NewEventServiceClient(dialRole(t, s, role))
		var all []*isthmusv1.Event
		for {
			page, err := client.ListEvents(soon(t), r)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, page.Events...)
			if r.PageToken = page.NextPageToken; r.PageToken == "" {
				return all
			}
		}
	}
	// Newest first, in pages; events about access are for admins.
	all := list(auth.Reader, &isthmusv1.ListEventsRequest{PageSize: 5})
	if len(all) != 22 || all[0].Type != "SecretSet" || all[0].Who != "test-operator" || all[1].Object != "tunnel/b" || strings.Contains(fmt.Sprint(all), "hunter2") {
		t.Errorf("%d events: %s", len(all), eventTypes(all))
	}
	for i := range all[1:] {
		if all[i].Sequence <= all[i+1].Sequence {
			t.Errorf("%d comes before %d", all[i].Sequence, all[i+1].Sequence)
		}
	}
	if got := eventTypes(list(auth.Admin, &isthmusv1.ListEventsRequest{})); !strings.Contains(got, "CallRefused node") {
		t.Errorf("an admin sees %s", got)
	}
	for what, c := range map[string]struct {
		f    *isthmusv1.EventFilter
		want int
	}{
		"a tunnel":          {&isthmusv1.EventFilter{Objects: []string{"tunnel/b"}}, 1},
		"tunnels":           {&isthmusv1.EventFilter{Objects: []string{"tunnel", "peer"}}, 21},
		"a type":            {&isthmusv1.EventFilter{Types: []string{"tunneldown"}}, 10},
		"a condition":       {&isthmusv1.EventFilter{Types: []string{"PoolDown"}}, 0},
		"errors":            {&isthmusv1.EventFilter{MinSeverity: "error"}, 10},
		"since":             {&isthmusv1.EventFilter{Since: timestamppb.New(began)}, 22},
		"later":             {&isthmusv1.EventFilter{Since: timestamppb.New(time.Now().Add(time.Minute))}, 0},
		"until":             {&isthmusv1.EventFilter{Until: timestamppb.New(began)}, 0},
		"one about access":  {&isthmusv1.EventFilter{Types: []string{"CallRefused"}}, 0},
		"a part of a name":  {&isthmusv1.EventFilter{Objects: []string{"tun"}}, 0},
		"several of a type": {&isthmusv1.EventFilter{Types: []string{"TunnelDown", "TunnelUp"}, Objects: []string{"tunnel/b"}}, 1},
	} {
		if got := list(auth.Reader, &isthmusv1.ListEventsRequest{Filter: c.f, PageSize: 7}); len(got) != c.want {
			t.Errorf("%s: %s", what, eventTypes(got))
		}
	}
	client := isthmusv1.NewEventServiceClient(reader)
	page, err := client.ListEvents(soon(t), &isthmusv1.ListEventsRequest{PageSize: 5})
	if err != nil {
		t.Fatal(err)
	}
	for what, r := range map[string]*isthmusv1.ListEventsRequest{
		"a page that is too large":    {PageSize: 1001},
		"a token of another filter":   {PageToken: page.NextPageToken, Filter: &isthmusv1.EventFilter{MinSeverity: "error"}},
		"a token that is not one":     {PageToken: "?"},
		"an unknown type":             {Filter: &isthmusv1.EventFilter{Types: []string{"NoSuchType"}}},
		"an unknown severity":         {Filter: &isthmusv1.EventFilter{MinSeverity: "fatal"}},
		"too many objects":            {Filter: &isthmusv1.EventFilter{Objects: make([]string, 101)}},
		"a name that is too long":     {Filter: &isthmusv1.EventFilter{Objects: []string{strings.Repeat("x", 1000)}}},
		"a time that is not possible": {Filter: &isthmusv1.EventFilter{Since: &timestamppb.Timestamp{Nanos: -1}}},
	} {
		_, err := client.ListEvents(soon(t), r)
		wantCode(t, what, err, codes.InvalidArgument)
	}
}

// TestWatchEvents: a watch goes on after a token without a gap, and says so when events are
// missing.
func TestWatchEvents(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	client := isthmusv1.NewEventServiceClient(dialRole(t, s, auth.Reader))
	watch := func(r *isthmusv1.WatchEventsRequest) grpc.ServerStreamingClient[isthmusv1.WatchEventsResponse] {
		t.Helper()
		stream, err := client.WatchEvents(soon(t), r)
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	next := func(stream grpc.ServerStreamingClient[isthmusv1.WatchEventsResponse], want string) *isthmusv1.WatchEventsResponse {
		t.Helper()
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		got := m.Type.String()[len("EVENT_TYPE_"):] + " " + m.GetEvent().GetObject()
		if m.Lost != "" {
			got += " lost"
		}
		if strings.TrimSpace(got) != want {
			t.Fatalf("%q, want %q: %v", got, want, m)
		}
		return m
	}
	look(s.Events, "old", "up")
	stream := watch(&isthmusv1.WatchEventsRequest{})
	next(stream, "MARK")
	look(s.Events, "a", "up")
	token := next(stream, "ADDED tunnel/a").ResumeToken
	look(s.Events, "b", "up")
	look(s.Events, "c", "up")
	next(stream, "ADDED tunnel/b")
	next(stream, "ADDED tunnel/c")

	stream = watch(&isthmusv1.WatchEventsRequest{ResumeToken: token, Filter: &isthmusv1.EventFilter{Since: timestamppb.New(time.Now().Add(time.Hour))}})
	next(stream, "ADDED tunnel/b")
	next(stream, "ADDED tunnel/c")
	marked := next(stream, "MARK").ResumeToken
	next(watch(&isthmusv1.WatchEventsRequest{ResumeToken: marked}), "MARK")

	stream = watch(&isthmusv1.WatchEventsRequest{Filter: &isthmusv1.EventFilter{Since: timestamppb.New(time.Now().Add(-time.Hour)), Objects: []string{"tunnel/old", "tunnel/d"}}})
	next(stream, "ADDED tunnel/old")
	next(stream, "MARK")
	look(s.Events, "d", "up")
	next(stream, "ADDED tunnel/d")

	for what, bad := range map[string]string{"of another log": "0123456789abcdef-2", "of the future": s.Events.ID() + "-1000"} {
		stream = watch(&isthmusv1.WatchEventsRequest{ResumeToken: bad})
		if m := next(stream, "ADDED tunnel/old lost"); m.Lost == "" {
			t.Errorf("a token %s: nothing is said to be lost", what)
		}
		next(stream, "ADDED tunnel/a")
	}
	for _, bad := range []string{"x", "-", "-1", s.Events.ID() + "-x", s.Events.ID() + "--1"} {
		_, err := watch(&isthmusv1.WatchEventsRequest{ResumeToken: bad}).Recv()
		wantCode(t, "the token "+bad, err, codes.InvalidArgument)
	}
	stream = watch(&isthmusv1.WatchEventsRequest{})
	next(stream, "MARK")
	s.Stop()
	_, err := stream.Recv()
	wantCode(t, "when the server stops", err, codes.Unavailable)
}

// TestListAudit: admins read the audit log, and others do not.
func TestListAudit(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	if _, err := isthmusv1.NewSecretServiceClient(dialRole(t, s, auth.Operator)).SetSecret(soon(t), &isthmusv1.SetSecretRequest{Name: "psk", Value: []byte("hunter2-very-secret")}); err != nil {
		t.Fatal(err)
	}
	for _, role := range []auth.Role{auth.Reader, auth.Operator} {
		_, err := isthmusv1.NewAccessServiceClient(dialRole(t, s, role)).ListAudit(soon(t), &isthmusv1.ListAuditRequest{})
		wantCode(t, role.String(), err, codes.PermissionDenied)
	}
	f, err := os.OpenFile(filepath.Clean(s.Audit), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(f, "rubbish")
	f.Close()
	client := isthmusv1.NewAccessServiceClient(dialRole(t, s, auth.Admin))
	page, err := client.ListAudit(soon(t), &isthmusv1.ListAuditRequest{Who: "test-operator", Method: "SetSecret"})
	if err != nil || len(page.Entries) != 2 || page.Damaged != 1 || strings.Contains(fmt.Sprint(page), "hunter2") {
		t.Fatalf("%v, %v", page, err)
	}
	if e := page.Entries[0]; e.Event != "end" || e.Result != "OK" || e.Object != "psk" || e.Role != "operator" || e.Call != page.Entries[1].Call || e.Time == nil {
		t.Errorf("%v", e)
	}
	page, err = client.ListAudit(soon(t), &isthmusv1.ListAuditRequest{PageSize: 1, Method: "ListAudit"})
	if err != nil || len(page.Entries) != 1 || page.Entries[0].Event != "refused" || page.NextPageToken == "" {
		t.Fatalf("%v, %v", page, err)
	}
	next, err := client.ListAudit(soon(t), &isthmusv1.ListAuditRequest{PageSize: 1, Method: "ListAudit", PageToken: page.NextPageToken})
	if err != nil || len(next.Entries) != 1 || next.Entries[0].Who != "test-reader" {
		t.Errorf("%v, %v", next, err)
	}
	for what, r := range map[string]*isthmusv1.ListAuditRequest{
		"a page that is too large":  {PageSize: 1001},
		"a token of another filter": {PageToken: page.NextPageToken},
		"a token that is not one":   {PageToken: "?"},
		"an impossible time":        {Until: &timestamppb.Timestamp{Nanos: -1}},
	} {
		_, err := client.ListAudit(soon(t), r)
		wantCode(t, what, err, codes.InvalidArgument)
	}
}
