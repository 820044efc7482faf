package importer

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// readGCP reads the output of gcloud compute vpn-gateways, vpn-tunnels and routers describe, which
// refer to each other by name.
func readGCP(r *Result, docs []document) {
	var o gcpObjects
	for _, d := range docs {
		before := o.count()
		d.walk(func(n *node) bool {
			object := document{file: d.file, node: n}
			list := &o.tunnels
			switch kind := n.string(terraformType); {
			case kind == "google_compute_router_interface":
				list = &o.interfaces
			case kind == "google_compute_router_peer":
				list = &o.sessions
			case n.has("vpnInterfaces"):
				list = &o.gateways
			case n.has("redundancyType"):
				list = &o.peers
			case n.has("ikeVersion") && !n.has("vpnIp") || n.has("sharedSecretHash") || n.string("kind") == "compute#vpnTunnel":
			case n.has("bgpPeers") || n.string("kind") == "compute#router":
				list = &o.routers
			default:
				return true
			}
			if r.room(object) {
				*list = append(*list, object)
			}
			return true
		})
		if o.count() == before {
			r.nothing(d, "VPN gateway, tunnel or router")
		}
	}
	o.join(r)
	if len(o.tunnels) == 0 {
		for _, d := range slices.Concat(o.gateways, o.peers, o.routers) {
			r.missing(d, d.node, "%s has no tunnel among the files; give gcloud compute vpn-tunnels describe as well", called(d.node))
		}
	}
	for _, t := range o.tunnels {
		r.gcpTunnel(t, o)
	}
}

// gcpObjects are the objects that a tunnel refers to. A peer is an external VPN gateway: this node.
// Interfaces and sessions are parts of routers that Terraform has as resources of their own.
type gcpObjects struct{ tunnels, gateways, peers, routers, interfaces, sessions []document }

func (o gcpObjects) count() int {
	return len(o.tunnels) + len(o.gateways) + len(o.peers) + len(o.routers) + len(o.interfaces) + len(o.sessions)
}

// join puts the interfaces and sessions of a Terraform state into their routers.
func (o *gcpObjects) join(r *Result) {
	router := func(part document) *node {
		name, region, project := lastOf(part.string("router")), lastOf(part.string("region")), part.string("project")
		for _, d := range o.routers {
			other, elsewhere := d.string("project"), lastOf(d.string("region"))
			if d.string("name") == name && (region == "" || elsewhere == "" || region == elsewhere) && (project == "" || other == "" || project == other) {
				return d.node
			}
		}
		// made elsewhere: what is known of it is its name
		d := document{file: part.file, node: object(part.line, "kind", "compute#router", "name", name, "region", region, "project", project, "interfaces", &node{list: true, line: part.line}, "bgpPeers", &node{list: true, line: part.line})}
		o.routers = append(o.routers, d)
		r.missing(part, part.node, "its router %s is not among the files, and so neither is the router's AS number; give gcloud compute routers describe as well", name)
		return d.node
	}
	add := func(part document, list string, n *node) {
		if l := router(part).child(norm(list)); l != nil && l.list {
			l.values = append(l.values, n)
		}
	}
	for _, i := range o.interfaces {
		tunnel := i.string("vpn_tunnel")
		if region, project := lastOf(i.string("region")), i.string("project"); !strings.Contains(tunnel, "/") && region != "" && project != "" {
			tunnel = "projects/" + project + "/regions/" + region + "/vpnTunnels/" + tunnel
		}
		add(i, "interfaces", object(i.line, "name", i.get("name"), "ipRange", i.get("ip_range"), "linkedVpnTunnel", tunnel))
	}
	for _, s := range o.sessions {
		s.node.add("interfaceName", s.get("interface"))
		add(s, "bgpPeers", s.node)
	}
}

// named returns the object that a URL or name means.
func named(all []document, url string) (document, bool) {
	for _, d := range all {
		if url != "" && same(d, url) {
			return d, true
		}
	}
	return document{}, false
}

// same reports whether a URL or name means an object.
func same(d document, url string) bool {
	self := d.string("selfLink")
	return self != "" && resource(self) == resource(url) || d.string("name") == url || self == "" && d.string("name") == lastOf(url)
}

// resource returns the resource in a URL, whatever the host and the version of the API.
func resource(url string) string {
	if _, after, ok := strings.Cut("/"+url, "/projects/"); ok {
		return after
	}
	return url
}

