package importer

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"unicode/utf16"
)

// tunnelXML is an ipsec_tunnel to an outside address of 198.51.100.0/24, with 169.254.64.0/30 and
// its neighbours inside.
func tunnelXML(own string, n int) string {
	return fmt.Sprintf(`<ipsec_tunnel>
<customer_gateway><tunnel_outside_address><ip_address>%s</ip_address></tunnel_outside_address>
<tunnel_inside_address><ip_address>169.254.64.%d</ip_address><network_mask>255.255.255.252</network_mask><network_cidr>30</network_cidr></tunnel_inside_address>
<bgp><asn>64620</asn><hold_time>30</hold_time></bgp></customer_gateway>
<vpn_gateway><tunnel_outside_address><ip_address>198.51.100.%d</ip_address></tunnel_outside_address>
<tunnel_inside_address><ip_address>169.254.64.%d</ip_address><network_mask>255.255.255.252</network_mask><network_cidr>30</network_cidr></tunnel_inside_address>
<bgp><asn>64521</asn><hold_time>30</hold_time></bgp></vpn_gateway>
<ike><pre_shared_key>FileKey%d</pre_shared_key></ike></ipsec_tunnel>`, own, 4*n+2, n, 4*n+1, n)
}

func connectionXML(id string, tunnels ...string) string {
	return `<vpn_connection id="` + id + `"><vpn_gateway_id></vpn_gateway_id>` + strings.Join(tunnels, "\n") + `</vpn_connection>`
}

// genericText is what AWS's console hands out for a generic device.
func genericText(id string, tunnels ...int) string {
	text := "Amazon Web Services\nVirtual Private Cloud\n\nYour VPN Connection ID                   : " + id + "\nYour Virtual Private Gateway ID          : vgw-1\n"
	for i, n := range tunnels {
		text += fmt.Sprintf(`
IPSec Tunnel #%d
================
#1: Internet Key Exchange Configuration

  - Authentication Method    : Pre-Shared Key
  - Pre-Shared Key           : FileKey%d
  - Encryption Algorithm     : aes-128-cbc

#3: Tunnel Interface Configuration

Outside IP Addresses:
  - Customer Gateway 		        : 203.0.113.9
  - Virtual Private Gateway	        : 198.51.100.%d

Inside IP Addresses
  - Customer Gateway         		: 169.254.64.%d/30
  - Virtual Private Gateway             : 169.254.64.%d/30

#4: Border Gateway Protocol (BGP) Configuration:

  - Customer Gateway ASN	          : 64620
  - Virtual Private  Gateway ASN          : 64521
  - Neighbor IP Address     		  : 169.254.64.%d
  - Neighbor Hold Time       : 15
`, i+1, n, n, 4*n+2, 4*n+1, 4*n+1)
	}
	return text
}

// swanText is what AWS's console hands out for strongSwan, as far as it is read. The second tunnel
// has no session.
const swanText = `! Amazon Web Services
! Your VPN Connection ID : vpn-0abc
conn Tunnel1
	auto=start
	leftid=203.0.113.31
	right=198.51.100.31
	mark=100
conn Tunnel2
	leftid=203.0.113.31
	right=198.51.100.32
203.0.113.31 198.51.100.31 : PSK "FileKeySwan1"
203.0.113.31 198.51.100.32 : PSK "FileKeySwan2"
sudo ip link add Tunnel1 type vti local 10.0.0.9 remote 198.51.100.31 key 100
sudo ip addr add 169.254.80.2/30 remote 169.254.80.1/30 dev Tunnel1
sudo ip link add Tunnel2 type vti local 10.0.0.9 remote 198.51.100.32 key 200
sudo ip addr add 169.254.80.6/30 remote 169.254.80.5/30 dev Tunnel2
router bgp 64631
 neighbor 169.254.80.1 remote-as 64531
exit
`

// ciscoText is what AWS's console hands out for Cisco's IOS, as far as it is read, for two tunnels.
const ciscoText = `! Amazon Web Services
! Virtual Private Cloud
! Your VPN Connection ID            : vpn-0abd
! Your Virtual Private Gateway ID   : vgw-9
! IPsec Tunnel #1
! #1: Internet Key Exchange (IKE) Configuration
crypto isakmp policy 200
   encryption aes 128
   authentication pre-share
exit
crypto keyring keyring-vpn-0abd-0
   local-address 203.0.113.41
   pre-shared-key address 198.51.100.41 key FileKeyCisco1
exit
interface GigabitEthernet1
   ip address 203.0.113.41 255.255.255.0
exit
interface Tunnel1
   ip address 169.254.90.2 255.255.255.252
   tunnel source 203.0.113.41
   tunnel destination 198.51.100.41 
   ! This option causes the router to reduce the Maximum Segment Size
exit
router bgp 64641
   neighbor 169.254.90.1 remote-as 64541
   neighbor 169.254.90.1 timers 7 20 20
   address-family ipv4 unicast
      neighbor 169.254.90.1 remote-as 64541
   exit
exit
crypto keyring keyring-vpn-0abd-1
   local-address 203.0.113.41
   pre-shared-key address 198.51.100.42 key 6 FileKeyEncrypted
exit
interface Tunnel2
   ip address 169.254.90.6 255.255.255.252
   tunnel source 203.0.113.41
   tunnel destination 198.51.100.42
exit
router bgp 64641
   neighbor 169.254.90.5 remote-as 64541
exit
`

// ciscoOther has the forms of IKEv2 and of the ASA, with static routes, after ciscoText.
const ciscoOther = ciscoText + `! Your VPN Connection ID            : vpn-0abe
crypto ikev2 keyring KEYRING1
 peer aws
  address 198.51.100.43
  pre-shared-key FileKeyIOSv2
 exit
exit
tunnel-group 198.51.100.44 type ipsec-l2l
tunnel-group 198.51.100.44 ipsec-attributes
   ikev1 pre-shared-key FileKeyASA1
exit
interface Tunnel1
   ip address 169.254.91.2 255.255.255.252
   tunnel source interface outside
   tunnel destination 198.51.100.43
exit
interface Tunnel2
   ip address 169.254.91.6 255.255.255.252
   tunnel destination 198.51.100.44
exit
ip route 10.0.0.0 255.255.0.0 Tunnel1 track 100
`

