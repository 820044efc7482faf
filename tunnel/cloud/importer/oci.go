package importer

import (
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// readOCI reads the output of oci network ip-sec-tunnel list or get, and the tunnels of a Terraform
// state.
func readOCI(r *Result, docs []document) {
	for _, d := range docs {
		found := false
		d.walk(func(n *node) bool {
			if n.string(terraformType) != "oci_core_ipsec_connection_tunnel_management" && (!n.has("vpn-ip") || !n.has("ike-version") && !n.has("bgp-session-info")) {
				return true
			}
			found = true
			object := document{file: d.file, node: n}
			if r.room(object) {
				r.ociTunnel(object)
			}
			return false
		})
		if !found {
			r.nothing(d, "tunnel of an IPSec connection; give oci network ip-sec-tunnel list --ipsc-id")
		}
	}
}

func (r *Result) ociTunnel(d document) {
	name := printable(d.string("display-name"))
	if name == "" {
		name = called(d.node)
	}
	state := d.either("lifecycle-state", "state")
	switch selectors := d.get("routing"); {
	case strings.EqualFold(state.string(), "TERMINATED"), strings.EqualFold(state.string(), "TERMINATING"):
		r.note(d, state, "%s: is %s; skipped", name, strings.ToLower(printable(state.string())))
		return
	case strings.EqualFold(d.string("ike-version"), "V1"):
		r.note(d, d.get("ike-version"), "%s: speaks IKEv1; set it to V2 with oci network ip-sec-tunnel update --ike-version V2", name)
		return
	case strings.EqualFold(selectors.string(), "POLICY"):
		r.note(d, selectors, "%s: has policies instead of routes; set its routing to BGP or STATIC, since a router has one pair of selectors for everything", name)
		return
	}
	t := Tunnel{Name: nameOf(name), Cloud: "oci", RouterPublic: r.address(d, d.get("cpe-ip"), "tunnel/cpe-ip"), Remote: r.address(d, d.get("vpn-ip"), "tunnel/vpn-ip")}
	if !t.Remote.known() {
		r.note(d, d.node, "%s: has no vpn-ip, the address of Oracle's side; give oci network ip-sec-tunnel list", name)
		return
	}
	t.About = fmt.Sprintf("%s, tunnel to %s of Oracle", name, t.Remote.Is)
	t.PSK = r.key(d, d.node, name, "oci", "read it with oci network ip-sec-psk get --tunnel-id "+printable(short(d.string("id"))), place{d.get("shared-secret"), "tunnel/shared-secret"})
	if i := d.get("oracle-can-initiate"); strings.EqualFold(i.string(), "RESPONDER_ONLY") {
		r.note(d, i, "%s: Oracle does not open the tunnel (oracle-can-initiate); leave ipsec.respondOnly off", name)
	}
	if e := d.get("nat-translation-enabled"); strings.EqualFold(e.string(), "ENABLED") {
		t.Encapsulation = Value[string]{"always", "tunnel/nat-translation-enabled"}
	}
	r.ociInside(d, name, &t)
	r.ociPhases(d, name, &t)
	r.add(d, d.node, t)
}

// ociInside reads the inside addresses and the session. Both ends are written with the length of
// their prefix.
func (r *Result) ociInside(d document, name string, t *Tunnel) {
	session := d.get("bgp-session-info").orFirst()
	for _, suffix := range []string{"", "v6"} {
		own, other := session.get("customer-interface-ip"+suffix), session.get("oracle-interface-ip"+suffix)
		if own.empty() && other.empty() {
			continue
		}
		local, err := netip.ParsePrefix(own.string())
		peer, err2 := netip.ParsePrefix(other.string())
		if err != nil || err2 != nil || !local.Contains(peer.Addr()) {
			r.note(d, own, "%s: bgp-session-info: %q and %q do not make a pair of inside addresses", name, short(own.string()), short(other.string()))
			continue
		}
		t.Inside = append(t.Inside, Inside{Value[netip.Prefix]{local, "bgp-session-info/customer-interface-ip" + suffix}, Value[netip.Addr]{peer.Addr(), "bgp-session-info/oracle-interface-ip" + suffix}})
	}
	if len(t.Inside) == 0 {
		r.note(d, session, "%s: no inside addresses in bgp-session-info; give them, or the node allocates some that Oracle does not know", name)
	}
	if strings.EqualFold(d.string("routing"), "STATIC") {
		r.note(d, d.get("routing"), "%s: is routed statically; write static routes for the VCN through it", name)
		return
	}
	t.ASN = r.asn(d, session.get("oracle-bgp-asn"), "bgp-session-info/oracle-bgp-asn")
	t.RouterASN = r.asn(d, session.get("customer-bgp-asn"), "bgp-session-info/customer-bgp-asn")
	if !t.ASN.known() {
		r.note(d, session, "%s: bgp-session-info has no oracle-bgp-asn; no peer is made for it", name)
	}
}

var (
	ociCiphers = map[string]string{"aes256gcm": "aes256gcm16", "aes192gcm": "aes192gcm16", "aes128gcm": "aes128gcm16", "aes256cbc": "aes256", "aes192cbc": "aes192", "aes128cbc": "aes128"}
	ociHashes  = map[string]string{"sha2384": "sha384", "sha2256": "sha256", "sha196": "sha1", "hmacsha2256128": "sha256", "hmacsha1128": "sha1"}
	ociGroups  = map[string]string{"group2": "modp1024", "group5": "modp1536", "group14": "modp2048", "group19": "ecp256", "group20": "ecp384", "group24": "modp2048s256"}
)

// ociPhases turns the algorithms of a tunnel, where they are its own, into proposals.
func (r *Result) ociPhases(d document, name string, t *Tunnel) {
	p := preset("oci")
	word := func(phase *node, words map[string]string, field string) string {
		n := phase.get(field)
		w, ok := words[norm(n.string())]
		if !ok {
			r.note(d, n, "%s: %s %q is not known here", name, field, short(n.string()))
		}
		return w
	}
	if one := d.either("phase-one-details", "phase-one-config").orFirst(); strings.EqualFold(one.string("is-custom-phase-one-config"), "true") {
		cipher, hash, group := word(one, ociCiphers, "custom-encryption-algorithm"), word(one, ociHashes, "custom-authentication-algorithm"), word(one, ociGroups, "custom-dh-group")
		if cipher != "" && hash != "" && group != "" {
			t.IKE = differs(cipher+"-"+hash+"-"+group, p.IKEProposals.Is, "tunnel/phase-one-details")
		}
		t.IKERekey = r.earlier(d, one, r.seconds(d, one.get("lifetime"), "phase-one-details/lifetime"), p.IKERekey.Is, 15*time.Minute)
	}
	if two := d.either("phase-two-details", "phase-two-config").orFirst(); strings.EqualFold(two.string("is-custom-phase-two-config"), "true") {
		parts := []string{word(two, ociCiphers, "custom-encryption-algorithm")}
		if parts[0] != "" && !strings.Contains(parts[0], "gcm") {
			parts = append(parts, word(two, ociHashes, "custom-authentication-algorithm"))
		}
		if !strings.EqualFold(two.string("is-pfs-enabled"), "false") {
			parts = append(parts, word(two, ociGroups, "dh-group"))
		}
		known := true
		for _, part := range parts {
			known = known && part != ""
		}
		if known {
			t.ESP = differs(strings.Join(parts, "-"), p.ESPProposals.Is, "tunnel/phase-two-details")
		}
		t.ChildRekey = r.earlier(d, two, r.seconds(d, two.get("lifetime"), "phase-two-details/lifetime"), p.ChildRekey.Is, 5*time.Minute)
	}
}

// orFirst returns an object, or the first one of a list, which Terraform has in its place.
func (n *node) orFirst() *node {
	if n.list && len(n.values) > 0 {
		return n.values[0]
	}
	return n
}
