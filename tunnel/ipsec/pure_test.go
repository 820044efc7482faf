package ipsec

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/strongswan/govici/vici"

	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/test/golden"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Ring: pure.

func example() tunnel.Config {
	return tunnel.Config{
		Name: "aws-0", ID: 17, Interface: "ist17", Underlay: "ens5", MTU: 1400,
		Inside: []tunnel.Inside{{Local: netip.MustParsePrefix("169.254.10.2/30"), Remote: netip.MustParseAddr("169.254.10.1")}},
		IPsec: &tunnel.IPsec{
			LocalAddress: netip.MustParseAddr("10.0.0.5"), RemoteAddress: netip.MustParseAddr("203.0.113.7"),
			LocalIdentity: "198.51.100.9", RemoteIdentity: "203.0.113.7",
			PSK:          secret.Ref{Name: "aws", Fingerprint: "f00"},
			IKEProposals: []string{"aes256gcm16-prfsha384-ecp384"}, ESPProposals: []string{"aes256gcm16-ecp384"},
			IKERekey: 7 * time.Hour, ChildRekey: 50 * time.Minute, ChildRekeyBytes: 1000, DPDDelay: 10 * time.Second, ReplayWindow: 1024,
		},
	}
}

func TestCompile(t *testing.T) {
	msg, err := compile(example())
	if err != nil {
		t.Fatal(err)
	}
	golden.Check(t, filepath.Join("testdata", "aws-0.golden"), msg.String())
}

// TestDigests checks that a change of each field of a configuration changes the right digests.
func TestDigests(t *testing.T) {
	of := func(c tunnel.Config) loaded {
		msg, err := compile(c)
		if err != nil {
			t.Fatal(err)
		}
		return digests(c, msg)
	}
	for _, tt := range []struct {
		change         func(*tunnel.Config)
		conn, key, end bool
	}{
		{func(c *tunnel.Config) { c.MTU++; c.Interface = "x" }, false, false, false},
		{func(c *tunnel.Config) { c.ID++ }, true, false, false},
		{func(c *tunnel.Config) { c.IPsec.PSK.Fingerprint = "other" }, false, true, false},
		{func(c *tunnel.Config) { c.IPsec.LocalAddress = c.IPsec.LocalAddress.Next() }, true, false, true},
		{func(c *tunnel.Config) { c.IPsec.RemoteAddress = netip.Addr{} }, true, false, true},
		{func(c *tunnel.Config) { c.IPsec.LocalIdentity += "x" }, true, true, true},
		{func(c *tunnel.Config) { c.IPsec.RemoteIdentity += "x" }, true, true, true},
		{func(c *tunnel.Config) { c.IPsec.IKEProposals = []string{"x"} }, true, false, false},
		{func(c *tunnel.Config) { c.IPsec.ESPProposals = []string{"x"} }, true, false, false},
		{func(c *tunnel.Config) { c.IPsec.IKERekey *= 2 }, true, false, false},
		{func(c *tunnel.Config) { c.IPsec.ChildRekey *= 2 }, true, false, false},
		{func(c *tunnel.Config) { c.IPsec.ChildRekeyBytes = 0 }, true, false, false},
		{func(c *tunnel.Config) { c.IPsec.DPDDelay *= 2 }, true, false, false},
		{func(c *tunnel.Config) { c.IPsec.ReplayWindow *= 2 }, true, false, false},
		{func(c *tunnel.Config) { c.IPsec.ForceUDP = true }, true, false, true},
		{func(c *tunnel.Config) { c.IPsec.RespondOnly = true }, false, false, false},
	} {
		a, c := of(example()), example()
		tt.change(&c)
		b := of(c)
		if a.Conn != b.Conn != tt.conn || a.Key != b.Key != tt.key || a.Ends != b.Ends != tt.end {
			t.Errorf("%s: conn %v, key %v, ends %v", tunnel.Diff(example(), c), a.Conn != b.Conn, a.Key != b.Key, a.Ends != b.Ends)
		}
	}
}

