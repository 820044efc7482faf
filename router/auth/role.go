// Package auth authenticates and authorizes callers of the API. The node is its own certificate
// authority: it signs its server certificate and those of its clients, which contain their role. On
// the node itself, root connects over a unix socket without a certificate. The audit log records
// every write before it happens, and every refusal.
package auth

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// Role is a set of permissions. A higher role includes all lower ones.
type Role int

const (
	// Reader may read everything except secrets and the list of clients.
	Reader = Role(isthmusv1.Role_ROLE_READER)
	// Operator may also change the document and secrets.
	Operator = Role(isthmusv1.Role_ROLE_OPERATOR)
	// Admin may also grant and revoke access.
	Admin = Role(isthmusv1.Role_ROLE_ADMIN)
)

var roleNames = []string{Reader: "reader", Operator: "operator", Admin: "admin"}

// String returns "reader", "operator" or "admin"; "none" for anything else.
func (r Role) String() string {
	if r < Reader || r > Admin {
		return "none"
	}
	return roleNames[r]
}

// ParseRole is the reverse of String.
func ParseRole(s string) (Role, error) {
	if i := slices.Index(roleNames, s); i >= int(Reader) {
		return Role(i), nil
	}
	return 0, fmt.Errorf("role %q: must be reader, operator or admin", s)
}

// rule is the role that a method needs.
type rule struct {
	role  Role
	write bool
}

// rules has every method of the API. Any other method is refused.
var rules = func() map[string]rule {
	all := map[string]rule{
		"/grpc.health.v1.Health/Check": {role: Reader},
		"/grpc.health.v1.Health/List":  {role: Reader},
		"/grpc.health.v1.Health/Watch": {role: Reader},

		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      {role: Reader},
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": {role: Reader},
	}
	// The contract gives each method its role.
	services := isthmusv1.File_isthmus_v1_services_proto.Services()
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			m := methods.Get(j)
			role := Role(proto.GetExtension(m.Options(), isthmusv1.E_Role).(isthmusv1.Role))
			if role < Reader || role > Admin {
				continue // see Check
			}
			all[fmt.Sprintf("/%s/%s", services.Get(i).FullName(), m.Name())] = rule{role, proto.GetExtension(m.Options(), isthmusv1.E_Audited).(bool)}
		}
	}
	return all
}()

// Check returns an error that lists each method of a server without a role, and each role without a
// method.
func Check(services map[string]grpc.ServiceInfo) error {
	var errs []error
	served := make(map[string]bool)
	for name, info := range services {
		for _, m := range info.Methods {
			full := "/" + name + "/" + m.Name
			served[full] = true
			if r, ok := rules[full]; !ok {
				errs = append(errs, fmt.Errorf("method %s has no role in its .proto file", full))
			} else if r.write && m.IsServerStream && m.IsClientStream {
				errs = append(errs, fmt.Errorf("method %s is audited, and answers one request after the other, while the audit log has only the first", full))
			}
		}
	}
	for full := range rules {
		if !served[full] {
			errs = append(errs, fmt.Errorf("method %s has a role, and is not served", full))
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

// Identity is the authenticated peer of a connection.
type Identity struct {
	credentials.CommonAuthInfo
	Name    string // the name in the certificate, or "root", or "root (alice)" with the login user
	Role    Role
	Serial  string    // of the certificate in hexadecimal; empty over the unix socket
	Expires time.Time // of the certificate; zero over the unix socket

	cert *x509.Certificate // nil over the unix socket
}

// AuthType implements credentials.AuthInfo.
func (Identity) AuthType() string { return "isthmus" }

// AddressOf returns the remote address of a call. It is the zero Addr over the unix socket and the
// loopback.
func AddressOf(ctx context.Context) netip.Addr {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return netip.Addr{}
	}
	from, ok := p.Addr.(*net.TCPAddr)
	if !ok || from.IP.IsLoopback() {
		return netip.Addr{}
	}
	return from.AddrPort().Addr().Unmap().WithZone("")
}

// FromContext returns the caller's identity. It is the zero Identity, which has no permissions, if
// ctx is not from a call through this package.
func FromContext(ctx context.Context) Identity {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Identity{}
	}
	id, _ := p.AuthInfo.(Identity)
	return id
}
