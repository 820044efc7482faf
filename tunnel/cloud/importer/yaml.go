package importer

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

// YAML formats the tunnels, peers and static routes as parts of a document, with comments.
func (r *Result) YAML() string {
	var b strings.Builder
	line := func(indent int, text, comment string) {
		b.WriteString(strings.Repeat("  ", indent) + text)
		if comment != "" {
			b.WriteString(" # " + printable(comment))
		}
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, "# From %s, by isthmus cloud import %s. Omitted fields come from `cloud`: see isthmus cloud show.\n", printable(strings.Join(r.Files, ", ")), r.Cloud)
	for _, a := range r.Routers() {
		asns := map[uint32]bool{}
		for _, t := range r.Tunnels {
			if t.RouterPublic.Is == a && t.RouterASN.known() && !asns[t.RouterASN.Is] {
				asns[t.RouterASN.Is] = true
				fmt.Fprintf(&b, "# The node needs underlay.publicAddress %s (%s) and node.asn %d (%s).\n", a, t.RouterPublic.From, t.RouterASN.Is, t.RouterASN.From)
			}
		}
		if len(asns) == 0 {
			fmt.Fprintf(&b, "# The node needs underlay.publicAddress %s.\n", a)
		}
	}
	asns := map[uint32]bool{}
	for _, t := range r.Tunnels {
		if !t.RouterPublic.known() && t.RouterASN.known() && !asns[t.RouterASN.Is] {
			asns[t.RouterASN.Is] = true
			fmt.Fprintf(&b, "# The node needs node.asn %d (%s).\n", t.RouterASN.Is, t.RouterASN.From)
		}
	}
	b.WriteString("tunnels:\n")
	for _, t := range r.Tunnels {
		line(1, "# "+printable(t.About), "")
		line(1, "- name: "+quote(t.Name), "")
		line(2, "cloud: "+t.Cloud, "")
		if len(t.Inside) > 0 {
			line(2, "inside:", "")
		}
		for _, in := range t.Inside {
			line(3, "- local: "+quote(in.Local.Is.String()), in.Local.From)
			line(4, "remote: "+quote(in.Peer.Is.String()), in.Peer.From)
		}
		line(2, "ipsec:", "")
		line(3, "remoteAddress: "+quote(t.Remote.Is.String()), t.Remote.From)
		psk := "the name of the secret; " + t.PSK.From
		if !t.PSK.Is.Known() {
			psk = "MISSING here: store it with isthmus secret set " + t.PSKName()
		}
		line(3, "psk: "+quote(t.PSKName()), psk)
		for _, p := range []struct {
			field string
			v     Value[[]string]
		}{{"ikeProposals", t.IKE}, {"espProposals", t.ESP}} {
			if p.v.known() {
				line(3, p.field+": ["+strings.Join(p.v.Is, ", ")+"]", p.v.From)
			}
		}
		if t.Encapsulation.known() {
			line(3, "udpEncapsulation: "+t.Encapsulation.Is, t.Encapsulation.From)
		}
		if t.IKERekey.known() {
			line(3, "ikeRekey: "+t.IKERekey.Is.String(), t.IKERekey.From)
		}
		if t.ChildRekey.known() {
			line(3, "childRekey: "+t.ChildRekey.Is.String(), t.ChildRekey.From)
		}
		if t.RekeyBytes.known() {
			line(3, fmt.Sprintf("childRekeyBytes: %d", t.RekeyBytes.Is), t.RekeyBytes.From)
		}
	}
	if slices.ContainsFunc(r.Tunnels, func(t Tunnel) bool { return t.ASN.known() }) {
		b.WriteString("peers:\n")
	}
	for _, t := range r.Tunnels {
		if !t.ASN.known() {
			continue
		}
		line(1, "- name: "+quote(t.Name), "")
		line(2, "tunnel: "+quote(t.Name), "")
		line(2, fmt.Sprintf("asn: %d", t.ASN.Is), t.ASN.From)
		if t.PeerAddress.known() {
			line(2, "address: "+quote(t.PeerAddress.Is.String()), t.PeerAddress.From)
		}
		if t.HoldTime.known() {
			line(2, "holdTime: "+t.HoldTime.Is.String(), t.HoldTime.From)
		}
		if t.Keepalive.known() {
			line(2, "keepalive: "+t.Keepalive.Is.String(), t.Keepalive.From)
		}
		if t.Password.known() {
			password := "the name of the secret; " + t.Password.From
			if !t.Password.Is.Known() {
				password = "MISSING here: store it with isthmus secret set " + t.PasswordName() + "; " + t.Password.From
			}
			line(2, "password: "+quote(t.PasswordName()), password)
		}
		if t.Import.known() {
			line(2, "import:", "")
			line(3, "allow:", t.Import.From)
			for _, p := range t.Import.Is {
				line(4, "- prefix: "+quote(p.String()), "")
			}
		}
		if t.ExportLimit.known() {
			line(2, "export:", "")
			line(3, fmt.Sprintf("maxPrefixes: %d", t.ExportLimit.Is), t.ExportLimit.From)
		}
		if t.Import.known() {
			line(2, "# Nothing is announced until `export` names it.", "")
		} else {
			line(2, "# Nothing is accepted or announced until `import` and `export` name it.", "")
		}
	}
	if len(r.Routes) > 0 {
		b.WriteString("staticRoutes:\n")
	}
	for _, route := range r.Routes {
		line(1, "- prefix: "+quote(route.Prefix.Is.String()), route.Prefix.From)
		var names []string
		for _, name := range route.Tunnels {
			names = append(names, quote(name))
		}
		line(2, "tunnels: ["+strings.Join(names, ", ")+"]", "")
	}
	return b.String()
}

// quote quotes a text that YAML would read as another value: IPv6 addresses have colons, and a name
// may be a number.
func quote(s string) string {
	var n yaml.Node
	if err := yaml.Unmarshal([]byte(s), &n); err != nil || n.Content[0].Tag != "!!str" || strings.Contains(s, ":") {
		return strconv.Quote(s)
	}
	return s
}

func preset(name string) cloud.Preset {
	p, _ := cloud.Lookup(name)
	return p
}
