package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/lab"
)

// far runs the command line on another machine, with a context file, over the Internet and through
// the node's 1:1 NAT.
type far struct {
	*bench
	node *lab.Node
	addr string // of the machine
}

func (f *far) argv(file string, args ...string) []string {
	return append([]string{filepath.Join(f.r.bin, "isthmus"), "--context", file}, args...)
}

func (f *far) cli(file, input string, args ...string) (string, error) {
	return f.node.ExecInput(f.Context(), input, f.argv(file, args...)...)
}

// refused checks that a command fails with exit code 1 and prints the reason in one line.
func (f *far) refused(file, input, why string, args ...string) {
	f.Helper()
	out, err := f.cli(file, input, args...)
	if exitCode(err) != 1 || out != "" || !strings.Contains(err.Error(), "isthmus: ") || !strings.Contains(err.Error(), why) {
		f.Errorf("isthmus %s: %q, %v; want exit code 1 and %q", strings.Join(args, " "), out, err, why)
	}
}

// readContext reads a context file, which is YAML and, from the node, JSON.
func (b *bench) readContext(file string) *isthmusv1.ClientContext {
	b.Helper()
	data, err := os.ReadFile(file)
	b.ok(err)
	var tree any
	b.ok(yaml.Unmarshal(data, &tree))
	data, err = json.Marshal(tree)
	b.ok(err)
	c := &isthmusv1.ClientContext{}
	b.ok(protojson.Unmarshal(data, c))
	return c
}

// entry is a line of the audit log.
type entry struct {
	Time                                                                     time.Time
	Event, Who, Role, Serial, Address, Method, Object, Digest, Result, Error string
	FromGeneration, ToGeneration                                             uint64
}

