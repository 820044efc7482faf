package lab

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/root"
)

func prefixes(s ...string) (p []netip.Prefix) {
	for _, x := range s {
		p = append(p, netip.MustParsePrefix(x))
	}
	return p
}

// build makes inside -- nat -- outside: 10.9.0.2 is 203.0.113.2 on the outside.
func build(t *testing.T) (l *Lab, inside, nat, outside *Node) {
	t.Helper()
	root.Need(t, "network namespaces")
	l, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	inside, nat, outside = l.Node("inside"), l.Node("nat"), l.Node("outside")
	outside.Bridge("br0", prefixes("203.0.113.1/24", "2001:db8::1/64")...)
	l.Link(End{inside, "eth0", prefixes("10.9.0.2/24", "2001:db8:9::2/64")}, End{nat, "in", prefixes("10.9.0.1/24", "2001:db8:9::1/64")})
	outside.Port("br0", End{nat, "wan", prefixes("203.0.113.9/24", "2001:db8::9/64")})
	inside.IP("route add default via 10.9.0.1")
	inside.IP("route add default via 2001:db8:9::1")
	outside.IP("route add 203.0.113.2/32 via 203.0.113.9")
	outside.IP("route add 2001:db8:9::/64 via 2001:db8::9")
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := nat.OneToOne(t.Context(), "wan", Pair{netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("203.0.113.2")}); err != nil {
		t.Fatal(err)
	}
	return l, inside, nat, outside
}

func TestPingAndNAT(t *testing.T) {
	_, inside, nat, outside := build(t)
	leaks, err := outside.Capture("p-nat", prefixes("10.0.0.0/8")...)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		from *Node
		to   string
	}{{inside, "203.0.113.1"}, {outside, "203.0.113.2"}, {inside, "2001:db8::1"}} {
		p, err := c.from.Ping(netip.MustParseAddr(c.to), PingOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for p.Report().Sent < 20 {
			time.Sleep(10 * time.Millisecond)
		}
		if r := p.Stop(); r.Lost != 0 || r.Sent < 20 || r.Duplicates != 0 {
			t.Errorf("%s to %s: %v", c.from.Name, c.to, r)
		}
	}
	if n, first, err := leaks.Count(); err != nil || n != 0 {
		t.Fatalf("%d inside sources outside (%v), first %v", n, err, first)
	}
	// A gap must be seen as one, and a leak as one.
	p, err := inside.Ping(netip.MustParseAddr("203.0.113.1"), PingOptions{})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	if _, err := nat.Exec(t.Context(), "nft", "delete", "table", "ip", "onetoone"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	r := p.Stop()
	if r.Lost < 10 || r.Lost > r.Sent-10 || r.Gap < 200*time.Millisecond || r.FirstLost < 100*time.Millisecond {
		t.Errorf("while NAT was gone: %v", r)
	}
	n, first, err := leaks.Stop()
	if err != nil || n != uint64(r.Lost) || len(first) == 0 || first[0] != "10.9.0.2 > 203.0.113.1 protocol 1" {
		t.Errorf("counted %d leaked packets (%v), first %q; %d were lost", n, err, first, r.Lost)
	}
}

func TestCaptureSelects(t *testing.T) {
	_, inside, _, outside := build(t)
	for _, c := range []struct {
		prefix string
		want   bool
	}{
		{"2001:db8:9::/64", true}, {"2001:db8:9::2/128", true}, {"2001:db8:8::/47", true}, {"::/0", true},
		{"2001:db8:9::3/128", false}, {"2001:db8:a::/64", false}, {"0.0.0.0/0", false},
	} {
		// Two prefixes: the second is reached by falling through the first.
		capt, err := outside.Capture("br0", netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix(c.prefix))
		if err != nil {
			t.Fatal(err)
		}
		p, err := inside.Ping(netip.MustParseAddr("2001:db8::1"), PingOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for p.Report().Sent < 3 {
			time.Sleep(10 * time.Millisecond)
		}
		p.Stop()
		if n, first, err := capt.Stop(); err != nil || (n > 0) != c.want {
			t.Errorf("%s: counted %d, %v %v", c.prefix, n, err, first)
		}
	}
}

func TestListenAndDial(t *testing.T) {
	_, inside, _, outside := build(t)
	l, err := outside.Listen("tcp", "203.0.113.1:80")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RemoteAddr) })}
	go srv.Serve(l)
	defer srv.Close()
	client := http.Client{Transport: &http.Transport{DialContext: inside.DialContext}, Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	r, err := client.Get("http://203.0.113.1/")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if b, err := io.ReadAll(r.Body); err != nil || !strings.HasPrefix(string(b), "203.0.113.2:") {
		t.Errorf("the server saw %q, %v", b, err)
	}
}

