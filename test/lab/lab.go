// Package lab builds network topologies out of network namespaces: nodes, links, bridges, 1:1 NAT,
// programs inside them, and the two checks of every test: was a packet lost (Ping), and did a
// packet go where it must not (Capture).
//
// The same code runs on this machine's kernel and in the guest of test/vm. All
// traffic stays inside namespaces that the lab made. Close, an interrupt, and the next New
// after a crash leave nothing behind: no process, no namespace, no file.
package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// runDir holds one directory per lab, named like its namespaces.
const runDir = "/run"

// Options of a lab. The zero value is usable.
type Options struct {
	// Prefix of the namespaces' names; "ist-PID-N-" if "". Inside a guest, which has no other
	// namespaces, "-" gives names without a prefix.
	Prefix string
	// Root is the tree that the peers' programs (charon, BIRD, FRR) are run from:
	// "/" (also if "") or the directory of a Debian tree.
	Root string
}

// Lab is a set of nodes. Building calls (Node, Link, Bridge, Node.IP, …) only queue commands; Up
// runs them. Methods may be called from several goroutines.
type Lab struct {
	// Dir is this lab's directory: one subdirectory per node, with logs and state of its programs.
	Dir string

	prefix, root string

	mu     sync.Mutex
	nodes  []*Node
	links  []string // lines for ip -batch
	procs  []*Process
	closed bool
}

// Node is one network namespace.
type Node struct {
	// Name is the short name, Namespace the one in /run/netns.
	Name, Namespace string

	lab  *Lab
	up   bool
	todo []string // lines for ip -batch
}

// End is one end of a link: an interface of a node.
type End struct {
	Node  *Node
	Name  string
	Addrs []netip.Prefix
}

var (
	labsMu sync.Mutex
	labs   = map[*Lab]bool{}
	serial int
	onSig  sync.Once
)

