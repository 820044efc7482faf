package peer

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
)

// BGPConfig is the configuration of a BGP speaker of a test, as far as BIRD and FRR share it.
type BGPConfig struct {
	ASN      uint32
	RouterID netip.Addr
	// Announce is originated to every neighbour.
	Announce  []netip.Prefix
	Neighbors []Neighbor
	// Multipath uses equal paths together.
	Multipath bool
}

// Neighbor is one BGP session.
type Neighbor struct {
	// Name of the session in BIRD; FRR identifies it by Remote.
	Name string
	// Local and Remote are the session's addresses.
	Local, Remote netip.Addr
	ASN           uint32
	// Hold is the hold time, keepalives go every third of it; 90 s if 0.
	Hold time.Duration
	// Passive leaves the opening of the connection to the other side.
	Passive bool
	// Multihop is for a neighbour that is not in a connected prefix.
	Multihop bool
	// Device, if not "", leads to a neighbour that is not in a connected prefix.
	Device string
	// Transit passes on what other neighbours announced.
	Transit bool
	// MaxPrefixes ends the session when the neighbour announces more; no limit if 0.
	MaxPrefixes int
	// MED of the routes announced to it, none if 0.
	MED uint32
	// Password of TCP MD5 (RFC 2385), one word, none if "".
	Password string
}

func (n Neighbor) hold() int {
	if n.Hold == 0 {
		return 90
	}
	return int(n.Hold.Seconds())
}

// Session is a speaker's state of one neighbour.
type Session struct {
	Name        string
	Remote      netip.Addr
	State       string // "Established", else RFC 4271's or the speaker's word
	Since       time.Time
	Imported    int
	Exported    int
	Updates     int // announcements received, BIRD only
	Withdrawals int // withdrawals received, BIRD only
	// MessagesSent and MessagesReceived count since the speaker's start, FRR only.
	MessagesSent, MessagesReceived int
}

// Speaker is a running BGP daemon.
type Speaker interface {
	Sessions(context.Context) ([]Session, error)
	// SetMED changes the MED of the routes announced to a neighbour that has one, without a new
	// session.
	SetMED(context.Context, Neighbor, uint32) error
	// Bounce ends a neighbour's session, and waits for a new one.
	Bounce(context.Context, Neighbor) error
	// Stop ends the daemon as its own tools would; Process kills it.
	Stop()
	Process() *lab.Process
}

// Established returns nil when all sessions of the speaker are established, else an error that
// names the missing ones.
func Established(ctx context.Context, s Speaker) error {
	sessions, err := s.Sessions(ctx)
	if err != nil {
		return err
	}
	for _, x := range sessions {
		if x.State != "Established" {
			return fmt.Errorf("session %s (%s) is %s: %w", x.Name, x.Remote, x.State, errNotYet)
		}
	}
	if len(sessions) == 0 {
		return fmt.Errorf("no session: %w", errNotYet)
	}
	return nil
}

// BIRD is a running BIRD 2. Its log has every session's change with a time stamp.
type BIRD struct {
	process *lab.Process
	socket  string
	conf    string
	config  BGPConfig
}

