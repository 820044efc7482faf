package auth

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/isthmus-net/isthmus/router/store"
)

// card is a certificate with its key, as a client has it.
type card struct {
	tls.Certificate
	id     Identity
	serial string
}

func newCard(t *testing.T, a *Authority, name string, role Role, lifetime time.Duration) card {
	t.Helper()
	key, _, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	text, c, err := a.Issue(name, role, request(t, key), lifetime)
	if err != nil {
		t.Fatal(err)
	}
	id := identity(t, text)
	return card{tls.Certificate{Certificate: [][]byte{id.cert.Raw}, PrivateKey: key}, id, c.Serial}
}

// errCall means that a connection was let in, and its call was not.
var errCall = errors.New("the call is refused")

// getIn opens a connection with a certificate by a client whose clock says now, which trusts what
// roots has. It returns what the client sees of a refusal, and the server certificate.
func getIn(t *testing.T, a *Authority, c card, roots string, now time.Time) (*x509.Certificate, error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		raw, err := l.Accept()
		if err != nil {
			return
		}
		accepted, id, err := a.Credentials(nil).ServerHandshake(raw)
		if err != nil {
			return
		}
		defer accepted.Close()
		if _, err := io.ReadFull(accepted, make([]byte, 1)); err != nil {
			return // it was cut at once
		}
		ctx := peer.NewContext(t.Context(), &peer.Peer{Addr: raw.RemoteAddr(), AuthInfo: id})
		if _, err := a.admit(ctx, "/grpc.health.v1.Health/Check"); err == nil {
			_, _ = accepted.Write([]byte("in"))
		}
	}()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(roots))
	conn, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{
		RootCAs: pool, ServerName: ServerName, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{c.Certificate},
		Time: func() time.Time { return now },
	})
	if err != nil {
		<-done
		return nil, err
	}
	_, _ = conn.Write([]byte("?")) // a refusal is heard by reading
	text, err := io.ReadAll(conn)
	conn.Close()
	if err == nil && string(text) != "in" {
		err = errCall
	}
	<-done
	return conn.ConnectionState().PeerCertificates[0], err
}

// wrongWorld has an authority of a node that was built 40 days later, with certificates of 0 and of
// 100 days after it.
type wrongWorld struct {
	dir   string
	clock *clock
	real  time.Time // what other clocks say
	roots string

	ann, bob, eve, out card // valid for a year, over after 30 days, of no list, revoked
}

func newWrongWorld(t *testing.T) wrongWorld {
	t.Helper()
	w := wrongWorld{dir: t.TempDir(), clock: newClock()}
	a, st, _ := setUp(t, w.dir, w.clock)
	w.bob = newCard(t, a, "bob", Admin, 30*day)
	w.clock.Time = w.clock.Add(100 * day)
	w.ann, w.eve, w.out = newCard(t, a, "ann", Admin, 365*day), newCard(t, a, "eve", Admin, 365*day), newCard(t, a, "out", Admin, 365*day)
	if err := errors.Join(st.DeleteClient(w.eve.serial), a.Revoke(w.out.serial)); err != nil {
		t.Fatal(err)
	}
	w.real, w.roots = w.clock.Add(50*day), a.Certificate()
	st.Close()
	return w
}

