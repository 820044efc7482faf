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
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// User is the user and group ID of the BGP process. It is in none of the ranges that distributions
// or service managers assign, so no other process has it.
const User = 490179

// process is a running child.
type process struct {
	pid  int
	conn io.ReadWriteCloser
	kill func()          // SIGKILL, so that no session is closed with a NOTIFICATION
	done <-chan struct{} // closed when it has ended
	// silent counts the seconds in which nothing came from it; see hangs.
	silent atomic.Int32
	beats  atomic.Bool  // it has sent frameAlive
	end    func() crash // only after done
	// dial opens a connection from one address to another in the network namespace of the child;
	// nil: the child has none.
	dial func(ctx context.Context, from, to netip.Addr) (net.Conn, error)
}

const (
	// aliveInterval is how often the child shows that it runs.
	aliveInterval = 2 * time.Second
	// mostSilent is how many seconds nothing may come from it. Sessions of a child that hangs would
	// seem to be established, while the peers have given them up.
	mostSilent = 15
)

// hangs is called every second, and reports whether the child has been silent for too long. Seconds
// are counted, because those in which the daemon itself did not run say nothing about the child.
func (p *process) hangs() bool { return p.beats.Load() && p.silent.Add(1) > mostSilent }

// startWait is how long a child may take to confine itself.
const startWait = 20 * time.Second

// spawn starts this program again as the child, in its own namespaces, without environment, with
// no descriptor but the connection, and without a way to gain privileges. It starts with the
// daemon's privileges, gives them up before it reads anything (confine), and dies with the daemon.
// A daemon that is not root needs the capabilities as ambient ones (capabilities(7)).
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
		// Not by path: an upgrade may have replaced the file.
		Path: "/proc/self/exe",
		Args: []string{childName, strconv.Itoa(o.UID), strconv.Itoa(o.GID)},
		Env: []string{
			// Labels name the peer in a stack (logger). Without the last two settings, the runtime
			// would keep files of the control group open to follow its limits, which it could not
			// read later.
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
		cmd.Wait() // the result is in ProcessState
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

// receiveNetwork receives the descriptor of the child's network namespace.
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
		return -1, errors.Join(errors.New("the child sent no network namespace"), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, errors.Join(errors.New("the child sent no network namespace"), err)
	}
	unix.CloseOnExec(fds[0])
	return fds[0], conn.SetReadDeadline(time.Time{})
}

// inside passes functions to the thread that enters network namespaces of children.
var inside = sync.OnceValue(func() chan<- func() {
	c := make(chan func())
	var serve func()
	serve = func() {
		// This thread cannot be used for anything else afterwards, and it never ends: see forks.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// Other programs take the namespaces of the first thread for those of the process.
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

// enter owns the descriptor of a network namespace until done, and returns a function that opens
// connections in it.
func enter(ns int, done <-chan struct{}) func(context.Context, netip.Addr, netip.Addr) (net.Conn, error) {
	closed := false // used by the thread only
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
		Timeout:   time.Second, // other dials wait meanwhile
		KeepAlive: -1,
		LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)),
		Control: func(_, _ string, c syscall.RawConn) error {
			var err error
			return errors.Join(c.Control(func(fd uintptr) {
				// No interface there has the address.
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

// forks passes functions to the thread that starts children.
var forks = sync.OnceValue(func() chan<- func() {
	c := make(chan func())
	go func() {
		// The parent-death signal is sent when the thread that forked ends, and no_new_privs
		// cannot be undone. Therefore this thread does nothing else, and never ends; its end would
		// also kill processes that were started from it before it was locked.
		runtime.LockOSThread()
		for f := range c {
			f()
		}
	}()
	return c
})

// fork starts cmd so that it and the programs it executes cannot gain privileges.
func fork(cmd *exec.Cmd) error {
	result := make(chan error)
	forks() <- func() {
		err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		if err == nil {
			// Descriptors that this process inherited, or that a library forgets to mark, are not
			// passed on.
			err = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
		}
		if err == nil {
			err = cmd.Start()
		}
		result <- err
	}
	return <-result
}

// head keeps the beginning of what is written to it: the first lines of a Go panic have the cause.
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
