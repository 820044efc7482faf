package ipsec

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/tunnel"
)

// Ring: pure. Log lines of charon 6.0.1 talking to another charon 6.0.1, with the namespace's
// addresses replaced.

// script feeds lines "SA NAME|WORDS" to a driver that wants the tunnel a, which is not up.
func script(t *testing.T, now time.Time, lines ...string) (*Driver, *record) {
	t.Helper()
	d := New(Options{})
	if err := d.want(example(), loaded{Name: "aws-0"}); err != nil {
		t.Fatal(err)
	}
	r := d.records["aws-0"]
	for _, l := range lines {
		head, words, ok := strings.Cut(l, "|")
		sa, name, _ := strings.Cut(head, " ")
		if !ok {
			t.Fatalf("no line: %s", l)
		}
		d.handleLine(line{sa: sa, name: name, words: words}, now)
	}
	return d, r
}

func linesFrom(peer string, lines ...string) (out []string) {
	for _, l := range append([]string{"received packet: from " + peer + "[500] to 10.0.0.4[500] (464 bytes)"}, lines...) {
		out = append(out, "7 (unnamed)|"+l)
	}
	return out
}

func TestPeerLog(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	peer := example().IPsec.RemoteAddress.String()
	named := "7 isthmus:aws-0|"
	for name, tt := range map[string]struct {
		lines    []string
		want     tunnel.Reason
		evidence tunnel.Evidence
	}{
		"IKE proposal, peer calls": {linesFrom(peer,
			"parsed IKE_SA_INIT request 0 [ SA KE No ]",
			peer+" is initiating an IKE_SA",
			"received proposals: IKE:AES_CBC_128/HMAC_SHA1_96/PRF_HMAC_SHA1/MODP_2048, IKE:3DES_CBC/HMAC_MD5_96/PRF_HMAC_MD5/MODP_1024",
			"configured proposals: IKE:AES_GCM_16_256/PRF_HMAC_SHA2_256/ECP_256",
			"received proposals unacceptable",
		), tunnel.IKEUnacceptable, tunnel.Evidence{IKEOffer: "AES_CBC_128/HMAC_SHA1_96/PRF_HMAC_SHA1/MODP_2048, 3DES_CBC/HMAC_MD5_96/PRF_HMAC_MD5/MODP_1024"}},
		"identity, peer calls": {linesFrom(peer,
			"looking for peer configs matching 10.0.0.4[198.51.100.1]..."+peer+"[192.168.7.4]",
			"no matching peer config found",
		), tunnel.Identity, tunnel.Evidence{CalledUs: "198.51.100.1", Identity: "192.168.7.4"}},
		"IKEv1, peer calls": {linesFrom(peer,
			"parsed ID_PROT request 0 [ SA V V V V ]",
			"no IKE config found for 10.0.0.4..."+peer+", sending NO_PROPOSAL_CHOSEN",
		), tunnel.IKEVersion, tunnel.Evidence{IKEv1: true}},
		"half open": {linesFrom(peer, "deleting half open IKE_SA with "+peer+" after timeout"), "", tunnel.Evidence{HalfOpen: true}},
		"known, but not loaded yet": {linesFrom(peer,
			"parsed IKE_SA_INIT request 0 [ SA KE No ]",
			"no IKE config found for 10.0.0.4..."+peer+", sending NO_PROPOSAL_CHOSEN",
		), "", tunnel.Evidence{}},
		"IKE proposal, we call":          {[]string{named + "received NO_PROPOSAL_CHOSEN notify error"}, tunnel.IKERefused, tunnel.Evidence{}},
		"ESP proposal, we call":          {[]string{named + "received NO_PROPOSAL_CHOSEN notify, no CHILD_SA built"}, tunnel.ESPRefused, tunnel.Evidence{}},
		"key, we call":                   {[]string{named + "received AUTHENTICATION_FAILED notify error"}, tunnel.AuthRefused, tunnel.Evidence{}},
		"certificate, peer calls":        {[]string{named + "no trusted RSA public key found for '203.0.113.7'"}, tunnel.Certificate, tunnel.Evidence{}},
		"key, peer calls":                {[]string{named + "tried 1 shared key for '198.51.100.1' - '203.0.113.7', but MAC mismatched"}, tunnel.KeyDiffers, tunnel.Evidence{OtherKey: true}},
		"selectors, we call":             {[]string{named + "received TS_UNACCEPTABLE notify, no CHILD_SA built"}, tunnel.TSRefused, tunnel.Evidence{}},
		"selectors, peer calls":          {[]string{named + "traffic selectors fd00::/8 === fd00::/8 unacceptable"}, tunnel.TSUnacceptable, tunnel.Evidence{Selectors: "fd00::/8 === fd00::/8"}},
		"identity, we call":              {[]string{named + "authentication of '192.168.7.4' with pre-shared key successful", named + "constraint check failed: identity '203.0.113.7' required "}, tunnel.Identity, tunnel.Evidence{Identity: "192.168.7.4"}},
		"ESP proposal, peer calls":       {[]string{named + "received proposals: ESP:AES_CBC_128/HMAC_SHA1_96/NO_EXT_SEQ", named + "no acceptable proposal found"}, tunnel.ESPUnacceptable, tunnel.Evidence{ESPOffer: "AES_CBC_128/HMAC_SHA1_96"}},
		"silence":                        {[]string{named + "retransmit 1 of request with message ID 0", named + "giving up after 4 retransmits"}, tunnel.NoAnswer, tunnel.Evidence{}},
		"silence to IKE_AUTH":            {[]string{named + "retransmit 1 of request with message ID 1", named + "giving up after 4 retransmits"}, tunnel.NoAnswerAuth, tunnel.Evidence{}},
		"silence after half of one":      {[]string{named + "retransmit 4 of request with message ID 1", named + "retransmit 1 of request with message ID 0"}, tunnel.NoAnswer, tunnel.Evidence{}},
		"what it said stands":            {[]string{named + "received TS_UNACCEPTABLE notify, no CHILD_SA built", named + "retransmit 1 of request with message ID 0"}, tunnel.TSRefused, tunnel.Evidence{}},
		"what it let out stands as well": {append(linesFrom(peer, "looking for peer configs matching 10.0.0.4[x]..."+peer+"[y]", "no matching peer config found"), "8 isthmus:aws-0|received AUTHENTICATION_FAILED notify error"), tunnel.Identity, tunnel.Evidence{CalledUs: "x", Identity: "y"}},
	} {
		_, r := script(t, now, tt.lines...)
		if r.failure.Reason != tt.want || r.evidence != tt.evidence || tt.want != "" && r.failure.Since != now {
			t.Errorf("%s:\n got %+v, %+v\nwant %s, %+v", name, r.failure, r.evidence, tt.want, tt.evidence)
		}
		if strings.HasSuffix(name, "peer calls") && strings.HasPrefix(tt.lines[0], "7 (unnamed)") && r.heard != now {
			t.Errorf("%s: no packet was recorded", name)
		}
		// Lines of one IKE SA come in any order from charon's threads.
		rnd := rand.New(rand.NewPCG(1, 2))
		for range 20 {
			if !strings.HasSuffix(name, "peer calls") || strings.Contains(tt.lines[0], named) {
				break
			}
			rnd.Shuffle(len(tt.lines), func(i, j int) { tt.lines[i], tt.lines[j] = tt.lines[j], tt.lines[i] })
			if _, r := script(t, now, tt.lines...); r.failure.Reason != tt.want || r.evidence != tt.evidence {
				t.Errorf("%s, as %q: %+v", name, tt.lines, r.failure)
			}
		}
	}
}