func TestExplain(t *testing.T) {
	for words, want := range map[string]string{
		"received AUTHENTICATION_FAILED notify error":                              "the peer refused our authentication (AUTHENTICATION_FAILED): PSK or identities differ",
		"received NO_PROPOSAL_CHOSEN notify error":                                 "the peer accepted none of our IKE proposals, or does not know us (NO_PROPOSAL_CHOSEN)",
		"received NO_PROPOSAL_CHOSEN notify, no CHILD_SA built":                    "the peer accepted none of our ESP proposals (NO_PROPOSAL_CHOSEN)",
		"received TS_UNACCEPTABLE notify, no CHILD_SA built":                       "the peer refused our traffic selectors (TS_UNACCEPTABLE)",
		"received INVALID_SYNTAX notify error":                                     "the peer answered with INVALID_SYNTAX",
		"tried 1 shared key for '10.0.0.1' - '10.0.0.2', but MAC mismatched":       "the peer's PSK is not ours (MAC mismatched)",
		"no shared key found for '10.0.0.1' - '10.0.0.2'":                          "no PSK for '10.0.0.1' - '10.0.0.2'",
		"constraint check failed: identity '203.0.113.7' required ":                "the peer's identity is not 203.0.113.7",
		"retransmit 1 of request with message ID 0":                                noAnswer,
		"giving up after 4 retransmits":                                            noAnswer,
		"received DELETE for IKE_SA isthmus:a[3]":                                  "the peer closed the IKE SA",
		"sending DELETE for ESP CHILD_SA with SPI c1":                              closedHere,
		"generating IKE_SA_INIT request 0 [ SA KE No N(NATD_S_IP) N(NATD_D_IP) ] ": "",
		"received DELETE for ESP CHILD_SA with SPI c1":                             peerClosed,
	} {
		if got, _ := reasonOf(words); got != want {
			t.Errorf("%s:\n got %q\nwant %q", words, got, want)
		}
	}
}

func TestConditions(t *testing.T) {
	for _, tt := range []struct {
		version string
		plugins []string
		want    int
	}{
		{"6.0.1", []string{"vici", "kernel-netlink"}, 0},
		{"5.9.8", []string{"kernel-netlink", "kernel-libipsec"}, 1},
		{"5.8.4", nil, 2},
		{"5.9.7", []string{"kernel-netlink"}, 1},
		{"5.9", []string{"kernel-netlink"}, 1},
		{"5.9.14", []string{"kernel-netlink"}, 0},
		{"5.9.8dr1", []string{"kernel-netlink"}, 0},
		{"6.0", []string{"kernel-netlink"}, 0},
		{"", []string{"kernel-netlink"}, 1},
	} {
		if got := conditions(tt.version, tt.plugins); len(got) != tt.want {
			t.Errorf("%s %v: %q", tt.version, tt.plugins, got)
		}
	}
}

func TestDecodeSA(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	m := build("isthmus:a", build(
		"uniqueid", "3", "state", "ESTABLISHED", "remote-host", "203.0.113.7", "remote-port", "4500", "nat-any", "yes",
		"initiator-spi", "0a", "established", "60", "encr-alg", "AES_GCM_16", "encr-keysize", "256", "prf-alg", "PRF_HMAC_SHA2_384",
		"dh-group", "ECP_384",
		"child-sas", build("isthmus:a-9", build(
			"uniqueid", "9", "state", "INSTALLED", "spi-in", "c0000001", "spi-out", "0000000f", "install-time", "5", "encap", "yes",
			"encr-alg", "AES_CBC", "encr-keysize", "128", "integ-alg", "HMAC_SHA2_256_128", "remote-ts", []string{"0.0.0.0/0", "::/0"})),
	), "odd", "text")
	want := map[string][]ikeSA{"isthmus:a": {{
		ID: 3, State: "ESTABLISHED", SPI: "0a", Remote: netip.MustParseAddrPort("203.0.113.7:4500"), NAT: true,
		Established: now.Add(-time.Minute), Algorithms: "AES_GCM_16-256/PRF_HMAC_SHA2_384/ECP_384",
		Children: []childSA{{
			ID: 9, State: "INSTALLED", In: 0xc0000001, Out: 0xf, Installed: now.Add(-5 * time.Second), Encap: true,
			Selectors: "0.0.0.0/0, ::/0", Algorithms: "AES_CBC-128/HMAC_SHA2_256_128",
		}},
	}}}
	if got := decodeSAs(m, now); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
}

