package main

import (
	"bytes"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestErrorsOfTheConnection checks that the error of a missing daemon names the daemon and has none
// of the words of grpc.
func TestErrorsOfTheConnection(t *testing.T) {
	w := newWorld(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	none := filepath.Join(w.home, "none.sock")
	for _, c := range []struct {
		args, want string
		code       int
	}{
		{"--socket " + none + " get status", "isthmus: the daemon at " + none + " cannot be reached: dial unix " + none + ": connect: no such file or directory\n", 1},
		{"--socket " + none + " plan -f testdata/first.yaml", "isthmus: planning testdata/first.yaml: the daemon at " + none + " cannot be reached: dial unix " + none + ": connect: no such file or directory\n", 1},
		{"--timeout 50ms --address " + silent.Addr().String() + " get status", "isthmus: the daemon at " + silent.Addr().String() + " did not answer within 50ms\n", 1},
		{"--timeout 0s get status", "isthmus: --timeout 0s: must be more than 0s\nRun 'isthmus get status --help' for usage.\n", 2},
		{"--address 203.0.113.9 get status", "isthmus: --address \"203.0.113.9\": must be a host and a port, as 203.0.113.9:7443\nRun 'isthmus get status --help' for usage.\n", 2},
		{"client issue a --role reader --endpoint nonsense -o " + none, "isthmus: --endpoint \"nonsense\": must be a host and a port, as 203.0.113.9:7443\nRun 'isthmus client issue --help' for usage.\n", 2},
	} {
		if stdout, stderr, code := w.run(t.Context(), "", strings.Fields(c.args)...); stdout != "" || stderr != c.want || code != c.code {
			t.Errorf("%s: exit %d, %q, want %d, %q", c.args, code, stdout+stderr, c.code, c.want)
		}
	}
	for uid, want := range map[int]string{
		0:    "isthmus: isthmusd does not run here (/run/isthmus/api.sock is missing), and the context " + w.home + "/.config/isthmus/context.yaml of another node is missing too: see isthmus context import\n",
		1000: "isthmus: the context " + w.home + "/.config/isthmus/context.yaml is missing: see isthmus context import\n",
	} {
		var stderr bytes.Buffer
		a := w.app(nil, io.Discard, &stderr)
		a.uid, a.getenv = uid, func(k string) string { return map[string]string{"HOME": w.home}[k] }
		if code := a.run(t.Context(), []string{"get", "status"}); code != 1 || stderr.String() != want {
			t.Errorf("uid %d: exit %d, %q, want %q", uid, code, stderr.String(), want)
		}
	}
}

// TestUnreadableDocuments: unreadable documents are refused before grpc would refuse them.
func TestUnreadableDocuments(t *testing.T) {
	w := newWorld(t)
	for text, want := range map[string]string{
		"\xff\xfen\x00":                    "isthmus: reading standard input: is not valid UTF-8 text\n",
		strings.Repeat("#", maxDocument+1): "isthmus: reading standard input: is larger than 16777216 bytes\n",
	} {
		for _, args := range []string{"validate -f -", "apply -f -", "policy set -f -", "topology show -f -"} {
			if _, stderr, code := w.run(t.Context(), text, strings.Fields(args)...); code != 1 || stderr != want {
				t.Errorf("%s: exit %d, %q, want %q", args, code, stderr, want)
			}
		}
	}
}

// slowReader delivers its text slowly, as typing does.
type slowReader struct{ io.Reader }

func (s slowReader) Read(p []byte) (int, error) {
	time.Sleep(1100 * time.Millisecond)
	return s.Reader.Read(p)
}

// TestTimeoutIsForTheAnswer: the time that it takes to read the standard input does not count.
func TestTimeoutIsForTheAnswer(t *testing.T) {
	w := newWorld(t)
	var stderr bytes.Buffer
	code := w.app(slowReader{strings.NewReader("tunnels: [{name: a}]")}, io.Discard, &stderr).run(t.Context(), []string{"--timeout", "1s", "plan", "-f", "-"})
	if code != exitChanges {
		t.Errorf("exit %d: %s", code, stderr.String())
	}
}
