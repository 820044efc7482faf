package api_test

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
)

func TestListPaths(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	client := isthmusv1.NewRouteServiceClient(dialRole(t, s, auth.Reader))
	s.Router.SetPeers(&isthmusv1.PeerStatus{Name: "a"}, &isthmusv1.PeerStatus{Name: "b"})
	s.Router.SetRoutes(&isthmusv1.Route{Prefix: "10.0.0.0/16"})
	s.Router.SetStarts(4)
	var paths []*isthmusv1.Path
	for i := range 2500 {
		p := &isthmusv1.Path{Prefix: fmt.Sprintf("10.%d.%d.0/24", i>>8, i&255), Peer: "a", State: "used"}
		if i%5 == 0 {
			p.State = "refused"
		}
		paths = append(paths, p)
	}
	paths = append(paths, &isthmusv1.Path{Prefix: "10.99.0.0/16", Peer: "b", State: "used"}, &isthmusv1.Path{Prefix: "172.16.0.0/16", State: "sent"})
	s.Router.SetPaths(paths...)
	list := func(r *isthmusv1.ListPathsRequest) (out []*isthmusv1.Path, pages, notes int) {
		t.Helper()
		r = proto.CloneOf(r)
		for {
			p, err := client.ListPaths(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			out, pages, notes = append(out, p.Paths...), pages+1, notes+len(p.Notes)
			if r.PageToken = p.NextPageToken; r.PageToken == "" {
				return out, pages, notes
			}
		}
	}
	const received, accepted, rejected, advertised = isthmusv1.PathView_PATH_VIEW_RECEIVED, isthmusv1.PathView_PATH_VIEW_ACCEPTED, isthmusv1.PathView_PATH_VIEW_REJECTED, isthmusv1.PathView_PATH_VIEW_ADVERTISED
	for _, k := range []struct {
		r        *isthmusv1.ListPathsRequest
		n, pages int
	}{
		{&isthmusv1.ListPathsRequest{Peer: "a", View: received}, 2500, 3},
		{&isthmusv1.ListPathsRequest{Peer: "a", View: received, PageSize: 2500}, 2500, 1},
		{&isthmusv1.ListPathsRequest{Peer: "a", View: rejected, PageSize: 7}, 500, 72},
		{&isthmusv1.ListPathsRequest{Peer: "a", View: accepted, PageSize: 10000}, 2000, 1},
		{&isthmusv1.ListPathsRequest{Peer: "b", View: accepted}, 1, 1},
		{&isthmusv1.ListPathsRequest{Peer: "b", View: advertised}, 1, 1},
		{&isthmusv1.ListPathsRequest{Peer: "b", View: rejected}, 0, 1},
	} {
		got, pages, notes := list(k.r)
		if len(got) != k.n || pages != k.pages || notes != 1 {
			t.Errorf("%v: %d paths on %d pages, %d notes", k.r, len(got), pages, notes)
		}
		for i := 1; i < len(got); i++ {
			if got[i].Prefix == got[i-1].Prefix {
				t.Errorf("%v: %s twice", k.r, got[i].Prefix)
			}
		}
	}
	for destination, want := range map[string]string{"10.0.3.4": "10.0.0.0/16", "::ffff:10.0.3.4": "10.0.0.0/16", "10.0.0.0/16": "10.0.0.0/16", "10.0.1.0/24": ""} {
		out, err := client.ListPaths(t.Context(), &isthmusv1.ListPathsRequest{Destination: destination})
		if err != nil || out.GetRoute().GetPrefix() != want || len(out.GetPaths()) > 1 {
			t.Errorf("to %s: %v, %v", destination, out, err)
		}
	}
	first, err := client.ListPaths(t.Context(), &isthmusv1.ListPathsRequest{Peer: "a", View: received, PageSize: 5})
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what string, r *isthmusv1.ListPathsRequest, want codes.Code) {
		t.Helper()
		if _, err := client.ListPaths(t.Context(), r); status.Code(err) != want {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("nothing", &isthmusv1.ListPathsRequest{}, codes.InvalidArgument)
	refused("no view", &isthmusv1.ListPathsRequest{Peer: "a"}, codes.InvalidArgument)
	refused("an unknown view", &isthmusv1.ListPathsRequest{Peer: "a", View: 99}, codes.InvalidArgument)
	refused("too many", &isthmusv1.ListPathsRequest{Peer: "a", View: received, PageSize: 10001}, codes.InvalidArgument)
	refused("both", &isthmusv1.ListPathsRequest{Peer: "a", View: received, Destination: "10.0.0.1"}, codes.InvalidArgument)
	refused("no destination", &isthmusv1.ListPathsRequest{Destination: "x"}, codes.InvalidArgument)
	refused("a zone", &isthmusv1.ListPathsRequest{Destination: "fe80::1%eth0"}, codes.InvalidArgument)
	refused("garbage as token", &isthmusv1.ListPathsRequest{Peer: "a", View: received, PageToken: "x"}, codes.InvalidArgument)
	refused("the token of another view", &isthmusv1.ListPathsRequest{Peer: "a", View: rejected, PageToken: first.NextPageToken}, codes.InvalidArgument)
	refused("the token of another peer", &isthmusv1.ListPathsRequest{Peer: "b", View: received, PageToken: first.NextPageToken}, codes.InvalidArgument)
	refused("an unknown peer", &isthmusv1.ListPathsRequest{Peer: "x", View: received}, codes.NotFound)
	refused("an unknown destination", &isthmusv1.ListPathsRequest{Destination: "192.0.2.1"}, codes.NotFound)
	s.Router.SetStarts(5)
	refused("over a restart", &isthmusv1.ListPathsRequest{Peer: "a", View: received, PageToken: first.NextPageToken}, codes.Aborted)
	s.Router.SetStarts(0)
	refused("without BGP", &isthmusv1.ListPathsRequest{Peer: "a", View: received}, codes.Unavailable)
}
