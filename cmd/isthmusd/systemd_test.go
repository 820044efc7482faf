package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// manager returns the messages to a service manager.
func manager(t *testing.T) <-chan string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	out := make(chan string, 1000)
	go func() {
		for buffer := make([]byte, 4096); ; {
			n, err := conn.Read(buffer)
			if err != nil {
				return
			}
			out <- string(buffer[:n])
		}
	}()
	return out
}

// stand is a node whose state a test sets.
type stand struct {
	ready, dead atomic.Bool
	asked       atomic.Int32
}

func (s *stand) Ready() bool     { return s.ready.Load() }
func (s *stand) Summary() string { return "as it is" }

func (s *stand) Alive(ctx context.Context) error {
	s.asked.Add(1)
	if s.dead.Load() {
		return errors.New("dead")
	}
	return nil
}

func await(t *testing.T, from <-chan string, begins string) {
	t.Helper()
	for limit := time.After(time.Minute); ; {
		select {
		case s := <-from:
			if strings.HasPrefix(s, begins) {
				return
			}
		case <-limit:
			t.Fatalf("%s is not sent", begins)
		}
	}
}

// TestTell checks that READY is not sent before the node is ready, but at the latest after
// readyLimit.
func TestTell(t *testing.T) {
	heard := manager(t)
	s := &stand{}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); tell(ctx, s, slog.New(slog.DiscardHandler)) }()
	await(t, heard, "STATUS=Starting")
	select {
	case m := <-heard:
		t.Errorf("%s is sent before the node is ready", m)
	case <-time.After(4 * readyPace):
	}
	s.ready.Store(true)
	await(t, heard, "READY=1")
	await(t, heard, "STATUS=as it is")
	cancel()
	await(t, heard, "STOPPING=1")
	<-ended

	defer func(d time.Duration) { readyLimit = d }(readyLimit)
	readyLimit = 2 * readyPace
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	go tell(ctx, &stand{}, slog.New(slog.DiscardHandler))
	await(t, heard, "READY=1")
}

// TestWatch checks that the watchdog is notified while the node works, and not while its API or
// router does not answer.
func TestWatch(t *testing.T) {
	heard := manager(t)
	t.Setenv("WATCHDOG_USEC", "400000")
	s := &stand{}
	var mute atomic.Bool
	ping := func(ctx context.Context) error {
		s.asked.Add(1)
		if mute.Load() {
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}
	go watch(t.Context(), s, ping, slog.New(slog.DiscardHandler))
	// Wait for two more checks, so that the result of an earlier one has been sent.
	asked := func() {
		t.Helper()
		before, limit := s.asked.Load(), time.Now().Add(30*time.Second)
		for s.asked.Load() < before+2 {
			if time.Now().After(limit) {
				t.Fatal("no more checks")
			}
			time.Sleep(time.Millisecond)
		}
	}
	mark := func() {
		t.Helper()
		if _, err := daemon.SdNotify(false, "MARK=1"); err != nil {
			t.Fatal(err)
		}
	}
	silent := func(what string) {
		t.Helper()
		asked()
		mark()
		await(t, heard, "MARK=1")
		asked()
		mark()
		if m := <-heard; m != "MARK=1" {
			t.Errorf("%s: %s is sent", what, m)
			await(t, heard, "MARK=1")
		}
	}
	await(t, heard, "WATCHDOG=1")
	s.dead.Store(true)
	silent("dead")
	s.dead.Store(false)
	await(t, heard, "WATCHDOG=1")
	mute.Store(true)
	silent("mute")
	mute.Store(false)
	await(t, heard, "WATCHDOG=1")
}