func (r *Result) gcpTunnel(d document, o gcpObjects) {
	name := called(d.node)
	switch {
	case d.string("ikeVersion") == "1":
		r.note(d, d.node, "%s: speaks IKEv1; make a new tunnel with --ike-version 2", name)
		return
	case d.has("targetVpnGateway"):
		r.note(d, d.node, "%s: is a Classic VPN tunnel; make an HA VPN tunnel, since Classic VPN has no BGP", name)
		return
	case strings.EqualFold(d.string("status"), "DEPROVISIONING"):
		r.note(d, d.node, "%s: is being deleted; skipped", name)
		return
	case d.has("peerGcpGateway"):
		r.note(d, d.node, "%s: leads to %s, another gateway of Google's; skipped", name, lastOf(d.string("peerGcpGateway")))
		return
	}
	g, ok := named(o.gateways, d.string("vpnGateway"))
	if !ok && !d.has("vpnGateway") {
		r.note(d, d.node, "%s: names no vpnGateway", name)
		return
	} else if !ok {
		r.missing(d, d.node, "%s: its gateway %s is not among the files; give gcloud compute vpn-gateways describe as well", name, lastOf(d.string("vpnGateway")))
		return
	}
	number := d.string("vpnGatewayInterface")
	if number == "" {
		number = "0"
	}
	t := Tunnel{Name: nameOf(name), Cloud: "gcp", About: fmt.Sprintf("%s, interface %s of %s", name, number, lastOf(d.string("vpnGateway")))}
	for _, i := range few(g.get("vpnInterfaces").items(), maxInstances) {
		if id := i.string("id"); id == number || id == "" && number == "0" {
			t.Remote = r.address(g, i.get("ipAddress"), "vpnGateway/vpnInterfaces")
			if !t.Remote.known() {
				t.Remote = r.address(g, i.get("ipv6Address"), "vpnGateway/vpnInterfaces")
			}
		}
	}
	if !t.Remote.known() {
		r.note(d, d.node, "%s: interface %s of the gateway has no address", name, printable(number))
		return
	}
	t.RouterPublic = r.address(d, d.get("peerIp"), "vpnTunnel/peerIp")
	if p, ok := named(o.peers, d.string("peerExternalGateway")); ok && !t.RouterPublic.known() {
		for _, i := range few(p.get("interfaces").items(), maxInstances) {
			if i.string("id") == d.string("peerExternalGatewayInterface") {
				t.RouterPublic = r.address(p, i.get("ipAddress"), "externalVpnGateway/interfaces")
			}
		}
	}
	t.PSK = r.key(d, d.node, name, "gcp", "Google never shows it: take it from where the tunnel was made, such as terraform show -json, or make the tunnel again with --shared-secret",
		place{d.get("sharedSecret"), "vpnTunnel/sharedSecret"})
	r.gcpStatus(d, name)
	r.gcpCiphers(d, name, &t)
	if router, ok := named(o.routers, d.string("router")); ok {
		r.gcpSession(d, router, name, &t)
	} else if url := d.string("router"); url != "" {
		r.missing(d, d.node, "%s: its router %s is not among the files; give gcloud compute routers describe as well; without it, the tunnel has no peer, and the node allocates inside addresses that Google does not know", name, lastOf(url))
	} else {
		r.note(d, d.node, "%s: has no Cloud Router; write static routes for the VPC through it", name)
	}
	r.add(d, d.node, t)
}

// gcpStatus notes what Google says of a tunnel that does not work, and selectors, which this node
// does not have.
func (r *Result) gcpStatus(d document, name string) {
	says := map[string]string{
		"authorizationerror":    "that the two sides have different keys; store the one of the tunnel",
		"negotiationfailure":    "that the two sides have no common algorithms; compare them with isthmus cloud show gcp",
		"peeridentitymismatch":  "that this node presents another identity; ipsec.localIdentity must be the peer address of the tunnel",
		"noincomingpackets":     "that nothing has come from this node yet; let UDP ports 500 and 4500 leave it",
		"tsnarrowingnotallowed": "that the traffic selectors differ; make the tunnel with a Cloud Router",
		"rejected":              "that it rejected the tunnel; make it again, with a peer address that Google allows",
		"failed":                "that the tunnel could not be made; make it again",
		"stopped":               "that the tunnel is stopped; make it again",
	}
	if s := d.get("status"); says[norm(s.string())] != "" {
		r.note(d, s, "%s: Google says (%s) %s", name, printable(s.string()), says[norm(s.string())])
	}
	for _, field := range []string{"localTrafficSelector", "remoteTrafficSelector"} {
		for _, s := range d.get(field).items() {
			if text := s.string(); text != "" && text != "0.0.0.0/0" && text != "::/0" {
				r.note(d, s, "%s: %s is %s, and a router has one pair of selectors for everything; make the tunnel with a Cloud Router and without selectors", name, field, printable(short(text)))
			}
		}
	}
}

