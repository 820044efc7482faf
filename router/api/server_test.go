package api_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/reason"
	"github.com/isthmus-net/isthmus/test/root"
)

func keyPair(t *testing.T) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "ignored"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, csr
}

// issued returns a certificate from the server's own authority, and its serial.
func issued(t *testing.T, s *apitest.Server, name string, role auth.Role, lifetime time.Duration) (tls.Certificate, string) {
	t.Helper()
	key, csr := keyPair(t)
	text, c, err := s.Authority.Issue(name, role, csr, lifetime)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(text))
	return tls.Certificate{Certificate: [][]byte{block.Bytes}, PrivateKey: key}, c.Serial
}

func dial(t *testing.T, s *apitest.Server, certs ...tls.Certificate) *grpc.ClientConn {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(s.Authority.Certificate())) {
		t.Fatal("the authority's certificate is not valid PEM")
	}
	c, err := grpc.NewClient(s.Address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		RootCAs: pool, ServerName: auth.ServerName, Certificates: certs, MinVersion: tls.VersionTLS13,
	})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func dialRole(t *testing.T, s *apitest.Server, role auth.Role) *grpc.ClientConn {
	t.Helper()
	cert, _ := issued(t, s, "test-"+role.String(), role, 0)
	return dial(t, s, cert)
}

// soon returns a context for calls that could wait forever.
func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func source(text string) *isthmusv1.Source {
	return &isthmusv1.Source{Source: &isthmusv1.Source_Text{Text: text}}
}

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
	if err != nil {
		wantReason(t, what, err)
	}
}

// wantReason checks that an error has a reason of the table, with the reason's code.
func wantReason(t *testing.T, what string, err error) {
	t.Helper()
	if m := status.Convert(err).Message(); strings.HasPrefix(m, "connection error") || strings.HasPrefix(m, "error reading from server") || strings.HasPrefix(m, "grpc: received message larger") {
		return // the connection's, or of gRPC before it calls interceptors
	}
	i := slices.IndexFunc(reason.All, func(r *reason.Reason) bool { return r.Name == reason.Of(err) })
	if i < 0 || reason.All[i].Code != status.Code(err) {
		t.Errorf("%s: %v has the reason %q", what, err, reason.Of(err))
	}
}

func auditLog(t *testing.T, s *apitest.Server) []auth.Entry {
	t.Helper()
	data, err := os.ReadFile(s.Audit)
	if err != nil {
		t.Fatal(err)
	}
	// Refused connections have a log of their own, if there were any; their lines come last here.
	if refused, err := os.ReadFile(auth.RefusedLog(s.Audit)); err == nil {
		data = append(data, refused...)
	}
	var out []auth.Entry
	for line := range bytes.Lines(data) {
		var e auth.Entry
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("audit line %q: %v", line, err)
		}
		out = append(out, e)
	}
	return out
}