func (b *bench) audit() (entries []entry) {
	b.Helper()
	data, err := os.ReadFile(filepath.Join(b.r.Dir, "state", "audit.log"))
	b.ok(err)
	// The lines that strangers caused are in a file of their own, once there are some.
	refused, err := os.ReadFile(filepath.Join(b.r.Dir, "state", "audit-refused.log"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		b.ok(err)
	}
	data = append(data, refused...)
	for line := range bytes.Lines(data) {
		var e entry
		if err := json.Unmarshal(line, &e); err != nil {
			b.Errorf("audit log: %v: %s", err, line)
		}
		if time.Since(e.Time).Abs() > time.Hour {
			b.Errorf("audit log: a line with a wrong time: %s", line)
		}
		entries = append(entries, e)
	}
	return entries
}

// audited checks that the audit log has a line in which all fields that are set in want are the
// same; Error may be a part. A refused client may receive the refusal before the line is written.
func (b *bench) audited(want entry) {
	b.Helper()
	same := func(got, want string) bool { return want == "" || got == want }
	err := lab.Until(b.Context(), 10*time.Second, func() error {
		if !slices.ContainsFunc(b.audit(), func(e entry) bool {
			return same(e.Event, want.Event) && same(e.Who, want.Who) && same(e.Role, want.Role) && same(e.Serial, want.Serial) && same(e.Address, want.Address) &&
				same(e.Method, want.Method) && same(e.Object, want.Object) && same(e.Result, want.Result) && strings.Contains(e.Error, want.Error)
		}) {
			return fmt.Errorf("the audit log lacks %+v", want)
		}
		return nil
	})
	if err != nil {
		b.Error(err)
	}
}

// TestAccess manages the node from another machine, with clients of each role and with refused
// ones.
func TestAccess(t *testing.T) {
	b := begin(t)
	f := &far{bench: b, node: b.c.Internet.Node, addr: Operator.String()}
	bundle := filepath.Join(b.r.Dir, "state", "admin.yaml")
	admin := b.readContext(bundle)
	info, err := os.Stat(bundle)
	b.ok(err)
	if info.Mode() != 0o600 {
		t.Errorf("the admin's bundle has mode %v", info.Mode())
	}
	// The bundle has the private address; this machine reaches the public one.
	admin.Address = net.JoinHostPort(NodePublic.String(), "7443")
	file := func(name string, c *isthmusv1.ClientContext) string {
		text, err := protojson.Marshal(c)
		b.ok(err)
		path := filepath.Join(t.TempDir(), name)
		b.ok(os.WriteFile(path, text, 0o600))
		return path
	}
	root := file("admin.yaml", admin)
	document := b.c.Document()
	apply := []string{"apply", "-f", "-"}

	// The admin may do everything, also from there.
	out, err := f.cli(root, "", "get", "tunnels")
	if err != nil || strings.Count(out, " up ") != 7 {
		t.Errorf("the admin sees %q, %v", out, err)
	}
	_, err = f.cli(root, strings.Replace(document, "- name: google-1\n", "- name: google-1\n  mtu: 1380\n", 1), apply...)
	b.ok(err)
	adminSerial := serial(t, admin.Certificate)
	b.audited(entry{Event: "begin", Who: "admin", Role: "admin", Serial: adminSerial, Address: f.addr, Method: "/isthmus.v1.SpecService/Apply"})
	b.audited(entry{Event: "end", Who: "admin", Role: "admin", Serial: adminSerial, Address: f.addr, Method: "/isthmus.v1.SpecService/Apply", Result: "OK"})
	issue := func(name, role string) string {
		path := filepath.Join(t.TempDir(), name+".yaml")
		_, err := f.cli(root, "", "client", "issue", name, "--role", role, "-o", path)
		b.ok(err)
		return path
	}
	reader, operator := issue("rita", "reader"), issue("otto", "operator")
	b.step("clients issued")

	// Too low a role.
	for _, r := range []struct {
		file, who, role, needs string
		method                 string
		args                   []string
	}{
		{reader, "rita", "reader", "operator", "SpecService/Apply", apply},
		{reader, "rita", "reader", "operator", "SecretService/SetSecret", []string{"secret", "set", "site"}},
		{reader, "rita", "reader", "operator", "SecretService/DeleteSecret", []string{"secret", "delete", "site"}},
		{reader, "rita", "reader", "operator", "SpecService/Rollback", []string{"rollback"}},
		{reader, "rita", "reader", "operator", "SpecService/Confirm", []string{"confirm", "1"}},
		{reader, "rita", "reader", "operator", "BGPService/ResetPeer", []string{"reset", "peer", "site"}},
		{reader, "rita", "reader", "admin", "AccessService/IssueClient", []string{"client", "issue", "eve", "--role", "reader", "-o", filepath.Join(t.TempDir(), "eve")}},
		{operator, "otto", "operator", "admin", "AccessService/IssueClient", []string{"client", "issue", "eve", "--role", "admin", "-o", filepath.Join(t.TempDir(), "eve")}},
		{operator, "otto", "operator", "admin", "AccessService/RevokeClient", []string{"client", "revoke", adminSerial}},
	} {
		method := "/isthmus.v1." + r.method
		f.refused(r.file, document, fmt.Sprintf("needs the role %s; this client is %s, %s", r.needs, r.who, r.role), r.args...)
		b.audited(entry{Event: "refused", Who: r.who, Role: r.role, Address: f.addr, Method: method, Result: "PermissionDenied", Error: "needs role " + r.needs})
	}
	for _, file := range []string{reader, operator} {
		if _, err := f.cli(file, "", "get", "peers"); err != nil {
			t.Errorf("reading: %v", err)
		}
	}
	if _, err := f.cli(operator, document, apply...); err != nil {
		t.Errorf("an operator applies: %v", err)
	}
	b.step("roles")

	// Without a certificate, and with one that another authority made for an admin.
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(admin.Authority))
	conn, err := f.node.DialContext(t.Context(), "tcp", admin.Address)
	b.ok(err)
	defer conn.Close()
	bare := tls.Client(conn, &tls.Config{RootCAs: roots, ServerName: admin.ServerName, NextProtos: []string{"h2"}})
	bare.SetDeadline(time.Now().Add(time.Minute))
	// The handshake of a TLS 1.3 client ends before the server has checked its certificate.
	if err := bare.Handshake(); err == nil {
		if _, err = bare.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "certificate required") {
			t.Errorf("without a certificate: %v", err)
		}
	}
	foreign := file("foreign.yaml", forge(t, admin))
	f.refused(foreign, "", "certificate", "get", "status")
	f.refused(foreign, document, "certificate", apply...)
	for _, why := range []string{"didn't provide a certificate", "unknown authority"} {
		b.audited(entry{Event: "refused", Address: f.addr, Error: why})
	}
	b.step("strangers")

	// A client that is revoked loses its open connections, and is not admitted again.
	watch, err := f.node.Start("watch", f.argv(operator, "watch", "tunnels")...)
	b.ok(err)
	b.until(10*time.Second, func() error {
		if text, err := os.ReadFile(watch.Log); err != nil || !bytes.Contains(text, []byte("google-1")) {
			return fmt.Errorf("watch: %s, %v", text, err)
		}
		return nil
	})
	ottoSerial := serial(t, b.readContext(operator).Certificate)
	_, err = f.cli(root, "", "client", "revoke", ottoSerial)
	b.ok(err)
	select {
	case <-watch.Done():
		if watch.Err() == nil {
			t.Error("a watch that was cut off ended without an error")
		}
	case <-time.After(time.Minute):
		t.Error("a revoked client still watches")
	}
	f.refused(operator, "", "", "get", "status")
	b.audited(entry{Event: "end", Who: "admin", Method: "/isthmus.v1.AccessService/RevokeClient", Object: ottoSerial, Result: "OK"})
	b.audited(entry{Event: "refused", Address: f.addr, Error: "revoked"})
	if out, err := f.cli(root, "", "client", "list"); err != nil || !strings.Contains(out, "revoked") {
		t.Errorf("clients: %s, %v", out, err)
	}
	b.step("revoked")

	b.run("secrets", func(b *bench) { b.secretsStay(f, root) })

	// The bundle is written once in the life of the node, also when it has been moved away.
	b.ok(os.Remove(bundle))
	b.r.Kill()
	b.ok(b.r.StartDaemon(t.Context()))
	if _, err := os.Stat(bundle); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the admin's bundle is there again: %v", err)
	}
	if _, err := f.cli(root, "", "get", "status"); err != nil {
		t.Errorf("the admin after a restart: %v", err)
	}
	f.refused(operator, "", "", "get", "status")
	log, err := os.ReadFile(b.r.Daemon.Log)
	b.ok(err)
	if n := bytes.Count(log, []byte("the first admin's certificate")); n != 1 {
		t.Errorf("the bundle was announced %d times", n)
	}
	b.run("no leak", (*bench).noLeak)
}

