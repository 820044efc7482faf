package gobgp

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// process is a running child.
type process struct {
	pid  int
	conn io.ReadWriteCloser
	kill func()          // SIGKILL: no session is closed with a NOTIFICATION
	done <-chan struct{} // closed when it has ended
	end  func() crash    // after done
}

// spawn starts this very program again as the child: another user, no capability but the one to bind a port below
// 1024, no way to gain any, no environment, no descriptors but the connection. It dies with the daemon.
func spawn(o Options) (*process, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("making a socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "bgp"), os.NewFile(uintptr(fds[1]), "daemon")
	conn, err := net.FileConn(ours)
	if err := errors.Join(err, ours.Close()); err != nil {
		theirs.Close()
		return nil, fmt.Errorf("making a socket pair: %w", err)
	}
	stderr := &head{limit: 64 << 10}
	cmd := &exec.Cmd{
		// Not by name: the child may not be allowed to walk there, and an upgrade may have replaced it.
		Path: "/proc/self/exe",
		Args: []string{childName},
		Env: []string{
			// TCP-MD5 does not work on the MPTCP sockets that Go listens on otherwise. Labels name the peer in a
			// stack (logger).
			"GODEBUG=multipathtcp=0,tracebacklabels=1",
			"GOTRACEBACK=single",
			fmt.Sprintf("GOGC=%d", o.GOGC),
			fmt.Sprintf("GOMEMLIMIT=%d", o.MemoryLimit+ballast),
		},
		Dir:        "/",
		ExtraFiles: []*os.File{theirs},
		Stderr:     stderr,
		SysProcAttr: &syscall.SysProcAttr{
			Pdeathsig: syscall.SIGKILL,
			Setsid:    true,
		},
	}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(o.UID), Gid: uint32(o.GID)}
		cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_NET_BIND_SERVICE}
	}
	if err := fork(cmd); err != nil {
		theirs.Close()
		conn.Close()
		return nil, fmt.Errorf("starting the BGP process: %w", err)
	}
	theirs.Close()
	done := make(chan struct{})
	go func() {
		cmd.Wait() // what it says is in ProcessState
		close(done)
	}()
	return &process{
		pid:  cmd.Process.Pid,
		conn: conn,
		kill: func() { cmd.Process.Kill() },
		done: done,
		end:  func() crash { return decodeCrash(stderr.String(), cmd.ProcessState.String()) },
	}, nil
}

// forks takes the commands for the thread that starts them.
var forks = sync.OnceValue(func() chan<- func() {
	c := make(chan func())
	go func() {
		// A death signal comes when the thread that forked ends, and no_new_privs is for good. So this thread does
		// nothing else, and never ends; if it did, it would also take along what others had started from it before it
		// was ours.
		runtime.LockOSThread()
		for f := range c {
			f()
		}
	}()
	return c
})

// fork starts cmd such that it, and what it executes, cannot gain privileges.
func fork(cmd *exec.Cmd) error {
	result := make(chan error)
	forks() <- func() {
		err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		if err == nil {
			err = cmd.Start()
		}
		result <- err
	}
	return <-result
}

// head keeps the beginning of what is written to it: the first lines of a Go panic say what happened.
type head struct {
	mu    sync.Mutex
	b     strings.Builder
	limit int
}

func (h *head) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.b.Write(p[:min(len(p), h.limit-h.b.Len())])
	return len(p), nil
}

func (h *head) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.b.String()
}