// junosText is what AWS's console hands out for Junos, as far as it is read.
const junosText = `# Amazon Web Services
# Your VPN Connection ID          : vpn-0abf
# IPsec Tunnel #1
set security ike proposal ike-prop-vpn-0abf-1 authentication-method pre-shared-keys 
set security ike policy ike-pol-vpn-0abf-1 mode main 
set security ike policy ike-pol-vpn-0abf-1 pre-shared-key ascii-text FileKeyJunos1
set security ike gateway gw-vpn-0abf-1 ike-policy ike-pol-vpn-0abf-1
set security ike gateway gw-vpn-0abf-1 external-interface ge-0/0/0.0
set security ike gateway gw-vpn-0abf-1 address 198.51.100.45
set security ike gateway gw-vpn-0abf-1 no-nat-traversal
set security ipsec vpn vpn-0abf-1 bind-interface st0.1
set security ipsec vpn vpn-0abf-1 ike gateway gw-vpn-0abf-1
set interfaces st0.1 family inet address 169.254.92.2/30
set interfaces st0.1 family inet mtu 1436
set protocols bgp group ebgp neighbor 169.254.92.1 export EXPORT-DEFAULT 
set protocols bgp group ebgp neighbor 169.254.92.1 peer-as 64545
set protocols bgp group ebgp neighbor 169.254.92.1 hold-time 20
set protocols bgp group ebgp neighbor 169.254.92.1 local-as 64645
set security ike policy ike-pol-vpn-0abf-2 pre-shared-key ascii-text "$9$FileKeyObfuscated"
set security ike gateway gw-vpn-0abf-2 ike-policy ike-pol-vpn-0abf-2
set security ike gateway gw-vpn-0abf-2 address 198.51.100.46
set security ipsec vpn vpn-0abf-2 bind-interface st0.2
set security ipsec vpn vpn-0abf-2 ike gateway gw-vpn-0abf-2
set interfaces st0.2 family inet address 169.254.92.6/30
`

// described is a connection as describe-vpn-connections has it.
func described(id, state, options, config string) string {
	return fmt.Sprintf(`{"VpnConnectionId": %q, "State": %q, "Options": %s, "CustomerGatewayConfiguration": %s}`, id, state, options, strconv.Quote(config))
}

const azureID = "/subscriptions/0/resourceGroups/rg/providers/Microsoft.Network/"

var (
	azureGateway = `{"id": "` + azureID + `virtualNetworkGateways/gw", "name": "gw", "gatewayType": "Vpn", "vpnType": "RouteBased", "bgpSettings": {"asn": 65010, "bgpPeeringAddresses": [
		{"ipconfigurationId": "` + azureID + `virtualNetworkGateways/gw/ipConfigurations/a", "defaultBgpIpAddresses": ["10.1.255.4"], "customBgpIpAddresses": ["169.254.21.2"], "tunnelIpAddresses": ["198.51.100.60"]}]}}`
	azureWithoutBGP = `{"id": "` + azureID + `virtualNetworkGateways/gw", "name": "gw", "gatewayType": "Vpn", "vpnType": "RouteBased", "sku": {"name": "Basic"}, "bgpSettings": {"asn": 65010, "bgpPeeringAddress": "10.1.255.7"},
		"ipConfigurations": [{"name": "a", "publicIPAddress": {"id": "` + azureID + `publicIPAddresses/p0"}}]}`
	azureLocal = `{"id": "` + azureID + `localNetworkGateways/r1", "name": "r1", "gatewayIpAddress": "203.0.113.9", "localNetworkAddressSpace": null, "bgpSettings": {"asn": 64620, "bgpPeeringAddress": "169.254.21.1"}}`
)

func azureConnection(fields string) string {
	return `{"name": "c1", "connectionType": "IPsec", "enableBgp": true, "ipsecPolicies": null, "virtualNetworkGateway1": {"id": "` + azureID + `virtualNetworkGateways/gw"},
		"localNetworkGateway2": {"id": "` + azureID + `localNetworkGateways/r1"}` + fields + `}`
}

const gcpURL = "https://www.googleapis.com/compute/v1/projects/p/regions/r/"

var (
	gcpGateway = `{"kind": "compute#vpnGateway", "name": "gw", "selfLink": "` + gcpURL + `vpnGateways/gw", "vpnInterfaces": [{"id": 0, "ipAddress": "198.51.100.80"}, {"id": 1, "ipAddress": "198.51.100.81"}]}`
	gcpRouter  = `{"kind": "compute#router", "name": "cr", "selfLink": "` + gcpURL + `routers/cr", "bgp": {"asn": 64530},
		"interfaces": [{"name": "if0", "ipRange": "169.254.66.1/30", "linkedVpnTunnel": "` + gcpURL + `vpnTunnels/t0"}],
		"bgpPeers": [{"name": "r1", "interfaceName": "if0", "ipAddress": "169.254.66.1", "peerIpAddress": "169.254.66.2", "peerAsn": 64620}]}`
)

func gcpTunnel(fields string) string {
	return `{"kind": "compute#vpnTunnel", "name": "t0", "selfLink": "` + gcpURL + `vpnTunnels/t0", "vpnGateway": "` + gcpURL + `vpnGateways/gw", "vpnGatewayInterface": 0,
		"router": "` + gcpURL + `routers/cr", "ikeVersion": 2, "sharedSecret": "*************"` + fields + `}`
}

