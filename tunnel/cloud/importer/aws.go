package importer

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

// readAWS reads the CustomerGatewayConfiguration (XML, or the text that says the same), alone or
// inside what describe-vpn-connections, the Query API or Terraform's state have around it.
func readAWS(r *Result, docs []document) {
	var o awsObjects
	for _, d := range docs {
		o.collect(d)
	}
	for _, d := range docs {
		found := false
		d.walk(func(n *node) bool {
			for _, c := range n.all("vpn_connection") {
				if d.xml && !c.has("VpnConnectionId") { // the Query API wraps it in vpnConnection
					r.awsConnection(d, &node{}, c, o)
					found = true
				}
			}
			config := n.string("CustomerGatewayConfiguration")
			switch {
			case n.string(terraformType) == "aws_vpn_connection", config != "" || n.has("VpnConnectionId") && (n.has("Options") || n.has("State")):
				r.awsText(d, n, n, config, o)
				found = true
				return false
			case strings.Contains(n.text, "<vpn_connection"):
				// an output of Terraform contains the XML as a plain value
				r.awsText(d, n, &node{}, n.text, o)
				found = true
			}
			return true
		})
		if !found {
			r.nothing(d, "VPN connection")
		}
	}
}

// awsObjects are objects that a connection refers to, by id.
type awsObjects struct{ customers, gateways map[string]document }

func (o *awsObjects) collect(d document) {
	if o.customers == nil {
		o.customers, o.gateways = map[string]document{}, map[string]document{}
	}
	d.walk(func(n *node) bool {
		object := document{file: d.file, node: n}
		id := n.string("id")
		switch kind := n.string(terraformType); {
		case kind == "aws_customer_gateway":
			o.customers[id] = object
		case kind == "aws_vpn_gateway", kind == "aws_ec2_transit_gateway":
			o.gateways[id] = object
		case n.has("CustomerGatewayId") && n.has("BgpAsn"):
			o.customers[n.string("CustomerGatewayId")] = object
		case n.has("VpnGatewayId") && n.has("AmazonSideAsn"):
			o.gateways[n.string("VpnGatewayId")] = object
		case n.has("TransitGatewayId") && n.get("Options").has("AmazonSideAsn"):
			o.gateways[n.string("TransitGatewayId")] = document{file: d.file, node: n.get("Options")}
		}
		return true
	})
}

// customer returns the customer gateway of a connection.
func (o awsObjects) customer(about, xml *node) (document, bool) {
	id := xml.string("customer_gateway_id")
	if id == "" {
		id = about.string("CustomerGatewayId")
	}
	d, ok := o.customers[id]
	return d, ok && id != ""
}

// complete adds what only the customer gateway and the gateway have when there is no XML.
func (o awsObjects) complete(r *Result, about, xml *node, gateway string, t *Tunnel) {
	if c, ok := o.customer(about, xml); ok {
		if !t.RouterPublic.known() {
			t.RouterPublic = r.address(c, c.get("ip_address"), "customer gateway/ip_address")
		}
		if !t.RouterASN.known() {
			t.RouterASN = r.asn(c, c.either("bgp_asn", "bgp_asn_extended"), "customer gateway/bgp_asn")
		}
	}
	if g, ok := o.gateways[gateway]; ok && !t.ASN.known() {
		t.ASN = r.asn(g, g.get("amazon_side_asn"), "gateway/amazon_side_asn")
	}
}

// genericLine is a line of the configuration that the console makes for a "generic" device: a name
// and a value.
var genericLine = regexp.MustCompile(`^[\s!-]*([A-Za-z][A-Za-z -]*?)\s*:\s*(\S*)`)