// TestPeerLogWhileUp checks that a failed renewal is shown on the tunnel that is still up, and
// disappears with the next keys, and that no other failure is shown.
func TestPeerLogWhileUp(t *testing.T) {
	c := newClock(t)
	c.step(0, "initiate", tunnel.Connecting)
	c.step(time.Second, "", tunnel.Up, ike(1, "ESTABLISHED", child(1, "INSTALLED")))
	c.r.note("received NO_PROPOSAL_CHOSEN notify, no CHILD_SA built", c.now)
	evidence(&c.r.evidence, "received proposals: ESP:AES_GCM_16_256/NO_EXT_SEQ")
	c.step(time.Second, "", tunnel.Up, ike(1, "ESTABLISHED", child(1, "INSTALLED")))
	s := c.r.state
	if s.Failure.Reason != tunnel.RekeyRefused || s.Evidence.ESPOffer != "AES_GCM_16_256" || s.LastError != notRenewed {
		t.Errorf("%+v", s)
	}
	since := s.Failure.Since
	c.now = c.now.Add(time.Minute)
	c.r.note("no acceptable proposal found", c.now)
	c.step(0, "", tunnel.Up, ike(1, "ESTABLISHED", child(1, "INSTALLED")))
	if c.r.state.Failure.Since != since {
		t.Error("it began again")
	}
	c.step(time.Minute, "", tunnel.Up, ike(1, "ESTABLISHED", child(2, "INSTALLED")))
	if s := c.r.state; s.Failure.Reason != "" || s.LastError != "" {
		t.Errorf("renewed: %+v", s)
	}
	c.r.note("retransmit 2 of request with message ID 6", c.now)
	c.step(time.Second, "initiate", tunnel.Connecting)
	if s := c.r.state; s.Failure.Reason != tunnel.PeerLost {
		t.Errorf("lost: %+v", s)
	}
}