// shapes are structures that files have been seen to have, each as small as it gets. Those with no
// tunnels are refused.
var shapes = []struct {
	name, cloud string
	files       []string
	tunnels     int
	want        []string // in the document, the notes or the error; after "not: ", what must not be
}{
	{"one connection, one tunnel", "aws", []string{connectionXML("vpn-1", tunnelXML("203.0.113.9", 1))}, 1, []string{"local: 169.254.64.6/30", "remote: 169.254.64.5", "asn: 64521"}},
	{"two files in one", "aws", []string{"<?xml version=\"1.0\"?>\n" + connectionXML("vpn-1", tunnelXML("203.0.113.9", 1)) + "\n<?xml version=\"1.0\"?>\n" + connectionXML("vpn-2", tunnelXML("203.0.113.9", 2)) + "\n%"}, 2,
		[]string{"name: vpn-1-1", "name: vpn-2-1"}},
	{"connections below an element of another format", "aws", []string{"<all>" + connectionXML("vpn-1", tunnelXML("203.0.113.9", 1)) + connectionXML("vpn-2", tunnelXML("203.0.113.9", 2)) + "</all>"}, 2, nil},
	{"Query API, one connection", "aws", []string{"<CreateVpnConnectionResponse><vpnConnection><vpnConnectionId>vpn-1</vpnConnectionId><state>available</state><customerGatewayConfiguration>" +
		strings.NewReplacer("<", "&lt;", ">", "&gt;").Replace(connectionXML("vpn-1", tunnelXML("203.0.113.9", 1))) + "</customerGatewayConfiguration></vpnConnection></CreateVpnConnectionResponse>"}, 1, nil},
	{"a tunnel twice", "aws", []string{connectionXML("vpn-1", tunnelXML("203.0.113.9", 1), tunnelXML("203.0.113.9", 1))}, 1, []string{"leads from the same node to the same gateway, 198.51.100.1, as vpn-1-1; left out"}},
	{"the same file twice", "aws", []string{connectionXML("vpn-1", tunnelXML("203.0.113.9", 1)), connectionXML("vpn-1", tunnelXML("203.0.113.9", 1))}, 1, []string{"f1:1: vpn-1-1 leads from the same node"}},
	{"no address of the gateway", "aws", []string{`<vpn_connection id="vpn-1"><ipsec_tunnel></ipsec_tunnel></vpn_connection>`}, 0, []string{"f0:1: vpn-1: an ipsec_tunnel has no vpn_gateway/tunnel_outside_address"}},
	{"deleted, deleting, pending, up", "aws", []string{"[" + described("vpn-1", "deleted", "{}", "") + "," + described("vpn-2", "deleting", "{}", "") + "," + described("vpn-3", "pending", "{}", "...") + "," + described("vpn-4", "available", "{}", connectionXML("vpn-4", tunnelXML("203.0.113.9", 1))) + "]"}, 1,
		[]string{"vpn-1: is deleted; skipped", "vpn-2: is deleting; skipped", "vpn-3: is pending; skipped"}},
	{"text in the place of the XML", "aws", []string{described("vpn-1", "available", "{}", "...configuration...")}, 0, []string{"vpn-1: its CustomerGatewayConfiguration: line 1: is not XML"}},
	{"IKEv1 only", "aws", []string{described("vpn-1", "available", `{"TunnelOptions": [{"OutsideIpAddress": "198.51.100.1", "IkeVersions": [{"Value": "ikev1"}]}]}`, connectionXML("vpn-1", tunnelXML("203.0.113.9", 1)))}, 1,
		[]string{"the tunnel to 198.51.100.1 takes only ikev1; add ikev2 with modify-vpn-tunnel-options"}},
	{"static routes", "aws", []string{described("vpn-1", "available", `{"StaticRoutesOnly": true}`, connectionXML("vpn-1", tunnelXML("203.0.113.9", 1)))}, 1, []string{"is routed statically; write a static route"}},
	{"IPv6 inside, in options", "aws", []string{described("vpn-1", "available", `{"TunnelInsideIpVersion": "ipv6", "TunnelOptions": [{"OutsideIpAddress": "198.51.100.1", "TunnelInsideCidr": "169.254.64.4/30", "TunnelInsideIpv6Cidr": "fd00:1::/126"}]}`, connectionXML("vpn-1", tunnelXML("203.0.113.9", 1)))}, 1,
		[]string{"local: 169.254.64.6/30 # customer", `local: "fd00:1::2/126" # TunnelInsideIpv6Cidr`, `remote: "fd00:1::1"`, "carries IPv6 only"}},
	{"IPv6 inside, in the XML", "aws", []string{connectionXML("vpn-1", strings.NewReplacer("169.254.64.6", "fd00:1::2", "169.254.64.5", "fd00:1::1", "<network_cidr>30</network_cidr>", "").Replace(tunnelXML("203.0.113.9", 1)))}, 1,
		[]string{`local: "fd00:1::2/126"`, `remote: "fd00:1::1"`}},
	{"timers of its own", "aws", []string{described("vpn-1", "available", `{"EnableAcceleration": true, "TunnelOptions": [{"OutsideIpAddress": "198.51.100.1", "Phase1LifetimeSeconds": 3600, "Phase2LifetimeSeconds": 1800, "RekeyMarginTimeSeconds": 120, "RekeyFuzzPercentage": 50}]}`, connectionXML("vpn-1", tunnelXML("203.0.113.9", 1)))}, 1,
		[]string{"ikeRekey: 56m0s # before the gateway's 57m0s", "childRekey: 26m0s # before the gateway's 27m0s"}},
	{"masked in the XML", "aws", []string{strings.Replace(connectionXML("vpn-1", tunnelXML("203.0.113.9", 1)), "FileKey1", "REDACTED", 1)}, 1, []string{"f0:8: vpn-1-1: its key is not in ike/pre_shared_key: the text is a placeholder; read it with aws ec2 describe", "psk: vpn-1-1 # MISSING"}},
	{"a key in Secrets Manager", "aws", []string{described("vpn-1", "available", `{"TunnelOptions": [{"OutsideIpAddress": "198.51.100.1", "PreSharedKey": "", "PreSharedKeyArn": "arn:aws:secretsmanager:r:0:secret:k"}]}`, strings.Replace(connectionXML("vpn-1", tunnelXML("203.0.113.9", 1)), "FileKey1", "", 1))}, 1,
		[]string{"its key is not in the file; AWS keeps it in Secrets Manager: aws secretsmanager get-secret-value --secret-id arn:aws:secretsmanager:r:0:secret:k"}},
	{"blanks around a key", "aws", []string{strings.Replace(connectionXML("vpn-1", tunnelXML("203.0.113.9", 1)), "FileKey1", " FileKey1\t", 1)}, 1, []string{"vpn-1-1: blanks, line ends or a byte order mark around its key (ike/pre_shared_key) were cut off", "psk: vpn-1-1 # the name"}},
	{"over Direct Connect", "aws", []string{described("vpn-1", "available", `{"OutsideIpAddressType": "PrivateIpv4"}`, connectionXML("vpn-1", tunnelXML("10.0.0.9", 1)))}, 1, []string{"has private outside addresses"}},
	{"a state of several clouds", "aws", []string{`{"resources": [{"type": "google_compute_router", "instances": [{"attributes": {"self_link": "` + gcpURL + `routers/a", "network": "` + gcpURL + `networks/n", "subnetworks": ["` + strings.Repeat(gcpURL+`", "`, 30) + `"]}}]},
		{"type": "aws_vpn_connection", "instances": [{"attributes": {"id": "vpn-1", "customer_gateway_configuration": ` + strconv.Quote(connectionXML("vpn-1", tunnelXML("203.0.113.9", 1))) + `}}]}]}`}, 1, nil},
	{"the console's text for a vendor's device", "aws", []string{"! Amazon Web Services\n! Virtual Private Cloud\n\n! IPSec Tunnel #1\n! #1: Internet Key Exchange Configuration\ncrypto isakmp policy 200\n"}, 0, []string{"f0: is a cloud's instructions for one vendor's device"}},
	{"the console's text for a generic device", "aws", []string{genericText("vpn-1", 1, 2) + genericText("vpn-2", 3)}, 3, []string{"name: vpn-1-1\n", "local: 169.254.64.10/30", "remote: 169.254.64.9", "remoteAddress: 198.51.100.2", "asn: 64521", "holdTime: 15s",
		"# vpn-2, tunnel to 198.51.100.3 of vgw-1", "psk: vpn-2-1 # the name of the secret", "publicAddress 203.0.113.9", "node.asn 64620"}},
	{"the console's text, static routes", "aws", []string{regexp.MustCompile(`(?s)#4: Border.*`).ReplaceAllString(genericText("vpn-1", 1), "#4: Static Routing Configuration:\n  - Next hop       : 169.254.64.5\n")}, 1, []string{"is routed statically"}},

	{"IPv6 inside, as the XML has it", "aws", []string{connectionXML("vpn-1", strings.NewReplacer("</network_cidr></tunnel_inside_address>\n<bgp><asn>64620", "</network_cidr></tunnel_inside_address>\n<tunnel_inside_ipv6_address><ip_address>fd00:9::a1b2</ip_address><prefix_length>128</prefix_length></tunnel_inside_ipv6_address><bgp><asn>64620",
		"</network_cidr></tunnel_inside_address>\n<bgp><asn>64521", "</network_cidr></tunnel_inside_address>\n<tunnel_inside_ipv6_address><ip_address>fd00:9::a1b1</ip_address><prefix_length>128</prefix_length></tunnel_inside_ipv6_address><bgp><asn>64521").Replace(tunnelXML("203.0.113.9", 1)))}, 1,
		[]string{"local: 169.254.64.6/30", `local: "fd00:9::a1b2/126" # customer_gateway/tunnel_inside_ipv6_address`, `remote: "fd00:9::a1b1"`}},
	{"accelerated", "aws", []string{described("vpn-1", "available", `{"EnableAcceleration": true, "RemoteIpv4NetworkCidr": "10.0.0.0/8"}`, connectionXML("vpn-1", tunnelXML("203.0.113.9", 1)))}, 1,
		[]string{"vpn-1: is accelerated", "udpEncapsulation: always # accelerated connections need NAT traversal", "RemoteIpv4NetworkCidr is 10.0.0.0/8"}},
	{"attached to nothing", "aws", []string{`{"VpnConnectionId": "vpn-1", "State": "available", "GatewayAssociationState": "not-associated", "CustomerGatewayConfiguration": ` + strconv.Quote(connectionXML("vpn-1", tunnelXML("203.0.113.9", 1))) + `}`}, 1,
		[]string{"vpn-1: is attached to no gateway, so that its tunnels lead nowhere", "# vpn-1, tunnel to 198.51.100.1 of no gateway"}},
	{"Cloud WAN", "aws", []string{`{"VpnConnectionId": "vpn-1", "State": "available", "CoreNetworkArn": "arn:aws:networkmanager::0:core-network/c", "CustomerGatewayConfiguration": ` + strconv.Quote(connectionXML("vpn-1", tunnelXML("203.0.113.9", 1))) + `}`}, 1,
		[]string{"vpn-1: leads to a core network of Cloud WAN", "of a core network"}},
	{"a certificate", "aws", []string{`{"VpnConnectionId": "vpn-1", "State": "available", "CustomerGatewayId": "cgw-1", "CustomerGatewayConfiguration": ` + strconv.Quote(connectionXML("vpn-1", tunnelXML("203.0.113.9", 1))) + `}`, `{"CustomerGateways": [{"CustomerGatewayId": "cgw-1", "BgpAsn": "64620", "CertificateArn": "arn:aws:acm:r:0:certificate/c"}]}`}, 0,
		[]string{"vpn-1: its customer gateway authenticates with a certificate, and this node has pre-shared keys alone"}},
	{"the console's text for strongSwan", "aws", []string{swanText}, 2, []string{"name: vpn-0abc-1\n", "local: 169.254.80.2/30", "remote: 169.254.80.1", "remoteAddress: 198.51.100.31", "publicAddress 203.0.113.31", "node.asn 64631", "asn: 64531", "psk: vpn-0abc-2 # the name of the secret",
		"the tunnel to 198.51.100.32 has no vpn_gateway/bgp/asn"}},
	{"the console's text for Cisco's IOS", "aws", []string{ciscoText}, 2, []string{"name: vpn-0abd-1\n", "# vpn-0abd, tunnel to 198.51.100.41 of vgw-9", "local: 169.254.90.2/30", "remote: 169.254.90.1", "remoteAddress: 198.51.100.41", "publicAddress 203.0.113.41", "node.asn 64641", "asn: 64541",
		"holdTime: 20s", "psk: vpn-0abd-1 # the name of the secret", "psk: vpn-0abd-2 # MISSING", "local: 169.254.90.6/30", "vpn-0abd-2: its key is not in the file"}},
	{"the console's text for Cisco's IKEv2 and ASA", "aws", []string{ciscoOther}, 4, []string{"name: vpn-0abe-2\n", "psk: vpn-0abe-1 # the name of the secret", "psk: vpn-0abe-2 # the name of the secret", "local: 169.254.91.2/30", "remote: 169.254.91.5",
		"vpn-0abe: is routed statically; write a static route for each VPC through vpn-0abe-1, vpn-0abe-2"}},
	{"the console's text for Junos", "aws", []string{junosText}, 2, []string{"name: vpn-0abf-1\n", "local: 169.254.92.2/30", "remote: 169.254.92.1", "remoteAddress: 198.51.100.45", "The node needs node.asn 64645", "asn: 64545", "holdTime: 20s", "psk: vpn-0abf-1 # the name of the secret",
		"remote: 169.254.92.5", "psk: vpn-0abf-2 # MISSING", "the tunnel to 198.51.100.46 has no vpn_gateway/bgp/asn"}},
	{"Terraform's configuration", "aws", []string{"resource \"aws_vpn_connection\" \"a\" {\n  customer_gateway_id = aws_customer_gateway.a.id\n}\n"}, 0, []string{"f0: line 2: has an expression: this is Terraform's configuration, and its state is needed"}},
	{"a state's text that ends early", "aws", []string{"resource \"aws_vpn_connection\" \"a\" {\n  id = \"vpn-1\"\n"}, 0, []string{"f0: line 2: the file ends before it is complete"}},
	{"colors of a terminal", "aws", []string{"# \x1b[1maws_vpn_connection.a\x1b[0m:\nresource \"aws_vpn_connection\" \"a\" {\n    id              = \"vpn-1\"\n    tunnel1_address = \"198.51.100.1\"\n    tunnel1_inside_cidr = \"169.254.64.4/30\"\n\x1b[0m}\n"}, 1, []string{"remoteAddress: 198.51.100.1 # tunnel1_address"}},
	{"the ASN from the gateway", "aws", []string{`{"values": {"root_module": {"resources": [{"type": "aws_vpn_connection", "values": {"id": "vpn-1", "vpn_gateway_id": "vgw-1", "tunnel1_address": "198.51.100.1", "tunnel1_inside_cidr": "169.254.64.4/30", "tunnel1_preshared_key": "FileKeyOne"}},
		{"type": "aws_vpn_gateway", "values": {"id": "vgw-1", "amazon_side_asn": "64530"}}]}}}`}, 1, []string{"asn: 64530 # gateway/amazon_side_asn", "psk: vpn-1-1 # the name of the secret; TunnelOptions/PreSharedKey"}},

	{"an id of several lines", "aws", []string{connectionXML("vpn&#10;&#13;peers: [] # &#x85;&#x2028;x", tunnelXML("203.0.113.9", 1))}, 1, []string{"name: vpn-peers-x-1\n", "# vpn??peers: [] # ??x, tunnel to"}},

	{"lists in one file", "azure", []string{"[" + azureGateway + "," + azureLocal + "," + azureConnection("") + "]"}, 1, []string{"local: 169.254.21.1/32", "remote: 169.254.21.2", "asn: 65010"}},
	{"values one after the other", "azure", []string{azureGateway + "\n" + azureLocal + "\n" + azureConnection("")}, 1, nil},
	{"an exported template", "azure", []string{azureGateway, azureLocal, `{"$schema": "https://schema.management.azure.com/schemas/2019-04-01/deploymentTemplate.json#",
		"parameters": {"connections_c1_name": {"defaultValue": "c1"}, "virtualNetworkGateways_gw_externalid": {"defaultValue": "` + azureID + `virtualNetworkGateways/gw"}, "localNetworkGateways_r1_name": {"defaultValue": "r1"}, "key": {"type": "securestring"}},
		"resources": [{"type": "Microsoft.Network/connections", "name": "[parameters('connections_c1_name')]", "properties": {"connectionType": "IPsec", "enableBgp": true, "sharedKey": "[parameters('key')]",
			"virtualNetworkGateway1": {"id": "[parameters('virtualNetworkGateways_gw_externalid')]"}, "localNetworkGateway2": {"id": "[resourceId('Microsoft.Network/localNetworkGateways', parameters('localNetworkGateways_r1_name'))]"}}},
			{"type": "Microsoft.Network/localNetworkGateways", "name": "[parameters('localNetworkGateways_r1_name')]", "properties": {"gatewayIpAddress": "203.0.113.9", "bgpSettings": {"asn": 64620, "bgpPeeringAddress": "169.254.21.1"}}}]}`}, 1,
		[]string{"name: c1", "psk: c1 # MISSING", "remote: 169.254.21.2"}},
	{"a gateway in a template", "azure", []string{`{"resources": [{"type": "Microsoft.Network/virtualNetworkGateways", "name": "gw", "properties": {"gatewayType": "Vpn", "bgpSettings": {"asn": 65010, "bgpPeeringAddresses": [{"ipconfigurationId": "x", "customBgpIpAddresses": []}]}}}]}`, azureLocal, azureConnection("")}, 0,
		[]string{"an instance of the gateway gw has no tunnelIpAddresses, which templates leave out"}},
	{"IKEv1", "azure", []string{azureGateway, azureLocal, azureConnection(`, "connectionProtocol": "IKEv1"`)}, 0, []string{"c1: speaks IKEv1, which cannot be changed"}},
	{"policy based selectors", "azure", []string{azureGateway, azureLocal, azureConnection(`, "usePolicyBasedTrafficSelectors": true`)}, 0, []string{"c1: usePolicyBasedTrafficSelectors: a router has one pair of selectors"}},
	{"selectors of its own", "azure", []string{azureGateway, azureLocal, azureConnection(`, "trafficSelectorPolicies": [{"localAddressRanges": ["10.0.0.0/8"]}]`)}, 0, []string{"c1: trafficSelectorPolicies"}},
	{"a policy based gateway", "azure", []string{strings.Replace(azureGateway, "RouteBased", "PolicyBased", 1), azureLocal, azureConnection("")}, 0, []string{"gw is policy based, which is IKEv1 with selectors"}},
	{"a gateway without BGP", "azure", []string{`{"id": "` + azureID + `virtualNetworkGateways/gw", "name": "gw", "gatewayType": "Vpn", "vpnType": "RouteBased", "bgpSettings": null}`, azureLocal, azureConnection("")}, 0, []string{"gw has neither bgpSettings/bgpPeeringAddresses nor ipConfigurations"}},
	{"a gateway as the API has it", "azure", []string{`{"name": "gw", "id": "` + azureID + `virtualNetworkGateways/gw", "properties": ` + azureGateway + `}`}, 0, []string{"f0:1: the gateway gw has no connection"}},
	{"no gateway", "azure", []string{azureLocal, azureConnection("")}, 0, []string{"f1:1: c1: its gateway gw is not among the files"}},
	{"only this node", "azure", []string{azureLocal}, 0, []string{"r1 is this node as Azure knows it"}},
	{"a hub's gateway with its connections, and the site", "azure", []string{`{"id": "` + azureID + `vpnGateways/hub", "name": "hub", "virtualHub": {"id": "x"}, "bgpSettings": {"asn": 65515, "bgpPeeringAddresses": [
			{"ipconfigurationId": "Instance0", "defaultBgpIpAddresses": ["10.0.0.12"], "customBgpIpAddresses": ["169.254.21.2"], "tunnelIpAddresses": ["10.0.0.4", "198.51.100.70"]},
			{"ipconfigurationId": "Instance1", "defaultBgpIpAddresses": ["10.0.0.13"], "customBgpIpAddresses": ["169.254.21.6"], "tunnelIpAddresses": ["198.51.100.71", "10.0.0.5"]}]},
		"connections": [{"id": "` + azureID + `vpnGateways/hub/vpnConnections/c1", "name": "c1", "vpnLinkConnections": [{"name": "l1", "enableBgp": true, "vpnConnectionProtocolType": "IKEv2", "vpnSiteLink": {"id": "` + azureID + `vpnSites/s/vpnSiteLinks/l1"},
			"vpnGatewayCustomBgpAddresses": [{"ipConfigurationId": "Instance1", "customBgpIpAddress": "169.254.21.10"}],
			"ipsecPolicies": [{"ikeEncryption": "AES256", "ikeIntegrity": "SHA256", "dhGroup": "DHGroup14", "ipsecEncryption": "GCMAES256", "ipsecIntegrity": "GCMAES256", "pfsGroup": "PFS2048", "saLifeTimeSeconds": 27000, "saDataSizeKilobytes": 102400000}]}]}]}`,
		`{"id": "` + azureID + `vpnSites/s", "name": "s", "vpnSiteLinks": [{"id": "` + azureID + `vpnSites/s/vpnSiteLinks/l1", "name": "l1", "ipAddress": "203.0.113.9", "bgpProperties": {"asn": 64620, "bgpPeeringAddress": "169.254.21.1"}}]}`}, 2,
		[]string{"cloud: azure-vwan", "remoteAddress: 198.51.100.70", "remote: 169.254.21.2 ", "remote: 169.254.21.10 # connection/vpnGatewayCustomBgpAddresses", "local: 169.254.21.1/32 # vpnSiteLink/bgpProperties/bgpPeeringAddress", "ikeProposals: [aes256-sha256-modp2048]", "espProposals: [aes256gcm16-modp2048]"}},

	{"a placeholder for the key", "azure", []string{azureGateway, azureLocal, azureConnection(`, "sharedKey": "<hidden>"`)}, 1, []string{"f2:2: c1: its key is not in connection/sharedKey: the text is an expression", "az network vpn-connection shared-key show --connection-name c1"}},
	{"blanks in the key", "azure", []string{azureGateway, azureLocal, azureConnection(`, "sharedKey": "File Key"`)}, 1, []string{"the text has blanks or line ends inside; if they belong to the key, store it by hand"}},
	{"addresses in public-ip show", "azure", []string{azureWithoutBGP, azureLocal, azureConnection(""), `{"id": "` + azureID + `publicIPAddresses/p0", "name": "p0", "ipAddress": "198.51.100.62", "publicIPAllocationMethod": "Static"}`}, 1,
		[]string{"remoteAddress: 198.51.100.62 # publicIPAddress/ipAddress", "gw has SKU Basic, which has neither BGP nor custom policies", "not: add a custom one", "remote: 10.1.255.7 # gateway/bgpSettings/bgpPeeringAddress"}},
	{"addresses that are missing", "azure", []string{azureWithoutBGP, azureLocal, azureConnection(""), `{"id": "` + azureID + `routeTables/r", "name": "r", "type": "Microsoft.Network/routeTables"}`}, 0,
		[]string{"the address of instance 0 of the gateway gw is not among the files; give az network public-ip show --name p0 as well (the files also have Microsoft.Network/routeTables, which are not read)"}},
	{"private addresses", "azure", []string{strings.Replace(azureGateway, `"bgpSettings"`, `"ipConfigurations": [{"name": "a", "privateIPAddress": "10.1.255.9"}], "bgpSettings"`, 1), azureLocal, azureConnection(`, "useLocalAzureIpAddress": true`)}, 1,
		[]string{"remoteAddress: 10.1.255.9 # gateway/ipConfigurations/privateIPAddress", "c1: uses the private addresses of the gateway (useLocalAzureIpAddress)"}},
	{"private addresses that are missing", "azure", []string{azureGateway, azureLocal, azureConnection(`, "useLocalAzureIpAddress": true`)}, 0, []string{"instance 0 of the gateway gw has no privateIPAddress"}},
	{"certificates", "azure", []string{azureGateway, azureLocal, azureConnection(`, "authenticationType": "Certificate"`)}, 0, []string{"c1: authenticates with certificates, and this node has pre-shared keys alone"}},
	{"a connection that is being deleted", "azure", []string{azureGateway, azureLocal, azureConnection(`, "provisioningState": "Deleting"`)}, 0, []string{"c1: is being deleted; skipped"}},
	{"a gateway for ExpressRoute", "azure", []string{strings.Replace(azureGateway, `"Vpn"`, `"ExpressRoute"`, 1), azureLocal, azureConnection("")}, 0, []string{"its gateway gw is of type ExpressRoute and not a VPN gateway"}},
	{"Azure calls", "azure", []string{azureGateway, azureLocal, azureConnection(`, "connectionMode": "InitiatorOnly"`)}, 1, []string{"c1: Azure opens the tunnel and answers no call (connectionMode); set ipsec.respondOnly: true"}},
	{"cut off by PowerShell", "azure", []string{`{"GatewayType": "Vpn", "Name": "gw", "Id": "` + azureID + `virtualNetworkGateways/gw", "IpConfigurations": "System.Object[]", "BgpSettings": "Microsoft.Azure.Commands.Network.Models.PSBgpSettings"}`, azureLocal, azureConnection("")}, 0,
		[]string{"f0: has objects that PowerShell cut off; make it again with ConvertTo-Json -Depth 10"}},
	{"a state without any of it", "azure", []string{`{"version": 4, "resources": [{"type": "azurerm_subnet", "instances": [{"attributes": {"id": "s"}}]}, {"type": "azurerm_route_table", "instances": [{"attributes": {"id": "r"}}]}]}`}, 0,
		[]string{"f0: has no gateway, connection, local gateway or VPN site in it (the files also have azurerm_route_table, azurerm_subnet, which are not read)"}},
	{"a name of several lines", "azure", []string{azureGateway, azureLocal, strings.Replace(azureConnection(""), `"c1"`, `"c\n1: {} # \u0085x"`, 1)}, 1, []string{"name: c-1-x\n", "# c?1: {} # ?x, instance 0"}},

	{"each in a file", "gcp", []string{gcpGateway, gcpRouter, gcpTunnel(`, "peerIp": "203.0.113.9"`)}, 1, []string{"local: 169.254.66.2/30", "remote: 169.254.66.1", "publicAddress 203.0.113.9"}},
	{"lists of the API", "gcp", []string{`{"kind": "compute#vpnTunnelAggregatedList", "items": {"regions/r": {"vpnTunnels": [` + gcpTunnel("") + `]}, "regions/q": {"warning": {"code": "NO_RESULTS_ON_PAGE"}}}}`, `{"items": [` + gcpGateway + `]}`, `{"items": [` + gcpRouter + `]}`}, 1, nil},
	{"assets, one a line", "gcp", []string{`{"asset_type": "compute.googleapis.com/Network", "resource": {"data": {"name": "n"}}}` + "\n" + `{"asset_type": "compute.googleapis.com/VpnTunnel", "resource": {"data": ` + strings.ReplaceAll(gcpTunnel(""), "\n", "") + "}}\n" +
		`{"resource": {"data": ` + gcpGateway + "}}\n" + `{"resource": {"data": ` + strings.ReplaceAll(gcpRouter, "\n", "") + "}}"}, 1, []string{"asn: 64530"}},
	{"versions of the API mixed", "gcp", []string{strings.ReplaceAll(gcpGateway, "/v1/", "/beta/"), strings.ReplaceAll(gcpRouter, "www.googleapis.com/compute", "compute.googleapis.com/compute"), gcpTunnel("")}, 1, []string{"asn: 64530"}},
	{"links without a host", "gcp", []string{strings.ReplaceAll(gcpGateway, "https://www.googleapis.com/compute/v1/", ""), strings.ReplaceAll(gcpRouter, "https://www.googleapis.com/compute/v1/", ""), gcpTunnel("")}, 1, []string{"asn: 64530"}},
	{"YAML of several descriptions", "gcp", []string{"name: gw\nselfLink: " + gcpURL + "vpnGateways/gw\nvpnInterfaces:\n- id: 0\n  ipAddress: 198.51.100.80\n---\nname: t0\nikeVersion: 2\nvpnGateway: " + gcpURL + "vpnGateways/gw\nvpnGatewayInterface: 0\nselfLink: " + gcpURL + "vpnTunnels/t0\n"}, 1, nil},
	{"YAML without what separates descriptions", "gcp", []string{"name: t0\nikeVersion: 2\nname: t1\nikeVersion: 2\n"}, 0, []string{`f0: line 3: has "name" twice in one object; where descriptions follow each other, put ---`}},
	{"the peer's address from its gateway", "gcp", []string{gcpGateway, gcpRouter, gcpTunnel(`, "peerExternalGateway": "` + strings.Replace(gcpURL, "regions/r", "global", 1) + `externalVpnGateways/x", "peerExternalGatewayInterface": 1`),
		`{"name": "x", "selfLink": "` + strings.Replace(gcpURL, "regions/r", "global", 1) + `externalVpnGateways/x", "redundancyType": "TWO_IPS_REDUNDANCY", "interfaces": [{"id": 0, "ipAddress": "203.0.113.8"}, {"id": 1, "ipAddress": "203.0.113.9"}]}`}, 1, []string{"publicAddress 203.0.113.9"}},
	{"tunnels in their gateway", "gcp", []string{strings.TrimSuffix(gcpGateway, "}") + `, "tunnels": [` + gcpTunnel("") + `]}`, gcpRouter}, 1, []string{"asn: 64530"}},
	{"IPv6 outside", "gcp", []string{strings.Replace(gcpGateway, `"ipAddress": "198.51.100.80"`, `"ipv6Address": "2001:db8::80"`, 1), gcpRouter, gcpTunnel("")}, 1, []string{`remoteAddress: "2001:db8::80"`}},
	{"names of several lines", "gcp", []string{gcpGateway, strings.Replace(gcpRouter, `"peerAsn"`, `"md5AuthenticationKeyName": "k\n1: {}", "peerAsn"`, 1), strings.Replace(gcpTunnel(""), `"t0"`, `"t\n0: {}"`, 1)}, 1, []string{"name: t-0\n", "# t?0: {}, interface 0", "md5AuthenticationKeyName k?1: {}"}},
	{"a name that is a number", "gcp", []string{gcpGateway, gcpRouter, strings.Replace(gcpTunnel(""), `"t0"`, `"529323810542142151"`, 1)}, 1, []string{`name: "529323810542142151"`, `tunnel: "529323810542142151"`}},
	{"a name that is true", "azure", []string{azureGateway, azureLocal, strings.Replace(azureConnection(""), `"c1"`, `"True"`, 1)}, 1, []string{`name: "true"`}},
	{"both families in a session", "gcp", []string{gcpGateway, strings.Replace(gcpRouter, `"peerAsn"`, `"enable": "TRUE", "enableIpv6": true, "ipv6NexthopAddress": "2600:2d00:0:2::21", "peerIpv6NexthopAddress": "2600:2d00:0:2::22", "peerAsn"`, 1), gcpTunnel("")}, 1,
		[]string{`local: "2600:2d00:0:2::22/126" # router/bgpPeers/peerIpv6NexthopAddress`, `remote: "2600:2d00:0:2::21"`, "t0: the session also carries the other family (enableIpv6)"}},
	{"both families, next hops missing", "gcp", []string{gcpGateway, strings.Replace(gcpRouter, `"peerAsn"`, `"enableIpv6": true, "peerAsn"`, 1), gcpTunnel("")}, 1, []string{"the session also carries the other family (enableIpv6), and has no next hops for it"}},
	{"a peer that is not enabled", "gcp", []string{gcpGateway, strings.Replace(gcpRouter, `"peerAsn"`, `"enable": "FALSE", "peerAsn"`, 1), gcpTunnel("")}, 1, []string{"the BGP peer r1 is not enabled, so that its session stays down"}},
	{"what Google says of a tunnel", "gcp", []string{gcpGateway, gcpRouter, gcpTunnel(`, "status": "AUTHORIZATION_ERROR", "remoteTrafficSelector": ["10.0.0.0/8"]`)}, 1, []string{"t0: Google says (AUTHORIZATION_ERROR) that the two sides have different keys", "t0: remoteTrafficSelector is 10.0.0.0/8"}},
	{"a tunnel that is being deleted", "gcp", []string{gcpGateway, gcpRouter, gcpTunnel(`, "status": "DEPROVISIONING"`)}, 0, []string{"t0: is being deleted; skipped"}},
	{"parts of a router that is elsewhere", "gcp", []string{gcpGateway, gcpTunnel(""), `{"version": 4, "resources": [{"type": "google_compute_router_interface", "instances": [{"attributes": {"name": "if0", "ip_range": "169.254.66.1/30", "router": "cr", "vpn_tunnel": "t0"}}]},
		{"type": "google_compute_router_peer", "instances": [{"attributes": {"name": "r1", "interface": "if0", "ip_address": "169.254.66.1", "peer_ip_address": "169.254.66.2", "peer_asn": 64620, "router": "cr"}}]}]}`}, 1,
		[]string{"its router cr is not among the files, and so neither is the router's AS number", "local: 169.254.66.2/30"}},
	{"something else", "gcp", []string{`{"kind": "compute#forwardingRule", "name": "f"}`}, 0, []string{"f0: has no VPN gateway, tunnel or router in it (the files also have compute#forwardingRule, which are not read)"}},
	{"Classic VPN", "gcp", []string{strings.Replace(gcpTunnel(""), `"vpnGateway"`, `"targetVpnGateway"`, 1)}, 0, []string{"t0: is a Classic VPN tunnel; make an HA VPN tunnel"}},
	{"fields that are null", "gcp", []string{gcpGateway, gcpRouter, gcpTunnel(`, "targetVpnGateway": null, "peerGcpGateway": null`)}, 1, nil},
	{"IKEv1", "gcp", []string{strings.Replace(gcpTunnel(""), `"ikeVersion": 2`, `"ikeVersion": 1`, 1), gcpGateway}, 0, []string{"t0: speaks IKEv1"}},
	{"to Google's own", "gcp", []string{gcpTunnel(`, "peerGcpGateway": "` + gcpURL + `vpnGateways/other"`), gcpGateway}, 0, []string{"t0: leads to other, another gateway of Google's"}},
	{"a tunnel of Terraform", "oci", []string{`{"version": 4, "resources": [{"type": "oci_core_ipsec_connection_tunnel_management", "instances": [{"attributes": {"id": "ocid1.ipsectunnel.x", "display_name": "t1", "vpn_ip": "198.51.100.9", "cpe_ip": "203.0.113.9", "ike_version": "V2", "routing": "BGP", "shared_secret": "FileKeyOracle",
		"bgp_session_info": [{"customer_bgp_asn": "64620", "customer_interface_ip": "10.1.1.2/30", "oracle_bgp_asn": "31898", "oracle_interface_ip": "10.1.1.1/30", "customer_interface_ipv6": "fd00:5::2/126", "oracle_interface_ipv6": "fd00:5::1/126"}]}}]}]}`}, 1,
		[]string{"local: 10.1.1.2/30", `local: "fd00:5::2/126"`, "asn: 31898", "psk: t1 # the name of the secret"}},
	{"a static tunnel", "oci", []string{`{"data": {"id": "ocid1.ipsectunnel.x", "display-name": "t1", "vpn-ip": "198.51.100.9", "cpe-ip": "203.0.113.9", "ike-version": "V2", "routing": "STATIC", "bgp-session-info": {"customer-interface-ip": "10.1.1.2/30", "oracle-interface-ip": "10.1.9.1/30"}}}`}, 1,
		[]string{"do not make a pair of inside addresses", "t1: is routed statically", "its key is not in the file; read it with oci network ip-sec-psk get --tunnel-id ocid1.ipsectunnel.x"}},
	{"policies and the dead", "oci", []string{`[{"display-name": "t1", "vpn-ip": "198.51.100.9", "ike-version": "V2", "routing": "POLICY"}, {"display-name": "t2", "vpn-ip": "198.51.100.9", "ike-version": "V2", "lifecycle-state": "TERMINATED"}]`}, 0, []string{"t1: has policies instead of routes", "t2: is terminated; skipped"}},
	{"a connection without tunnels", "oci", []string{`{"data": {"id": "ocid1.ipsecconnection.x", "cpe-id": "c"}}`}, 0, []string{"has no tunnel of an IPSec connection in it; give oci network ip-sec-tunnel list --ipsc-id"}},
	{"of no gateway", "gcp", []string{`{"ikeVersion": 2, "name": "t0"}`}, 0, []string{"f0:1: t0: names no vpnGateway"}},
}

