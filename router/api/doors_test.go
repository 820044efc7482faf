package api_test

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
)

// TestRenewAuthority checks that clients of the former authority keep access and new ones trust
// both authorities, and that a renewal at once ends the access of both, but not of root.
func TestRenewAuthority(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	before := dialRole(t, s, auth.Admin)
	old := isthmusv1.NewAccessServiceClient(before)
	operator := dialRole(t, s, auth.Operator)
	_, err := isthmusv1.NewAccessServiceClient(operator).RenewAuthority(soon(t), &isthmusv1.RenewAuthorityRequest{})
	wantCode(t, "as operator", err, codes.PermissionDenied)
	r, err := old.RenewAuthority(soon(t), &isthmusv1.RenewAuthorityRequest{})
	if err != nil || strings.Count(r.Authority, "BEGIN CERTIFICATE") != 2 || time.Until(r.FormerUntil.AsTime()) < auth.Overlap-time.Hour {
		t.Fatal(r, err)
	}
	_, err = old.RenewAuthority(soon(t), &isthmusv1.RenewAuthorityRequest{})
	wantCode(t, "twice", err, codes.InvalidArgument)
	later := dialRole(t, s, auth.Admin)
	for what, c := range map[string]isthmusv1.AccessServiceClient{"of the former authority": old, "of the new authority": isthmusv1.NewAccessServiceClient(later)} {
		if _, err := c.ListClients(soon(t), &isthmusv1.ListClientsRequest{}); err != nil {
			t.Errorf("a client %s: %v", what, err)
		}
	}
	// The answer may be lost with the connection.
	_, _ = isthmusv1.NewAccessServiceClient(later).RenewAuthority(soon(t), &isthmusv1.RenewAuthorityRequest{AtOnce: true})
	// The server closes the connections one after the other.
	for end := time.Now().Add(time.Minute); err == nil || status.Code(err) == codes.InvalidArgument; {
		if time.Now().After(end) {
			t.Fatal("a client of a former authority has access after a renewal at once")
		}
		_, err = old.ListClients(soon(t), &isthmusv1.ListClientsRequest{})
	}
	wantCode(t, "a client of a former authority, after a renewal at once", err, codes.Unavailable)
	fresh, _ := issued(t, s, "fresh", auth.Admin, 0)
	if _, err := isthmusv1.NewAccessServiceClient(dial(t, s, fresh)).ListClients(soon(t), &isthmusv1.ListClientsRequest{}); err != nil {
		t.Errorf("a new client: %v", err)
	}
}

func TestRollbackSecret(t *testing.T) {
	router := apitest.New(time.Now)
	s := apitest.Serve(t, time.Now, router)
	c := isthmusv1.NewSecretServiceClient(dialRole(t, s, auth.Operator))
	for _, value := range []string{"one", "three"} {
		if _, err := c.SetSecret(soon(t), &isthmusv1.SetSecretRequest{Name: "k", Value: []byte(value)}); err != nil {
			t.Fatal(err)
		}
	}
	if i, err := c.RollbackSecret(soon(t), &isthmusv1.RollbackSecretRequest{Name: "k"}); err != nil || i.Name != "k" || router.Secret("k") != "one" {
		t.Errorf("got %v, %v", i, err)
	}
	_, err := c.RollbackSecret(soon(t), &isthmusv1.RollbackSecretRequest{Name: "other"})
	wantCode(t, "without a former value", err, codes.NotFound)
	log := auditLog(t, s)
	found := false
	for _, e := range log {
		found = found || e.Method == "/isthmus.v1.SecretService/RollbackSecret" && e.Object == "k" && e.Event == auth.End && e.Result == "OK"
	}
	if !found {
		t.Errorf("the audit log lacks it: %+v", log)
	}
}