// StartBIRD starts BIRD in the node and waits until it answers.
func StartBIRD(ctx context.Context, n *lab.Node, c BGPConfig) (*BIRD, error) {
	dir, err := n.Dir()
	if err != nil {
		return nil, fmt.Errorf("starting BIRD: %w", err)
	}
	b := &BIRD{socket: filepath.Join(dir, "bird.ctl")}
	conf := filepath.Join(dir, "bird.conf")
	b.conf, b.config = conf, c
	if err := os.WriteFile(conf, []byte(c.bird()), 0o600); err != nil {
		return nil, fmt.Errorf("starting BIRD: %w", err)
	}
	b.process, err = n.StartPeer("bird", []string{"TZ=UTC"}, "/usr/sbin/bird", "-f", "-c", conf, "-s", b.socket)
	if err != nil {
		return nil, err
	}
	err = lab.Until(ctx, 20*time.Second, func() error {
		select {
		case <-b.process.Done():
			log, _ := os.ReadFile(b.process.Log)
			return fmt.Errorf("it ended: %w: %s", b.process.Err(), bytes.TrimSpace(log))
		default:
		}
		_, err := b.Command("show status")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("starting BIRD in %s: %w", n.Name, err)
	}
	return b, nil
}

func (c BGPConfig) bird() string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	merge := "off"
	if c.Multipath {
		merge = "on"
	}
	p("log stderr all;\ntimeformat log iso long us;\ntimeformat protocol \"%%Y-%%m-%%dT%%H:%%M:%%S.%%6f\";")
	p("router id %s;\nprotocol device { }", c.RouterID)
	for v, word := range map[int]string{4: "ipv4", 6: "ipv6"} {
		p("protocol kernel kernel%d { merge paths %s; %s { import none; export where source = RTS_BGP; }; }", v, merge, word)
		p("protocol static announce%d { %s;", v, word)
		for _, a := range c.Announce {
			if a.Addr().Is4() == (v == 4) {
				p("  route %s unreachable;", a)
			}
		}
		p("}\nprotocol static inside%d { %s;", v, word) // so that multihop next hops resolve
		for _, n := range c.Neighbors {
			if n.Device != "" && n.Remote.Is4() == (v == 4) {
				p("  route %s via \"%s\";", netip.PrefixFrom(n.Remote, n.Remote.BitLen()), n.Device)
			}
		}
		p("}")
	}
	for _, n := range c.Neighbors {
		p("protocol bgp %s {\n  local %s as %d;\n  neighbor %s as %d;\n  hold time %d;\n  keepalive time %d;\n  connect retry time 5;\n  connect delay time 1;\n  error wait time 2, 10;",
			n.Name, n.Local, c.ASN, n.Remote, n.ASN, n.hold(), n.hold()/3)
		if n.Passive {
			p("  passive;")
		}
		if n.Multihop {
			p("  multihop;")
		}
		if n.Password != "" {
			p("  password \"%s\";", n.Password)
		}
		word, v := "ipv4", 4
		if n.Remote.Is6() {
			word, v = "ipv6", 6
		}
		export := fmt.Sprintf(`proto = "announce%d"`, v)
		if n.Transit {
			export += " || source = RTS_BGP"
		}
		med := ""
		if n.MED > 0 {
			med = fmt.Sprintf("bgp_med = %d; ", n.MED)
		}
		p("  %s {\n    import all;\n    export filter { if %s then { %saccept; } reject; };\n    next hop self;", word, export, med)
		if n.MaxPrefixes > 0 {
			p("    receive limit %d action disable;", n.MaxPrefixes)
		}
		p("  };\n}")
	}
	return b.String()
}

