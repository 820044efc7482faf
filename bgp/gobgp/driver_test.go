package gobgp

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/secret"
)

// fake is a child made of channels. It answers configurations by itself; everything else is up to
// the test.
type fake struct {
	conn     net.Conn
	die      func(crash)
	mu       sync.Mutex
	messages []configMessage
	configs  chan []string // names of the peers
	freed    chan struct{}
	asked    []askMessage
	ask      func(askMessage) // answers a question; nil: no answer
}

// fakes returns a start function and the children that it started.
func fakes() (func() (*process, error), chan *fake) {
	started := make(chan *fake, 100)
	return func() (*process, error) {
		ours, theirs := net.Pipe()
		done := make(chan struct{})
		var end crash
		die := sync.OnceFunc(func() { theirs.Close(); close(done) })
		f := &fake{
			conn: theirs, configs: make(chan []string, 100), freed: make(chan struct{}, 1),
			die: func(c crash) { end = c; die() },
		}
		go func() {
			for {
				kind, body, err := readFrame(theirs, maxToChild)
				if err != nil {
					return
				}
				switch kind {
				case frameConfig:
					var m configMessage
					if err := json.Unmarshal(body, &m); err != nil {
						panic(err)
					}
					var names []string
					for _, p := range m.Peers {
						names = append(names, p.Peer.Name)
					}
					f.mu.Lock()
					f.messages = append(f.messages, m)
					f.mu.Unlock()
					f.configs <- names
					writeJSON(theirs, frameReply, replyMessage{ID: m.ID, Changes: 1})
				case frameRelease:
					f.freed <- struct{}{}
				case frameAsk:
					var m askMessage
					if err := json.Unmarshal(body, &m); err != nil {
						panic(err)
					}
					f.mu.Lock()
					f.asked = append(f.asked, m)
					ask := f.ask
					f.mu.Unlock()
					if ask != nil {
						ask(m)
					}
				}
			}
		}()
		started <- f
		return &process{conn: ours, kill: die, done: done, end: func() crash { return end }}, nil
	}, started
}

func (f *fake) state(id uint32, s bgp.SessionState) {
	writeJSON(f.conn, frameState, stateMessage{Peer: id, State: s, Down: s == bgp.Idle})
}

// drive starts a Driver with fake children and three peers with the numbers 1 to 3.
func drive(t *testing.T) (*node, chan *fake) {
	d := New(Options{Log: slog.New(slog.DiscardHandler)})
	var started chan *fake
	d.start, started = fakes()
	if err := d.Apply(t.Context(), config(loPeer("a", "169.254.0.11", 1), loPeer("b", "169.254.0.12", 2), loPeer("c", "169.254.0.13", 3))); err != nil {
		t.Fatal(err)
	}
	n := &node{Driver: d, recorder: newRecorder()}
	go d.Run(t.Context(), n.recorder)
	return n, started
}

// expectConfig waits for the next configuration. A configuration that only lacks the peer to be
// admitted next may come before it, depending on which comes first, the timer or the
// configuration.
func expectConfig(t *testing.T, f *fake, want string) {
	t.Helper()
	for {
		select {
		case got := <-f.configs:
			if s := strings.Join(got, ""); s == want {
				return
			} else if s != want[:len(want)-1] {
				t.Errorf("configured %v, not %q", got, want)
				return
			}
		case <-time.After(time.Hour):
			t.Errorf("not configured %q", want)
			return
		}
	}
}

func TestNamedCrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, started := drive(t)
		f := <-started
		expectConfig(t, f, "abc")
		for id := range uint32(3) {
			f.state(id+1, bgp.Established)
			writeJSON(f.conn, frameEnd, endMessage{id + 1})
		}
		synctest.Wait()
		if n.recorder.count() != 1 || n.restarted != 1 {
			t.Errorf("restarted %d times, synced %d times", n.restarted, n.recorder.count())
		}
		start := time.Now()
		f.die(crash{peer: addr("169.254.0.12"), reason: "panic: x"})
		f = <-started
		if d := time.Since(start); d > time.Second {
			t.Errorf("started again after %v", d)
		}
		expectConfig(t, f, "ac")
		synctest.Wait()
		if s := n.state("b"); s.State != bgp.Quarantined || !s.Restarting || s.QuarantineReason != "panic: x" || s.NextTry.Sub(start) != time.Minute {
			t.Errorf("culprit %+v", s)
		}
		if s := n.state("a"); s.State != bgp.Unknown || !s.Restarting {
			t.Errorf("another %+v", s)
		}
		f.state(1, bgp.Established)
		writeJSON(f.conn, frameEnd, endMessage{1})
		synctest.Wait()
		select {
		case <-f.freed:
			t.Error("released before the End-of-RIB of c")
		default:
		}
		f.state(3, bgp.Established)
		writeJSON(f.conn, frameEnd, endMessage{3})
		<-f.freed // the release does not wait for the quarantined peer,
		if n.recorder.count() != 1 {
			t.Error("but Synced waits for its paths")
		}
		expectConfig(t, f, "abc")
		if d := time.Since(start); d < time.Minute || d > time.Minute+time.Second {
			t.Errorf("let in again after %v", d)
		}
		time.Sleep(61 * time.Second)
		if s := n.state("b"); n.recorder.count() != 2 || s.Restarting {
			t.Errorf("after its restart time: synced %d times, %+v", n.recorder.count(), s)
		}
	})
}

// TestUnnamedCrash checks that a crash that does not point to a peer holds no peer out.
func TestUnnamedCrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, started := drive(t)
		f := <-started
		for range 4 {
			expectConfig(t, f, "abc")
			synctest.Wait()
			f.die(crash{reason: "signal: killed"})
			f = <-started
		}
		expectConfig(t, f, "abc")
		for _, s := range n.Peers() {
			if s.State == bgp.Quarantined {
				t.Errorf("%+v", s)
			}
		}
	})
}

// TestEvidence checks that a goroutine label does not blame a peer that has sent nothing, and that
// the relay's evidence does blame a peer.
func TestEvidence(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	for name, c := range map[string]struct {
		end   crash
		known *evidence
		want  string
	}{
		"label":            {crash{peer: addr("169.254.0.12")}, &evidence{sent: map[string]bool{"b": true}}, "b"},
		"label, no relay":  {crash{peer: addr("169.254.0.12")}, nil, "b"},
		"label, has not":   {crash{peer: addr("169.254.0.12")}, &evidence{sent: map[string]bool{"a": true}}, ""},
		"link-local label": {crash{peer: addr("100::3:0:0:2")}, &evidence{sent: map[string]bool{"c": true}}, ""},
	} {
		d := New(Options{Log: slog.New(slog.DiscardHandler)})
		c3 := loPeer("c", "fe80::3", 3)
		c3.LocalAddress = addr("fe80::1")
		if err := d.Apply(t.Context(), config(loPeer("a", "169.254.0.11", 1), loPeer("b", "169.254.0.12", 2), c3)); err != nil {
			t.Fatal(err)
		}
		if name == "link-local label" {
			c.end.peer, _ = inner(d.ids["c"], c3)
			c.want = "c"
		}
		d.ended(newRecorder(), c.end, c.known, true)
		for _, s := range d.Peers() {
			if (s.State == bgp.Quarantined) != (s.Name == c.want) {
				t.Errorf("%s: %+v", name, s)
			}
		}
	}
	e := evidenceOf(now, map[string]time.Time{"a": now.Add(-blameWindow - 1), "b": now.Add(-blameWindow)})
	if len(e.sent) != 2 || len(e.recent) != 1 || !e.recent["b"] {
		t.Errorf("%+v", e)
	}
}

func TestMalformed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, started := drive(t)
		f := <-started
		expectConfig(t, f, "abc")
		synctest.Wait()
		if err := writeFrame(f.conn, framePaths, []byte{33, 4, 10, 0, 0, 0, 0}); err != nil {
			t.Fatal(err)
		}
		f = <-started
		expectConfig(t, f, "abc")
		if n.Starts() != 2 {
			t.Errorf("%d starts", n.Starts())
		}
	})
}

func TestCannotStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := New(Options{Log: slog.New(slog.DiscardHandler)})
		var at []time.Duration
		start := time.Now()
		d.start = func() (*process, error) {
			at = append(at, time.Since(start)/time.Second)
			return nil, fmt.Errorf("no")
		}
		if err := d.Apply(t.Context(), config()); err != nil {
			t.Fatal(err)
		}
		go d.Run(t.Context(), newRecorder())
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if want := []time.Duration{0, 1, 3, 7, 15, 31, 61, 91}; !slices.Equal(at, want) {
			t.Errorf("tried at %v", at)
		}
	})
}

func TestApplyPartly(t *testing.T) {
	d := New(Options{Log: slog.New(slog.DiscardHandler), Secrets: secrets(nil)})
	a, b := loPeer("a", "169.254.0.11", 1), loPeer("b", "169.254.0.12", 2)
	if err := d.Apply(t.Context(), config(a, b)); err != nil {
		t.Fatal(err)
	}
	twin := loPeer("twin", "169.254.0.12", 2)
	a.Password.Name, a.TTL = "gone", 7
	err := d.Apply(t.Context(), config(a, b, twin))
	if err == nil || !strings.Contains(err.Error(), "no such secret") || !strings.Contains(err.Error(), "peer b has address") {
		t.Errorf("error %v", err)
	}
	if len(d.want.Peers) != 2 || d.want.Peers[0].TTL != 1 {
		t.Errorf("wanted %+v", d.want.Peers)
	}
	if err := d.Reset(t.Context(), "twin", false); err == nil {
		t.Error("reset of an unknown peer")
	}
}

// TestUnresponsiveChild checks that a child that does not read is replaced, and that callers do
// not wait for it.
func TestUnresponsiveChild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, started := drive(t)
		f := <-started
		expectConfig(t, f, "abc")
		synctest.Wait()
		n.Driver.mu.Lock()
		ours, theirs := net.Pipe()
		n.proc.conn = ours
		n.Driver.mu.Unlock()
		defer theirs.Close()
		applied := make(chan error, 1)
		go func() { applied <- n.Apply(t.Context(), config(loPeer("a", "169.254.0.11", 1))) }()
		select {
		case err := <-applied:
			if err == nil {
				t.Error("applied")
			}
		case <-time.After(2 * readTimeout):
			t.Error("Apply still waits")
		}
		select {
		case f = <-started:
			expectConfig(t, f, "a")
		case <-time.After(time.Minute):
			t.Error("not replaced")
		}
	})
}

// TestSlowSecrets checks that the end of a session is reported while Apply waits for a secret.
func TestSlowSecrets(t *testing.T) {
	n, started := drive(t)
	f := <-started
	expectConfig(t, f, "abc")
	f.state(1, bgp.Established)
	asked, disk := make(chan struct{}), make(chan struct{})
	n.o.Secrets = func(secret.Ref) ([]byte, error) { close(asked); <-disk; return []byte("key"), nil }
	a := loPeer("a", "169.254.0.11", 1)
	a.Password.Name = "key"
	applied := make(chan error, 1)
	go func() { applied <- n.Apply(t.Context(), config(a)) }()
	<-asked
	f.state(1, bgp.Idle)
	reported := func() (idle bool) {
		n.recorder.get(func() { idle = n.recorder.peers["a"].State == bgp.Idle })
		return idle
	}
	for end := time.Now().Add(time.Minute); !reported() && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if !reported() {
		t.Error("the end of the session is not reported while Apply waits for a secret")
	}
	close(disk)
	if err := <-applied; err != nil {
		t.Error(err)
	}
}

// cgo reports whether this program is built with cgo.
func cgo() bool {
	info, _ := debug.ReadBuildInfo()
	return slices.Contains(info.Settings, debug.BuildSetting{Key: "CGO_ENABLED", Value: "1"})
}