func TestHandshake(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	foreignKey, _ := keyPair(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "stranger"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, URIs: []*url.URL{{Scheme: "isthmus", Opaque: "role/admin"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, foreignKey.Public(), foreignKey)
	if err != nil {
		t.Fatal(err)
	}
	revoked, serial := issued(t, s, "gone", auth.Admin, 0)
	if err := s.Authority.Revoke(serial); err != nil {
		t.Fatal(err)
	}
	good, _ := issued(t, s, "ann", auth.Reader, 0)

	for _, c := range []struct {
		name  string
		cert  tls.Certificate
		audit string // empty: let in
	}{
		{name: "issued", cert: good},
		{name: "none", audit: "didn't provide a certificate"},
		{name: "foreign", cert: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: foreignKey}, audit: "unknown authority"},
		{name: "revoked", cert: revoked, audit: "is revoked"},
	} {
		before := len(auditLog(t, s))
		conn, err := tls.Dial("tcp", s.Address, &tls.Config{
			InsecureSkipVerify: true, NextProtos: []string{"h2"},
			// Send the certificate even if its issuer is not one that the server accepts.
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c.cert, nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		// A server that accepts the connection sends its SETTINGS first.
		_, err = conn.Read(make([]byte, 1))
		conn.Close()
		if (err == nil) != (c.audit == "") {
			t.Errorf("%s: reading: %v", c.name, err)
		}
		if c.audit == "" {
			continue
		}
		deadline := time.Now().Add(time.Minute)
		for len(auditLog(t, s)) == before && time.Now().Before(deadline) {
			time.Sleep(5 * time.Millisecond)
		}
		log := auditLog(t, s)[before:]
		if len(log) != 1 || log[0].Event != auth.Refused || !strings.Contains(log[0].Error, c.audit) || log[0].Address != "127.0.0.1" {
			t.Errorf("%s: audit log has %+v, want a refusal with %q", c.name, log, c.audit)
		}
	}

	old, err := tls.Dial("tcp", s.Address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{good}})
	if err == nil {
		old.Close()
		t.Error("TLS 1.2 was accepted")
	}
}

// TestRoles calls every unary method of the services with every role, and checks the refusals.
func TestRoles(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	minimum := map[string]auth.Role{}
	for _, m := range []string{"Apply", "EditPolicies", "SetDisabled", "Confirm", "Rollback", "ResetPeer", "ResetTunnel", "SetSecret", "AddSecret", "RollbackSecret", "DeleteSecret", "ProveEgress", "Who", "EndFlows", "ListLogs"} {
		minimum[m] = auth.Operator
	}
	for _, m := range []string{"IssueClient", "ListClients", "ListAudit", "RevokeClient", "RenewAuthority", "RollbackSlot", "Reboot", "PowerOff", "Seal", "Unseal"} {
		minimum[m] = auth.Admin
	}
	var methods []string
	protoregistry.GlobalFiles.RangeFilesByPackage("isthmus.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			service := f.Services().Get(i)
			for j := range service.Methods().Len() {
				if m := service.Methods().Get(j); !m.IsStreamingClient() && !m.IsStreamingServer() {
					methods = append(methods, fmt.Sprintf("/%s/%s", service.FullName(), m.Name()))
				}
			}
		}
		return true
	})
	// a method of two services would hide that the list has only one role for its name
	names := map[string]bool{}
	for _, full := range methods {
		name := path.Base(full)
		if names[name] {
			t.Errorf("two methods are named %s", name)
		}
		names[name] = true
	}
	for name := range minimum {
		if !names[name] {
			t.Errorf("unknown method %s", name)
		}
	}
	if len(methods) < 30 {
		t.Errorf("only %d methods", len(methods))
	}
	for _, role := range []auth.Role{auth.Reader, auth.Operator, auth.Admin} {
		conn := dialRole(t, s, role)
		for _, full := range methods {
			// An empty request of any type will do, because the role is checked before the
			// request.
			err := conn.Invoke(t.Context(), full, &isthmusv1.GetStatusRequest{}, &isthmusv1.GetStatusRequest{})
			refused := status.Code(err) == codes.PermissionDenied
			if want := role < max(minimum[path.Base(full)], auth.Reader); refused != want {
				t.Errorf("%s as %s: %v", full, role, err)
			}
			if err != nil {
				wantReason(t, full, err)
			}
		}
	}
}