// boot starts the node with a clock.
func (w *wrongWorld) boot(t *testing.T, now time.Time) *Authority {
	t.Helper()
	st, err := store.Open(filepath.Join(w.dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	audit, err := OpenAudit(filepath.Join(w.dir, "audit.log"), w.clock.now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { audit.Close(); st.Close() })
	w.clock.Time = now
	a, err := New(Options{Store: st, Bundle: filepath.Join(w.dir, "admin.yaml"), Notice: io.Discard, Audit: audit, Now: w.clock.now, Sane: newClock().AddDate(0, 0, 40)})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func has(a *Authority, kind, text string) bool {
	for _, c := range a.Conditions() {
		if c.Type == kind && strings.Contains(c.Message, text) {
			return true
		}
	}
	return false
}

// TestWrongClock: a node whose clock is wrong for certain lets in those who may, by their own right
// clock, and no others; one that only may be wrong does as it says. When the clock is set,
// everything is as with a right clock from the start.
func TestWrongClock(t *testing.T) {
	start := newClock().Time
	issued := start.Add(100 * day)
	for _, c := range []struct {
		what    string
		now     time.Time
		wrong   wrongness
		in      bool   // ann
		says    string // the condition
		refusal string // of ann
	}{
		{what: "no battery", now: time.Unix(0, 0), wrong: behind, in: true, says: "the clock says 1970-01-01T00:00:00Z, and isthmusd was built from a revision of 2026-04-10T12:00:00Z: set the clock"},
		{what: "before the authority", now: start.Add(-30 * day), wrong: behind, in: true, says: "isthmusd was built"},
		{what: "before the certificate", now: issued.Add(-2 * day), wrong: behind, in: true, says: "and the node has issued client certificate "},
		{what: "within a day of it", now: issued.Add(-23 * time.Hour), in: true},
		{what: "right", now: issued.Add(50 * day), in: true},
		{what: "a bit ahead", now: issued.Add(364 * day), in: true},
		{what: "ahead of the end", now: issued.Add(366 * day), refusal: "expired certificate"},
		{what: "far ahead", now: issued.Add(MaxLifetime - day), refusal: "expired certificate"},
		{what: "impossible", now: issued.Add(MaxLifetime + day), wrong: ahead, in: true, says: "more than 10 years after the newest certificate that the node has signed, of 2026-06-09T12:00:00Z"},
		{what: "another century", now: time.Date(2118, 1, 1, 0, 0, 0, 0, time.UTC), wrong: ahead, in: true, says: "if it is right, issue a certificate as root"},
	} {
		t.Run(c.what, func(t *testing.T) {
			w := newWrongWorld(t)
			a := w.boot(t, c.now)
			if got := a.clock().wrong; got != c.wrong {
				t.Errorf("the clock is judged %d, want %d", got, c.wrong)
			}
			if has(a, "ClockWrong", c.says) != (c.wrong != notWrong) {
				t.Errorf("conditions %v", a.Conditions())
			}
			// A client's clock may be wrong by a day too, or the node's is: then it takes the
			// server for what the node's clock says.
			real := w.real
			if c.wrong == notWrong {
				real = c.now
			}
			_, err := getIn(t, a, w.ann, w.roots, real)
			if (err == nil) != c.in || err != nil && !strings.Contains(err.Error(), c.refusal) {
				t.Errorf("ann: %v, want in %v %s", err, c.in, c.refusal)
			}
			for name, x := range map[string]card{"bob, whose certificate is over": w.bob, "eve, of no list": w.eve, "out, who is revoked": w.out, "a stranger": stranger(t, w.ann)} {
				if _, err := getIn(t, a, x, w.roots, real); err == nil || err == errCall {
					t.Errorf("%s gets in: %v", name, err)
				}
			}
			err = a.MayIssue(peer.NewContext(t.Context(), &peer.Peer{Addr: &net.UnixAddr{}, AuthInfo: Identity{Name: rootName, Role: Admin}}))
			if (err == nil) != (c.wrong != behind) {
				t.Errorf("issuing: %v", err)
			}
			if _, _, err := a.Issue("new", Reader, request(t, nil), 0); err != nil {
				t.Error(err)
			}
			if c.wrong == ahead && has(a, "ClockWrong", "") {
				t.Errorf("root has said that the clock is right, and it is not believed: %v", a.Conditions())
			}
		})
	}
}

// stranger has a certificate like one of this node's, which another authority has signed.
func stranger(t *testing.T, like card) card {
	t.Helper()
	ca, _, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parent := &x509.Certificate{Subject: like.id.cert.Issuer, SubjectKeyId: like.id.cert.AuthorityKeyId, IsCA: true, PublicKey: ca.Public()}
	der, err := x509.CreateCertificate(rand.Reader, like.id.cert, parent, key.Public(), ca)
	if err != nil {
		t.Fatal(err)
	}
	return card{Certificate: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}}
}

// TestClockIsSet: while it is wrong nothing is signed for clients but by root, and when it is set
// in the running daemon the server shows a certificate of 90 days again, and expiry is final again
// for those who are connected too.
func TestClockIsSet(t *testing.T) {
	for _, now := range []time.Time{time.Unix(0, 0), newClock().AddDate(60, 0, 0)} {
		w := newWrongWorld(t)
		a := w.boot(t, now)
		wide, err := getIn(t, a, w.ann, w.roots, w.real)
		if err != nil {
			t.Fatalf("at %v: %v", now, err)
		}
		if _, _, err := a.RenewClient(w.ann.id, request(t, nil)); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "no certificate is issued while the clock is wrong") {
			t.Errorf("at %v: renewing: %v", now, err)
		}
		remote := peer.NewContext(t.Context(), &peer.Peer{Addr: &net.TCPAddr{}, AuthInfo: w.ann.id})
		root := peer.NewContext(t.Context(), &peer.Peer{Addr: &net.UnixAddr{}, AuthInfo: Identity{Name: rootName, Role: Admin}})
		isAhead := now.Year() > 2000
		for _, x := range []struct {
			what   string
			err    error
			wantOK bool
		}{
			{"issuing, remote", a.MayIssue(remote), false}, {"issuing, root", a.MayIssue(root), isAhead},
			{"renewing the authority, remote", a.MayRenew(remote), !isAhead}, {"renewing the authority, root", a.MayRenew(root), true},
		} {
			if (x.err == nil) != x.wantOK {
				t.Errorf("at %v: %s: %v", now, x.what, x.err)
			}
		}
		w.clock.Time = w.real
		narrow, err := getIn(t, a, w.ann, w.roots, w.real)
		if err != nil {
			t.Fatal(err)
		}
		if wide.NotAfter.Before(w.real.AddDate(19, 0, 0)) || !narrow.NotAfter.Equal(w.real.Add(serverLifetime)) {
			t.Errorf("at %v the server certificate ended at %v, and set right at %v", now, wide.NotAfter, narrow.NotAfter)
		}
		if has(a, "ClockWrong", "") {
			t.Errorf("conditions %v", a.Conditions())
		}
		call := func(ctx context.Context) codes.Code {
			_, err := a.admit(ctx, "/grpc.health.v1.Health/Check")
			return status.Code(err)
		}
		if got := call(remote); got != codes.OK {
			t.Errorf("a call: %v", got)
		}
		w.clock.Time = w.ann.id.Expires.Add(time.Second)
		if got := call(remote); got != codes.Unauthenticated {
			t.Errorf("a call after the end: %v", got)
		}
	}
}

// TestIssuedInTheFuture: a certificate that was issued while the clock was ahead shuts no client
// out when the clock is right again. The condition names it, and without it the clock is right.
func TestIssuedInTheFuture(t *testing.T) {
	w := newWrongWorld(t)
	a := w.boot(t, w.real.AddDate(3, 0, 0))
	future := newCard(t, a, "future", Reader, 0)
	w.clock.Time = w.real
	for name, x := range map[string]card{"ann": w.ann, "future": future} {
		if _, err := getIn(t, a, x, w.roots, w.real); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !has(a, "ClockWrong", "isthmus client revoke "+future.serial) {
		t.Errorf("conditions %v", a.Conditions())
	}
	if err := a.Revoke(future.serial); err != nil {
		t.Fatal(err)
	}
	if has(a, "ClockWrong", "") || a.clock().wrong != notWrong {
		t.Errorf("conditions %v", a.Conditions())
	}
	if _, _, err := a.Issue("new", Reader, request(t, nil), 0); err != nil {
		t.Error(err)
	}
}

// TestServerCertificateForYears: in a process that runs for years and whose clock jumps, clients
// with the same clock always take the server certificate, and it is not issued more often than each
// 60 days without a jump.
func TestServerCertificateForYears(t *testing.T) {
	c := newClock()
	a, _, _ := setUp(t, t.TempDir(), c)
	roots := a.roots()
	last, count := "", 0
	check := func(what string) {
		t.Helper()
		cert, err := a.serverCertificate(nil)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if _, err := cert.Leaf.Verify(x509.VerifyOptions{DNSName: ServerName, Roots: roots, CurrentTime: c.Time}); err != nil {
			t.Fatalf("%s, at %v: %v", what, c.Time, err)
		}
		if left := cert.Leaf.NotAfter.Sub(c.Time); left < serverLifetime/3 {
			t.Fatalf("%s: it is good for %v", what, left)
		}
		if s := serialText(cert.Leaf.SerialNumber); s != last {
			last, count = s, count+1
		}
	}
	check("at first")
	for range 5 * 365 {
		c.Time = c.Add(day)
		check("five years")
	}
	if count < 29 || count > 32 {
		t.Errorf("issued %d times in five years", count)
	}
	for _, jump := range []time.Duration{3 * 365 * day, -2 * 365 * day, 61 * day, -30 * day, -day, day} {
		c.Time = c.Add(jump)
		check("jumped by " + jump.String())
	}
	// No client has to connect.
	c.Time = c.Add(80 * day)
	before := count
	if got := a.serverConditions(); len(got) > 0 {
		t.Errorf("conditions %v", got)
	}
	if a.server.Leaf.NotAfter.Sub(c.Time) < serverLifetime-time.Second {
		t.Error("it is renewed only when a client comes")
	}
	check("afterwards")
	if count != before+1 {
		t.Errorf("issued %d times", count-before)
	}
}

type brokenKey struct{ crypto.Signer }

func (brokenKey) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("the key is broken")
}

// TestServerCertificateFails: the one before goes on until its end, and a condition tells of it all
// the time.
func TestServerCertificateFails(t *testing.T) {
	c := newClock()
	a, _, _ := setUp(t, t.TempDir(), c)
	first, err := a.serverCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	good := a.present.Load()
	broken := *good
	broken.key = brokenKey{good.key}
	a.present.Store(&broken)
	c.Time = c.Add(70 * day)
	if !has(a, "ServerCertificate", "the key is broken: the present one ends at 2026-05-30T12:00:00Z") {
		t.Errorf("conditions %v", a.Conditions())
	}
	if got, err := a.serverCertificate(nil); err != nil || got != first {
		t.Errorf("%v, %v", got, err)
	}
	c.Time = c.Add(30 * day)
	if got, err := a.serverCertificate(nil); err == nil {
		t.Errorf("one that is over is shown: %v", got.Leaf.NotAfter)
	}
	if !has(a, "ServerCertificate", "cannot be reached") {
		t.Errorf("conditions %v", a.Conditions())
	}
	a.present.Store(good)
	if _, err := a.serverCertificate(nil); err != nil || has(a, "ServerCertificate", "") {
		t.Errorf("with a key again: %v, %v", err, a.Conditions())
	}
}

// TestEndingConditions: the last certificate of an admin has a condition of its own, 30 days ahead
// and as an error in the last week; the others share one.
func TestEndingConditions(t *testing.T) {
	c := newClock()
	a, _, _ := setUp(t, t.TempDir(), c) // the first admin, for a year
	start := c.Time
	first := a.Clients()[0]
	ann := newCard(t, a, "ann", Operator, 60*day)
	newCard(t, a, "long", Reader, 3*365*day)
	for i := range 8 {
		newCard(t, a, "short"+string(rune('a'+i)), Reader, 9*time.Hour)
	}
	says := func() []string {
		var out []string
		for _, x := range a.Conditions() {
			out = append(out, x.Type+" "+x.Severity)
		}
		return out
	}
	for _, x := range []struct {
		at   time.Duration
		want []string
		text string
	}{
		{5 * time.Hour, nil, ""},
		{6 * time.Hour, []string{"ClientsExpire warning"}, "shorta (reader) at 2026-03-01T21:00:00Z, "},
		{6 * time.Hour, []string{"ClientsExpire warning"}, " and 3 more (isthmus client list)"},
		{9 * time.Hour, nil, ""},
		{40*day - time.Second, nil, ""},
		{40 * day, []string{"ClientsExpire warning"}, "end soon: ann (operator) at 2026-04-30T12:00:00Z: let"},
		{61 * day, nil, ""},
		{335*day - time.Second, nil, ""},
		{335 * day, []string{"ClientExpires warning"}, first.Serial + " of admin, ends at 2027-03-01T12:00:00Z"},
		{358*day + time.Second, []string{"ClientExpires error"}, "let admin run isthmus client renew"},
		{366 * day, []string{"ClientExpires error"}, "ended at 2027-03-01T12:00:00Z: as root on the node"},
	} {
		c.Time = start.Add(x.at)
		if got := says(); !slices.Equal(got, x.want) || x.text != "" && !has(a, strings.Fields(x.want[0])[0], x.text) {
			t.Errorf("after %v: %v, want %v %s; %v", x.at, got, x.want, x.text, a.Conditions())
		}
	}
	// A renewed one is not reported, nor one next to another admin.
	c.Time = start.Add(41 * day)
	renewed, _ := renewFor(t, a, ann.id)
	if got := says(); len(got) > 0 {
		t.Errorf("renewed: %v", a.Conditions())
	}
	c.Time = start.Add(340 * day)
	newCard(t, a, "second", Admin, 365*day)
	if got := says(); !slices.Equal(got, []string{"ClientsExpire warning"}) || !has(a, "ClientsExpire", "admin (admin) at") {
		t.Errorf("with a second admin: %v", a.Conditions())
	}
	if err := a.Revoke(first.Serial); err != nil || len(says()) > 0 || renewed.Serial == "" {
		t.Errorf("revoked: %v, %v", err, a.Conditions())
	}
}
