package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/test/golden"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func ago(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(noon.Add(-d)) }

// fill gives the node something of everything.
func fill(r *apitest.Router) {
	r.SetTunnels(
		&isthmusv1.TunnelStatus{
			Name: "aws-0", Kind: "ipsec", State: "up", Since: ago(3*time.Hour + 12*time.Minute), RemoteAddress: "203.0.113.10:4500", Interface: "ist1",
			Inside: []*isthmusv1.Inside{{Local: "169.254.10.2/30", Remote: "169.254.10.1"}}, Mtu: 1436, RxBytes: 5 << 20, TxBytes: 1234, RxPackets: 4000, TxPackets: 12,
			Algorithms: "IKE AES_GCM_16_256/PRF_HMAC_SHA2_384/ECP_384, ESP AES_GCM_16_256", Keyed: ago(10 * time.Minute), TimesUp: 1, NatTraversal: true, Id: 1,
		},
		&isthmusv1.TunnelStatus{
			Name: "site-0", Kind: "wireguard", State: "down", Since: ago(42 * time.Second), Interface: "ist2", LastError: "no handshake\x1b[31m for 180s",
			Inside:     []*isthmusv1.Inside{{Local: "169.254.64.2/30"}, {Local: "fd00::1/127"}},
			Conditions: []*isthmusv1.Condition{{Type: "PeerUnreachable", Message: "check the peer", Severity: "error"}}, NextTry: timestamppb.New(noon.Add(5 * time.Second)),
		},
		&isthmusv1.TunnelStatus{
			Name: "vwan-1", Kind: "ipsec", State: "dead", Since: ago(time.Minute), RemoteAddress: "203.0.113.20", Interface: "ist3", LastError: "none of the peer's IKE proposals is one of ours",
			Explanation: &isthmusv1.Explanation{
				Reason: "ike-unacceptable", Since: ago(time.Minute), What: "the peer proposed none of our IKE proposals; its last offer was \x1b[31m", Cause: "the peer wants aes128-sha1-modp2048",
				Remedy: "set the algorithms that the peer wants", Field: "tunnels[2].ipsec.ikeProposals", Value: "[aes128-sha1-modp2048]", Line: 17, There: "azure-vwan: IPsec policy of the link",
			},
			Heard: ago(9 * time.Second), Listening: ago(time.Hour),
		},
	)
	r.SetStrays(
		&isthmusv1.StrayTunnel{
			Address: "203.0.113.99", State: "dead", Since: ago(3 * time.Minute), Last: ago(5 * time.Second), Attempts: 12, Reason: "second-instance", Cloud: "azure", Beside: "azure-0",
			Why: "most likely the other half of azure-0", Remedy: "add a tunnel to it", Source: "https://example.net/active-active",
		},
		&isthmusv1.StrayTunnel{State: "dead", Reason: "second-endpoint", Cloud: "aws", Beside: "aws-0", Why: "a connection has two", Remedy: "add the other"},
	)
	r.SetPeers(
		&isthmusv1.PeerStatus{
			Name: "aws-0", Tunnel: "aws-0", Address: "169.254.10.1", Asn: 65002, State: "established", Since: ago(27 * time.Hour),
			PrefixesReceived: 3, PrefixesAccepted: 2, PrefixesAnnounced: 4, MessagesReceived: 3021, MessagesSent: 3019, TimesUp: 2, HoldTime: durationpb.New(30 * time.Second),
			Families: []string{"IPv4 unicast"}, MaxPrefixes: 1000, Limits: []string{"3 of at most 1000 prefixes received, 2 of them used"},
		},
		&isthmusv1.PeerStatus{Name: "azure-0", Tunnel: "azure-0", Address: "169.254.21.2", Asn: 65001, State: "quarantined", Since: ago(9 * time.Second), LastError: "ended the BGP process 3 times", NextTry: timestamppb.New(noon.Add(time.Minute))},
	)
	r.SetRoutes(
		&isthmusv1.Route{Prefix: "10.0.0.0/8", Source: "static", Blackhole: true, Installed: true, Since: ago(100 * time.Hour)},
		&isthmusv1.Route{
			Prefix: "172.16.0.0/16", Source: "bgp", AsPath: "65002 65100", Installed: true, Since: ago(61 * time.Second),
			NextHops: []*isthmusv1.NextHop{{Tunnel: "aws-0", Interface: "ist1", Gateway: "169.254.10.1", Peer: "aws-0"}, {Tunnel: "aws-1", Gateway: "169.254.11.1", Peer: "aws-1", Dead: true}},
		},
	)
	r.SetStarts(1)
	r.SetPaths(
		&isthmusv1.Path{
			Prefix: "10.7.0.0/16", Peer: "aws-0", State: "refused", Reason: "not-allowed", Why: "no rule of import.allow contains it: 172.16.0.0/12 le 24\x1b[31m",
			NextHop: "169.254.10.1", AsPath: "65002", Origin: "IGP", Communities: []string{"65002:7", "NO_EXPORT"}, LargeCommunities: []string{"65002:1:2"}, RouterId: "10.0.0.1", Since: ago(time.Minute),
		},
		&isthmusv1.Path{Prefix: "172.16.0.0/16", Peer: "aws-0", State: "used", NextHop: "169.254.10.1", AsPath: "65002 65100", Origin: "IGP", Med: new(uint32(0)), LocalPreference: new(uint32(200)), Since: ago(61 * time.Second)},
		&isthmusv1.Path{
			Prefix: "172.16.0.0/16", Peer: "azure-0", State: "unused", Reason: "local-pref", Winner: "aws-0", Why: "LOCAL_PREF 100 is lower than 200 of the path of peer aws-0",
			NextHop: "169.254.21.2", AsPath: "65001 65100", Origin: "INCOMPLETE", Med: new(uint32(7)), LocalPreference: new(uint32(100)), Since: ago(time.Hour), Stale: true,
		},
		&isthmusv1.Path{Prefix: "10.200.0.0/16", State: "sent", NextHop: "169.254.10.2", AsPath: "64620", Origin: "IGP", Since: ago(27 * time.Hour)},
		&isthmusv1.Path{Prefix: "172.20.0.0/16", State: "held back", Reason: "export-limit", Why: "held back: export.maxPrefixes is 1; put aggregates into announce, or raise it to what the peer takes"},
	)
	r.SetPolicies(&isthmusv1.PolicyStatus{
		Name: "partner", Action: "snat", Pool: "main", PublicAddresses: []string{"198.51.100.7"}, Sources: []string{"172.16.0.0/16", "10.0.1.0/24"},
		Protocol: "tcp", Ports: []string{"443"}, Flows: 17, Bytes: 1020, Installed: true,
	})
	r.SetPools(&isthmusv1.PoolStatus{
		Name: "main", Healthy: 1, Announce: []string{"0.0.0.0/0"}, Announced: true,
		Members: []*isthmusv1.PoolMember{
			{Address: "10.9.0.10", PublicAddress: "198.51.100.7", Zone: "a", Weight: 2, Health: "healthy", Since: ago(time.Hour)},
			{
				Address: "10.9.0.11", PublicAddress: "198.51.100.8", Zone: "b", Weight: 1, Health: "down", Since: ago(20 * time.Second), Reason: "reaches 0 of 1 targets, needs 1 (tcp://203.0.113.7:443: connection refused)",
				Targets: []*isthmusv1.ProbeTarget{{Target: "tcp://203.0.113.7:443", State: "down", Since: ago(20 * time.Second), LastError: "connection refused", Failed: ago(3 * time.Second)}},
			},
		},
	})
	direction := func(status string, since time.Duration, reason string, loss float64) *isthmusv1.LaneDirection {
		return &isthmusv1.LaneDirection{Status: status, Since: ago(since), Reason: reason, Loss: &loss}
	}
	r.SetLinks(&isthmusv1.LinkStatus{Name: "pair", Node: "isthmus-b", Usable: 1, Restarts: 1, Lanes: []*isthmusv1.LaneStatus{
		{Tunnel: "pair-1", Number: 1, Interface: "t-pair-1-4", Local: "169.254.96.2", Remote: "169.254.96.3", Out: direction("ok", time.Hour, "", 0), In: direction("ok", time.Hour, "", 0.015625),
			Usable: true, PathMtu: 1420, RttP50: durationpb.New(1234567), RttP99: durationpb.New(4 * time.Millisecond), Buckets: 128, TxPackets: 12000, RxPackets: 9000, TxBytes: 12e6, RxBytes: 9e6},
		{Tunnel: "pair-2", Number: 2, Interface: "t-pair-2-5", Local: "169.254.96.4", Remote: "169.254.96.5", Out: direction("dead", time.Minute, "isthmus-b says that no packet of this node arrives", 1), In: direction("ok", time.Hour, "", 0),
			Reason: "isthmus-b says that no packet of this node arrives", Heals: 3, Healed: ago(20 * time.Second), Heal: "new interface"},
	}})
	r.SetNames(
		&isthmusv1.NameStatus{Name: "*.example.com", Policies: []string{"partner"}, Addresses: []string{"203.0.113.1", "203.0.113.2", "203.0.113.3", "203.0.113.4", "203.0.113.5", "2001:db8::1"}},
		&isthmusv1.NameStatus{Name: "api.partner.example", Policies: []string{"partner", "web"}, Addresses: []string{"203.0.113.7"}, Gone: []*isthmusv1.GoneAddress{{Address: "203.0.113.6", Since: ago(time.Hour)}, {Address: "203.0.113.8", Since: ago(2 * time.Minute)}, {Address: "203.0.113.9", Since: ago(time.Minute)}}, Next: timestamppb.New(noon.Add(30 * time.Second)), LastError: "asking 10.9.0.2:53: no answer in time", Failing: ago(5 * time.Minute)},
	)
	r.SetPorts(
		&isthmusv1.PortUse{Pool: "main", Address: "10.200.0.7", PublicAddress: "198.51.100.7", Destination: "203.0.113.9", Protocol: "tcp", Port: 443,
			Used: 58000, Free: 6512, Percent: 89.906, Growth: 12.34, ExhaustedIn: durationpb.New(528 * time.Second), State: "low"},
		&isthmusv1.PortUse{Pool: "main", Address: "10.200.0.8", PublicAddress: "198.51.100.8", Destination: "203.0.113.9", Protocol: "tcp", Port: 443,
			Used: 12000, Free: 52512, Percent: 18.601, State: "ok", Refused: 1234},
	)
	r.SetConditions(&isthmusv1.Condition{Type: "CharonUnreachable", Message: "charon does not answer", Severity: "error", Since: ago(time.Minute)})
}