// New starts an empty lab. It needs root.
func New(o Options) (*Lab, error) {
	if os.Getuid() != 0 {
		return nil, errors.New("making a lab: network namespaces need root")
	}
	onSig.Do(func() {
		c := make(chan os.Signal, 1)
		signal.Notify(c, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
		go func() {
			<-c
			labsMu.Lock()
			for l := range labs {
				l.close()
			}
			os.Exit(130)
		}()
	})
	sweep()
	labsMu.Lock()
	defer labsMu.Unlock()
	serial++
	id := fmt.Sprintf("ist-%d-%d-", os.Getpid(), serial)
	l := &Lab{Dir: filepath.Join(runDir, strings.TrimSuffix(id, "-")), prefix: id, root: o.Root}
	if o.Prefix != "" {
		l.prefix = strings.TrimPrefix(o.Prefix, "-")
	}
	if l.root == "" {
		l.root = "/"
	}
	if err := os.MkdirAll(l.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("making a lab: %w", err)
	}
	labs[l] = true
	return l, nil
}

// sweep removes leftovers of labs of dead processes. Their programs died with them (parent death
// signal), or are found in their namespaces.
func sweep() {
	dirs, _ := filepath.Glob(filepath.Join(runDir, "ist-*-*"))
	for _, dir := range dirs {
		id := filepath.Base(dir)
		pid, err := strconv.Atoi(strings.Split(id, "-")[1])
		if err != nil || unix.Kill(pid, 0) == nil {
			continue
		}
		spaces, _ := filepath.Glob("/run/netns/" + id + "-*")
		for _, ns := range spaces {
			killIn(ns)
			_ = exec.Command("ip", "netns", "del", filepath.Base(ns)).Run()
		}
		_ = os.RemoveAll(dir)
	}
}

// Node adds a namespace that forwards IPv4 and IPv6, without reverse path filter,
// redirects and duplicate address detection, hashing equal paths on layer 4.
func (l *Lab) Node(name string) *Node {
	n := &Node{Name: name, Namespace: l.prefix + name, lab: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.nodes = append(l.nodes, n)
	return n
}

// Nodes are all nodes in the order they were made.
func (l *Lab) Nodes() []*Node {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.nodes)
}

// Link adds a veth pair.
func (l *Lab) Link(a, b End) {
	l.mu.Lock()
	l.links = append(l.links, fmt.Sprintf("link add name %s netns %s type veth peer name %s netns %s", a.Name, a.Node.Namespace, b.Name, b.Node.Namespace))
	l.mu.Unlock()
	for _, e := range []End{a, b} {
		e.Node.address(e.Name, e.Addrs)
	}
}

// Bridge adds a bridge to the node. Ports are linked with Port.
func (n *Node) Bridge(name string, addrs ...netip.Prefix) {
	n.IP("link add %s type bridge forward_delay 0 mcast_snooping 0", name)
	n.address(name, addrs)
}

// Port links e to the bridge of node n; the port is named "p-" and e's node.
func (n *Node) Port(bridge string, e End) {
	port := "p-" + e.Node.Name
	n.lab.Link(e, End{Node: n, Name: port})
	n.IP("link set %s master %s", port, bridge)
}

func (n *Node) address(dev string, addrs []netip.Prefix) {
	for _, a := range addrs {
		n.IP("addr add %s dev %s", a, dev)
	}
	n.IP("link set %s up", dev)
}

// IP queues a command for ip(8) in the node, without the leading "ip".
func (n *Node) IP(format string, args ...any) {
	n.lab.mu.Lock()
	defer n.lab.mu.Unlock()
	n.todo = append(n.todo, fmt.Sprintf(format, args...))
}

// Up runs the commands queued since the last Up, each node's part in order. It starts as few
// programs as possible: under emulation each costs 0.1 s.
func (l *Lab) Up(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errors.New("bringing the lab up: it is closed")
	}
	var add []string
	for _, n := range l.nodes {
		if !n.up {
			add = append(add, "netns add "+n.Namespace)
		}
	}
	if err := ipBatch(ctx, "", add); err != nil {
		return fmt.Errorf("adding nodes: %w", err)
	}
	// Before the links, because a new interface takes its values from "default".
	for _, n := range l.nodes {
		if n.up {
			continue
		}
		n.up = true
		for _, s := range []string{
			"ipv4/ip_forward=1", "ipv6/conf/all/forwarding=1", "ipv6/conf/default/forwarding=1", "ipv6/conf/default/accept_dad=0", "ipv6/conf/all/accept_dad=0",
			"ipv4/conf/all/rp_filter=0", "ipv4/conf/default/rp_filter=0",
			"ipv4/conf/all/send_redirects=0", "ipv4/conf/default/send_redirects=0",
			"ipv4/fib_multipath_hash_policy=1", "ipv6/fib_multipath_hash_policy=1",
		} {
			key, value, _ := strings.Cut(s, "=")
			if err := n.Sysctl(key, value); err != nil {
				return err
			}
		}
		n.todo = append([]string{"link set lo up"}, n.todo...)
	}
	if err := ipBatch(ctx, "", l.links); err != nil {
		return fmt.Errorf("adding links: %w", err)
	}
	l.links = nil
	errs := make([]error, len(l.nodes))
	var wg sync.WaitGroup
	busy := make(chan struct{}, 4)
	for i, n := range l.nodes {
		todo := n.todo
		n.todo = nil
		wg.Go(func() {
			busy <- struct{}{}
			defer func() { <-busy }()
			if err := ipBatch(ctx, n.Namespace, todo); err != nil {
				errs[i] = fmt.Errorf("configuring node %s: %w", n.Name, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// ipBatch passes the lines to one ip(8). An error names the line that failed, or all lines when ip
// does not report which.
func ipBatch(ctx context.Context, namespace string, lines []string) error {
	if len(lines) == 0 {
		return nil
	}
	args := []string{"-batch", "-"}
	if namespace != "" {
		args = append([]string{"-n", namespace}, args...)
	}
	cmd := exec.CommandContext(ctx, "ip", args...)
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	at := strings.Join(lines, "; ")
	if _, where, ok := strings.Cut(string(out), "Command failed -:"); ok {
		if i, convErr := strconv.Atoi(strings.TrimSpace(where)); convErr == nil && i <= len(lines) {
			at = lines[i-1]
		}
	}
	return fmt.Errorf("running ip %s: %w: %s", at, err, bytes.TrimSpace(out))
}

// Close ends every program of the lab and removes its namespaces and files. It may be
// called more than once.
func (l *Lab) Close() error {
	labsMu.Lock()
	delete(labs, l)
	labsMu.Unlock()
	return l.close()
}

func (l *Lab) close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	procs, nodes := l.procs, l.nodes
	l.mu.Unlock()
	for _, p := range procs {
		p.Signal(unix.SIGKILL)
	}
	var del []string
	for _, n := range nodes {
		if n.up {
			killIn(n.path())
			del = append(del, "netns del "+n.Namespace)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err := ipBatch(ctx, "", del)
	return errors.Join(err, os.RemoveAll(l.Dir))
}

// Save copies the regular files of the lab's directory, logs and configurations, to dst, together
// with each node's addresses, routes and rules. It is for the analysis of a failed test.
func (l *Lab) Save(ctx context.Context, dst string) error {
	for _, n := range l.Nodes() {
		from, err := n.Dir()
		if err != nil {
			return err
		}
		to := filepath.Join(dst, n.Name)
		if err := os.MkdirAll(to, 0o755); err != nil {
			return err
		}
		out, _ := n.Exec(ctx, "sh", "-c", "ip addr; ip rule; ip route show table all; ip -s xfrm state; nft list ruleset")
		if err := os.WriteFile(filepath.Join(to, "state.txt"), []byte(out), 0o644); err != nil {
			return err
		}
		files, _ := filepath.Glob(from + "/*")
		more, _ := filepath.Glob(from + "/*/*")
		for _, f := range append(files, more...) {
			if fi, err := os.Lstat(f); err == nil && fi.Mode().IsRegular() {
				b, err := os.ReadFile(f)
				if err != nil {
					return err
				}
				if err := os.WriteFile(filepath.Join(to, filepath.Base(f)), b, 0o644); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (n *Node) path() string { return "/run/netns/" + n.Namespace }

// killIn kills the processes in a namespace of ours: children of programs
// that we started and that detached themselves.
func killIn(ns string) {
	var want, have unix.Stat_t
	if unix.Stat(ns, &want) != nil {
		return
	}
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		pid, _ := strconv.Atoi(filepath.Base(p))
		if pid != os.Getpid() && unix.Stat(p+"/ns/net", &have) == nil && have.Ino == want.Ino && have.Dev == want.Dev {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}