// TestChangeClearsEvidence checks that refusals of a former configuration do not count for the
// next one.
func TestChangeClearsEvidence(t *testing.T) {
	d, r := script(t, time.Now(), "7 isthmus:aws-0|received proposals: ESP:AES_CBC_128/HMAC_SHA1_96/NO_EXT_SEQ", "7 isthmus:aws-0|no acceptable proposal found")
	if r.failure.Reason == "" {
		t.Fatal("the failure has no reason")
	}
	if err := d.want(example(), loaded{Name: "aws-0", Conn: "another"}); err != nil {
		t.Fatal(err)
	}
	if r.failure != (tunnel.Failure{}) || r.evidence != (tunnel.Evidence{}) || r.reason != "" {
		t.Errorf("%+v %+v", r.failure, r.evidence)
	}
}

func TestCallers(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	stranger := func(i int) []string {
		a := fmt.Sprintf("198.18.%d.%d", i/256, i%256)
		out := linesFrom(a, "parsed IKE_SA_INIT request 0 [ SA KE No ]", "no IKE config found for 10.0.0.4..."+a+", sending NO_PROPOSAL_CHOSEN",
			"generating IKE_SA_INIT response 0 [ N(NO_PROP) ]")
		for j, l := range out {
			out[j] = fmt.Sprintf("%d", 1000+i) + strings.TrimPrefix(l, "7")
		}
		return out
	}
	d, r := script(t, now, stranger(1)...)
	d.handleLine(line{"2000", "(unnamed)", "no IKE config found for 10.0.0.4...198.18.0.1, sending NO_PROPOSAL_CHOSEN"}, now.Add(time.Second))
	want := tunnel.Caller{Address: netip.MustParseAddr("198.18.0.1"), First: now, Last: now.Add(time.Second), Attempts: 2}
	if got := d.Callers(); len(got) != 1 || got[0] != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if r.failure.Reason != "" || !r.heard.IsZero() {
		t.Errorf("the tunnel to another address: %+v", r)
	}

	// A flood from forged addresses stays within bounds, and does not displace an address with
	// repeated attempts.
	for i := 2; i < 3000; i++ {
		for _, l := range stranger(i) {
			head, words, _ := strings.Cut(l, "|")
			sa, name, _ := strings.Cut(head, " ")
			d.handleLine(line{sa, name, words}, now)
		}
	}
	got := d.Callers()
	if len(got) != maxCallers || len(d.peerLog.pending) > maxPending || !slices.Contains(got, want) {
		t.Errorf("%d callers, %d pending SAs, the first still there: %v", len(got), len(d.peerLog.pending), slices.Contains(got, want))
	}

	// An address that gets a tunnel is no longer a caller, and one without attempts for long is
	// dropped.
	c := example()
	c.Name = "b"
	c.IPsec.RemoteAddress, c.IPsec.RemoteIdentity = want.Address, want.Address.String()
	if err := d.want(c, loaded{Name: "b"}); err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(d.Callers(), func(c tunnel.Caller) bool { return c.Address == want.Address }) {
		t.Error("a tunnel's peer is listed as a caller")
	}
	d.peerLog.forget(now.Add(callerFor + time.Minute))
	if len(d.peerLog.callers) != 0 || len(d.peerLog.pending) != 0 {
		t.Errorf("%d callers and %d pending SAs are never dropped", len(d.peerLog.callers), len(d.peerLog.pending))
	}
}

func TestLongWordsAreCut(t *testing.T) {
	var e tunnel.Evidence
	evidence(&e, "received proposals: IKE:"+strings.Repeat("AES_CBC_128/", 1000))
	if len(e.IKEOffer) > maxWords+3 {
		t.Errorf("%d bytes", len(e.IKEOffer))
	}
}
