package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Do runs f on a thread that is in the node's namespace: sockets that f opens stay in it, and
// processes that f starts begin in it. f must not start goroutines that open sockets.
func (n *Node) Do(f func() error) error {
	there, err := unix.Open(n.path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("entering node %s: %w", n.Name, err)
	}
	defer unix.Close(there)
	runtime.LockOSThread()
	here, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("entering node %s: %w", n.Name, err)
	}
	defer unix.Close(here)
	if err := unix.Setns(there, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("entering node %s: %w", n.Name, err)
	}
	err = f()
	if back := unix.Setns(here, unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, back) // the thread stays locked and dies with its goroutine
	}
	runtime.UnlockOSThread()
	return err
}

// Sysctl sets net/KEY, for example "ipv4/ip_forward".
func (n *Node) Sysctl(key, value string) error {
	err := n.Do(func() error { return os.WriteFile("/proc/sys/net/"+key, []byte(value), 0) })
	if err != nil {
		return fmt.Errorf("setting sysctl of node %s: %w", n.Name, err)
	}
	return nil
}

// Listen listens in the node.
func (n *Node) Listen(network, address string) (l net.Listener, err error) {
	err = n.Do(func() error { l, err = net.Listen(network, address); return err })
	return l, err
}

// DialContext connects from the node; it fits http.Transport. The address must be
// numeric.
func (n *Node) DialContext(ctx context.Context, network, address string) (c net.Conn, err error) {
	var d net.Dialer
	err = n.Do(func() error { c, err = d.DialContext(ctx, network, address); return err })
	return c, err
}

// Dir is the directory for the state of the node's programs; it exists.
func (n *Node) Dir() (string, error) {
	dir := filepath.Join(n.lab.Dir, n.Name)
	return dir, os.MkdirAll(dir, 0o755)
}

// Exec runs a program of this machine in the node and returns its standard output. The error
// contains its standard error.
func (n *Node) Exec(ctx context.Context, argv ...string) (string, error) {
	return n.exec(ctx, "", exec.CommandContext(ctx, argv[0], argv[1:]...))
}

// ExecInput is Exec with standard input.
func (n *Node) ExecInput(ctx context.Context, input string, argv ...string) (string, error) {
	return n.exec(ctx, input, exec.CommandContext(ctx, argv[0], argv[1:]...))
}

// ExecPeer is Exec for a program of the lab's Root.
func (n *Node) ExecPeer(ctx context.Context, argv ...string) (string, error) {
	argv, attr := n.lab.peer(argv)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.SysProcAttr = attr
	return n.exec(ctx, "", cmd)
}

func (n *Node) exec(_ context.Context, input string, cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &stdout, &stderr
	// For a program that leaves its output to another one. Reading the output of one that has ended
	// takes longer than a second under emulation on a busy machine.
	cmd.WaitDelay = time.Minute
	if err := n.Do(cmd.Start); err != nil {
		return "", fmt.Errorf("running %s in %s: %w", cmd.Args[0], n.Name, err)
	}
	if err := cmd.Wait(); err != nil {
		return stdout.String(), fmt.Errorf("running %s in %s: %w: %s", strings.Join(cmd.Args, " "), n.Name, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}

// peer makes argv a command that runs in the lab's Root. With another tree
// than ours it gets a mount namespace of its own, in which the tree has this
// machine's /proc and /dev, an empty /run and /tmp, and the lab's directory.
func (l *Lab) peer(argv []string) ([]string, *syscall.SysProcAttr) {
	if l.root == "/" {
		return argv, &syscall.SysProcAttr{}
	}
	const script = `set -e; t=$1 d=$2; shift 2
mount --rbind /proc "$t/proc"; mount --rbind /dev "$t/dev"; mount -t tmpfs tmpfs "$t/tmp"; mount -t tmpfs tmpfs "$t/run"
mkdir -p "$t$d"; mount --bind "$d" "$t$d"; exec chroot "$t" "$@"`
	return append([]string{"sh", "-c", script, "sh", l.root, l.Dir}, argv...), &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
}

// Process is a program that runs in a node.
type Process struct {
	// Log is the file with its output.
	Log string

	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// Start runs a program of this machine in the node until Stop or the end of the
// lab. Its output is appended to NAME.log in the node's directory.
func (n *Node) Start(name string, argv ...string) (*Process, error) {
	return n.start(name, argv, &syscall.SysProcAttr{}, nil)
}

// StartPeer is Start for a program of the lab's Root, with further VAR=value pairs.
func (n *Node) StartPeer(name string, env []string, argv ...string) (*Process, error) {
	argv, attr := n.lab.peer(argv)
	return n.start(name, argv, attr, env)
}

func (n *Node) start(name string, argv []string, attr *syscall.SysProcAttr, env []string) (*Process, error) {
	fail := func(err error) (*Process, error) { return nil, fmt.Errorf("starting %s in %s: %w", name, n.Name, err) }
	dir, err := n.Dir()
	if err != nil {
		return fail(err)
	}
	p := &Process{Log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fail(err)
	}
	defer log.Close()
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Env = append(os.Environ(), env...)
	attr.Setpgid, attr.Pdeathsig = true, unix.SIGKILL
	p.cmd.SysProcAttr = attr
	n.lab.mu.Lock()
	defer n.lab.mu.Unlock()
	if n.lab.closed {
		return fail(errors.New("the lab is closed"))
	}
	if err := n.Do(p.cmd.Start); err != nil {
		return fail(err)
	}
	n.lab.procs = append(n.lab.procs, p)
	go func() { p.err = p.cmd.Wait(); close(p.done) }()
	return p, nil
}

// Pid of the program.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Signal goes to the program and the children that stayed in its process group. A program that
// has ended gets nothing.
func (p *Process) Signal(s unix.Signal) {
	select {
	case <-p.done:
	default:
		_ = unix.Kill(-p.Pid(), s)
	}
}

// Done is closed when the program has ended; Err then says how.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err is how the program ended. It may be called after Done is closed.
func (p *Process) Err() error { return p.err }

// Stop sends SIGTERM to the program, kills it if it has not ended within five seconds, and waits
// for its end.
func (p *Process) Stop() {
	p.Signal(unix.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(5 * time.Second):
		p.Signal(unix.SIGKILL)
		<-p.done
	}
}

// Until calls f every 100 ms until it returns nil; after the limit the last error is returned. The
// limit is the time that an idle machine needs; another one gets three times as much, and at least
// a minute. After a call that takes long, as one that starts programs in the guest does, Until
// pauses twice as long, up to two seconds: what f waits for needs the processors too.
func Until(ctx context.Context, limit time.Duration, f func() error) error {
	limit = max(3*limit, time.Minute)
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		began := time.Now()
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %v: %w", limit, err)
		case <-time.After(min(max(2*time.Since(began), 100*time.Millisecond), 2*time.Second)):
		}
	}
}

// Limit returns a time within which a test on this machine, as busy as it is now, comes to do
// several things that take as long as f: at least ten seconds.
func Limit(f func()) time.Duration {
	began := time.Now()
	f()
	return max(10*time.Second, 20*time.Since(began)).Round(time.Second)
}