func TestAudit(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	op := dialRole(t, s, auth.Operator)
	specs := isthmusv1.NewSpecServiceClient(op)
	if _, err := specs.Apply(t.Context(), &isthmusv1.ApplyRequest{Source: source("aws-0\n")}); err != nil {
		t.Fatal(err)
	}
	_, err := specs.Apply(t.Context(), &isthmusv1.ApplyRequest{Source: source("aws-0\nbad-1\n")})
	wantCode(t, "bad document", err, codes.InvalidArgument)
	if _, err := specs.EditPolicies(t.Context(), &isthmusv1.EditPoliciesRequest{Set: []*isthmusv1.EgressPolicy{{Name: "a"}, {Name: "b"}}, Delete: []string{"c"}}); err != nil {
		t.Fatal(err)
	}
	for _, r := range []*isthmusv1.EditPoliciesRequest{
		{Text: "aws-0\n"},
		{Text: "aws-0\n", Delete: []string{"c"}},
		{Text: "aws-0\n", Delete: []string{"d"}, DryRun: true},
		{Delete: []string{"c"}, ConfirmWithin: durationpb.New(time.Minute), Message: "NET-1"},
	} {
		if _, err := specs.EditPolicies(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := specs.Apply(t.Context(), &isthmusv1.ApplyRequest{Source: source("aws-0\n"), ConfirmWithin: durationpb.New(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	secrets := isthmusv1.NewSecretServiceClient(op)
	if _, err := secrets.SetSecret(t.Context(), &isthmusv1.SetSecretRequest{Name: "psk", Value: []byte("hunter2hunter2")}); err != nil {
		t.Fatal(err)
	}
	_, err = isthmusv1.NewSpecServiceClient(dialRole(t, s, auth.Reader)).Apply(t.Context(), &isthmusv1.ApplyRequest{Source: source("x")})
	wantCode(t, "reader applying", err, codes.PermissionDenied)

	var got []string
	for _, e := range auditLog(t, s) {
		got = append(got, fmt.Sprintf("%s %s %s %s object=%s digest=%.8s %d->%d %s %s",
			e.Event, e.Who, e.Role, e.Method, e.Object, e.Digest, e.From, e.To, e.Result, e.Error))
	}
	want := []string{
		"begin test-operator operator /isthmus.v1.SpecService/Apply object= digest=c973868e 0->0  ",
		"end test-operator operator /isthmus.v1.SpecService/Apply object= digest=c973868e 0->1 OK ",
		"begin test-operator operator /isthmus.v1.SpecService/Apply object= digest=063d0ee9 1->0  ",
		"end test-operator operator /isthmus.v1.SpecService/Apply object= digest=063d0ee9 1->0 InvalidArgument document refused: tunnels[1].name: must not begin with bad",
		"begin test-operator operator /isthmus.v1.SpecService/EditPolicies object=set a, set b, delete c digest=56cf31bf 1->0  ",
		"end test-operator operator /isthmus.v1.SpecService/EditPolicies object=set a, set b, delete c digest=56cf31bf 1->2 OK ",
		"begin test-operator operator /isthmus.v1.SpecService/EditPolicies object= digest=c973868e 2->0  ",
		"end test-operator operator /isthmus.v1.SpecService/EditPolicies object= digest=c973868e 2->3 OK ",
		"begin test-operator operator /isthmus.v1.SpecService/EditPolicies object=delete c digest=f6dfd224 3->0  ",
		"end test-operator operator /isthmus.v1.SpecService/EditPolicies object=delete c digest=f6dfd224 3->4 OK ",
		"begin test-operator operator /isthmus.v1.SpecService/EditPolicies object=dry run, delete d digest=98060c25 4->0  ",
		"end test-operator operator /isthmus.v1.SpecService/EditPolicies object=dry run, delete d digest=98060c25 4->4 OK ",
		"begin test-operator operator /isthmus.v1.SpecService/EditPolicies object=to be confirmed within 1m0s, why: NET-1, delete c digest=dea1bfa5 4->0  ",
		"end test-operator operator /isthmus.v1.SpecService/EditPolicies object=to be confirmed within 1m0s, why: NET-1, delete c digest=dea1bfa5 4->5 OK ",
		"begin test-operator operator /isthmus.v1.SpecService/Apply object=to be confirmed within 1m0s digest=c973868e 5->0  ",
		"end test-operator operator /isthmus.v1.SpecService/Apply object=to be confirmed within 1m0s digest=c973868e 5->5 OK ",
		"begin test-operator operator /isthmus.v1.SecretService/SetSecret object=psk digest= 5->0  ",
		"end test-operator operator /isthmus.v1.SecretService/SetSecret object=psk digest= 5->0 OK ",
		"refused test-reader reader /isthmus.v1.SpecService/Apply object= digest= 0->0 PermissionDenied /isthmus.v1.SpecService/Apply needs role operator, test-reader has role reader",
	}
	if !slices.Equal(got, want) {
		t.Errorf("audit log has\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if data, _ := os.ReadFile(s.Audit); bytes.Contains(data, []byte("hunter2")) {
		t.Error("the audit log holds a secret")
	}
}

func TestErrors(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	conn := dialRole(t, s, auth.Admin)
	specs, secrets := isthmusv1.NewSpecServiceClient(conn), isthmusv1.NewSecretServiceClient(conn)
	ctx := t.Context()

	_, err := specs.Apply(ctx, &isthmusv1.ApplyRequest{Source: source("bad-1\nbad-2\n")})
	wantCode(t, "bad document", err, codes.InvalidArgument)
	details := status.Convert(err).Details()
	if len(details) != 3 || len(details[0].(*isthmusv1.Problems).Problems) != 2 {
		t.Errorf("details are %v, want two problems, their fields and a reason", details)
	}
	// Ten thousand problems do not fit into trailers: the server sends some, and the number of the
	// others.
	_, err = specs.Plan(ctx, &isthmusv1.PlanRequest{Source: source(strings.Repeat("bad\n", 10000))})
	wantCode(t, "very bad document", err, codes.InvalidArgument)
	problems := status.Convert(err).Details()[0].(*isthmusv1.Problems).Problems
	if last := problems[len(problems)-1].Rule; last != fmt.Sprintf("%d more problems", 10000-len(problems)+1) {
		t.Errorf("%d problems sent, the last is %q", len(problems), last)
	}
	v, err := specs.Validate(ctx, &isthmusv1.ValidateRequest{Source: source(strings.Repeat("bad\n", 10000))})
	if err != nil || len(v.Problems) != 10000 {
		t.Errorf("validating: %d problems, %v", len(v.GetProblems()), err)
	}

	_, err = specs.Apply(ctx, &isthmusv1.ApplyRequest{})
	wantCode(t, "no document", err, codes.InvalidArgument)
	_, err = specs.Apply(ctx, &isthmusv1.ApplyRequest{Source: source("a"), ConfirmWithin: durationpb.New(time.Second)})
	wantCode(t, "confirm too soon", err, codes.InvalidArgument)
	_, err = specs.Apply(ctx, &isthmusv1.ApplyRequest{Source: source("a"), ExpectedGeneration: new(uint64(7))})
	wantCode(t, "stale", err, codes.Aborted)
	edit := func(what string, r *isthmusv1.EditPoliciesRequest, want codes.Code) {
		_, err := specs.EditPolicies(ctx, r)
		wantCode(t, what, err, want)
	}
	for what, r := range map[string]*isthmusv1.SetDisabledRequest{
		"no name":        {},
		"too many names": {Tunnels: make([]string, 999), Peers: make([]string, 2)},
		"two lines":      {Tunnels: []string{"a"}, Message: "a\nb"},
		"too soon":       {Tunnels: []string{"a"}, ConfirmWithin: durationpb.New(time.Second)},
	} {
		_, err := specs.SetDisabled(ctx, r)
		wantCode(t, what, err, codes.InvalidArgument)
	}
	edit("two lines", &isthmusv1.EditPoliciesRequest{Delete: []string{"c"}, Message: "a\nb"}, codes.InvalidArgument)
	edit("no edit", &isthmusv1.EditPoliciesRequest{}, codes.InvalidArgument)
	edit("set and text", &isthmusv1.EditPoliciesRequest{Set: []*isthmusv1.EgressPolicy{{Name: "a"}}, Text: "b"}, codes.InvalidArgument)
	edit("edit of 16 MiB and a byte", &isthmusv1.EditPoliciesRequest{Text: strings.Repeat("#", 16<<20+1)}, codes.InvalidArgument)
	edit("edit confirmed too soon", &isthmusv1.EditPoliciesRequest{Delete: []string{"a"}, ConfirmWithin: durationpb.New(time.Second)}, codes.InvalidArgument)
	edit("edit of nothing", &isthmusv1.EditPoliciesRequest{Delete: []string{"a"}}, codes.FailedPrecondition)
	edit("bad edit", &isthmusv1.EditPoliciesRequest{Set: []*isthmusv1.EgressPolicy{{Name: "bad"}}}, codes.InvalidArgument)
	edit("stale edit", &isthmusv1.EditPoliciesRequest{Delete: []string{"a"}, ExpectedGeneration: new(uint64(7))}, codes.Aborted)
	_, err = specs.Validate(ctx, &isthmusv1.ValidateRequest{Source: source(strings.Repeat("#", 16<<20))})
	wantCode(t, "document of 16 MiB", err, codes.OK)
	_, err = specs.Validate(ctx, &isthmusv1.ValidateRequest{Source: source(strings.Repeat("#", 16<<20+1))})
	wantCode(t, "document of 16 MiB and a byte", err, codes.InvalidArgument)
	_, err = specs.Validate(ctx, &isthmusv1.ValidateRequest{Source: source(strings.Repeat("#", 17<<20))})
	wantCode(t, "document of 17 MiB", err, codes.ResourceExhausted)
	_, err = specs.GetSpec(ctx, &isthmusv1.GetSpecRequest{Generation: 9})
	wantCode(t, "no such generation", err, codes.NotFound)
	_, err = specs.Confirm(ctx, &isthmusv1.ConfirmRequest{})
	wantCode(t, "confirming nothing", err, codes.InvalidArgument)
	_, err = isthmusv1.NewTunnelServiceClient(conn).GetTunnel(ctx, &isthmusv1.GetTunnelRequest{Name: "none"})
	wantCode(t, "no such tunnel", err, codes.NotFound)
	_, err = isthmusv1.NewBGPServiceClient(conn).ResetPeer(ctx, &isthmusv1.ResetPeerRequest{Name: "none"})
	wantCode(t, "no such peer", err, codes.NotFound)
	_, err = isthmusv1.NewRouteServiceClient(conn).ListRoutes(ctx, &isthmusv1.ListRoutesRequest{Within: "10.0.0.0"})
	wantCode(t, "no prefix", err, codes.InvalidArgument)

	_, err = secrets.SetSecret(ctx, &isthmusv1.SetSecretRequest{Name: "Bad/Name", Value: []byte("x")})
	wantCode(t, "bad secret name", err, codes.InvalidArgument)
	_, err = secrets.SetSecret(ctx, &isthmusv1.SetSecretRequest{Name: "a"})
	wantCode(t, "empty secret", err, codes.InvalidArgument)
	_, err = secrets.SetSecret(ctx, &isthmusv1.SetSecretRequest{Name: "a", Value: make([]byte, 4097)})
	wantCode(t, "long secret", err, codes.InvalidArgument)
	_, err = secrets.DeleteSecret(ctx, &isthmusv1.DeleteSecretRequest{Name: "none"})
	wantCode(t, "no such secret", err, codes.NotFound)
	if _, err := secrets.SetSecret(ctx, &isthmusv1.SetSecretRequest{Name: "aws-0", Value: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	if _, err := specs.Apply(ctx, &isthmusv1.ApplyRequest{Source: source("aws-0")}); err != nil {
		t.Fatal(err)
	}
	_, err = secrets.DeleteSecret(ctx, &isthmusv1.DeleteSecretRequest{Name: "aws-0"})
	wantCode(t, "secret in use", err, codes.FailedPrecondition)

	access := isthmusv1.NewAccessServiceClient(conn)
	_, csr := keyPair(t)
	for what, r := range map[string]*isthmusv1.IssueClientRequest{
		"role":     {Name: "bob", Role: "owner", Csr: csr},
		"name":     {Name: "bob smith", Role: "reader", Csr: csr},
		"root":     {Name: "root", Role: "reader", Csr: csr},
		"csr":      {Name: "bob", Role: "reader", Csr: []byte("x")},
		"lifetime": {Name: "bob", Role: "reader", Csr: csr, Lifetime: durationpb.New(time.Minute)},
	} {
		_, err = access.IssueClient(ctx, r)
		wantCode(t, "issuing with a bad "+what, err, codes.InvalidArgument)
	}
	_, err = access.RevokeClient(ctx, &isthmusv1.RevokeClientRequest{Serial: "00"})
	wantCode(t, "no such client", err, codes.NotFound)
}

// TestPanic checks that a panic fails only its own call, and that the audit log has the end of a
// writing call that panicked.
func TestPanic(t *testing.T) {
	router := apitest.New(time.Now)
	s := apitest.Serve(t, time.Now, router)
	conn := dialRole(t, s, auth.Operator)
	specs, tunnels := isthmusv1.NewSpecServiceClient(conn), isthmusv1.NewTunnelServiceClient(conn)
	_, err := specs.Validate(t.Context(), &isthmusv1.ValidateRequest{Source: source("panic\n")})
	wantCode(t, "validating", err, codes.Internal)
	_, err = specs.Apply(t.Context(), &isthmusv1.ApplyRequest{Source: source("panic\n")})
	wantCode(t, "applying", err, codes.Internal)
	log := auditLog(t, s)
	if last := log[len(log)-1]; last.Event != auth.End || last.Result != "Internal" {
		t.Errorf("the audit log ends with %+v", last)
	}
	router.SetTunnels(&isthmusv1.TunnelStatus{Name: "panic"})
	watch, err := tunnels.WatchTunnels(t.Context(), &isthmusv1.WatchTunnelsRequest{})
	if err == nil {
		_, err = watch.Recv()
	}
	wantCode(t, "watching", err, codes.Internal)
	router.SetTunnels(&isthmusv1.TunnelStatus{Name: "aws-0"})
	if list, err := tunnels.ListTunnels(t.Context(), &isthmusv1.ListTunnelsRequest{}); err != nil || len(list.Tunnels) != 1 {
		t.Errorf("afterwards: %v %v", list, err)
	}
}

func TestPages(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	var all []*isthmusv1.Route
	for i := range 2500 {
		r := &isthmusv1.Route{Prefix: fmt.Sprintf("10.%d.%d.0/24", i/256, i%256)}
		if i%2 == 0 {
			r.NextHops = []*isthmusv1.NextHop{{Peer: "even"}}
		}
		all = append(all, r)
	}
	s.Router.SetRoutes(all...)
	client := isthmusv1.NewRouteServiceClient(dialRole(t, s, auth.Reader))
	list := func(r *isthmusv1.ListRoutesRequest) (out []*isthmusv1.Route, pages int) {
		for {
			p, err := client.ListRoutes(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, p.Routes...)
			pages++
			if p.NextPageToken == "" {
				return out, pages
			}
			r.PageToken = p.NextPageToken
		}
	}
	for _, c := range []struct {
		r          *isthmusv1.ListRoutesRequest
		n, inPages int
	}{
		{&isthmusv1.ListRoutesRequest{}, 2500, 3},
		{&isthmusv1.ListRoutesRequest{PageSize: 2500}, 2500, 1},
		{&isthmusv1.ListRoutesRequest{PageSize: 7, Within: "10.2.0.0/16"}, 256, 37},
		{&isthmusv1.ListRoutesRequest{PageSize: 100, Peer: "even"}, 1250, 13},
		{&isthmusv1.ListRoutesRequest{Peer: "even", Within: "10.1.0.0/17"}, 64, 1},
		{&isthmusv1.ListRoutesRequest{Within: "11.0.0.0/8"}, 0, 1},
	} {
		got, pages := list(c.r)
		seen := map[string]bool{}
		for _, r := range got {
			seen[r.Prefix] = true
		}
		if len(got) != c.n || len(seen) != c.n || pages != c.inPages {
			t.Errorf("%v: %d routes, %d different, in %d pages; want %d in %d", c.r, len(got), len(seen), pages, c.n, c.inPages)
		}
	}

	first, err := client.ListRoutes(t.Context(), &isthmusv1.ListRoutesRequest{PageSize: 10})
	if err != nil {
		t.Fatal(err)
	}
	// The next page is the same if a route is removed between two pages.
	s.Router.SetRoutes(slices.Concat(all[:9], all[10:])...)
	second, err := client.ListRoutes(t.Context(), &isthmusv1.ListRoutesRequest{PageSize: 1, PageToken: first.NextPageToken})
	if err != nil || second.Routes[0].Prefix != all[10].Prefix {
		t.Errorf("second page: %v, %v", second, err)
	}
	for what, r := range map[string]*isthmusv1.ListRoutesRequest{
		"another filter": {PageToken: first.NextPageToken, Peer: "even"},
		"nonsense":       {PageToken: "nonsense"},
		"a large page":   {PageSize: 10001},
	} {
		_, err := client.ListRoutes(t.Context(), r)
		wantCode(t, what, err, codes.InvalidArgument)
	}
	_, err = isthmusv1.NewTunnelServiceClient(dialRole(t, s, auth.Reader)).ListTunnels(t.Context(), &isthmusv1.ListTunnelsRequest{PageToken: first.NextPageToken})
	wantCode(t, "another list", err, codes.InvalidArgument)
}

func TestWatch(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	tunnel := func(name, state string, rx uint64) *isthmusv1.TunnelStatus {
		return &isthmusv1.TunnelStatus{Name: name, State: state, RxBytes: rx}
	}
	s.Router.SetTunnels(tunnel("a", "up", 0), tunnel("b", "up", 0))
	stream, err := isthmusv1.NewTunnelServiceClient(dialRole(t, s, auth.Reader)).WatchTunnels(soon(t), &isthmusv1.WatchTunnelsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := func(want string) {
		t.Helper()
		e, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		got := strings.TrimSpace(fmt.Sprintf("%s %s %s", strings.TrimPrefix(e.Type.String(), "EVENT_TYPE_"), e.Tunnel.GetName(), e.Tunnel.GetState()))
		if got != want {
			t.Fatalf("event is %q, want %q", got, want)
		}
	}
	next("ADDED a up")
	next("ADDED b up")
	next("MARK")
	s.Router.SetTunnels(tunnel("a", "up", 99), tunnel("b", "up", 99)) // counters alone
	time.Sleep(100 * time.Millisecond)
	s.Router.SetTunnels(tunnel("a", "down", 100), tunnel("c", "up", 0))
	next("UPDATED a down")
	next("REMOVED b")
	next("ADDED c up")
	// Changes during the pause of a watch are sent as one.
	for i := range 100 {
		s.Router.SetTunnels(tunnel("a", fmt.Sprint(i), 0))
	}
	s.Router.SetTunnels(tunnel("a", "last", 0), tunnel("d", "up", 0))
	events := 0
	for {
		e, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if events++; e.Tunnel.Name == "d" {
			break
		}
	}
	if events > 10 {
		t.Errorf("%d events for a hundred changes in a row", events)
	}
}

// TestWatchLasts checks that a watch lasts for days, on a connection that takes no new calls after
// the first day.
func TestWatchLasts(t *testing.T) {
	defer api.DaysAreSeconds()()
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	conn := dialRole(t, s, auth.Reader)
	stream, err := isthmusv1.NewTunnelServiceClient(conn).WatchTunnels(soon(t), &isthmusv1.WatchTunnelsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2500 * time.Millisecond)
	if _, err := isthmusv1.NewSystemServiceClient(conn).GetStatus(soon(t), &isthmusv1.GetStatusRequest{}); err != nil {
		t.Error(err)
	}
	s.Router.SetTunnels(&isthmusv1.TunnelStatus{Name: "a"})
	if e, err := stream.Recv(); err != nil || e.Tunnel.GetName() != "a" {
		t.Errorf("after two days: %v, %v", e, err)
	}
}

// TestSlowWatcher checks that the server keeps no queue of events for a client that does not read.
func TestSlowWatcher(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	big := strings.Repeat("x", 1<<10)
	fill := func(round int) {
		var all []*isthmusv1.Route
		for i := range 1000 {
			all = append(all, &isthmusv1.Route{Prefix: fmt.Sprintf("10.%d.%d.0/24", i/256, i%256), AsPath: fmt.Sprint(round, big)})
		}
		s.Router.SetRoutes(all...)
	}
	fill(0)
	stream, err := isthmusv1.NewRouteServiceClient(dialRole(t, s, auth.Reader)).WatchRoutes(soon(t), &isthmusv1.WatchRoutesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for round := range 30 {
		fill(round + 1)
		time.Sleep(10 * time.Millisecond)
	}
	events, last := 0, map[string]string{}
	for {
		e, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if e.Route != nil {
			events++
			last[e.Route.Prefix] = e.Route.AsPath[:2]
		}
		if len(last) == 1000 && e.Route.GetPrefix() == "10.3.231.0/24" && e.Route.AsPath[:2] == "30" {
			break
		}
	}
	if events > 10*1000 {
		t.Errorf("%d events: each of 30 rounds was queued for a client that did not read", events)
	}
	for prefix, round := range last {
		if round != "30" {
			t.Fatalf("%s is of round %s at the end", prefix, round)
		}
	}
}

func TestRevokeCutsConnections(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	cert, serial := issued(t, s, "bob", auth.Reader, 0)
	conn := dial(t, s, cert)
	other := dialRole(t, s, auth.Reader)
	watch := func(c *grpc.ClientConn) grpc.ServerStreamingClient[isthmusv1.TunnelEvent] {
		w, err := isthmusv1.NewTunnelServiceClient(c).WatchTunnels(soon(t), &isthmusv1.WatchTunnelsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if e, err := w.Recv(); err != nil || e.Type != isthmusv1.EventType_EVENT_TYPE_MARK {
			t.Fatalf("%v, %v", e, err)
		}
		return w
	}
	cut, kept := watch(conn), watch(other)
	admin := isthmusv1.NewAccessServiceClient(dialRole(t, s, auth.Admin))
	if _, err := admin.RevokeClient(t.Context(), &isthmusv1.RevokeClientRequest{Serial: serial}); err != nil {
		t.Fatal(err)
	}
	_, err := cut.Recv()
	wantCode(t, "watch of the revoked client", err, codes.Unavailable)
	_, err = isthmusv1.NewSystemServiceClient(conn).GetStatus(t.Context(), &isthmusv1.GetStatusRequest{})
	wantCode(t, "next call of the revoked client", err, codes.Unavailable)
	s.Router.SetTunnels(&isthmusv1.TunnelStatus{Name: "a"})
	if _, err := kept.Recv(); err != nil {
		t.Errorf("watch of another client: %v", err)
	}
}

// TestExpiry checks that a connection ends when its certificate expires.
func TestExpiry(t *testing.T) {
	var offset atomic.Int64
	s := apitest.Serve(t, func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }, apitest.New(time.Now))
	offset.Store(int64(2*time.Second - auth.MinLifetime))
	cert, _ := issued(t, s, "brief", auth.Reader, auth.MinLifetime)
	offset.Store(0)
	w, err := isthmusv1.NewTunnelServiceClient(dial(t, s, cert)).WatchTunnels(soon(t), &isthmusv1.WatchTunnelsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Recv(); err != nil {
		t.Fatalf("before the certificate expires: %v", err)
	}
	_, err = w.Recv()
	wantCode(t, "after it", err, codes.Unavailable)
}

func TestUnixSocket(t *testing.T) {
	root.Need(t, "being root on the API's socket")
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	if info, err := os.Stat(s.Socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", info.Mode(), err)
	}
	c, err := grpc.NewClient("unix:"+s.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := isthmusv1.NewSpecServiceClient(c).Apply(t.Context(), &isthmusv1.ApplyRequest{Source: source("a")}); err != nil {
		t.Fatal(err)
	}
	if h := s.Router.History(); len(h) != 1 || h[0].Author != "root" {
		t.Errorf("history is %v", h)
	}

	// The server refuses another user by UID, even where the file mode would permit access.
	for dir := s.Socket; dir != "/tmp" && dir != "/"; dir = dir[:strings.LastIndexByte(dir, '/')] {
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestHelperUnix$")
	cmd.Env = []string{"ISTHMUS_TEST_SOCKET=" + s.Socket}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	before := len(auditLog(t, s))
	// Another user may have no access to the directory of the test binary, so pass it as a
	// descriptor.
	exe, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer exe.Close()
	cmd.ExtraFiles = []*os.File{exe}
	cmd.Path = "/proc/self/fd/3"
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "connected, then closed") {
		t.Errorf("another user: %v, %s", err, out)
	}
	// The line is written after the connection is closed.
	for deadline := time.Now().Add(time.Minute); len(auditLog(t, s)) == before && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	if log := auditLog(t, s)[before:]; len(log) != 1 || log[0].Who != "uid 65534" || log[0].Event != auth.Refused {
		t.Errorf("audit log has %+v", log)
	}
}

// TestHelperUnix is the other user of TestUnixSocket, in a process of its own.
func TestHelperUnix(t *testing.T) {
	path := os.Getenv("ISTHMUS_TEST_SOCKET")
	if path == "" {
		return
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := c.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Fatalf("reading: %v", err)
	}
	fmt.Println("connected, then closed")
}

func TestHealthAndReflection(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	conn := dialRole(t, s, auth.Reader)
	client := grpc_health_v1.NewHealthClient(conn)
	watch, err := client.Watch(soon(t), &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := func(want grpc_health_v1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		if r, err := watch.Recv(); err != nil || r.Status != want {
			t.Fatalf("health is %v, %v; want %v", r, err, want)
		}
	}
	next(grpc_health_v1.HealthCheckResponse_SERVING)
	s.Router.SetConditions(&isthmusv1.Condition{Type: "CharonUnreachable", Severity: "error"})
	next(grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	r, err := client.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: "condition/CharonUnreachable"})
	if err != nil || r.Status != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("condition: %v, %v", r, err)
	}
	s.Router.SetConditions(&isthmusv1.Condition{Type: "ConfirmPending", Severity: "warning"})
	next(grpc_health_v1.HealthCheckResponse_SERVING)
	s.Router.SetConditions(&isthmusv1.Condition{Type: "TunnelDown", Severity: "error", Object: "tunnel a"})
	next(grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	check := func(service string) string {
		r, err := client.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: service})
		return fmt.Sprint(r.GetStatus(), " ", status.Code(err))
	}
	if got := check("tunnel/a"); got != "NOT_SERVING OK" {
		t.Errorf("the tunnel: %s", got)
	}
	s.Router.SetConditions()
	next(grpc_health_v1.HealthCheckResponse_SERVING)
	if got := check("condition/TunnelDown"); got != "SERVING OK" {
		t.Errorf("a condition that has ended: %s", got)
	}
	if got := check("tunnel/a"); got != "SERVICE_UNKNOWN OK" {
		t.Errorf("an object that is gone: %s", got)
	}

	info, err := grpc_reflection_v1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := info.Send(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	list, err := info.Recv()
	if err != nil || len(list.GetListServicesResponse().GetService()) != 18 {
		t.Errorf("reflection: %v, %v", list, err)
	}
}

// TestRate checks that the server limits the calls of one client, and that another client is not
// affected.
func TestRate(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	client := isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Reader))
	refused := 0
	for range 1000 {
		if _, err := client.GetStatus(t.Context(), &isthmusv1.GetStatusRequest{}); status.Code(err) == codes.ResourceExhausted {
			refused++
		}
	}
	if refused == 0 {
		t.Error("a thousand calls in a row were all accepted")
	}
	if _, err := isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Operator)).GetStatus(t.Context(), &isthmusv1.GetStatusRequest{}); err != nil {
		t.Errorf("another client: %v", err)
	}
}

// TestFirstAdmin checks that the exported context gives access as admin, and that only its owner
// can read it.
func TestFirstAdmin(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	info, err := os.Stat(s.Context)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("context file: %v, %v", info, err)
	}
	data, err := os.ReadFile(s.Context)
	if err != nil {
		t.Fatal(err)
	}
	var c isthmusv1.ClientContext
	if err := protojson.Unmarshal(data, &c); err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair([]byte(c.Certificate), []byte(c.Key))
	if err != nil {
		t.Fatal(err)
	}
	clients, err := isthmusv1.NewAccessServiceClient(dial(t, s, cert)).ListClients(context.Background(), &isthmusv1.ListClientsRequest{})
	if err != nil || len(clients.Clients) != 1 || clients.Clients[0].Role != "admin" {
		t.Errorf("clients are %v, %v", clients, err)
	}
}