// TestShapes imports each shape, as it is and as Windows writes it.
func TestShapes(t *testing.T) {
	forms := map[string]func(string) []byte{
		"":       func(s string) []byte { return []byte(s) },
		"CRLF":   func(s string) []byte { return []byte(strings.ReplaceAll(s, "\n", "\r\n")) },
		"BOM":    func(s string) []byte { return []byte("\ufeff" + s) },
		"UTF-16": utf16le,
	}
	for _, s := range shapes {
		for name, form := range forms {
			t.Run(s.cloud+", "+s.name+" "+name, func(t *testing.T) {
				var files []File
				for i, f := range s.files {
					files = append(files, File{fmt.Sprintf("f%d", i), form(f)})
				}
				r, err := Import(s.cloud, files)
				if err != nil {
					r = &Result{Notes: []string{err.Error()}}
				}
				got := strings.Join(r.Notes, "\n") + "\n" + r.YAML()
				if len(r.Tunnels) != s.tunnels {
					t.Errorf("%d tunnels, want %d:\n%s", len(r.Tunnels), s.tunnels, got)
				}
				for _, w := range s.want {
					if w, not := strings.CutPrefix(w, "not: "); strings.Contains(got, w) == not {
						t.Errorf("%q: there %v, in\n%s", w, not, got)
					}
				}
				if s.tunnels > 0 {
					if err := checked(r); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
}

func utf16le(s string) []byte {
	out := []byte{0xff, 0xfe}
	for _, u := range utf16.Encode([]rune(s)) {
		out = append(out, byte(u), byte(u>>8))
	}
	return out
}