// Command sends BIRD one command, as birdc(8) would, and returns the answer without the reply
// codes.
func (b *BIRD) Command(command string) (string, error) {
	fail := func(err error) (string, error) { return "", fmt.Errorf("asking BIRD %q: %w", command, err) }
	conn, err := net.Dial("unix", b.socket)
	if err != nil {
		return fail(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return fail(err)
	}
	if _, err := conn.Write([]byte(command + "\n")); err != nil {
		return fail(err)
	}
	var out strings.Builder
	greeting := true
	s := bufio.NewScanner(conn)
	for s.Scan() {
		line := s.Text()
		if greeting { // "0001 BIRD 2.17.5 ready."
			greeting = false
			continue
		}
		code, err := strconv.Atoi(line[:min(4, len(line))])
		coded := err == nil && len(line) > 4
		text := strings.TrimPrefix(line, " ")
		if coded {
			text = line[5:]
		}
		out.WriteString(text + "\n")
		if coded && line[4] == ' ' {
			if code >= 8000 {
				return fail(fmt.Errorf("%s", text))
			}
			return out.String(), nil
		}
	}
	return fail(fmt.Errorf("it closed the connection: %w", s.Err()))
}

var (
	birdHead     = regexp.MustCompile(`^(\S+)\s+BGP\s+\S+\s+\S+\s+(\S+)`)
	birdState    = regexp.MustCompile(`^\s+BGP state:\s+(.*\S)`)
	birdNeighbor = regexp.MustCompile(`^\s+Neighbor address:\s+([^\s%]+)`)
	birdRoutes   = regexp.MustCompile(`^\s+Routes:\s+(\d+) imported, (?:\d+ filtered, )?(\d+) exported`)
	birdUpdates  = regexp.MustCompile(`^\s+Import updates:\s+(\d+)`)
	birdGone     = regexp.MustCompile(`^\s+Import withdraws:\s+(\d+)`)
)

// Sessions reads "show protocols all".
func (b *BIRD) Sessions(context.Context) ([]Session, error) {
	out, err := b.Command("show protocols all")
	if err != nil {
		return nil, err
	}
	return parseBIRD(out), nil
}

func parseBIRD(out string) []Session {
	var sessions []Session
	var s *Session
	number := func(text string) int { n, _ := strconv.Atoi(text); return n }
	for line := range strings.Lines(out) {
		if line[0] != ' ' && line[0] != '\n' {
			s = nil
		}
		if m := birdHead.FindStringSubmatch(line); m != nil {
			sessions = append(sessions, Session{Name: m[1]})
			s = &sessions[len(sessions)-1]
			s.Since, _ = time.Parse("2006-01-02T15:04:05.999999", m[2])
		} else if s == nil {
			continue
		} else if m := birdState.FindStringSubmatch(line); m != nil {
			s.State = m[1]
		} else if m := birdNeighbor.FindStringSubmatch(line); m != nil {
			s.Remote, _ = netip.ParseAddr(m[1])
		} else if m := birdRoutes.FindStringSubmatch(line); m != nil {
			s.Imported, s.Exported = number(m[1]), number(m[2])
		} else if m := birdUpdates.FindStringSubmatch(line); m != nil {
			s.Updates = number(m[1])
		} else if m := birdGone.FindStringSubmatch(line); m != nil {
			s.Withdrawals = number(m[1])
		}
	}
	return sessions
}

// SetMED implements Speaker.
func (b *BIRD) SetMED(_ context.Context, n Neighbor, med uint32) error {
	b.config.Neighbors = slices.Clone(b.config.Neighbors)
	for i := range b.config.Neighbors {
		if b.config.Neighbors[i].Remote == n.Remote {
			b.config.Neighbors[i].MED = med
		}
	}
	if err := os.WriteFile(b.conf, []byte(b.config.bird()), 0o600); err != nil {
		return fmt.Errorf("changing BIRD's MED: %w", err)
	}
	_, err := b.Command("configure")
	return err
}

// Bounce implements Speaker.
func (b *BIRD) Bounce(_ context.Context, n Neighbor) error {
	_, err := b.Command("restart " + n.Name)
	return err
}

// Stop ends BIRD.
func (b *BIRD) Stop() { b.process.Stop() }

// Process is BIRD's.
func (b *BIRD) Process() *lab.Process { return b.process }

// FRR is a running bgpd with its zebra and mgmtd.
type FRR struct {
	mgmtd, zebra, bgpd *lab.Process
	vty                string
}

// StartFRR starts mgmtd, zebra and bgpd in the node and waits until bgpd answers.
func StartFRR(ctx context.Context, n *lab.Node, c BGPConfig) (*FRR, error) {
	fail := func(err error) (*FRR, error) { return nil, fmt.Errorf("starting FRR in %s: %w", n.Name, err) }
	dir, err := n.Dir()
	if err != nil {
		return fail(err)
	}
	run := filepath.Join(dir, "frr") // written by FRR's own user
	if err := os.MkdirAll(run, 0o777); err != nil {
		return fail(err)
	}
	if err := os.Chmod(run, 0o777); err != nil {
		return fail(err)
	}
	conf := filepath.Join(run, "bgpd.conf")
	if err := os.WriteFile(conf, []byte(c.frr()), 0o644); err != nil {
		return fail(err)
	}
	f := &FRR{vty: filepath.Join(run, "bgpd.vty")}
	start := func(daemon string, more ...string) (*lab.Process, error) {
		// No option sets the path of mgmtd's socket, so each FRR has a /run/frr of its own, which
		// must not be visible outside. Propagation cannot be changed in a chroot, and is private
		// there already.
		const script = `p=private; unshare -m --propagation $p true 2>/dev/null || p=unchanged
exec unshare -m --propagation $p /bin/sh -c 'mkdir -p /run/frr && mount --bind "$0" /run/frr && exec "$@"' "$0" "$@"`
		argv := []string{"/bin/sh", "-c", script, run,
			"/usr/lib/frr/" + daemon, "-i", filepath.Join(run, daemon+".pid"),
			"-z", filepath.Join(run, "zserv.api"), "--vty_socket", run, "-P", "0", "--log", "stdout", "--log-level", "informational"}
		p, err := n.StartPeer(daemon, nil, append(argv, more...)...)
		if err != nil {
			return nil, err
		}
		err = lab.Until(ctx, time.Minute, func() error { _, err := os.Stat(filepath.Join(run, daemon+".vty")); return err })
		return p, err
	}
	// Without it, zebra runs a timer a hundred times a second.
	if f.mgmtd, err = start("mgmtd"); err != nil {
		return fail(err)
	}
	if f.zebra, err = start("zebra", "-f", "/dev/null"); err != nil {
		return fail(err)
	}
	if f.bgpd, err = start("bgpd", "-f", conf); err != nil {
		return fail(err)
	}
	return f, nil
}

func (c BGPConfig) frr() string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p("router bgp %d\n bgp router-id %s\n no bgp ebgp-requires-policy\n no bgp network import-check\n no bgp default ipv4-unicast\n timers bgp 3 9", c.ASN, c.RouterID)
	for _, n := range c.Neighbors {
		p(" neighbor %s remote-as %d\n neighbor %s update-source %s\n neighbor %s timers %d %d\n neighbor %s timers connect 5",
			n.Remote, n.ASN, n.Remote, n.Local, n.Remote, n.hold()/3, n.hold(), n.Remote)
		if n.Passive {
			p(" neighbor %s passive", n.Remote)
		}
		if n.Multihop {
			p(" neighbor %s ebgp-multihop 255", n.Remote)
		}
		if n.Password != "" {
			p(" neighbor %s password %s", n.Remote, n.Password)
		}
	}
	for _, word := range []string{"ipv4", "ipv6"} {
		p(" address-family %s unicast", word)
		for _, a := range c.Announce {
			if a.Addr().Is4() == (word == "ipv4") {
				p("  network %s", a)
			}
		}
		if !c.Multipath {
			p("  maximum-paths 1")
		}
		for _, n := range c.Neighbors {
			if n.Remote.Is4() != (word == "ipv4") {
				continue
			}
			p("  neighbor %s activate\n  neighbor %s next-hop-self", n.Remote, n.Remote)
			if n.MaxPrefixes > 0 {
				p("  neighbor %s maximum-prefix %d", n.Remote, n.MaxPrefixes)
			}
			if !n.Transit {
				p("  neighbor %s filter-list own out", n.Remote)
			}
			if n.MED > 0 {
				p("  neighbor %s route-map %s out", n.Remote, n.medMap())
			}
		}
		p(" exit-address-family")
	}
	p("exit\nbgp as-path access-list own permit ^$")
	for _, n := range c.Neighbors {
		if n.MED > 0 {
			p("route-map %s permit 10\n set metric %d\nexit", n.medMap(), n.MED)
		}
	}
	return b.String()
}

