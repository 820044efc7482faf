// Package netns gives tests network namespaces without names. They vanish with the test process,
// however it ends.
package netns

import (
	"fmt"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/root"
)

// NS is a network namespace, held by a thread of this process.
type NS struct {
	t    testing.TB
	jobs chan func()
	// Path is the file by which iproute2 finds the namespace.
	Path string
}

// New makes a network namespace with the loopback interface up, for the time of the test. It needs
// CAP_SYS_ADMIN.
func New(t testing.TB) *NS {
	t.Helper()
	root.Need(t, "network namespaces")
	n := &NS{t: t, jobs: make(chan func())}
	ready := make(chan error)
	go n.hold(ready)
	if err := <-ready; err != nil {
		t.Fatalf("making a network namespace: %v", err)
	}
	t.Cleanup(func() { close(n.jobs) })
	n.Run("ip link set lo up")
	return n
}

// hold makes the namespace on a thread that ends with it. The process' first thread cannot end
// before the process does, so it is held back until another one has been found.
func (n *NS) hold(ready chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		found := make(chan error)
		go n.hold(found)
		err := <-found
		runtime.UnlockOSThread()
		ready <- err
		return
	}
	err := unix.Unshare(unix.CLONE_NEWNET)
	n.Path = fmt.Sprintf("/proc/%d/task/%d/ns/net", unix.Getpid(), unix.Gettid())
	if ready <- err; err != nil {
		return
	}
	for job := range n.jobs {
		job()
	}
}

// Do runs f in the namespace, on its thread, and waits for it. Sockets that f opens stay in the
// namespace. f must not end the goroutine (t.Fatal does).
func (n *NS) Do(f func()) {
	done := make(chan struct{})
	n.jobs <- func() { defer close(done); f() }
	<-done
}

// Try runs a command, given as words, in the namespace, and returns its output.
func (n *NS) Try(command string) (string, error) {
	var out []byte
	var err error
	words := strings.Fields(command)
	n.Do(func() { out, err = exec.Command(words[0], words[1:]...).CombinedOutput() })
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return string(out), err
}

// Run runs commands, one in each line, in the namespace, and fails the test when one fails. It
// returns their output.
func (n *NS) Run(commands string) string {
	n.t.Helper()
	var all strings.Builder
	for line := range strings.Lines(commands) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		out, err := n.Try(line)
		if err != nil {
			n.t.Fatal(err)
		}
		all.WriteString(out)
	}
	return all.String()
}

// Veth joins two namespaces by a pair of interfaces with the given names.
func Veth(a *NS, nameA string, b *NS, nameB string) {
	a.t.Helper()
	a.Run(fmt.Sprintf("ip link add %s type veth peer name %s netns %s", nameA, nameB, b.Path))
	a.Run("ip link set " + nameA + " up")
	b.Run("ip link set " + nameB + " up")
}