// awsGeneric reads the console's text for a "generic" device as if it were the XML: the contents
// are the same.
func awsGeneric(data []byte) (*node, error) {
	if bytes.Count(data, []byte("IPSec Tunnel #"))+bytes.Count(data, []byte("Your VPN Connection ID")) > maxObjects {
		return nil, fmt.Errorf("has more than %d tunnels; give it in parts", maxObjects)
	}
	root := &node{line: 1}
	connection := root.add("vpn_connection", &node{line: 1})
	tunnel, where := connection, ""
	number := 0
	// half of an address may be another address
	data = data[:bytes.LastIndexByte(data, '\n')+1]
	for line := range bytes.Lines(data) {
		text := string(line)
		number++
		switch {
		case strings.Contains(text, "IPSec Tunnel #"):
			tunnel = connection.add("ipsec_tunnel", &node{line: number})
		case strings.Contains(text, "Outside IP Addresses"):
			where = "tunnel_outside_address"
		case strings.Contains(text, "Inside IP Addresses"):
			where = "tunnel_inside_address"
		case strings.Contains(text, "Static Routing Configuration"):
			connection.set("NoBGPVPNConnection", number, "vpn_connection_attributes")
		}
		m := genericLine.FindStringSubmatch(text)
		if m == nil {
			continue
		}
		address, bits, _ := strings.Cut(m[2], "/")
		switch strings.Join(strings.Fields(m[1]), " ") { // some names have two spaces in them
		case "Your VPN Connection ID":
			if connection.has("id") { // a second file follows the first
				connection = root.add("vpn_connection", &node{line: number})
			}
			connection.set(m[2], number, "id")
		case "Your Virtual Private Gateway ID":
			connection.set(m[2], number, "vpn_gateway_id")
		case "Pre-Shared Key":
			tunnel.set(m[2], number, "ike", "pre_shared_key")
		case "Customer Gateway":
			tunnel.set(address, number, "customer_gateway", where, "ip_address")
			tunnel.set(bits, number, "customer_gateway", where, "network_cidr")
		case "Virtual Private Gateway":
			tunnel.set(address, number, "vpn_gateway", where, "ip_address")
		case "Customer Gateway ASN":
			tunnel.set(m[2], number, "customer_gateway", "bgp", "asn")
		case "Virtual Private Gateway ASN":
			tunnel.set(m[2], number, "vpn_gateway", "bgp", "asn")
		case "Neighbor Hold Time":
			tunnel.set(m[2], number, "vpn_gateway", "bgp", "hold_time")
		}
	}
	return root, nil
}

// awsText reads the XML of a connection, and the data around it.
func (r *Result) awsText(d document, at, about *node, config string, o awsObjects) {
	if state := strings.ToLower(about.string("State")); slices.Contains([]string{"deleted", "deleting", "pending"}, state) {
		r.note(d, about, "%s: is %s; skipped", awsID(about), state)
		return
	}
	xml := &node{line: at.line}
	if strings.TrimSpace(config) != "" {
		read, err := parseXML(unescape(bytes.TrimSpace([]byte(config))))
		if err == nil && read.child("vpnconnection") == nil {
			err = errors.New("has no vpn_connection")
		}
		if err != nil {
			// The options may be sufficient.
			r.note(d, at, "%s: its CustomerGatewayConfiguration: %v", awsID(about), err)
		} else {
			xml = read.child("vpnconnection")
		}
	}
	if about.empty() {
		about = &node{line: at.line}
	}
	// Line numbers of the inner text have no meaning in the file.
	xml.walk(func(n *node) bool { n.line = at.line; return true })
	r.awsConnection(d, about, xml, o)
}

func awsID(about *node) string {
	for _, name := range []string{"VpnConnectionId", "id"} {
		if id := about.string(name); id != "" {
			return printable(id)
		}
	}
	return "a connection"
}

// awsTunnel is one ipsec_tunnel with the options that belong to it.
type awsTunnel struct {
	at     *node
	xml    *node
	remote Value[netip.Addr]
	option func(name string) *node
}