// gcpSession finds the interface of a router that a tunnel is linked to, and the peer on it.
func (r *Result) gcpSession(d, router document, name string, t *Tunnel) {
	var iface *node
	for _, i := range few(router.get("interfaces").items(), maxObjects) {
		if link := i.string("linkedVpnTunnel"); link != "" && same(d, link) {
			iface = i
		}
	}
	if iface == nil {
		r.note(router, router.node, "%s: no interface of %s is linked to it", name, called(router.node))
		return
	}
	for _, p := range few(router.get("bgpPeers").items(), maxObjects) {
		if p.string("interfaceName") != iface.string("name") {
			continue
		}
		if strings.EqualFold(p.string("enable"), "false") {
			r.note(router, p, "%s: the BGP peer %s is not enabled, so that its session stays down; enable it with gcloud compute routers update-bgp-peer --enabled", name, called(p))
		}
		own := r.address(router, p.get("peerIpAddress"), "router/bgpPeers/peerIpAddress")
		peer := r.address(router, p.get("ipAddress"), "router/bgpPeers/ipAddress")
		block, err := netip.ParsePrefix(iface.string("ipRange"))
		if !peer.known() && err == nil {
			peer = Value[netip.Addr]{block.Addr(), "router/interfaces/ipRange"}
		}
		if own.known() && peer.known() {
			bits := own.Is.BitLen() - 2
			if err == nil && block.Contains(own.Is) {
				bits = block.Bits()
			}
			t.Inside = []Inside{{Value[netip.Prefix]{netip.PrefixFrom(own.Is, bits), own.From}, peer}}
			r.gcpSecond(router, p, name, t)
		} else {
			r.note(router, p, "%s: the BGP peer has no ipAddress or no peerIpAddress", name)
		}
		t.ASN = r.asn(router, router.get("bgp", "asn"), "router/bgp/asn")
		t.RouterASN = r.asn(router, p.get("peerAsn"), "router/bgpPeers/peerAsn")
		if k := r.seconds(router, router.get("bgp", "keepaliveInterval"), "router/bgp/keepaliveInterval"); k.known() && k.Is != preset("gcp").Keepalive.Is {
			t.Keepalive = k
			t.HoldTime = Value[time.Duration]{3 * k.Is, "three times " + k.From}
		}
		if k := p.first("md5AuthenticationKey"); !k.empty() { // of Terraform
			how := "store it with isthmus secret set " + t.PasswordName()
			if t.Password = r.key(router, k, name+"'s session", "gcp", how, place{k.get("key"), "router peer/md5_authentication_key"}); !t.Password.known() {
				t.Password = Value[Secret]{From: "router peer/md5_authentication_key"}
			}
		} else if key := p.string("md5AuthenticationKeyName"); key != "" {
			t.Password = Value[Secret]{From: "router/bgpPeers/md5AuthenticationKeyName " + printable(key)}
			r.note(router, p, "%s: the session has a TCP MD5 key, which Google does not show; store it with isthmus secret set %s", name, t.PasswordName())
		}
		return
	}
	r.note(router, iface, "%s: its interface %s has no BGP peer", name, called(iface))
}