func TestProcess(t *testing.T) {
	l, inside, _, _ := build(t)
	p, err := inside.Start("sleeper", "sh", "-c", `setsid sh -c "echo hello; exec sleep 1000" & sleep 1000`)
	if err != nil {
		t.Fatal(err)
	}
	err = Until(t.Context(), 5*time.Second, func() error {
		if b, err := os.ReadFile(p.Log); err != nil || string(b) != "hello\n" {
			return fmt.Errorf("log %q, %w", b, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	p.Stop()
	if p.Err() == nil {
		t.Error("a program that was killed has no error")
	}
	// As on a machine where the end of the output is late.
	if out, err := inside.Exec(t.Context(), "sh", "-c", "sleep 2 & echo done"); err != nil || out != "done\n" {
		t.Errorf("a program whose output another one holds: %q, %v", out, err)
	}
	if _, err := inside.Exec(t.Context(), "sh", "-c", "echo why >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "why") {
		t.Errorf("Exec of a failing program: %v", err)
	}
	inside.IP("addr add nonsense dev lo")
	if err := l.Up(t.Context()); err == nil || !strings.Contains(err.Error(), "node inside") || !strings.Contains(err.Error(), "addr add nonsense") {
		t.Errorf("Up with a wrong command: %v", err)
	}
	before := sleepers(t, inside.path()) // the one that left its process group
	if before == 0 {
		t.Error("the detached child is not there")
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(inside.path()); err == nil {
		t.Error("the namespace is still there")
	}
	if _, err := os.Stat(l.Dir); err == nil {
		t.Error("the directory is still there")
	}
}

// sleepers counts processes in a namespace.
func sleepers(t *testing.T, ns string) int {
	t.Helper()
	out, err := exec.Command("ip", "netns", "pids", filepath.Base(ns)).Output()
	if err != nil {
		t.Fatal(err)
	}
	return len(strings.Fields(string(out)))
}

// TestInterrupted kills a process that has a lab: by SIGINT, after which nothing may be
// left, and by SIGKILL, after which the next New must clean up.
func TestInterrupted(t *testing.T) {
	root.Need(t, "network namespaces")
	if os.Getenv("LAB_CHILD") != "" {
		l, inside, _, _ := build(t)
		if _, err := inside.Start("sleep", "sleep", "1000"); err != nil {
			t.Fatal(err)
		}
		fmt.Println("LAB", l.Dir)
		time.Sleep(time.Minute)
	}
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestInterrupted$", "-test.v")
		cmd.Env = append(os.Environ(), "LAB_CHILD=1")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var dir string
		for s := bufio.NewScanner(out); s.Scan(); {
			if d, ok := strings.CutPrefix(s.Text(), "LAB "); ok {
				dir = d
				break
			}
		}
		if dir == "" {
			t.Fatal("the child made no lab")
		}
		spaces, _ := filepath.Glob("/run/netns/" + filepath.Base(dir) + "-*")
		if len(spaces) != 3 || sleepers(t, spaces[0]) != 1 {
			t.Fatalf("the child's namespaces: %v", spaces)
		}
		cmd.Process.Signal(sig)
		cmd.Wait()
		if sig == syscall.SIGKILL {
			l, err := New(Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		}
		if left, _ := filepath.Glob("/run/netns/" + filepath.Base(dir) + "-*"); len(left) != 0 {
			t.Errorf("after %v: namespaces %v are left", sig, left)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("after %v: %s is left", sig, dir)
		}
	}
}

// TestTap asks a bridge for its address, as a machine behind a tap device would.
func TestTap(t *testing.T) {
	_, _, nat, _ := build(t)
	nat.Bridge("vpc", prefixes("10.8.0.1/24")...)
	if err := nat.lab.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	f, err := nat.Tap(t.Context(), "tap0", "vpc")
	if err != nil {
		t.Fatal(err)
	}
	const header = 10 // struct virtio_net_hdr
	own := []byte{2, 0, 0, 0, 0, 1}
	ask := append(make([]byte, header), 255, 255, 255, 255, 255, 255)
	ask = append(append(ask, own...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 1) // RFC 826
	ask = append(append(ask, own...), 10, 8, 0, 2, 0, 0, 0, 0, 0, 0, 10, 8, 0, 1)
	if _, err := f.Write(ask); err != nil {
		t.Fatal(err)
	}
	if err := f.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for buf := make([]byte, 2048); ; {
		n, err := f.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if p := buf[header:n]; len(p) >= 42 && bytes.Equal(p[12:14], []byte{8, 6}) && bytes.Equal(p[20:22], []byte{0, 2}) && bytes.Equal(p[28:32], []byte{10, 8, 0, 1}) {
			break
		}
	}
	if out, err := nat.Exec(t.Context(), "ip", "-o", "link", "show", "master", "vpc", "up"); err != nil || !strings.Contains(out, "tap0") {
		t.Errorf("ports of the bridge: %q, %v", out, err)
	}
	f.Close()
	if out, err := nat.Exec(t.Context(), "ip", "-o", "link", "show", "type", "tun"); err != nil || out != "" {
		t.Errorf("after its end there is %q, %v", out, err)
	}
}