func (r *Result) awsConnection(d document, about, xml *node, all awsObjects) {
	id := xml.string("id")
	if id == "" {
		id = awsID(about)
	}
	options := r.awsOptions(d, about)
	var tunnels []awsTunnel
	for _, x := range xml.all("ipsec_tunnel") {
		at := x.get("vpn_gateway", "tunnel_outside_address")
		if ip := at.get("ip_address"); !ip.empty() {
			at = ip // older ones have the address without an element of its own
		}
		remote := r.address(d, at, "vpn_gateway/tunnel_outside_address")
		if !remote.known() {
			r.note(d, x, "%s: an ipsec_tunnel has no vpn_gateway/tunnel_outside_address; skipped", id)
			continue
		}
		t := awsTunnel{at: x, xml: x, remote: remote, option: func(string) *node { return &node{} }}
		if o, ok := options[remote.Is]; ok {
			t.option = o.option
		}
		tunnels = append(tunnels, t)
	}
	if len(tunnels) == 0 {
		for _, o := range options {
			o.xml = &node{line: o.at.line}
			tunnels = append(tunnels, o)
		}
	}
	if len(tunnels) == 0 {
		r.note(d, xml, "%s: has no tunnels", id)
		return
	}
	// The order in the file is not stable, but that of the addresses is.
	slices.SortFunc(tunnels, func(a, b awsTunnel) int { return a.remote.Is.Compare(b.remote.Is) })

	gateway := xml.string("vpn_gateway_id")
	for _, name := range []string{"VpnGatewayId", "TransitGatewayId"} {
		if gateway == "" {
			gateway = about.string(name)
		}
	}
	if gateway == "" {
		gateway = "a transit gateway" // the element is there and empty
		if len(xml.keys) > 0 && xml.child("vpngatewayid") == nil {
			gateway = "a gateway"
		}
	}
	if c, ok := all.customer(about, xml); ok && c.has("CertificateArn") {
		r.note(d, about, "%s: its customer gateway authenticates with a certificate, and this node has pre-shared keys alone; make a connection with a customer gateway without certificate_arn; skipped", id)
		return
	}
	if !about.empty() && xml.string("vpn_gateway_id") == "" && !about.has("VpnGatewayId") && !about.has("TransitGatewayId") {
		gateway = r.awsAttached(d, about, id, gateway)
	}
	r.awsVariant(d, about, id)
	static := xml.string("vpn_connection_attributes") == "NoBGPVPNConnection" || strings.EqualFold(about.string("Options", "StaticRoutesOnly"), "true") || strings.EqualFold(about.string("static_routes_only"), "true")
	var names []string
	for i, t := range tunnels {
		out := r.awsTunnel(d, id, fmt.Sprintf("%s-%d", id, i+1), t)
		out.About = fmt.Sprintf("%s, tunnel to %s of %s", id, t.remote.Is, gateway)
		all.complete(r, about, xml, gateway, &out)
		if strings.EqualFold(about.get("Options").string("EnableAcceleration"), "true") || strings.EqualFold(about.string("EnableAcceleration"), "true") {
			out.Encapsulation = Value[string]{"always", "accelerated connections need NAT traversal"}
		}
		if strings.HasPrefix(gateway, "tgw-") {
			out.ExportLimit = Value[uint32]{cloud.TransitExportLimit.Is, cloud.TransitExportLimit.Why}
		}
		if static {
			out.ASN = Value[uint32]{}
		} else if !out.ASN.known() {
			r.note(d, t.at, "%s: the tunnel to %s has no vpn_gateway/bgp/asn; no peer is made for it", id, t.remote.Is)
		}
		if name, ok := r.add(d, t.at, out); ok {
			names = append(names, name)
		}
	}
	if static {
		r.note(d, xml, "%s: is routed statically; write a static route for each VPC through %s", id, strings.Join(names, ", "))
	}
}