// gcpSecond reads the next hops of the other family in a session, which are the inside addresses of
// that family.
func (r *Result) gcpSecond(router document, p *node, name string, t *Tunnel) {
	first := t.Inside[0].Peer.Is
	own, peer, enable := "peerIpv6NexthopAddress", "ipv6NexthopAddress", "enableIpv6"
	if first.Is6() {
		own, peer, enable = "peerIpv4NexthopAddress", "ipv4NexthopAddress", "enableIpv4"
	}
	if !strings.EqualFold(p.string(enable), "true") {
		return
	}
	local, remote := r.address(router, p.get(own), "router/bgpPeers/"+own), r.address(router, p.get(peer), "router/bgpPeers/"+peer)
	if !local.known() || !remote.known() || local.Is.Is4() != first.Is6() || remote.Is.Is4() != first.Is6() {
		r.note(router, p, "%s: the session also carries the other family (%s), and has no next hops for it; its routes are left out", name, enable)
		return
	}
	bits := local.Is.BitLen() - 2
	block := netip.PrefixFrom(local.Is, bits)
	if !block.Contains(remote.Is) {
		r.note(router, p, "%s: the next hops %s and %s are not in one /%d; the routes of their family are left out", name, local.Is, remote.Is, bits)
		return
	}
	t.Inside = append(t.Inside, Inside{Value[netip.Prefix]{block, local.From}, remote})
	if first.Is6() {
		r.note(router, p, "%s: the session also carries the other family (%s); an IPv6 session of this node carries IPv6 alone, so make the BGP peer over IPv4, which can carry both", name, enable)
		return
	}
	r.note(router, p, "%s: the session also carries the other family (%s); it does so here once import or export has a rule of IPv6", name, enable)
}

var (
	gcpCipherWords = map[string]string{
		"aes-gcm-16-256": "aes256gcm16", "aes-gcm-16-192": "aes192gcm16", "aes-gcm-16-128": "aes128gcm16",
		"aes-cbc-256": "aes256", "aes-cbc-192": "aes192", "aes-cbc-128": "aes128", "3des-cbc": "3des",
	}
	gcpHashWords = map[string]string{
		"sha2-512": "sha512", "sha2-384": "sha384", "sha2-256": "sha256", "sha1": "sha1", "md5": "md5", "aes-xcbc": "aesxcbc", "aes-cmac": "aescmac",
	}
	gcpGroupWords = map[string]string{
		"14": "modp2048", "15": "modp3072", "16": "modp4096", "18": "modp8192", "19": "ecp256", "20": "ecp384", "21": "ecp521", "31": "curve25519",
		"2": "modp1024", "5": "modp1536", "22": "modp1024s160", "23": "modp2048s224", "24": "modp2048s256",
	}
)

// gcpCiphers turns the cipher suite of a tunnel, when it has one, into proposals with the first of
// each kind.
func (r *Result) gcpCiphers(d document, name string, t *Tunnel) {
	suite := d.get("cipherSuite")
	p := preset("gcp")
	word := func(phase, kind string, words map[string]string) string {
		for _, n := range suite.get(phase, kind).items() {
			text := strings.ToLower(n.string())
			for _, cut := range []string{"group-", "prf-", "hmac-"} {
				text = strings.TrimPrefix(text, cut)
			}
			text = strings.TrimSuffix(strings.TrimSuffix(text, "-96"), "-128")
			if w, ok := words[text]; ok {
				return w
			}
			if w, ok := words[strings.ToLower(n.string())]; ok {
				return w
			}
			r.note(d, n, "%s: cipherSuite/%s/%s %q is not known here", name, phase, kind, short(n.string()))
		}
		return ""
	}
	if cipher := word("phase1", "encryption", gcpCipherWords); cipher != "" {
		hash, group := word("phase1", "integrity", gcpHashWords), word("phase1", "dh", gcpGroupWords)
		if strings.Contains(cipher, "gcm") {
			if hash = word("phase1", "prf", gcpHashWords); hash != "" {
				hash = "prf" + hash
			}
		}
		if hash != "" && group != "" {
			t.IKE = differs(cipher+"-"+hash+"-"+group, p.IKEProposals.Is, "vpnTunnel/cipherSuite")
		}
	}
	if cipher := word("phase2", "encryption", gcpCipherWords); cipher != "" {
		if group := word("phase2", "pfs", gcpGroupWords); strings.Contains(cipher, "gcm") && group != "" {
			t.ESP = differs(cipher+"-"+group, p.ESPProposals.Is, "vpnTunnel/cipherSuite")
		} else if hash := word("phase2", "integrity", gcpHashWords); hash != "" && group != "" {
			t.ESP = differs(cipher+"-"+hash+"-"+group, p.ESPProposals.Is, "vpnTunnel/cipherSuite")
		}
	}
}
