package api_test

import (
	"crypto/tls"
	"encoding/pem"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/test/root"
)

// TestRenewClient checks that a client renews its own certificate and no other, and that the new
// one grants access; root has no certificate. While the clock is wrong, the API signs none, except
// for root while the clock is ahead.
func TestRenewClient(t *testing.T) {
	root.Need(t, "being root on the API's socket")
	var offset atomic.Int64
	s := apitest.Serve(t, func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }, apitest.New(time.Now))
	offset.Store(int64(-300 * 24 * time.Hour))
	cert, serial := issued(t, s, "rita", auth.Reader, 0)
	offset.Store(0)
	rita := isthmusv1.NewAccessServiceClient(dial(t, s, cert))
	key, csr := keyPair(t)
	r, err := rita.RenewClient(soon(t), &isthmusv1.RenewClientRequest{Csr: csr})
	if err != nil || r.Client.GetName() != "rita" || r.Client.GetRole() != "reader" || r.Client.GetRenewedFrom() != serial {
		t.Fatal(r, err)
	}
	block, _ := pem.Decode([]byte(r.Certificate))
	if _, err := isthmusv1.NewTunnelServiceClient(dial(t, s, tls.Certificate{Certificate: [][]byte{block.Bytes}, PrivateKey: key})).ListTunnels(soon(t), &isthmusv1.ListTunnelsRequest{}); err != nil {
		t.Errorf("with the new one: %v", err)
	}
	_, other := keyPair(t)
	_, err = rita.RenewClient(soon(t), &isthmusv1.RenewClientRequest{Csr: other})
	wantCode(t, "for another key", err, codes.InvalidArgument)
	conn, err := grpc.NewClient("unix:"+s.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	root := isthmusv1.NewAccessServiceClient(conn)
	_, err = root.RenewClient(soon(t), &isthmusv1.RenewClientRequest{Csr: other})
	wantCode(t, "root", err, codes.InvalidArgument)

	admin := isthmusv1.NewAccessServiceClient(dialRole(t, s, auth.Admin))
	issue := &isthmusv1.IssueClientRequest{Name: "new", Role: "reader", Csr: other}
	for _, c := range []struct {
		what      string
		years     int
		admin, by codes.Code // by root
		renew     codes.Code // the authority, by the admin
	}{{"behind", -50, codes.InvalidArgument, codes.InvalidArgument, codes.OK}, {"ahead", 50, codes.InvalidArgument, codes.OK, codes.InvalidArgument}} {
		offset.Store(int64(time.Duration(c.years) * 365 * 24 * time.Hour))
		_, err = admin.IssueClient(soon(t), issue)
		wantCode(t, c.what+", an admin issues", err, c.admin)
		if c.renew != codes.OK {
			_, err = admin.RenewAuthority(soon(t), &isthmusv1.RenewAuthorityRequest{})
			wantCode(t, c.what+", an admin renews the authority", err, c.renew)
		}
		_, err = root.IssueClient(soon(t), issue)
		wantCode(t, c.what+", root issues", err, c.by)
	}
}