// awsVariant notes the requirements of a variant of a connection beyond those of the preset.
func (r *Result) awsVariant(d document, about *node, id string) {
	option := func(name string) *node {
		if o := about.get("Options", name); !o.empty() {
			return o
		}
		return about.get(name) // of Terraform
	}
	switch o := option("OutsideIpAddressType"); strings.ToLower(o.string()) {
	case "privateipv4":
		r.note(d, o, "%s: has private outside addresses, over Direct Connect; the underlay must lead there", id)
	case "ipv6":
		r.note(d, o, "%s: has outside addresses of IPv6; the underlay needs one", id)
	}
	if o := option("TunnelInsideIpVersion"); strings.EqualFold(o.string(), "ipv6") {
		r.note(d, o, "%s: carries IPv6 only; what is IPv4 needs a connection of its own", id)
	}
	if o := option("EnableAcceleration"); strings.EqualFold(o.string(), "true") {
		r.note(d, o, "%s: is accelerated, which needs NAT traversal, and leaves the renewal of keys to this node", id)
	}
	for _, name := range []string{"LocalIpv4NetworkCidr", "RemoteIpv4NetworkCidr"} {
		if o := option(name); o.string() != "" && o.string() != "0.0.0.0/0" {
			r.note(d, o, "%s: %s is %s, and a router has one pair of selectors for everything; set it to 0.0.0.0/0 with modify-vpn-connection-options", id, name, printable(short(o.string())))
		}
	}
}

// awsAttached returns what a connection without a gateway leads to, and notes when that is nothing.
func (r *Result) awsAttached(d document, about *node, id, unknown string) string {
	if c := about.either("CoreNetworkArn", "CoreNetworkAttachmentArn"); !c.empty() {
		r.note(d, c, "%s: leads to a core network of Cloud WAN, whose segments and edges decide where its routes go; the AS number is that of the edge", id)
		return "a core network"
	}
	// A description with chosen fields proves nothing.
	alone := strings.EqualFold(about.string("GatewayAssociationState"), "not-associated")
	if !alone && (about.child("vpngatewayid") == nil || about.child("transitgatewayid") == nil) {
		return unknown
	}
	r.note(d, about, "%s: is attached to no gateway, so that its tunnels lead nowhere; attach it with aws ec2 modify-vpn-connection, or to a core network", id)
	return "no gateway"
}

// awsOptions returns the tunnel options of a connection by outside address, as
// describe-vpn-connections or Terraform's state have them.
func (r *Result) awsOptions(d document, about *node) map[netip.Addr]awsTunnel {
	all := map[netip.Addr]awsTunnel{}
	list := about.get("Options", "TunnelOptions")
	if list.empty() {
		list = about.get("Options", "TunnelOptionSet") // of the Query API
	}
	for _, o := range list.items() {
		if a := r.address(d, o.get("OutsideIpAddress"), "TunnelOptions/OutsideIpAddress"); a.known() {
			all[a.Is] = awsTunnel{at: o, remote: a, option: func(name string) *node {
				n := o.get(name)
				if n.empty() { // a list is a Set in the Query API
					n = o.get(strings.TrimSuffix(name, "s") + "Set")
				}
				return n
			}}
		}
	}
	for _, n := range []string{"tunnel1", "tunnel2"} {
		if a := r.address(d, about.get(n+"_address"), n+"_address"); a.known() {
			all[a.Is] = awsTunnel{at: about, remote: a, option: func(name string) *node { return about.get(n + strings.TrimPrefix(name, "Tunnel")) }}
		}
	}
	return all
}