// FuzzDecode builds messages of any shape from the keys that decode reads.
func FuzzDecode(f *testing.F) {
	f.Add([]byte{1, 2, 3, 0, 4, 5}, "60")
	f.Add([]byte{0}, "looking for peer configs matching 10.0.0.4[a]...203.0.113.7[b]")
	f.Add([]byte{0}, "no IKE config found for 10.0.0.4...203.0.113.7, sending NO_PROPOSAL_CHOSEN")
	f.Fuzz(func(t *testing.T, shape []byte, value string) {
		keys := []string{
			"uniqueid", "state", "remote-host", "remote-port", "established", "child-sas", "spi-in", "install-time", "remote-ts",
			"encr-alg", "ikesa-name", "msg", "isthmus:a",
		}
		m := vici.NewMessage()
		stack := []*vici.Message{m}
		for _, b := range shape {
			top := stack[len(stack)-1]
			key := keys[int(b>>2)%len(keys)]
			switch b & 3 {
			case 0:
				_ = top.Set(key, value)
			case 1:
				_ = top.Set(key, []string{value, key})
			case 2:
				sub := vici.NewMessage()
				defer func() { _ = top.Set(key, sub) }()
				stack = append(stack, sub)
			case 3:
				if len(stack) > 1 {
					stack = stack[:len(stack)-1]
				}
			}
		}
		for _, sub := range stack[1:] {
			_ = m.Set("isthmus:a", sub)
		}
		decodeSAs(m, time.Unix(0, 0))
		decodeLine(m)
		decodeEvent(vici.Event{Name: "child-updown", Message: m})
		reasonOf(value)
		w := newLogWatcher()
		w.handle(line{sa: "1", words: value}, time.Unix(0, 0))
	})
}

// clock drives a record through time as Run would.
type clock struct {
	t   *testing.T
	now time.Time
	r   *record
	rnd *rand.Rand
}

func newClock(t *testing.T) *clock {
	c := &clock{t: t, now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), rnd: rand.New(rand.NewPCG(1, 2))}
	c.r = &record{cfg: example(), known: true, stale: map[uint32]time.Time{}, state: tunnel.State{Name: "aws-0", Status: tunnel.Unknown}}
	return c
}

// step advances the time, makes the record decide about the SAs, and compares the result.
func (c *clock) step(after time.Duration, want string, status tunnel.Status, sas ...ikeSA) {
	c.t.Helper()
	c.now = c.now.Add(after)
	c.r.sas = sas
	actions, _ := c.r.decide(c.now, c.rnd)
	var got []string
	for _, a := range actions {
		switch {
		case a.initiate:
			got = append(got, "initiate")
		case a.terminateIKE != 0:
			got = append(got, "end ike "+string('0'+rune(a.terminateIKE)))
		default:
			got = append(got, "end child "+string('0'+rune(a.terminateChild)))
		}
	}
	if s := strings.Join(got, ", "); s != want || c.r.state.Status != status {
		c.t.Errorf("actions %q, want %q; %s, want %s", s, want, c.r.state.Status, status)
	}
}

func ike(id uint32, state string, children ...childSA) ikeSA {
	return ikeSA{ID: id, State: state, SPI: string('0' + rune(id)), Children: children}
}

func child(id uint32, state string) childSA {
	return childSA{ID: id, State: state, In: id, Out: id, Selectors: "0.0.0.0/0"}
}