// medMap names the route map in FRR that sets the neighbour's MED.
func (n Neighbor) medMap() string { return "med-" + n.Remote.String() }

// SetMED implements Speaker.
func (f *FRR) SetMED(_ context.Context, n Neighbor, med uint32) error {
	_, err := f.Command("enable", "configure terminal", "route-map "+n.medMap()+" permit 10", fmt.Sprintf("set metric %d", med))
	return err
}

// Bounce implements Speaker.
func (f *FRR) Bounce(_ context.Context, n Neighbor) error {
	_, err := f.Command("enable", "clear bgp "+n.Remote.String())
	return err
}

// Command sends bgpd commands in one session, as vtysh(1) would, and returns the last answer.
func (f *FRR) Command(commands ...string) (string, error) {
	conn, err := net.Dial("unix", f.vty)
	if err != nil {
		return "", fmt.Errorf("asking FRR: %w", err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return "", fmt.Errorf("asking FRR: %w", err)
	}
	var answer string
	for _, c := range commands {
		if answer, err = vtyCommand(conn, c); err != nil {
			return "", fmt.Errorf("asking FRR %q: %w", c, err)
		}
	}
	return answer, nil
}

// vtyCommand sends a command ended by a zero byte; the answer ends with three of them
// and the command's status.
func vtyCommand(conn net.Conn, command string) (string, error) {
	if _, err := conn.Write(append([]byte(command), 0)); err != nil {
		return "", err
	}
	var out []byte
	for buf := make([]byte, 4096); ; {
		k, err := conn.Read(buf)
		out = append(out, buf[:k]...)
		if i := len(out) - 4; i >= 0 && bytes.Equal(out[i:i+3], []byte{0, 0, 0}) {
			if out[i+3] != 0 {
				return "", fmt.Errorf("status %d: %s", out[i+3], bytes.TrimSpace(out[:i]))
			}
			return string(out[:i]), nil
		}
		if err != nil {
			return "", err
		}
	}
}

// Sessions reads "show bgp neighbors json".
func (f *FRR) Sessions(context.Context) ([]Session, error) {
	out, err := f.Command("show bgp neighbors json")
	if err != nil {
		return nil, err
	}
	var neighbors map[string]json.RawMessage
	if err := json.Unmarshal([]byte(out), &neighbors); err != nil {
		return nil, fmt.Errorf("reading FRR's neighbours: %w", err)
	}
	var sessions []Session
	for addr, raw := range neighbors {
		remote, err := netip.ParseAddr(addr)
		if err != nil {
			continue // "warning" and the like
		}
		var x struct {
			State    string `json:"bgpState"`
			Epoch    int64  `json:"bgpTimerUpEstablishedEpoch"`
			Messages struct {
				Sent     int `json:"totalSent"`
				Received int `json:"totalRecv"`
			} `json:"messageStats"`
			Families map[string]struct {
				Accepted int `json:"acceptedPrefixCounter"`
				Sent     int `json:"sentPrefixCounter"`
			} `json:"addressFamilyInfo"`
		}
		if err := json.Unmarshal(raw, &x); err != nil {
			return nil, fmt.Errorf("reading FRR's neighbour %s: %w", addr, err)
		}
		s := Session{Name: addr, Remote: remote, State: x.State, MessagesSent: x.Messages.Sent, MessagesReceived: x.Messages.Received}
		if x.Epoch > 0 {
			s.Since = time.Unix(x.Epoch, 0)
		}
		for _, fam := range x.Families {
			s.Imported += fam.Accepted
			s.Exported += fam.Sent
		}
		sessions = append(sessions, s)
	}
	return sessions, nil
}

// Stop ends bgpd, zebra and mgmtd.
func (f *FRR) Stop() {
	f.bgpd.Stop()
	f.zebra.Stop()
	f.mgmtd.Stop()
}

// Process is bgpd's.
func (f *FRR) Process() *lab.Process { return f.bgpd }
