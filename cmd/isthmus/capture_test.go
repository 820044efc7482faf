package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/api/apitest"
)

// TestCapture checks the bytes of a capture, to standard output and to a file, and that the file is
// for its owner alone and is not made for a capture that is refused.
func TestCapture(t *testing.T) {
	w := newWorld(t)
	stdout, stderr, code := w.run(t.Context(), "", "capture", "--tunnel", "aws-0", "-c", "5", "--size", "128")
	if code != exitOK || !strings.Contains(stderr, "capturing at interface t-aws-0") {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	u32 := binary.LittleEndian.Uint32
	b := []byte(stdout)
	if len(b) != 24+5*(16+20) || u32(b) != 0xa1b23c4d || u32(b[4:]) != 4<<16|2 || u32(b[8:]) != 0 || u32(b[12:]) != 0 || u32(b[16:]) != 128 || u32(b[20:]) != 101 {
		t.Fatalf("%x", b)
	}
	for n, p := 0, b[24:]; n < 5; n, p = n+1, p[36:] {
		if u32(p) != 1_790_000_000 || u32(p[4:]) != 123_456_789 || u32(p[8:]) != 20 || u32(p[12:]) != 1420 || !bytes.Equal(p[16:36], apitest.Packet(n)) {
			t.Errorf("packet %d: %x", n, p[:36])
		}
	}

	file := filepath.Join(t.TempDir(), "a.pcap")
	if _, stderr, code := w.run(t.Context(), "", "capture", "--tunnel", "none", "-f", file); code != exitFailed {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if _, stderr, code := w.run(t.Context(), "", "capture", "--tunnel", "aws-0", "-c", "5", "--size", "128", "-f", file); code != exitOK {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}

	if _, stderr, code := w.run(t.Context(), "", "capture", "--tunnel", "aws-0", "-c", "1", "-f", file); code != exitFailed || !strings.Contains(stderr, "file exists") {
		t.Errorf("the file exists: exit %d: %s", code, stderr)
	}
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, b) {
		t.Errorf("%x, %v", got, err)
	}

	var out, errs bytes.Buffer
	a := w.app(nil, &out, &errs)
	a.terminal = func() int { return 80 }
	if code := a.run(t.Context(), []string{"capture", "--tunnel", "aws-0"}); code != exitUsage || out.Len() > 0 || !strings.Contains(errs.String(), "give a file with -f FILE, or a pipe") {
		t.Errorf("to a terminal: exit %d, %q, %s", code, out.String(), errs.String())
	}

	// The packets before an interruption are there when they come, not at the end.
	ctx, interrupt := context.WithCancel(t.Context())
	live := filepath.Join(t.TempDir(), "live.pcap")
	ended := make(chan int)
	go func() {
		_, stderr, code = w.run(ctx, "", "capture", "--underlay", "--host", apitest.CaptureHangs, "-f", live)
		ended <- code
	}()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if got, _ := os.ReadFile(live); len(got) == 24+36 {
			break
		}
		if time.Now().After(end) {
			t.Error("the packet is not in the file")
			break
		}
	}
	interrupt()
	if code := <-ended; code != exitOK || !strings.Contains(stderr, "1 packet: interrupted") {
		t.Errorf("interrupted: exit %d: %s", code, stderr)
	}
}