// fillEvents has the log record a tunnel that comes up, goes down for two minutes and comes up
// again, and a few others.
func fillEvents(l *event.Log) {
	at := func(d time.Duration, state string, conditions ...*isthmusv1.Condition) {
		l.Look(event.Snapshot{
			Now: noon.Add(-d), Started: noon.Add(-24 * time.Hour), Conditions: conditions,
			Tunnels: []*isthmusv1.TunnelStatus{{Name: "aws-0", State: state, LastError: "no answer\x1b[31m since the last rekey"}},
			Peers:   []*isthmusv1.PeerStatus{{Name: "aws-0", State: map[string]string{"up": "established", "down": "idle"}[state], LastError: "hold timer expired"}},
		})
	}
	limit := &isthmusv1.Condition{Type: "PrefixLimit", Severity: "error", Object: "peer azure-0", Message: "the peer sent more than 100 prefixes"}
	at(3*time.Hour, "up")
	at(30*time.Minute, "down", limit)
	at(28*time.Minute, "up", limit)
	at(10*time.Minute, "up")
}

// fillLogs has the daemon write lines of several levels and rooms.
func fillLogs(t *testing.T, log *slog.Logger) {
	t.Helper()
	for _, l := range []struct {
		ago     time.Duration
		level   slog.Level
		message string
		attrs   []any
	}{
		{24 * time.Hour, slog.LevelInfo, "serving", []any{"address", ":7443", "version", "v1"}},
		{2 * time.Hour, slog.LevelWarn, "GoBGP: received NOTIFICATION 6/4", []any{"room", "bgp", "peer", "aws-0"}},
		{90 * time.Minute, slog.LevelInfo, "connected to charon", []any{"room", "ipsec"}},
		{30 * time.Minute, slog.LevelWarn, "no proposal chosen", []any{"room", "ipsec", "tunnel", "aws-0", "text", "strange \x1b[31m\n= \"text\"", "empty", ""}},
		{time.Minute, slog.LevelError, "writing routes", []any{"room", "fib", "err", errors.New("no buffer space available")}},
		{time.Second, slog.LevelDebug, "never printed", nil},
	} {
		if !log.Enabled(t.Context(), l.level) {
			continue
		}
		r := slog.NewRecord(noon.Add(-l.ago), l.level, l.message, 0)
		r.Add(l.attrs...)
		if err := log.Handler().Handle(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
}

type world struct {
	t       *testing.T
	server  *apitest.Server
	context string
	home    string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	r := apitest.New(func() time.Time { return noon.Add(-time.Hour) })
	fill(r)
	s := apitest.Serve(t, time.Now, r)
	fillEvents(s.Events)
	fillLogs(t, s.Log)
	w := &world{t: t, server: s, home: t.TempDir()}
	// The context names the address that other machines use; here it is another one.
	data, err := os.ReadFile(s.Context)
	if err != nil {
		t.Fatal(err)
	}
	var c isthmusv1.ClientContext
	if err := protojson.Unmarshal(data, &c); err != nil {
		t.Fatal(err)
	}
	c.Address = s.Address
	w.context = filepath.Join(w.home, "admin.yaml")
	if err := writeContext(w.context, &c); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) run(ctx context.Context, stdin string, args ...string) (stdout, stderr string, code int) {
	var out, errs bytes.Buffer
	code = w.app(strings.NewReader(stdin), &out, &errs).run(ctx, args)
	return out.String(), errs.String(), code
}

func (w *world) app(stdin io.Reader, stdout, stderr io.Writer) *app {
	env := map[string]string{"ISTHMUS_CONTEXT": w.context, "HOME": w.home}
	return &app{stdin: stdin, stdout: stdout, stderr: stderr, now: func() time.Time { return noon }, wall: time.Now, uid: 0, getenv: func(k string) string { return env[k] }}
}

var volatile = []struct {
	pattern *regexp.Regexp
	with    string
}{
	{regexp.MustCompile(`\b[4-7][0-9a-f]{31}\b`), "SERIAL"},
	{regexp.MustCompile(`(expires:?) \d{4}-\S+`), "$1 TIME"},
	{regexp.MustCompile(`/\S+/([a-z]+\.yaml|api\.sock)\b`), "DIR/$1"},
	{regexp.MustCompile(`(generation 1,) [0-9-]+ [0-9:]+ UTC`), "$1 TIME"},
	{regexp.MustCompile(`isthmus (\s?)(v\d|unknown|\(devel\))\S*\n`), "isthmus ${1}VERSION\n"},
	{regexp.MustCompile(`("?client"?:) "?(v\d|unknown|\(devel\))[^\s",]*"?`), "$1 VERSION"},
}

// TestCommands runs the command lines of testdata/*.txt against a server and compares everything
// that they print. A line "$ args" is a command, "$ args <<< text" gives it standard input; "! "
// begins a line of standard error, "exit N" is the code when it is not 0, and "## " begins a
// comment.
func TestCommands(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("scripts: %v, %v", files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			w := newWorld(t)
			var got strings.Builder
			for line := range strings.Lines(string(want)) {
				command, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "$ ")
				if !ok {
					if strings.HasPrefix(line, "## ") {
						got.WriteString(line)
					}
					continue
				}
				got.WriteString(line)
				args, stdin, _ := strings.Cut(command, " <<< ")
				args = strings.ReplaceAll(args, "SOCKET", w.server.Socket)
				args = strings.ReplaceAll(args, "DIR", w.home)
				stdout, stderr, code := w.run(t.Context(), stdin, strings.Fields(args)...)
				text := stdout
				for l := range strings.Lines(stderr) {
					text += "! " + l
				}
				if code != 0 {
					text += fmt.Sprintf("exit %d\n", code)
				}
				for _, v := range volatile {
					text = v.pattern.ReplaceAllString(text, v.with)
				}
				got.WriteString(text)
			}
			golden.Check(t, file, got.String())
		})
	}
}