func (r *Result) awsTunnel(d document, id, name string, t awsTunnel) Tunnel {
	name = nameOf(name)
	x := t.xml
	out := Tunnel{Name: name, Cloud: "aws", Remote: t.remote}
	own := x.get("customer_gateway", "tunnel_outside_address")
	if ip := own.get("ip_address"); !ip.empty() {
		own = ip
	}
	out.RouterPublic = r.address(d, own, "customer_gateway/tunnel_outside_address")
	out.RouterASN = r.asn(d, x.get("customer_gateway", "bgp", "asn"), "customer_gateway/bgp/asn")
	out.ASN = r.asn(d, x.get("vpn_gateway", "bgp", "asn"), "vpn_gateway/bgp/asn")
	if !out.ASN.known() {
		out.ASN = r.asn(d, t.option("BgpAsn"), "tunnel's bgp_asn")
	}
	h := r.seconds(d, x.get("vpn_gateway", "bgp", "hold_time"), "vpn_gateway/bgp/hold_time")
	if !h.known() {
		h = r.seconds(d, t.option("BgpHoldtime"), "tunnel's bgp_holdtime")
	}
	if h.known() && h.Is != preset("aws").HoldTime.Is {
		out.HoldTime = h
	}
	out.Inside = r.awsInside(d, id, t)

	how := "read it with aws ec2 describe-vpn-connections --vpn-connection-ids " + printable(id) + ", or set another with modify-vpn-tunnel-options"
	if arn := t.option("PreSharedKeyArn").string(); arn != "" {
		how = "AWS keeps it in Secrets Manager: aws secretsmanager get-secret-value --secret-id " + printable(arn[:min(len(arn), 200)])
	}
	out.PSK = r.key(d, t.at, name, "aws", how, place{x.get("ike", "pre_shared_key"), "ike/pre_shared_key"}, place{t.option("PreSharedKey"), "TunnelOptions/PreSharedKey"})

	if versions := values(t.option("IkeVersions")); len(versions) > 0 && !slices.Contains(versions, "ikev2") {
		r.note(d, t.at, "%s: the tunnel to %s takes only %s; add ikev2 with modify-vpn-tunnel-options", id, t.remote.Is, strings.Join(versions, ", "))
	}
	p := preset("aws")
	out.IKE = r.awsProposal(d, id, t, "1", p.IKEProposals.Is[0])
	out.ESP = r.awsProposal(d, id, t, "2", p.ESPProposals.Is[0])
	// The lifetimes in the XML do not follow the options: only the options count. The gateway
	// renews before the end by a margin that is randomly increased.
	margin, fuzz := 270*time.Second, int64(100)
	if m := r.seconds(d, t.option("RekeyMarginTimeSeconds"), "RekeyMarginTimeSeconds"); m.known() {
		margin = m.Is
	}
	if f, err := strconv.ParseInt(t.option("RekeyFuzzPercentage").string(), 10, 8); err == nil && f >= 0 && f <= 100 {
		fuzz = f
	}
	longest := margin + margin*time.Duration(fuzz)/100
	renews := func(option string) Value[time.Duration] {
		v := r.seconds(d, t.option(option), option)
		v.Is = max(v.Is-longest, time.Second)
		return v
	}
	out.IKERekey = r.earlier(d, t.at, renews("Phase1LifetimeSeconds"), p.IKERekey.Is, 15*time.Minute)
	out.ChildRekey = r.earlier(d, t.at, renews("Phase2LifetimeSeconds"), p.ChildRekey.Is, 5*time.Minute)
	return out
}

