// Package linktest runs a test binary in separate network namespaces.
//
// The whole process runs in unnamed network, mount and process namespaces, so that nothing it makes
// is visible outside or outlives it, however it ends.
package linktest

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/isthmus-net/isthmus/test/root"
)

const inside = "ISTHMUS_NLTEST"

// Main is for TestMain: it runs the tests of m in fresh network, mount and process namespaces in
// which /run is empty and the loopback interface is up. Without root it runs them in the present
// namespaces, where privileged operations fail.
func Main(m *testing.M) {
	if os.Getenv(inside) != "" || os.Geteuid() != 0 {
		if os.Getenv(inside) != "" {
			must("mount", "--make-rprivate", "/")
			must("mount", "-t", "tmpfs", "none", "/run")
			must("mount", "-t", "proc", "none", "/proc") // of the new process namespace
			must("ip", "link", "set", "lo", "up")
		}
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // Pdeathsig counts the thread as the parent
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// the end of its first process ends all others
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	err := cmd.Run()
	if err != nil && cmd.ProcessState == nil {
		fmt.Fprintln(os.Stderr, "starting the tests in a network namespace:", err)
		os.Exit(1)
	}
	if code := cmd.ProcessState.ExitCode(); code >= 0 {
		os.Exit(code)
	}
	os.Exit(1) // ended by a signal
}

func must(name string, arg ...string) {
	if out, err := exec.Command(name, arg...).CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%s %s: %v: %s\n", name, strings.Join(arg, " "), err, out)
		os.Exit(1)
	}
}

// Run runs a command and fails the test with its output when it fails.
func Run(t testing.TB, name string, arg ...string) string {
	t.Helper()
	out, err := exec.Command(name, arg...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(arg, " "), err, out)
	}
	return string(out)
}

// Namespace makes a named network namespace with its loopback interface up, for the other end of a
// link.
func Namespace(t testing.TB, name string) {
	t.Helper()
	root.Need(t, "network namespaces")
	Run(t, "ip", "netns", "add", name)
	t.Cleanup(func() { Run(t, "ip", "netns", "del", name) })
	Run(t, "ip", "-n", name, "link", "set", "lo", "up")
}