func TestDecide(t *testing.T) {
	up := ike(1, "ESTABLISHED", child(1, "INSTALLED"))
	t.Run("from nothing to up, lost, back at once", func(t *testing.T) {
		c := newClock(t)
		c.step(0, "initiate", tunnel.Connecting)
		c.step(100*time.Millisecond, "", tunnel.Connecting)
		c.step(100*time.Millisecond, "", tunnel.Connecting, ike(1, "CONNECTING"))
		c.step(time.Second, "", tunnel.Up, up)
		c.step(time.Minute, "", tunnel.Up, up)
		c.step(time.Minute, "initiate", tunnel.Connecting)
		if s := c.r.state; s.TimesUp != 1 || s.LastError != "the CHILD SA was closed" {
			t.Errorf("%+v", s)
		}
	})
	t.Run("failures wait longer each time, up to a minute", func(t *testing.T) {
		c := newClock(t)
		for n := range 12 {
			c.step(2*time.Minute, "initiate", tunnel.Connecting)
			c.step(time.Second, "", tunnel.Connecting, ike(1, "CONNECTING"))
			c.step(time.Second, "", tunnel.Down)
			pause := c.r.state.NextTry.Sub(c.now)
			most := min(time.Second<<n, time.Minute)
			if pause < most/2 || pause > most {
				t.Errorf("after failure %d the next try is in %v, want %v to %v", n+1, pause, most/2, most)
			}
			c.step(pause-1, "", tunnel.Down)
		}
	})
	t.Run("accepted and dropped at once does not run in circles", func(t *testing.T) {
		c := newClock(t)
		c.step(0, "initiate", tunnel.Connecting)
		c.step(time.Second, "", tunnel.Up, up)
		c.step(time.Second, "", tunnel.Down)
		if c.r.next.IsZero() {
			t.Error("no pause")
		}
	})
	t.Run("the moment of an IKE rekeying does not count as a loss", func(t *testing.T) {
		c := newClock(t)
		c.step(0, "", tunnel.Up, up)
		c.step(time.Minute, "", tunnel.Up, ike(1, "REKEYING"), ike(2, "ESTABLISHED"))
		c.step(100*time.Millisecond, "", tunnel.Up, ike(2, "ESTABLISHED", child(1, "INSTALLED")))
	})
	t.Run("a CHILD SA is missing", func(t *testing.T) {
		c := newClock(t)
		c.step(0, "", tunnel.Up, up)
		c.step(time.Minute, "", tunnel.Up, ike(1, "ESTABLISHED"))
		c.step(blink, "initiate", tunnel.Connecting, ike(1, "ESTABLISHED"))
		c.step(time.Second, "", tunnel.Up, up)
	})
	t.Run("a CHILD rekeying does not count as a duplicate", func(t *testing.T) {
		c := newClock(t)
		for range 10 {
			c.step(overlap, "", tunnel.Up, ike(1, "ESTABLISHED", child(1, "REKEYED"), child(2, "INSTALLED")))
		}
	})
	t.Run("a late reading does not change when an SA was made", func(t *testing.T) {
		c := newClock(t)
		made := c.now
		read := func(want time.Time, ikeSPI string, childSPI uint32, off time.Duration) {
			t.Helper()
			of := child(1, "INSTALLED")
			of.In, of.Installed = childSPI, made.Add(off)
			sa := ike(1, "ESTABLISHED", of)
			sa.SPI, sa.Established = ikeSPI, made.Add(off)
			c.step(time.Second, "", tunnel.Up, sa)
			if s := c.r.state; !s.Established.Equal(want) || !s.Keyed.Equal(want) {
				t.Errorf("established %v, keyed %v, want %v", s.Established, s.Keyed, want)
			}
		}
		read(made, "a", 1, 0)
		read(made, "a", 1, 8*time.Second)
		read(made, "a", 1, -8*time.Second)
		read(made.Add(time.Second), "b", 2, time.Second) // made again
		read(made.Add(time.Hour), "b", 2, time.Hour)     // the clock was set
	})
	t.Run("the older duplicate ends, after a while", func(t *testing.T) {
		c := newClock(t)
		older, newer := child(2, "INSTALLED"), child(1, "INSTALLED")
		older.Installed, newer.Installed = c.now.Add(-time.Hour), c.now.Add(-time.Minute)
		sas := []ikeSA{ike(2, "ESTABLISHED", older), ike(1, "ESTABLISHED", newer)}
		c.step(0, "", tunnel.Up, sas...)
		c.step(overlap, "end ike 2", tunnel.Up, sas...)
		both := ike(1, "ESTABLISHED", older, newer)
		c.step(overlap, "", tunnel.Up, both) // the next one is tolerated for longer
		c.step(3*overlap, "end child 2", tunnel.Up, both)
		c.step(time.Second, "", tunnel.Up, up)
	})
	t.Run("a peer that opens another one each time is left in peace", func(t *testing.T) {
		c := newClock(t)
		ended := 0
		older, newer := child(2, "INSTALLED"), child(1, "INSTALLED")
		older.Installed, newer.Installed = c.now.Add(-time.Hour), c.now.Add(-time.Minute)
		c.r.sas = []ikeSA{ike(2, "ESTABLISHED", older), ike(1, "ESTABLISHED", newer)}
		for range 3600 {
			actions, _ := c.r.decide(c.now, c.rnd)
			ended += len(actions)
			c.now = c.now.Add(time.Second)
		}
		if ended == 0 || ended > 6 {
			t.Errorf("%d SAs were ended in an hour", ended)
		}
	})
	t.Run("both ends keep the same one of two made together", func(t *testing.T) {
		c := newClock(t)
		a, b := child(1, "INSTALLED"), child(2, "INSTALLED")
		a.Installed, b.Installed = c.now.Add(time.Second), c.now
		c.step(0, "", tunnel.Up, ike(1, "ESTABLISHED", a), ike(2, "ESTABLISHED", b))
		c.step(overlap, "end ike 1", tunnel.Up, ike(1, "ESTABLISHED", a), ike(2, "ESTABLISHED", b))
		a, b = b, a // the other end, one second earlier and later
		c = newClock(t)
		b.ID, a.ID = 1, 2
		c.step(0, "", tunnel.Up, ike(2, "ESTABLISHED", a), ike(1, "ESTABLISHED", b))
		c.step(overlap, "end ike 1", tunnel.Up, ike(2, "ESTABLISHED", a), ike(1, "ESTABLISHED", b))
	})
	t.Run("new ends are negotiated next to the old", func(t *testing.T) {
		c := newClock(t)
		c.step(0, "", tunnel.Up, up)
		c.r.stale[1] = c.now
		c.step(time.Second, "initiate", tunnel.Up, up)
		c.step(time.Second, "", tunnel.Up, up, ike(2, "CONNECTING"))
		c.step(time.Second, "end ike 1", tunnel.Up, up, ike(2, "ESTABLISHED", child(2, "INSTALLED")))
		if c.r.state.TimesUp != 1 {
			t.Errorf("%+v", c.r.state)
		}
	})
	t.Run("the old ends do not stay forever", func(t *testing.T) {
		c := newClock(t)
		c.step(0, "", tunnel.Up, up)
		c.r.stale[1] = c.now
		c.step(time.Second, "initiate", tunnel.Up, up)
		c.step(replace, "end ike 1", tunnel.Up, up)
	})
	t.Run("charon is away", func(t *testing.T) {
		c := newClock(t)
		c.step(0, "", tunnel.Up, up)
		c.r.known = false
		c.step(time.Minute, "", tunnel.Unknown)
		c.r.known = true // the same charon
		c.step(time.Second, "", tunnel.Up, up)
		if c.r.state.TimesUp != 1 || !c.r.state.Since.Before(c.now.Add(-time.Minute)) {
			t.Errorf("losing the connection to charon counts as a loss: %+v", c.r.state)
		}
	})
	t.Run("charon began again", func(t *testing.T) {
		c := newClock(t)
		c.step(0, "", tunnel.Up, up)
		c.r.held = c.now.Add(2 * time.Minute)
		c.step(time.Minute, "initiate", tunnel.Unknown)
		c.step(time.Second, "", tunnel.Up, up)
		c.r.held = c.now.Add(2 * time.Minute)
		c.step(time.Minute, "initiate", tunnel.Unknown)
		c.step(time.Minute, "", tunnel.Connecting, ike(1, "CONNECTING"))
	})
	t.Run("respond only", func(t *testing.T) {
		c := newClock(t)
		c.r.cfg.IPsec.RespondOnly = true
		c.step(0, "", tunnel.Down)
		c.step(time.Hour, "", tunnel.Down)
		if c.r.state.LastError != "waiting for the peer to connect" {
			t.Errorf("%+v", c.r.state)
		}
		c.step(time.Second, "", tunnel.Up, up)
	})
	t.Run("an SA that never comes to be is given up", func(t *testing.T) {
		c := newClock(t)
		c.step(0, "initiate", tunnel.Connecting)
		c.step(time.Second, "", tunnel.Connecting, ike(1, "CONNECTING"))
		c.step(stuck, "end ike 1", tunnel.Connecting, ike(1, "CONNECTING"))
	})
}

