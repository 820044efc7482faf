package spec

import (
	"fmt"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/secret"
)

// SecretUse is a field of a document that names a secret.
type SecretUse struct {
	Name string // of the secret
	Path string // of the field
	Kind secret.Kind
}

// SecretUses returns the fields of a document that name secrets, in order. The document may be
// invalid.
func SecretUses(m *isthmusv1.Spec) (out []SecretUse) {
	add := func(name, format string, i int, kind secret.Kind) {
		if name != "" {
			out = append(out, SecretUse{name, fmt.Sprintf(format, i), kind})
		}
	}
	for i, t := range m.GetTunnels() {
		add(t.GetIpsec().GetPsk(), "tunnels[%d].ipsec.psk", i, secret.PSK)
		add(t.GetWireguard().GetPrivateKey(), "tunnels[%d].wireguard.privateKey", i, secret.WireGuardKey)
		add(t.GetWireguard().GetPresharedKey(), "tunnels[%d].wireguard.presharedKey", i, secret.WireGuardKey)
	}
	for i, l := range m.GetLinks() {
		add(l.GetWireguard().GetPrivateKey(), "links[%d].wireguard.privateKey", i, secret.WireGuardKey)
		add(l.GetWireguard().GetPresharedKey(), "links[%d].wireguard.presharedKey", i, secret.WireGuardKey)
	}
	for i, p := range m.GetPeers() {
		add(p.GetPassword(), "peers[%d].password", i, secret.Password)
	}
	for i, e := range m.GetEvents().GetExport() {
		add(e.GetSecret(), "events.export[%d].secret", i, secret.WebhookKey)
	}
	return out
}