// awsInside reads the inside addresses. In the options the gateway has the first host address of
// the block, the customer gateway the second. A connection for IPv6 has a block of each family.
func (r *Result) awsInside(d document, id string, t awsTunnel) (pairs []Inside) {
	for _, element := range []string{"tunnel_inside_address", "tunnel_inside_ipv6_address"} {
		own := t.xml.get("customer_gateway", element)
		local := r.address(d, own.get("ip_address"), "customer_gateway/"+element)
		peer := r.address(d, t.xml.get("vpn_gateway", element, "ip_address"), "vpn_gateway/"+element)
		if !local.known() || !peer.known() {
			continue
		}
		// The IPv6 element has a prefix_length of 128, although the block is a /126.
		bits := local.Is.BitLen() - 2
		if v, err := strconv.Atoi(own.string("network_cidr")); err == nil {
			bits = v
		}
		if slices.ContainsFunc(pairs, func(in Inside) bool { return in.Peer.Is.Is4() == peer.Is.Is4() }) {
			r.note(d, t.at, "%s: %s has a second pair of inside addresses of one family, %s and %s; left out", id, element, local.Is, peer.Is)
		} else if p, err := local.Is.Prefix(bits); err == nil && p.Contains(peer.Is) {
			pairs = append(pairs, Inside{Value[netip.Prefix]{netip.PrefixFrom(local.Is, bits), local.From}, peer})
		} else {
			r.note(d, t.at, "%s: %s and %s do not make a pair of inside addresses with /%d", id, local.Is, peer.Is, bits)
		}
	}
	for _, option := range []struct {
		name string
		bits int
	}{{"TunnelInsideCidr", 30}, {"TunnelInsideIpv6Cidr", 126}} {
		text := t.option(option.name).string()
		block, err := netip.ParsePrefix(text)
		switch {
		case text == "":
		case err != nil || block.Bits() != option.bits:
			r.note(d, t.at, "%s: %s %q is not a /%d", id, option.name, short(text), option.bits)
		case !slices.ContainsFunc(pairs, func(in Inside) bool { return in.Peer.Is.Is4() == block.Addr().Is4() }):
			first := block.Masked().Addr().Next()
			pairs = append(pairs, Inside{Value[netip.Prefix]{netip.PrefixFrom(first.Next(), option.bits), option.name}, Value[netip.Addr]{first, option.name}})
		}
	}
	if len(pairs) == 0 {
		r.note(d, t.at, "%s: no inside addresses for the tunnel to %s; give them, or the node allocates some that AWS does not know", id, t.remote.Is)
	}
	return pairs
}

// values returns the texts of a list of {Value: x}, or of texts, in lower case.
func values(list *node) (out []string) {
	for _, n := range list.items() {
		text := n.string("Value")
		if text == "" {
			text = n.string()
		}
		if text != "" {
			out = append(out, strings.ToLower(text))
		}
	}
	return out
}

var awsWords = struct{ ciphers, hashes, groups [][2]string }{
	ciphers: [][2]string{{"aes256-gcm-16", "aes256gcm16"}, {"aes256", "aes256"}, {"aes128-gcm-16", "aes128gcm16"}, {"aes128", "aes128"}},
	hashes:  [][2]string{{"sha2-384", "sha384"}, {"sha2-512", "sha512"}, {"sha2-256", "sha256"}, {"sha1", "sha1"}},
	groups: [][2]string{
		{"20", "ecp384"}, {"21", "ecp521"}, {"19", "ecp256"}, {"16", "modp4096"}, {"15", "modp3072"}, {"14", "modp2048"}, {"17", "modp6144"}, {"18", "modp8192"},
		{"24", "modp2048s256"}, {"23", "modp2048s224"}, {"5", "modp1536"}, {"2", "modp1024"}, {"22", "modp1024s160"},
	},
}

// awsProposal returns the strongest proposal that a phase's options allow; empty if that is the
// preset's.
func (r *Result) awsProposal(d document, id string, t awsTunnel, phase, usual string) (v Value[[]string]) {
	pick := func(option string, words [][2]string) string {
		allowed := values(t.option("Phase" + phase + option))
		for _, w := range words {
			if len(allowed) == 0 || slices.Contains(allowed, w[0]) {
				return w[1]
			}
		}
		r.note(d, t.at, "%s: Phase%s%s allows only %s, and none of them is known here", id, phase, option, short(strings.Join(allowed, ", ")))
		return words[0][1]
	}
	cipher := pick("EncryptionAlgorithms", awsWords.ciphers)
	hash := pick("IntegrityAlgorithms", awsWords.hashes)
	parts := []string{cipher}
	switch aead := strings.Contains(cipher, "gcm"); {
	case aead && phase == "1":
		parts = append(parts, "prf"+hash)
	case !aead:
		parts = append(parts, hash)
	}
	parts = append(parts, pick("DHGroupNumbers", awsWords.groups))
	if p := strings.Join(parts, "-"); p != usual {
		return Value[[]string]{[]string{p}, "the strongest of TunnelOptions/Phase" + phase + "..."}
	}
	return v
}