// TestDecideWalk feeds random SAs and holds. It checks that nothing is initiated while an SA is
// live, pending or begun, nor twice in a row without a pause, and that a tunnel is Up exactly when
// a CHILD SA is live.
func TestDecideWalk(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		c := newClock(t)
		states := []string{"CREATED", "CONNECTING", "ESTABLISHED", "REKEYING", "REKEYED", "DELETING"}
		children := []string{"CREATED", "INSTALLING", "INSTALLED", "REKEYING", "REKEYED", "DELETING", "DELETED"}
		var last time.Time
		for range 200 {
			c.now = c.now.Add(time.Duration(rnd.IntN(3000)) * time.Millisecond)
			c.r.sas = nil
			live, pending, bare := false, false, false
			for i := range rnd.IntN(3) {
				s := ike(uint32(i+1), states[rnd.IntN(len(states))])
				for j := range rnd.IntN(3) {
					s.Children = append(s.Children, child(uint32(10*i+j+1), children[rnd.IntN(len(children))]))
				}
				alive := false
				for _, ch := range s.Children {
					live = live || ch.live() && s.State != "DELETING"
					pending = pending || ch.pending() && s.established()
					alive = alive || ch.live() || ch.pending()
				}
				pending = pending || s.pending()
				bare = bare || s.established() && !alive
				c.r.sas = append(c.r.sas, s)
			}
			actions, again := c.r.decide(c.now, c.rnd)
			initiated := false
			for _, a := range actions {
				initiated = initiated || a.initiate
			}
			if initiated && (live || pending) {
				t.Fatalf("seed %d: initiated next to %+v", seed, c.r.sas)
			}
			if initiated && c.now.Sub(last) < begin {
				t.Fatalf("seed %d: initiated again after %v", seed, c.now.Sub(last))
			}
			if initiated {
				last = c.now
			}
			if status := c.r.state.Status; live && status != tunnel.Up || !live && !bare && status == tunnel.Up {
				t.Fatalf("seed %d: %s with %+v", seed, status, c.r.sas)
			}
			if !again.IsZero() && !again.After(c.now) {
				t.Fatalf("seed %d: to be woken in the past", seed)
			}
			if !live && !pending && !initiated && again.IsZero() {
				t.Fatalf("seed %d: down and nothing planned: %+v", seed, c.r)
			}
		}
	}
}

