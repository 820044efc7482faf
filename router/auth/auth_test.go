package auth

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/store"
)

type clock struct{ time.Time }

func (c *clock) now() time.Time { return c.Time }

func newClock() *clock { return &clock{time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)} }

// setUp opens an authority over the store in dir, as a start of the daemon does.
func setUp(t *testing.T, dir string, c *clock) (*Authority, *store.Store, string) {
	t.Helper()
	st, err := store.Open(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	audit, err := OpenAudit(filepath.Join(dir, "audit.log"), c.now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { audit.Close(); st.Close() })
	var notice bytes.Buffer
	a, err := New(Options{
		Store: st, Hosts: []string{"192.0.2.1", "node-1"}, Address: "192.0.2.1:7443", Bundle: filepath.Join(dir, "admin.yaml"),
		Notice: &notice, Audit: audit, Now: c.now,
	})
	if err != nil {
		t.Fatal(err)
	}
	return a, st, notice.String()
}

// TestRules checks which methods a reader may call, and which of them the audit log records. Each
// method that is not in these lists only reads, and a reader may call it.
func TestRules(t *testing.T) {
	const v1 = "/isthmus.v1."
	want := map[string]rule{
		v1 + "AccessService/ListClients": {Admin, false},
		v1 + "AccessService/ListAudit":   {Admin, false},
		v1 + "LogService/ListLogs":       {Operator, false},
		v1 + "LogService/WatchLogs":      {Operator, false},
		v1 + "AccessService/RenewClient": {Reader, true}, // only the caller's own certificate
	}
	for role, methods := range map[Role]string{
		Operator: `SpecService/Apply SpecService/EditPolicies SpecService/SetDisabled SpecService/Confirm SpecService/Rollback TunnelService/ResetTunnel BGPService/ResetPeer
			NATService/ProveEgress NATService/EndFlows NATService/Who DiagnosticService/Ping SecretService/SetSecret SecretService/AddSecret SecretService/RollbackSecret SecretService/DeleteSecret`,
		Admin: `SystemService/Upgrade SystemService/RollbackSlot SystemService/Reboot SystemService/PowerOff SystemService/Seal SystemService/Unseal
			AccessService/IssueClient AccessService/RevokeClient AccessService/RenewAuthority DiagnosticService/Capture`,
	} {
		for _, m := range strings.Fields(methods) {
			want[v1+m] = rule{role, true}
		}
	}
	for method, got := range rules {
		w, ok := want[method]
		if !ok {
			w = rule{Reader, false}
		}
		if got != w {
			t.Errorf("%s: %+v, want %+v", method, got, w)
		}
		delete(want, method)
	}
	for method := range want {
		t.Errorf("%s has no rule", method)
	}
}

// TestCheck checks which audited streams are refused: the audit log has only the first request.
func TestCheck(t *testing.T) {
	for _, k := range []struct {
		method         string
		client, server bool
		want           bool
	}{
		{"Ping", false, true, false}, {"Ping", true, false, false}, {"Ping", true, true, true},
	} {
		err := Check(map[string]grpc.ServiceInfo{"isthmus.v1.DiagnosticService": {Methods: []grpc.MethodInfo{{Name: k.method, IsClientStream: k.client, IsServerStream: k.server}}}})
		if got := strings.Contains(err.Error(), "the audit log has only the first"); got != k.want {
			t.Errorf("%+v: %v", k, err)
		}
	}
}

func TestAuthorityOutlivesRestart(t *testing.T) {
	dir, c := t.TempDir(), newClock()
	a, st, notice := setUp(t, dir, c)
	if !strings.Contains(notice, filepath.Join(dir, "admin.yaml")) {
		t.Errorf("notice is %q", notice)
	}
	first, err := os.ReadFile(filepath.Join(dir, "admin.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "admin.yaml")); err != nil {
		t.Fatal(err)
	}
	st.Close()
	b, _, notice := setUp(t, dir, c)
	if a.Certificate() != b.Certificate() {
		t.Error("the authority changed over a restart")
	}
	if _, err := os.Stat(filepath.Join(dir, "admin.yaml")); !errors.Is(err, os.ErrNotExist) || notice != "" {
		t.Errorf("the first admin was exported twice: %v, %q", err, notice)
	}
	var bundle isthmusv1.ClientContext
	if err := protojson.Unmarshal(first, &bundle); err != nil {
		t.Fatal(err)
	}
	if bundle.Authority != b.Certificate() || bundle.Address != "192.0.2.1:7443" || len(b.Clients()) != 1 {
		t.Errorf("context is for %s, clients are %v", bundle.Address, b.Clients())
	}
}

// TestExportInterrupted: when the daemon dies before the first admin's file is written, the next
// start writes one, and the lost certificate is not valid.
func TestExportInterrupted(t *testing.T) {
	dir, c := t.TempDir(), newClock()
	st, err := store.Open(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = New(Options{Store: st, Bundle: filepath.Join(dir, "missing", "admin.yaml"), Notice: io.Discard, Now: c.now})
	if err == nil {
		t.Fatal("a bundle that cannot be written is not an error")
	}
	lost := st.Clients()
	st.Close()
	a, _, notice := setUp(t, dir, c)
	if notice == "" || len(lost) != 1 || len(a.Clients()) != 1 || a.Clients()[0].Serial == lost[0].Serial {
		t.Errorf("clients were %v and are %v, notice %q", lost, a.Clients(), notice)
	}
	if a.valid(lost[0].Serial) == nil {
		t.Error("the certificate of the interrupted attempt is valid")
	}
}

// TestDamagedAuthority: it is not replaced by a new one.
func TestDamagedAuthority(t *testing.T) {
	dir, c := t.TempDir(), newClock()
	_, st, _ := setUp(t, dir, c)
	st.Close()
	name := filepath.Join(dir, "store", "private", "authority.sealed")
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if st, err = store.Open(filepath.Join(dir, "store")); err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if _, err := New(Options{Store: st, Notice: io.Discard, Now: c.now}); !errors.Is(err, store.ErrDamaged) {
		t.Errorf("opening a damaged authority: %v", err)
	}
}

func TestServerCertificate(t *testing.T) {
	c := newClock()
	a, _, _ := setUp(t, t.TempDir(), c)
	serial := func() string {
		t.Helper()
		cert, err := a.serverCertificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, host := range append([]string{ServerName, "localhost", "127.0.0.1"}, a.hosts...) {
			opts := x509.VerifyOptions{DNSName: host, Roots: a.roots(), CurrentTime: c.Time}
			if _, err := cert.Leaf.Verify(opts); err != nil {
				t.Errorf("as %s: %v", host, err)
			}
		}
		// A client certificate must not pass for the server's, nor the other way round.
		opts := x509.VerifyOptions{Roots: a.roots(), CurrentTime: c.Time, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
		if _, err := cert.Leaf.Verify(opts); err == nil {
			t.Error("the server certificate is good for a client")
		}
		return serialText(cert.Leaf.SerialNumber)
	}
	first := serial()
	if serial() != first {
		t.Error("issued again without a reason")
	}
	a.SetHosts(a.hosts)
	if serial() != first {
		t.Error("issued again for the same hosts")
	}
	a.SetHosts([]string{"192.0.2.9", "node-2"})
	second := serial()
	if second == first {
		t.Error("not issued again for other hosts")
	}
	a.SetHosts([]string{"192.0.2.9", "münchen"})
	if cert, err := a.serverCertificate(nil); err != nil || cert.Leaf.VerifyHostname("192.0.2.9") != nil {
		t.Errorf("with a name that no certificate can have: %v", err)
	}
	a.SetHosts([]string{"192.0.2.9", "node-2"})
	c.Time = c.Add(serverLifetime * 2 / 3)
	third := serial()
	if third == second {
		t.Error("not issued again when a third of its lifetime was left")
	}
}

// TestNothingIsForgottenByTheClock: a clock that is wrong for a while shuts no client out, and the
// list of clients has a bound all the same.
func TestNothingIsForgottenByTheClock(t *testing.T) {
	c := newClock()
	a, st, _ := setUp(t, t.TempDir(), c)
	issue := func(name string) store.Client {
		t.Helper()
		key, _, err := newKey()
		if err != nil {
			t.Fatal(err)
		}
		_, client, err := a.issue(name, Reader, key.Public(), MinLifetime)
		if err != nil {
			t.Fatal(err)
		}
		return client
	}
	if a.room != maxClients {
		t.Errorf("the list takes %d", a.room)
	}
	a.room = 20
	one := issue("one")
	c.Time = c.AddDate(3, 0, 0)
	issue("two")
	if err := a.valid(one.Serial); err != nil {
		t.Errorf("after the clock was ahead: %v", err)
	}
	for i := len(a.Clients()); i < a.room; i++ {
		if err := st.SetClient(store.Client{Serial: fmt.Sprintf("%x", i), Name: "x", Issued: c.Time.Add(time.Duration(i))}); err != nil {
			t.Fatal(err)
		}
	}
	key, _, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.issue("more", Reader, key.Public(), MinLifetime); !errors.Is(err, ErrInvalid) {
		t.Errorf("one more than the list takes: %v", err)
	}
	if err := a.Revoke(one.Serial); err != nil {
		t.Fatal(err)
	}
	issue("more")
	if a.valid(one.Serial) == nil || len(a.Clients()) != a.room {
		t.Errorf("%d clients", len(a.Clients()))
	}
}

// TestAuthorityWaitsForTheClock: none is made before a time that is over for certain; then it is.
func TestAuthorityWaitsForTheClock(t *testing.T) {
	dir := t.TempDir()
	c := &clock{time.Unix(0, 0)}
	sane := newClock().Time
	st, err := store.Open(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	audit, err := OpenAudit(filepath.Join(dir, "audit.log"), c.now)
	if err != nil {
		t.Fatal(err)
	}
	defer audit.Close()
	a, err := New(Options{Store: st, Bundle: filepath.Join(dir, "admin.yaml"), Notice: io.Discard, Audit: audit, Now: c.now, Sane: sane})
	if err != nil {
		t.Fatal(err)
	}
	key, _, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.issue("early", Reader, key.Public(), 0); !errors.Is(err, ErrClock) {
		t.Errorf("issuing: %v", err)
	}
	if _, err := a.serverCertificate(nil); !errors.Is(err, ErrClock) || a.Certificate() != "" {
		t.Errorf("the server: %v", err)
	}
	if _, _, err := a.acceptTLS(nil, nil); !errors.Is(err, ErrClock) {
		t.Errorf("a connection: %v", err)
	}
	if got := a.Conditions(); len(got) != 1 || got[0].Type != "ClockWrong" || !strings.Contains(got[0].Message, "2026-03-01") {
		t.Errorf("conditions %v", got)
	}
	if _, err := st.Private("authority"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("an authority was made: %v", err)
	}
	c.Time = sane
	a.Await(t.Context())
	if got := a.Conditions(); len(got) != 0 || a.Certificate() == "" {
		t.Errorf("conditions %v", got)
	}
	if _, err := os.Stat(filepath.Join(dir, "admin.yaml")); err != nil {
		t.Error(err)
	}
	c.Time = sane.Add(authorityLifetime)
	if got := a.Conditions(); len(got) != 2 || got[0].Type != "AuthorityEnds" || got[1].Type != "ClockWrong" {
		t.Errorf("at the end: conditions %v", got)
	}
}

// TestRenew: clients of the former authority get in, and trust the server, until the overlap ends,
// also over a restart.
func TestRenew(t *testing.T) {
	dir, c := t.TempDir(), newClock()
	a, st, _ := setUp(t, dir, c)
	old := x509.NewCertPool()
	old.AppendCertsFromPEM([]byte(a.Certificate()))
	client := func() *x509.Certificate {
		t.Helper()
		key, _, err := newKey()
		if err != nil {
			t.Fatal(err)
		}
		text, _, err := a.issue("ann", Reader, key.Public(), 0)
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode([]byte(text))
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	good := func(what string, cert *x509.Certificate, roots *x509.CertPool, usage x509.ExtKeyUsage, want bool) {
		t.Helper()
		_, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: c.Time, KeyUsages: []x509.ExtKeyUsage{usage}})
		if (err == nil) != want {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	server := func() *x509.Certificate {
		t.Helper()
		s, err := a.serverCertificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		return s.Leaf
	}
	first := client()
	server()
	until, err := a.Renew(false)
	if err != nil || until != c.Time.Add(Overlap) {
		t.Fatal(until, err)
	}
	if _, err := a.Renew(false); !errors.Is(err, ErrInvalid) {
		t.Errorf("renewed twice: %v", err)
	}
	st.Close()
	a, _, _ = setUp(t, dir, c)
	fresh := x509.NewCertPool()
	fresh.AppendCertsFromPEM([]byte(a.Certificate()))
	second := client()
	for _, k := range []struct {
		after     time.Duration
		overlap   bool
		condition int
	}{{0, true, 1}, {Overlap, false, 0}} {
		c.Time = c.Add(k.after)
		good("a client of before", first, a.roots(), x509.ExtKeyUsageClientAuth, k.overlap)
		good("a client of now", second, a.roots(), x509.ExtKeyUsageClientAuth, true)
		good("the server, to a client of before", server(), old, x509.ExtKeyUsageServerAuth, k.overlap)
		good("the server, to a client of now", server(), fresh, x509.ExtKeyUsageServerAuth, true)
		if got := a.Conditions(); len(got) != k.condition {
			t.Errorf("after %v: conditions %v", k.after, got)
		}
	}
	if until, err := a.Renew(true); err != nil || !until.IsZero() {
		t.Error(until, err)
	}
	good("a client of before, at once", second, a.roots(), x509.ExtKeyUsageClientAuth, false)
}

func lines(t *testing.T, name string) []Entry {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var out []Entry
	for line := range bytes.Lines(data) {
		var e Entry
		if err := json.Unmarshal(line, &e); err != nil {
			e = Entry{Error: "torn: " + string(line)}
		}
		out = append(out, e)
	}
	return out
}

func TestAuditRotation(t *testing.T) {
	name := filepath.Join(t.TempDir(), "audit.log")
	l, err := OpenAudit(name, newClock().now)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.limit = 1000
	for i := range 200 {
		if err := l.write(Entry{Event: End, Object: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
	next := 200
	for i := range auditFiles + 1 {
		file := name
		if i > 0 {
			file = fmt.Sprintf("%s.%d", name, i)
		}
		if info, err := os.Stat(file); err != nil || info.Size() > 1000 || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", file, info, err)
		}
		all := lines(t, file)
		if next -= len(all); all[0].Object != fmt.Sprint(next) {
			t.Errorf("%s begins with %s, want %d: a line is missing", file, all[0].Object, next)
		}
	}
	if _, err := os.Stat(fmt.Sprintf("%s.%d", name, auditFiles+1)); err == nil {
		t.Error("too many files are kept")
	}
}

// TestAuditRotatesLater: while a new file cannot be opened, as without a free descriptor or inode,
// every call that is refused for it leaves the old files alone.
func TestAuditRotatesLater(t *testing.T) {
	name := filepath.Join(t.TempDir(), "audit.log")
	l, err := OpenAudit(name, newClock().now)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.limit = 300
	next := 0
	write := func() error { next++; return l.write(Entry{Event: End, Object: fmt.Sprint(next)}) }
	for next < 100 {
		if err := write(); err != nil {
			t.Fatal(err)
		}
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	refused := 0
	for range 20 {
		if write() != nil {
			refused++
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := write(); err != nil || refused < 15 {
		t.Fatalf("%d refused, then %v", refused, err)
	}
	for i := 1; i <= auditFiles; i++ {
		if all := lines(t, fmt.Sprintf("%s.%d", name, i)); len(all) == 0 {
			t.Errorf("file %d is empty", i)
		}
	}
	if all := lines(t, name); all[0].Object != fmt.Sprint(next) {
		t.Errorf("the new file has %+v", all)
	}
}

// TestAuditTornLine: a line that was cut short does not spoil the next.
func TestAuditTornLine(t *testing.T) {
	name := filepath.Join(t.TempDir(), "audit.log")
	if err := os.WriteFile(name, []byte(`{"event":"begin","who":"an`), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := OpenAudit(name, newClock().now)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.write(Entry{Event: End, Who: "ann"}); err != nil {
		t.Fatal(err)
	}
	if all := lines(t, name); len(all) != 2 || all[1].Who != "ann" {
		t.Errorf("lines are %+v", all)
	}
}

// TestAuditFlood: refusals of one client are bounded, those of another are still written, and the
// number of those left out is.
func TestAuditFlood(t *testing.T) {
	c := newClock()
	name := filepath.Join(t.TempDir(), "audit.log")
	l, err := OpenAudit(name, c.now)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	refuse := func(who string) {
		if err := l.refuse(who, Entry{Who: who}); err != nil {
			t.Fatal(err)
		}
	}
	for range 1000 {
		refuse("eve")
	}
	refuse("bob")
	c.Time = c.Add(refusalsEvery)
	refuse("eve")
	all := lines(t, name)
	if len(all) != refusalsBurst+2 || all[refusalsBurst].Who != "bob" || all[refusalsBurst+1].Suppressed != 1000-refusalsBurst {
		t.Errorf("%d lines, the last two are %+v", len(all), all[len(all)-2:])
	}
}

// TestFullAudit: what cannot be written down is not done.
func TestFullAudit(t *testing.T) {
	l, err := OpenAudit(filepath.Join(t.TempDir(), "audit.log"), newClock().now)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := l.begin(Entry{}); err == nil {
		t.Error("an audit log that cannot be written is not an error")
	}
}

// TestAuditOpensLater: a log that cannot be opened takes its first entry as soon as it can.
func TestAuditOpensLater(t *testing.T) {
	name := filepath.Join(t.TempDir(), "disk", "audit.log")
	l, err := OpenAudit(name, newClock().now)
	if l == nil || err == nil {
		t.Fatalf("%v, %v", l, err)
	}
	if err := l.write(Entry{Who: "ann"}); err == nil {
		t.Error("a missing directory took an entry")
	}
	if err := os.Mkdir(filepath.Dir(name), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := l.write(Entry{Who: "bob"}); err != nil {
		t.Fatal(err)
	}
	if all := lines(t, name); len(all) != 1 || all[0].Who != "bob" {
		t.Errorf("lines are %+v", all)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// TestRefusalIsHeard: a client of TLS 1.3 that writes before it reads receives the reason of the
// refusal.
func TestRefusalIsHeard(t *testing.T) {
	a, _, _ := setUp(t, t.TempDir(), newClock())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for conn, err := l.Accept(); err == nil; conn, err = l.Accept() {
			_, _, _ = a.Credentials(nil).ServerHandshake(conn)
		}
	}()
	// A refusal is written to the audit log after the client has it, and the log's directory must
	// not be removed before.
	defer func() { l.Close(); <-ended }()
	for range 20 {
		conn, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{RootCAs: a.roots(), ServerName: ServerName, NextProtos: []string{"h2"}, Time: a.now})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		for range 3 {
			_, err = conn.Write(make([]byte, 1000))
			time.Sleep(5 * time.Millisecond)
		}
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
		}
		if err == nil || !strings.Contains(err.Error(), "certificate required") {
			t.Fatalf("the client receives %v", err)
		}
		conn.Close()
	}
}
