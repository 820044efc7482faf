package ipsec

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/strongswan/govici/vici"
	"golang.org/x/sys/unix"
)

const (
	// callTimeout is for a command that does not wait for a peer. A charon that takes longer
	// hangs.
	callTimeout = 10 * time.Second
	spared      = 10 * time.Second // how long a charon that hangs is not called again
	// listBuffer is the number of list-sa events per list-sas. govici drops those that do not fit.
	listBuffer  = 1 << 14
	eventBuffer = 1 << 13
)

// errRefused is wrapped by the error of a command that charon has executed and refused.
var errRefused = errors.New("charon refuses")

// client holds one vici session for commands, one at a time, and reconnects when it is lost.
type client struct {
	socket  string
	noLists bool // listSAs is never called

	mu       sync.Mutex
	session  *vici.Session
	listed   chan vici.Event
	instance string
	hangs    error // the error of the last attempt, if charon did not answer
	hung     time.Time
}

// call executes a command with a deadline. On an error other than errRefused the session is
// closed: charon answers in order, and a late answer would be taken for that of the next command.
func (c *client) call(ctx context.Context, command string, in *vici.Message) (*vici.Message, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.callLocked(ctx, command, in)
}

func (c *client) callLocked(ctx context.Context, command string, in *vici.Message) (*vici.Message, error) {
	if err := c.dialLocked(); err != nil {
		return nil, err
	}
	limited, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	out, err := c.session.Call(limited, command, in)
	if out != nil && err != nil {
		return out, fmt.Errorf("%s: %w: %s", command, errRefused, text(out, "errmsg"))
	}
	if err != nil {
		c.closeLocked()
		err = fmt.Errorf("%s: %w", command, err)
		if ctx.Err() == nil {
			c.spareLocked(err)
		}
		return nil, err
	}
	return out, nil
}

// spareLocked records that charon did not answer, so that waiting callers fail at once.
func (c *client) spareLocked(err error) {
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
		c.hangs, c.hung = err, time.Now()
	}
}

// answers records that charon answers again.
func (c *client) answers() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hangs = nil
}

// listSAs reads the IKE SAs of one connection, or with an empty name, of all.
func (c *client) listSAs(ctx context.Context, name string) (map[string][]ikeSA, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.dialLocked(); err != nil {
		return nil, err
	}
	in := vici.NewMessage()
	if name != "" {
		in = build("ike", name)
	}
	if _, err := c.callLocked(ctx, "list-sas", in); err != nil {
		return nil, err
	}
	// The session's reader has delivered all events before the answer to the command.
	if len(c.listed) == cap(c.listed) {
		c.closeLocked()
		return nil, fmt.Errorf("list-sas: more than %d IKE SAs", cap(c.listed))
	}
	now := time.Now()
	sas := map[string][]ikeSA{}
	for len(c.listed) > 0 {
		e, ok := <-c.listed
		if !ok {
			return nil, errors.New("list-sas: session closed")
		}
		for n, s := range decodeSAs(e.Message, now) {
			sas[n] = append(sas[n], s...)
		}
	}
	return sas, nil
}

// current returns an identifier of the running charon that differs from that of its predecessor:
// its process, or when that is not visible from here, the second in which it started.
func (c *client) current() (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.dialLocked()
	return c.instance, err
}

func (c *client) dialLocked() error {
	if c.session != nil {
		return nil
	}
	if c.hangs != nil && time.Since(c.hung) < spared {
		return c.hangs
	}
	s, instance, err := dial(c.socket)
	if err != nil {
		return err
	}
	c.session, c.instance = s, instance
	if c.noLists {
		return nil
	}
	listed := make(chan vici.Event, listBuffer)
	if err := s.Subscribe("list-sa"); err != nil {
		c.closeLocked()
		err = fmt.Errorf("subscribing to list-sa: %w", err)
		c.spareLocked(err)
		return err
	}
	s.NotifyEvents(listed)
	c.listed = listed
	if instance == "" || strings.HasSuffix(instance, "-") {
		stats, err := c.callLocked(context.Background(), "stats", nil)
		if err != nil {
			return err
		}
		if uptime := section(stats, "uptime"); uptime != nil {
			c.instance += "since " + text(uptime, "since")
		}
	}
	return nil
}

func (c *client) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closeLocked()
}

func (c *client) closeLocked() {
	if c.session != nil {
		c.session.Close()
		c.session = nil
	}
}

// dial opens a session and returns the identifier of the charon that listens (see peer).
func dial(socket string) (*vici.Session, string, error) {
	instance := ""
	s, err := vici.NewSession(
		vici.WithSocketPath(socket),
		vici.WithDialContext(func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := (&net.Dialer{Timeout: callTimeout}).DialContext(ctx, network, addr)
			if err == nil {
				instance = peer(conn)
			}
			return conn, err
		}),
	)
	if err != nil {
		return nil, "", fmt.Errorf("connecting to charon: %w", err)
	}
	return s, instance, nil
}

// peer identifies the process at the other end of a unix socket by its ID and start time. The
// result ends with a hyphen when the start time cannot be read, and is empty when the process is
// not visible either.
func peer(conn net.Conn) string {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return ""
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return ""
	}
	var cred *unix.Ucred
	if raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }) != nil ||
		err != nil || cred.Pid <= 0 {
		return ""
	}
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(int(cred.Pid)) + "/stat")
	if err != nil { // the service manager may hide processes of other users (ProtectProc)
		return fmt.Sprintf("%d-", cred.Pid)
	}
	// proc_pid_stat(5): the name in parentheses may hold anything; starttime is field 22, the 20th
	// after it.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 {
		return ""
	}
	return fmt.Sprintf("%d-%s", cred.Pid, fields[19])
}