// TestConfinedByUser is TestConfined with a daemon that is not root and has the capabilities of
// its systemd unit. Only root loses its capabilities by becoming another user.
func TestConfinedByUser(t *testing.T) {
	needConfined(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := func(test string, caps ...uintptr) (string, error) {
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+test+"$", "-test.v")
		cmd.Args[0] = self
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: 65533, Gid: 65533}, AmbientCaps: caps, Pdeathsig: syscall.SIGKILL,
		}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if cgo() {
		if out, err := run("TestMayConfine", unix.CAP_NET_ADMIN); err == nil || !strings.Contains(out, "built with cgo") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	// The first three are for the test itself, which reads files of another user's process.
	all := []uintptr{unix.CAP_SYS_PTRACE, unix.CAP_DAC_READ_SEARCH, unix.CAP_DAC_OVERRIDE, unix.CAP_NET_RAW, unix.CAP_NET_BIND_SERVICE}
	for _, c := range needed {
		all = append(all, uintptr(c))
	}
	if out, err := run("TestConfined", all...); err != nil || !strings.Contains(out, "--- PASS: TestConfined") {
		t.Errorf("%v\n%s", err, out)
	}
	lacking := []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_BIND_SERVICE, unix.CAP_NET_RAW, unix.CAP_KILL, unix.CAP_SETGID, unix.CAP_SETPCAP}
	if out, err := run("TestMayConfine", lacking...); err == nil || !strings.Contains(out, "confining it needs CAP_SETUID, CAP_SYS_ADMIN\n") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestMayConfine(t *testing.T) {
	needConfined(t)
	if err := mayConfine(); err != nil {
		t.Error(err)
	}
}

// TestConfined inspects the process from outside.
func TestConfined(t *testing.T) {
	// Descriptors without close-on-exec, as a shell or a careless library may leave them.
	var leaked []int
	for _, open := range []func() (int, error){
		func() (int, error) { return unix.Open("/", unix.O_RDONLY, 0) },
		func() (int, error) { return unix.InotifyInit1(0) },
		func() (int, error) { return unix.TimerfdCreate(unix.CLOCK_MONOTONIC, 0) },
	} {
		fd, err := open()
		if err != nil {
			t.Fatal(err)
		}
		leaked = append(leaked, fd)
	}
	t.Cleanup(func() {
		for _, fd := range leaked {
			unix.Close(fd)
		}
	})
	n := startNode(t, Options{}, config())
	eventually(t, 20*time.Second, "synced", func() bool { return n.recorder.count() == 1 })
	p := n.process()
	proc := func(name string) string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.pid, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		status := proc("task/" + thread.Name() + "/status")
		for _, line := range []string{
			"Uid:\t490179\t490179\t490179\t490179\n", "Gid:\t490179\t490179\t490179\t490179\n", "Groups:\t \n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n",
			"CapInh:\t0000000000000000\n", "CapPrm:\t0000000000000000\n", "CapEff:\t0000000000000000\n", "CapBnd:\t0000000000000000\n", "CapAmb:\t0000000000000000\n",
		} {
			if cgo() && strings.HasPrefix(line, "CapBnd") {
				continue // see prctl
			}
			if !strings.Contains(status, line) {
				t.Errorf("no %q in:\n%s", line, status)
			}
		}
	}
	for _, v := range strings.Split(strings.TrimRight(proc("environ"), "\x00"), "\x00") {
		if name, _, _ := strings.Cut(v, "="); !slices.Contains([]string{"GODEBUG", "GOTRACEBACK", "GOGC", "GOMEMLIMIT", "GOMAXPROCS"}, name) {
			t.Errorf("environment %s", v)
		}
	}
	if !strings.Contains(proc("limits"), "Max core file size        0                    0") {
		t.Errorf("limits:\n%s", proc("limits"))
	}
	if adj := proc("oom_score_adj"); adj != "500\n" {
		t.Errorf("oom_score_adj %s", adj)
	}
	link := func(name string) string {
		to, err := os.Readlink(name)
		if err != nil {
			t.Fatal(err)
		}
		return to
	}
	for _, ns := range []string{"net", "mnt", "uts"} {
		if a, b := link("/proc/self/ns/"+ns), link(fmt.Sprintf("/proc/%d/ns/%s", p.pid, ns)); a == b {
			t.Errorf("namespace %s is ours", ns)
		}
	}
	if lines := strings.Split(strings.TrimSpace(proc("net/dev")), "\n"); len(lines) != 3 || !strings.Contains(lines[2], "lo:") {
		t.Errorf("interfaces:\n%s", proc("net/dev"))
	}
	for _, dir := range []string{"root", "cwd"} {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/%s/", p.pid, dir))
		if err != nil || len(entries) > 0 {
			t.Errorf("%s: %v, %v", dir, entries, err)
		}
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/%s/x", p.pid, dir), nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Errorf("writing to %s: %v", dir, err)
		}
	}
	if m := strings.Split(strings.TrimSpace(proc("mountinfo")), "\n"); len(m) != 1 {
		t.Errorf("mounts: %q", m)
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range fds {
		to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", p.pid, e.Name()))
		if !strings.HasPrefix(to, "socket:") && to != "anon_inode:[eventpoll]" && to != "anon_inode:[eventfd]" && to != "/dev/null" && !strings.HasPrefix(to, "pipe:") {
			t.Errorf("descriptor %s is %s", e.Name(), to)
		}
	}
	// When the daemon closes the connection, the child exits.
	p.conn.Close()
	select {
	case <-p.done:
	case <-time.After(time.Minute):
		t.Error("still there")
	}
}