func TestLedger(t *testing.T) {
	dir := t.TempDir()
	open := func(instance string) *ledger {
		t.Helper()
		l, err := openLedger(dir, instance)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(l.close)
		return l
	}
	l := open("1-1")
	a, b := loaded{"a", "c1", "k1", "e1"}, loaded{"b", "c2", "k2", "e2"}
	for _, e := range []loaded{a, b, {Name: "b"}, b, {Name: "a", Conn: "c9"}, a} {
		if err := l.put(e); err != nil {
			t.Fatal(err)
		}
	}
	want := map[string]loaded{"a": a, "b": b}
	if got := open("1-1").entries; !reflect.DeepEqual(got, want) {
		t.Errorf("read back %v", got)
	}
	text, _ := os.ReadFile(filepath.Join(dir, "charon.loaded"))
	if err := os.WriteFile(filepath.Join(dir, "charon.loaded"), text[:len(text)-5], 0o600); err != nil {
		t.Fatal(err)
	}
	if got := open("1-1").entries; len(got) != 1 {
		t.Errorf("after a cut: %v", got)
	}
	if got := open("2-1").entries; len(got) != 0 {
		t.Errorf("of another charon: %v", got)
	}
	if got := open("1-1").entries; len(got) != 0 {
		t.Errorf("back at the first: %v", got)
	}
}

func TestParseESP(t *testing.T) {
	ip := func(proto byte, payload ...byte) []byte {
		h := make([]byte, 20)
		h[0], h[9] = 0x45, proto
		binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
		return append(h, payload...)
	}
	for _, tt := range []struct {
		packet []byte
		spi    uint32 // number 7
	}{
		{ip(50, 0xc0, 0, 0, 1, 0, 0, 0, 7), 0xc0000001},
		{ip(17, 0x11, 0x94, 0x11, 0x94, 0, 16, 0, 0, 0xc0, 0, 0, 2, 0, 0, 0, 7), 0xc0000002},
		{ip(17, 0x11, 0x94, 0x11, 0x94, 0, 16, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4), 0},
		{ip(17, 0x11, 0x94, 0x11, 0x94, 0, 9, 0, 0, 0xff), 0},
		{ip(6, 1, 2, 3, 4, 5, 6, 7, 8), 0},
		{nil, 0},
	} {
		if id, sequence, ok := parseESP(tt.packet); id.spi != tt.spi || ok != (tt.spi != 0) || ok && sequence != 7 {
			t.Errorf("% x: %x, %d, %v", tt.packet, id.spi, sequence, ok)
		}
	}
}