// TestStrangeText: what a peer says, as in the reason of its NOTIFICATION, keeps no message from
// being shown.
func TestStrangeText(t *testing.T) {
	for _, text := range []string{"a\x7fb", "a\u0080\u0084\u0085\u0086\u009fb", "a\ufffe\uffffb", "a\n\u009bb\n", "\\\x7f", "\\\\u007f", "\t\u2028\ufeff"} {
		data, err := encodeYAML(&isthmusv1.PeerStatus{Name: "a", LastError: text})
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		var back map[string]string
		if err := yaml.Unmarshal(data, &back); err != nil || back["lastError"] != text {
			t.Errorf("%q: printed %q, read back %q, %v", text, data, back["lastError"], err)
		}
		if i := bytes.ContainsAny(data, "\x7f\u009b"); i {
			t.Errorf("%q: printed %q", text, data)
		}
	}
}

// syncBuffer is a buffer that a test reads while a command writes.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func (s *syncBuffer) waitFor(t *testing.T, text string) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for time.Now().Before(deadline) {
		s.mu.Lock()
		ok := strings.Contains(s.b.String(), text)
		s.mu.Unlock()
		if ok {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%q does not come; there is\n%s", text, s.b.String())
}

func TestWatch(t *testing.T) {
	for format, want := range map[string][]string{
		"table": {
			"TIME      EVENT    TUNNEL  KIND       STATE         SINCE   PEER               INSIDE                       RX          TX          WHY\n" +
				"12:00:00  added    aws-0   ipsec      up            3h12m   203.0.113.10:4500  169.254.10.2/30              5.0 MiB     1.2 KiB     -\n",
			"12:00:00  removed  aws-0   ", "12:00:00  updated  site-0  -          up    ",
		},
		"json": {`"MARK"`, `"EVENT_TYPE_REMOVED"`, `"state":`},
	} {
		t.Run(format, func(t *testing.T) {
			w := newWorld(t)
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var out syncBuffer
			code := make(chan int, 1)
			go func() {
				code <- w.app(strings.NewReader(""), &out, io.Discard).run(ctx, []string{"watch", "tunnels", "-o", format})
			}()
			out.waitFor(t, "site-0")
			w.server.Router.SetTunnels(&isthmusv1.TunnelStatus{Name: "site-0", State: "up"})
			for _, text := range want[1:] {
				out.waitFor(t, strings.ReplaceAll(text, `"MARK"`, "EVENT_TYPE_MARK"))
			}
			stop()
			if c := <-code; c != 0 {
				t.Errorf("an interrupt ends it with %d", c)
			}
		})
	}
}

