package api

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/bell"
)

// TestWatchPause checks that constant changes do not keep a watch busy all the time.
func TestWatchPause(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*watchPause)
	defer cancel()
	always := make(chan struct{})
	close(always)
	reads := 0
	list := func() []*isthmusv1.Route {
		reads++
		return nil
	}
	err := Routes.watch(ctx, nil, func() <-chan struct{} { return always }, list, func(isthmusv1.EventType, *isthmusv1.Route) error { return nil })
	if status.Code(err) != codes.DeadlineExceeded || reads > 11 || reads < 2 {
		t.Errorf("%d reads in %v, %v", reads, 10*watchPause, err)
	}
}

// TestWatchStops checks that watches end with UNAVAILABLE when the server stops.
func TestWatchStops(t *testing.T) {
	stopping := make(chan struct{})
	var changes bell.Bell
	list := func() []*isthmusv1.Route { return nil }
	done := make(chan error, 1)
	go func() {
		done <- Routes.watch(t.Context(), stopping, changes.Wait, list, func(isthmusv1.EventType, *isthmusv1.Route) error { return nil })
	}()
	close(stopping)
	select {
	case err := <-done:
		if status.Code(err) != codes.Unavailable {
			t.Errorf("watch ends with %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("the watch does not end")
	}
}

func TestCompareRoutes(t *testing.T) {
	ordered := []string{"0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/24", "10.0.1.0/24", "172.16.0.0/16", "::/0", "2001:db8::/32", "2001:db8::/48"}
	for i, a := range ordered {
		for j, b := range ordered {
			if got := CompareRoutes(a, b); (got < 0) != (i < j) || (got == 0) != (i == j) {
				t.Errorf("%s and %s compare as %d", a, b, got)
			}
		}
	}
}

func TestComparePorts(t *testing.T) {
	ordered := []string{
		"main 10.0.0.9 192.0.2.1 tcp 443", "main 10.0.0.10 192.0.2.1 tcp 443", "main 10.0.0.10 192.0.2.1 tcp 8443", "main 10.0.0.10 192.0.2.1 udp 53",
		"main 10.0.0.10 192.0.2.10 tcp 80", "main 2001:db8::1 2001:db8::2 tcp 1", "partner 10.0.0.1 192.0.2.1 tcp 443",
	}
	for i, a := range ordered {
		if PortKey(portOf(a)) != a {
			t.Errorf("%q is read as %v", a, portOf(a))
		}
		for j, b := range ordered {
			if got := ComparePorts(a, b); (got < 0) != (i < j) || (got == 0) != (i == j) {
				t.Errorf("%s and %s compare as %d", a, b, got)
			}
		}
	}
}

// TestListenUnix checks that listenUnix replaces the socket of a daemon that has ended, and leaves
// that of a serving daemon alone.
func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	first, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listenUnix(path); err == nil || err.Error() != "another daemon serves this socket" {
		t.Errorf("listening where another serves: %v", err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("connecting to the first listener: %v", err)
	}
	c.Close()
	first.(*net.UnixListener).SetUnlinkOnClose(false) // as when the daemon was killed
	first.Close()
	second, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	second.Close()
}
