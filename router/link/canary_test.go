package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/link/linktest"
)

// TestCanary checks that a host appears behind an interface, connects, and goes without a trace,
// and that Surroundings does not include it.
func TestCanary(t *testing.T) {
	for _, k := range []struct{ from, to string }{{"10.1.255.254", "198.51.100.1"}, {"fd00:1::fe", "2001:db8::1"}} {
		t.Run(k.from, func(t *testing.T) {
			l := open(t)
			from, to := netip.MustParseAddr(k.from), netip.MustParseAddr(k.to)
			one := netip.PrefixFrom(to, to.BitLen()).String()
			add := []string{"addr", "replace", one, "dev", "lo"}
			if to.Is6() {
				add = append(add, "nodad") // else it is tentative for a moment
			}
			linktest.Run(t, "ip", add...)
			defer linktest.Run(t, "ip", "addr", "del", one, "dev", "lo")
			listener, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(to, 0)))
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			port := uint16(listener.Addr().(*net.TCPAddr).Port)
			before, err := l.Surroundings()
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err = l.Canary(from, to, 1400); err != nil { // leaves a host behind
				t.Fatal(err)
			}
			dial, remove, err := l.Canary(from, to, 1400)
			if err != nil {
				t.Fatal(err)
			}
			if during, err := l.Surroundings(); err != nil || !reflect.DeepEqual(during, before) {
				t.Errorf("the surroundings are\n%v, were\n%v: %v", during, before, err)
			}
			if link, err := l.Get("canary0"); err != nil || link.MTU != 1400 {
				t.Errorf("%+v, %v", link, err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			conn, err := dial(ctx, port)
			if err != nil {
				t.Fatal(err)
			}
			peer, err := listener.AcceptTCP()
			if err != nil {
				t.Fatal(err)
			}
			defer peer.Close()
			if who := peer.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); who != from {
				t.Errorf("connected from %v, want %v", who, from)
			}
			if _, err := conn.Write([]byte("?")); err != nil {
				t.Error(err)
			}
			for range 2 {
				if err := remove(); err != nil {
					t.Error(err)
				}
			}
			// The peer receives an RST.
			_ = peer.SetDeadline(time.Now().Add(time.Minute))
			if _, err := io.ReadAll(peer); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the peer reads %v", err)
			}
			if _, err := dial(ctx, port); !errors.Is(err, net.ErrClosed) {
				t.Errorf("dialling after remove: %v", err)
			}
			if _, err := l.Get("canary0"); !errors.Is(err, ErrNotFound) {
				t.Errorf("after remove: %v", err)
			}
			if route := linktest.Run(t, "ip", "route", "show", "table", "all", k.from); route != "" {
				t.Errorf("after remove: %s", route)
			}
		})
	}
}

// TestCanaryOfOthers checks that a foreign interface of this name stays and that Canary fails.
func TestCanaryOfOthers(t *testing.T) {
	l := open(t)
	linktest.Run(t, "ip", "link", "add", "canary0", "type", "veth", "peer", "name", "canary1")
	defer linktest.Run(t, "ip", "link", "del", "canary0")
	if _, _, err := l.Canary(netip.MustParseAddr("10.1.255.254"), netip.MustParseAddr("198.51.100.1"), 0); !errors.Is(err, ErrNotOurs) {
		t.Errorf("got %v", err)
	}
	if err := l.RemoveCanary(); err != nil {
		t.Error(err)
	}
	if _, err := l.Get("canary0"); err != nil {
		t.Error(err)
	}
}

// TestCanaryDies checks that the host and its interface go with the process, whatever it was doing.
func TestCanaryDies(t *testing.T) {
	const child = "ISTHMUS_CANARY_CHILD"
	l := open(t)
	if os.Getenv(child) != "" {
		dial, _, err := l.Canary(netip.MustParseAddr("10.1.255.254"), netip.MustParseAddr("198.51.100.1"), 0)
		if err != nil {
			t.Fatal(err)
		}
		linktest.Run(t, "ip", "route", "add", "blackhole", "198.51.100.1")
		fmt.Println("ready")
		_, _ = dial(t.Context(), 80) // nothing answers
		return
	}
	defer linktest.Run(t, "ip", "route", "del", "blackhole", "198.51.100.1")
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestCanaryDies$")
	cmd.Env = append(os.Environ(), child+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := make([]byte, 256)
	n, err := out.Read(said)
	_, there := l.Get("canary0")
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if !strings.HasPrefix(string(said[:n]), "ready") || there != nil {
		t.Fatalf("%s: %v, %v", said[:n], err, there)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		_, err := l.Get("canary0")
		if errors.Is(err, ErrNotFound) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("a minute after the end of the process: %v", err)
		}
	}
}