func TestGenerate(t *testing.T) {
	w := newWorld(t)
	public, _, code := w.run(t.Context(), "", "secret", "set", "site-key", "--generate", "wireguard")
	private := w.server.Router.Secret("site-key")
	if raw, err := base64.StdEncoding.DecodeString(private); code != 0 || err != nil || len(raw) != 32 || raw[0]&7 != 0 || raw[31]>>6 != 1 {
		t.Fatalf("exit %d, private key is not 32 clamped bytes: %v", code, err)
	}
	if strings.Contains(public, private) {
		t.Error("the private key is shown")
	}
	if wg, err := exec.LookPath("wg"); err == nil {
		cmd := exec.Command(wg, "pubkey")
		cmd.Stdin = strings.NewReader(private)
		if out, err := cmd.Output(); err != nil || string(out) != public {
			t.Errorf("wg says the public key is %q, %v; we say %q", out, err, public)
		}
	}
	psk, _, code := w.run(t.Context(), "", "secret", "set", "aws-psk", "--generate", "psk")
	if !regexp.MustCompile(`^[A-Za-z][A-Za-z0-9]{47}\n$`).MatchString(psk) || code != 0 || w.server.Router.Secret("aws-psk") != strings.TrimSpace(psk) {
		t.Errorf("exit %d, pre-shared key %q", code, psk)
	}
}

