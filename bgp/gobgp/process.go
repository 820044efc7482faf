package gobgp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// User is the user and group ID of the BGP process. It is in no range that distributions or service managers give out, so
// that no other process has it.
const User = 490179

// process is a running child.
type process struct {
	pid  int
	conn io.ReadWriteCloser
	kill func()          // SIGKILL: no session is closed with a NOTIFICATION
	done <-chan struct{} // closed when it has ended
	end  func() crash    // after done
	// dial opens a connection from one address to another in the network namespace of the child; nil: it has none.
	dial func(ctx context.Context, from, to netip.Addr) (net.Conn, error)
}

// startWait is how long a child may take to confine itself.
const startWait = 20 * time.Second

// spawn starts this very program again as the child, in namespaces of its own, with no environment and no descriptors
// but the connection, and no way to gain privileges. It comes with the daemon's, gives them up before it reads anything
// (confine), and dies with the daemon. A daemon that is not root needs the capabilities as ambient ones (capabilities(7)).
func spawn(o Options) (*process, error) {
	if err := mayConfine(); err != nil {
		return nil, fmt.Errorf("starting the BGP process: %w", err)
	}
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
		// Not by name: an upgrade may have replaced it.
		Path: "/proc/self/exe",
		Args: []string{childName, strconv.Itoa(o.UID), strconv.Itoa(o.GID)},
		Env: []string{
			// Labels name the peer in a stack (logger). The runtime would keep files of the control group open to follow
			// its limits, which it cannot read later.
			"GODEBUG=multipathtcp=0,tracebacklabels=1,containermaxprocs=0,updatemaxprocs=0",
			fmt.Sprintf("GOMAXPROCS=%d", runtime.GOMAXPROCS(0)),
			"GOTRACEBACK=single",
			fmt.Sprintf("GOGC=%d", o.GOGC),
			fmt.Sprintf("GOMEMLIMIT=%d", o.MemoryLimit+ballast),
		},
		Dir:        "/",
		ExtraFiles: []*os.File{theirs},
		Stderr:     stderr,
		SysProcAttr: &syscall.SysProcAttr{
			Pdeathsig:  syscall.SIGKILL,
			Setsid:     true,
			Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS,
		},
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
	p := &process{
		pid:  cmd.Process.Pid,
		conn: conn,
		kill: func() { cmd.Process.Kill() },
		done: done,
		end:  func() crash { return decodeCrash(stderr.String(), cmd.ProcessState.String()) },
	}
	ns, err := receiveNetwork(conn.(*net.UnixConn))
	if err != nil {
		p.kill()
		<-done
		conn.Close()
		return nil, fmt.Errorf("starting the BGP process: %w (%s)", err, p.end().reason)
	}
	p.dial = enter(ns, done)
	return p, nil
}

// receiveNetwork takes the descriptor of the child's network namespace.
func receiveNetwork(conn *net.UnixConn) (int, error) {
	if err := conn.SetReadDeadline(time.Now().Add(startWait)); err != nil {
		return -1, err
	}
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(b[:], oob)
	if err != nil {
		return -1, fmt.Errorf("waiting for its network namespace: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return -1, errors.Join(errors.New("it sent no network namespace"), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, errors.Join(errors.New("it sent no network namespace"), err)
	}
	unix.CloseOnExec(fds[0])
	return fds[0], conn.SetReadDeadline(time.Time{})
}

// inside takes what the thread does that goes into network namespaces of children.
var inside = sync.OnceValue(func() chan<- func() {
	c := make(chan func())
	var serve func()
	serve = func() {
		// The thread is not fit for anything else afterwards, and it never ends either: see forks.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The namespaces of the first thread are taken to be those of the process.
			next := make(chan struct{})
			go func() { close(next); serve() }()
			<-next
			runtime.UnlockOSThread()
			return
		}
		for f := range c {
			f()
		}
	}
	go serve()
	return c
})

// enter takes the descriptor of a network namespace over until done, and returns what opens connections there.
func enter(ns int, done <-chan struct{}) func(context.Context, netip.Addr, netip.Addr) (net.Conn, error) {
	closed := false // of the thread
	go func() {
		<-done
		inside() <- func() { closed = true; unix.Close(ns) }
	}()
	return func(ctx context.Context, from, to netip.Addr) (conn net.Conn, err error) {
		worked := make(chan struct{})
		work := func() {
			defer close(worked)
			if closed {
				err = errEnded
			} else if err = unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
				err = fmt.Errorf("entering the network namespace of the BGP process: %w", err)
			} else {
				conn, err = dialInner(ctx, from, to)
			}
		}
		select {
		case inside() <- work:
			<-worked
			return conn, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// dialInner opens a connection to the child, in the network namespace of the calling thread.
func dialInner(ctx context.Context, from, to netip.Addr) (net.Conn, error) {
	d := net.Dialer{
		Timeout:   time.Second, // the others wait meanwhile
		KeepAlive: -1,
		LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)),
		Control: func(_, _ string, c syscall.RawConn) error {
			var err error
			return errors.Join(c.Control(func(fd uintptr) {
				// No address is an interface's own there.
				level, option := unix.IPPROTO_IP, unix.IP_FREEBIND
				if !from.Is4() {
					level, option = unix.IPPROTO_IPV6, unix.IPV6_FREEBIND
				}
				err = unix.SetsockoptInt(int(fd), level, option, 1)
			}), err)
		},
	}
	d.SetMultipathTCP(false)
	return d.DialContext(ctx, "tcp", netip.AddrPortFrom(to, childPort).String())
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
			// Descriptors that this process was started with, or that a library forgets to mark, do not get across.
			err = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
		}
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