// secretsStay looks for the pre-shared keys, and for one that is pasted in the place of its name,
// in all output and files.
func (b *bench) secretsStay(f *far, root string) {
	const pasted = "kPASTEDINTHEDOCUMENT23456"
	secrets := []string{pasted, b.c.NodeKey.Private}
	for _, g := range b.c.Gateways() {
		for _, p := range g.Config.Peerings {
			secrets = append(secrets, p.PSK)
		}
	}
	look := func(where string, text []byte) {
		for i, s := range secrets {
			for form, needle := range map[string][]byte{"as it is": []byte(s), "in base64": []byte(base64.StdEncoding.EncodeToString([]byte(s))[:len(s)]), "in hexadecimal": []byte(hex.EncodeToString([]byte(s)))} {
				if bytes.Contains(text, needle) {
					b.Errorf("%s has secret %d, %s", where, i, form)
				}
			}
		}
	}
	said := func(input string, args ...string) {
		out, err := f.cli(root, input, args...)
		look("isthmus "+strings.Join(args, " "), fmt.Append(nil, out, err))
	}
	for _, o := range []string{"table", "wide", "json", "yaml"} {
		for _, noun := range []string{"tunnels", "peers", "routes", "nat", "spec", "history", "secrets", "clients", "status"} {
			said("", "get", noun, "-o", o)
		}
		said("", "describe", "tunnel", "aws-0", "-o", o)
		said("", "describe", "node", "-o", o)
		said(b.c.Document(), "plan", "-f", "-", "-o", o)
	}
	wrong := strings.Replace(b.c.Document(), "psk: aws-0", "psk: "+pasted, 1)
	for _, verb := range []string{"validate", "plan", "apply"} {
		said(wrong, verb, "-f", "-")
	}
	said(pasted, "secret", "set", "Not_A_Name")
	said(pasted, "secret", "set", "pasted")
	said(pasted, "secret", "list")
	said("", "secret", "delete", "pasted")
	said("", "secret", "delete", "aws-0")

	files := 0
	kept := func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		look(path, text)
		files++
		return err
	}
	for _, dir := range []string{"state", "run"} {
		b.ok(filepath.WalkDir(filepath.Join(b.r.Dir, dir), kept))
	}
	log, err := os.ReadFile(b.r.Daemon.Log)
	b.ok(err)
	look("the log", log)
	if files < 10 || len(log) == 0 {
		b.Errorf("%d files, log of %d bytes: this test looks in the wrong place", files, len(log))
	}
}

func certificate(t *testing.T, text string) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Fatalf("no PEM: %s", text)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func serial(t *testing.T, text string) string {
	t.Helper()
	return fmt.Sprintf("%x", certificate(t, text).SerialNumber)
}

// forge returns the context with a certificate that has the same content and was issued by another
// authority of the same name.
func forge(t *testing.T, c *isthmusv1.ClientContext) *isthmusv1.ClientContext {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "isthmus authority"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	leaf := &x509.Certificate{SerialNumber: certificate(t, c.Certificate).SerialNumber, Subject: pkix.Name{CommonName: "admin"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, URIs: []*url.URL{{Scheme: "isthmus", Opaque: "role/admin"}}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &isthmusv1.ClientContext{Address: c.Address, ServerName: c.ServerName, Authority: c.Authority,
		Certificate: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		Key:         string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))}
}