// TestSecretFromStdin: one line break at the end is the terminal's or the editor's, the rest is the
// secret.
func TestSecretFromStdin(t *testing.T) {
	w := newWorld(t)
	for given, want := range map[string]string{"abc\n": "abc", "abc": "abc", "a\nb\r\n": "a\nb", "\n\n": "\n", " a ": " a "} {
		if _, stderr, code := w.run(t.Context(), given, "secret", "set", "x"); code != 0 || w.server.Router.Secret("x") != want {
			t.Errorf("given %q: stored %q, want %q; exit %d, %s", given, w.server.Router.Secret("x"), want, code, stderr)
		}
	}
}

// TestSecretFromFile: what editors and PowerShell put around a value is cut off, with a note unless
// it is one line end.
func TestSecretFromFile(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "key")
	for given, noted := range map[string]bool{"abc": false, "abc\n": false, "abc\r\n": false, " abc\n": true, "abc\n\n": true, "\ufeffabc": true, "\xff\xfea\x00b\x00c\x00\r\x00\n\x00": true, "\xfe\xff\x00a\x00b\x00c": true} {
		if err := os.WriteFile(file, []byte(given), 0o600); err != nil {
			t.Fatal(err)
		}
		_, stderr, code := w.run(t.Context(), "", "secret", "set", "x", "--from-file", file)
		if code != 0 || w.server.Router.Secret("x") != "abc" || strings.Contains(stderr, "cut off") != noted {
			t.Errorf("given %q: stored %q; exit %d, %s", given, w.server.Router.Secret("x"), code, stderr)
		}
	}
}