// TestRenumber changes the ASN, which takes a new process.
func TestRenumber(t *testing.T) {
	a := newSpeaker(t, "169.254.0.11", 65001, nil)
	c := config(loPeer("a", "169.254.0.11", 65001))
	n := startNode(t, Options{}, c)
	eventually(t, 5*time.Second, "announcement", func() bool { return slices.Equal(a.attribute("172.16.0.0/16", 2), asSequence(nodeASN)) })
	c.ASN = 64621
	if err := n.Apply(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "announcement", func() bool { return slices.Equal(a.attribute("172.16.0.0/16", 2), asSequence(64621)) })
	if n.Starts() != 2 || n.state("a").State != bgp.Established {
		t.Errorf("%d starts, %+v", n.Starts(), n.state("a"))
	}
}

// TestNone checks that the zero Config ends every session, and is accepted as the first
// configuration.
func TestNone(t *testing.T) {
	if err := New(Options{Log: slog.New(slog.DiscardHandler)}).Apply(t.Context(), bgp.Config{}); err != nil {
		t.Errorf("before the first configuration: %v", err)
	}
	a := newSpeaker(t, "169.254.0.11", 65001, nil)
	c := config(loPeer("a", "169.254.0.11", 65001))
	n := startNode(t, Options{}, c)
	up := func() bool { return a.has("172.16.0.0/16") && n.state("a").State == bgp.Established }
	eventually(t, 5*time.Second, "session", up)
	if err := n.Apply(t.Context(), bgp.Config{}); err != nil {
		t.Fatal(err)
	}
	if peers := n.Peers(); len(peers) != 0 {
		t.Errorf("%+v", peers)
	}
	if err := n.Apply(t.Context(), bgp.Config{Peers: c.Peers}); err == nil {
		t.Error("peers without an ASN")
	}
	if err := n.Apply(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "another session", func() bool { return a.count() == 2 && up() })
}

func TestReset(t *testing.T) {
	a := newSpeaker(t, "169.254.0.11", 65001, nil)
	b := newSpeaker(t, "169.254.0.12", 65002, nil)
	n := startNode(t, Options{}, config(loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65002)))
	up := func() bool { return a.has("172.16.0.0/16") && n.state("a").State == bgp.Established }
	eventually(t, 5*time.Second, "session", up)
	a.mu.Lock()
	clear(a.routes)
	a.mu.Unlock()
	if err := n.Reset(t.Context(), "a", true); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "our routes again", up)
	if a.count() != 1 {
		t.Errorf("%d sessions", a.count())
	}
	if err := n.Reset(t.Context(), "a", false); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "a new session", func() bool { return a.count() == 2 && up() })
	if b.count() != 1 {
		t.Errorf("%d sessions of b", b.count())
	}
}