// TestSecretFromTerminal: what is typed is not shown, and the terminal shows again afterwards.
func TestSecretFromTerminal(t *testing.T) {
	w := newWorld(t)
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	var prompt syncBuffer
	code := make(chan int, 1)
	go func() {
		code <- w.app(terminal, io.Discard, &prompt).run(t.Context(), []string{"secret", "set", "typed"})
	}()
	prompt.waitFor(t, "Value of typed (not shown): ")
	if _, err := master.WriteString("hunter2\n"); err != nil {
		t.Fatal(err)
	}
	if c := <-code; c != 0 || w.server.Router.Secret("typed") != "hunter2" {
		t.Errorf("exit %d, stored %q", c, w.server.Router.Secret("typed"))
	}
	// Typed now, it is shown; whatever the terminal showed before comes first.
	if _, err := master.WriteString("visible\n"); err != nil {
		t.Fatal(err)
	}
	shown := make([]byte, 100)
	k, err := master.Read(shown)
	if err != nil || !strings.HasPrefix(string(shown[:k]), "visible") {
		t.Errorf("the terminal showed %q, %v", shown[:k], err)
	}
}

// TestClientLife: an admin makes a reader, who can read and not write, and takes the access away
// again.
func TestClientLife(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(w.home, "reader.yaml")
	if _, stderr, code := w.run(t.Context(), "", "client", "issue", "ann", "--role", "reader", "-o", file); code != 0 {
		t.Fatalf("issuing: exit %d, %s", code, stderr)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("context file: %v, %v", info, err)
	}
	if _, stderr, code := w.run(t.Context(), "", "client", "issue", "ann", "--role", "reader", "-o", file); code != 1 || !strings.Contains(stderr, "exists already") {
		t.Errorf("issuing into the same file: exit %d, %s", code, stderr)
	}
	if out, stderr, code := w.run(t.Context(), "", "get", "tunnels", "--context", file); code != 0 || !strings.Contains(out, "aws-0") {
		t.Errorf("reading as a reader: exit %d, %s%s", code, out, stderr)
	}
	if _, stderr, code := w.run(t.Context(), "", "apply", "-f", "testdata/first.yaml", "--context", file); code != 1 || !strings.Contains(stderr, "isthmus: `isthmus apply` needs the role operator; this client is ann, reader\n") {
		t.Errorf("writing as a reader: exit %d, %s", code, stderr)
	}
	if out, _, _ := w.run(t.Context(), "", "client", "list"); !regexp.MustCompile(`(?m)^ann +reader +valid `).MatchString(out) {
		t.Errorf("clients are\n%s", out)
	}
	for _, line := range []string{"get client ann", "describe clients ann"} {
		if out, stderr, code := w.run(t.Context(), "", strings.Fields(line)...); code != 0 || !strings.Contains(out, "ann") || strings.Contains(out, "admin") {
			t.Errorf("%s: exit %d, %s%s", line, code, out, stderr)
		}
	}
	printed, stderr, code := w.run(t.Context(), "", "client", "issue", "eve", "--role", "reader", "-o", "-")
	if code != 0 || !strings.HasPrefix(printed, "address: ") || !strings.Contains(printed, "PRIVATE KEY") {
		t.Errorf("issuing to standard output: exit %d, %s", code, stderr)
	}
	serial := ""
	for _, c := range w.server.Authority.Clients() {
		if c.Name == "ann" {
			serial = c.Serial
		}
	}
	if _, stderr, code := w.run(t.Context(), "", "client", "revoke", serial); code != 0 {
		t.Errorf("revoking: exit %d, %s", code, stderr)
	}
	if out, _, _ := w.run(t.Context(), "", "get", "clients"); !regexp.MustCompile(`(?m)^ann +reader +revoked `).MatchString(out) {
		t.Errorf("clients are\n%s", out)
	}
	if out, stderr, code := w.run(t.Context(), "", "get", "tunnels", "--context", file); code != 1 || out != "" || stderr != "isthmus: the node at "+w.server.Address+" refuses this certificate: revoked or expired; see isthmus context show\n" {
		t.Errorf("reading with a revoked certificate: exit %d, %s%s", code, out, stderr)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, stderr, _ := w.run(t.Context(), "", "get", "tunnels", "--context", file); !strings.Contains(stderr, "chmod 600") {
		t.Errorf("no warning about a context that others can read: %s", stderr)
	}
}

// TestAuthorityRenew: contexts of before and of now work side by side, and the command says until
// when.
func TestAuthorityRenew(t *testing.T) {
	w := newWorld(t)
	_, stderr, code := w.run(t.Context(), "", "authority", "renew")
	if ends := time.Now().Add(30 * 24 * time.Hour).UTC().Format("2006-01-02"); code != 0 || !strings.Contains(stderr, "the former authority ends at "+ends) {
		t.Errorf("renewing: exit %d, %s", code, stderr)
	}
	if _, stderr, code := w.run(t.Context(), "", "authority", "renew"); code != 1 || !strings.Contains(stderr, "is trusted until") {
		t.Errorf("renewing twice: exit %d, %s", code, stderr)
	}
	file := filepath.Join(w.home, "new.yaml")
	if _, stderr, code := w.run(t.Context(), "", "client", "issue", "new", "--role", "admin", "-o", file); code != 0 {
		t.Fatalf("issuing: exit %d, %s", code, stderr)
	}
	for _, context := range []string{w.context, file} {
		if _, stderr, code := w.run(t.Context(), "", "get", "tunnels", "--context", context); code != 0 {
			t.Errorf("with %s: exit %d, %s", filepath.Base(context), code, stderr)
		}
	}
	if _, stderr, code := w.run(t.Context(), "", "authority", "renew", "--at-once", "--context", file); code == 0 && !strings.Contains(stderr, "has ended") {
		t.Errorf("renewing at once: %s", stderr)
	}
	if _, _, code := w.run(t.Context(), "", "get", "tunnels"); code == 0 {
		t.Error("a context of before works after the former authority has ended")
	}
}
