package topology

import (
	"fmt"
	"slices"
	"strings"
)

// The suite that the presets of tunnel/cloud use, in Google's terms (cipherSuite of the resource
// VpnTunnel, case-sensitive).
const (
	gcpCipher = "AES-GCM-16-256"
	gcpPRF    = "PRF-HMAC-SHA2-384"
	gcpGroup  = "Group-20"
)

// external is Google's external VPN gateway: up to four interfaces of peers.
type external struct {
	name       string
	interfaces []Address
}

// redundancy is Google's word for the number of interfaces.
func (e external) redundancy() string {
	return map[int]string{1: "SINGLE_IP_INTERNALLY_REDUNDANT", 2: "TWO_IPS_REDUNDANCY", 4: "FOUR_IPS_REDUNDANCY"}[len(e.interfaces)]
}

// externals returns the external gateways of a gateway. Nodes are interfaces of as few external
// gateways as possible, because Google counts two interfaces of one gateway as redundant, but not
// two gateways; a gateway of another cloud is one.
func (s *side) externals(g Gateway) (out []external) {
	var nodes []Address
	others := map[string]*external{}
	var names []string
	for _, tu := range s.of(g) {
		if tu.peer.Cloud == "" {
			if !slices.Contains(nodes, tu.peer.Outside) {
				nodes = append(nodes, tu.peer.Outside)
			}
			continue
		}
		name := g.Name + "-to-" + tu.peer.Name
		if others[name] == nil {
			others[name] = &external{name: name}
			names = append(names, name)
		}
		others[name].interfaces = append(others[name].interfaces, tu.peer.Outside)
	}
	for i := 0; len(nodes) > 0; i++ {
		n := 1
		for _, k := range []int{4, 2} {
			if len(nodes) >= k {
				n = k
				break
			}
		}
		out = append(out, external{fmt.Sprintf("%s-to-nodes-%d", g.Name, i), nodes[:n]})
		nodes = nodes[n:]
	}
	for _, name := range names {
		out = append(out, *others[name])
	}
	return out
}

// at returns the external gateway and the number of the interface with an address.
func at(all []external, a Address) (name string, number int) {
	for _, e := range all {
		if i := slices.Index(e.interfaces, a); i >= 0 {
			return e.name, i
		}
	}
	return "", 0
}

func (s *side) gcpCLI(g Gateway) {
	region := "--region " + g.Region
	if s.gateways {
		s.line("")
		s.line("# Gateway %s in %s.", g.Name, g.Region)
		s.command("", "gcloud compute vpn-gateways create "+g.Name, "--network "+g.Network, region)
		for i := range 2 {
			name := fmt.Sprintf("%s_%d", upper(g.Name), i)
			s.command(name, "gcloud compute vpn-gateways describe "+g.Name, region, fmt.Sprintf("--format 'value(vpnInterfaces[%d].ipAddress)'", i))
			s.own = append(s.own, [2]string{name})
		}
		s.command("", "gcloud compute routers create "+g.Name, "--network "+g.Network, region, fmt.Sprintf("--asn %d", g.ASN))
	}
	if !s.tunnels {
		return
	}
	all := s.externals(g)
	for _, e := range all {
		var interfaces []string
		for i, a := range e.interfaces {
			interfaces = append(interfaces, fmt.Sprintf("%d=%s", i, shellAddress(a)))
		}
		s.command("", "gcloud compute external-vpn-gateways create "+e.name, "--interfaces "+strings.Join(interfaces, ","))
	}
	for _, tu := range s.of(g) {
		peer, number := at(all, tu.peer.Outside)
		s.line("")
		s.line("# Tunnel %s with %s.", tu.Name, tu.peer.Name)
		s.commandWithKey("gcloud compute vpn-tunnels create "+tu.Name, []string{region, "--vpn-gateway " + g.Name, fmt.Sprintf("--interface %d", tu.own.Instance),
			"--peer-external-gateway " + peer, fmt.Sprintf("--peer-external-gateway-interface %d", number), "--router " + g.Name, "--ike-version 2",
			"--phase1-encryption " + gcpCipher, "--phase1-prf " + gcpPRF, "--phase1-dh " + gcpGroup, "--phase2-encryption " + gcpCipher, "--phase2-pfs " + gcpGroup,
			// YAML (gcloud topic flags-file)
			"--flags-file /dev/stdin"}, fmt.Sprintf("--shared-secret: '$%s'", s.t.key(tu.Key).Environment))
		s.command("", "gcloud compute routers add-interface "+g.Name, region, "--interface-name "+tu.Name, "--vpn-tunnel "+tu.Name,
			"--ip-address "+tu.own.Inside.Addr().String(), fmt.Sprintf("--mask-length %d", tu.own.Inside.Bits()))
		s.command("", "gcloud compute routers add-bgp-peer "+g.Name, region, "--peer-name "+tu.Name, "--interface "+tu.Name,
			"--peer-ip-address "+tu.peer.Inside.Addr().String(), fmt.Sprintf("--peer-asn %d", tu.peer.ASN), "--advertised-route-priority 100")
	}
}

func (s *side) gcpTerraform(g Gateway) {
	name := lower(g.Name)
	region := func() { s.attr("region", quote(g.Region)) }
	if s.gateways {
		s.line("")
		s.line("# Gateway %s in %s.", g.Name, g.Region)
		s.block(fmt.Sprintf("resource %q %q", "google_compute_ha_vpn_gateway", name), func() {
			s.attr("name", quote(g.Name))
			region()
			s.attr("network", quote(g.Network))
		})
		for i := range 2 {
			s.own = append(s.own, [2]string{fmt.Sprintf("%s_%d", upper(g.Name), i), fmt.Sprintf("google_compute_ha_vpn_gateway.%s.vpn_interfaces[%d].ip_address", name, i)})
		}
		s.resource("google_compute_router", name, func() {
			s.attr("name", quote(g.Name))
			region()
			s.attr("network", quote(g.Network))
			s.block("bgp", func() { s.attr("asn", fmt.Sprint(g.ASN)) })
		})
	}
	if !s.tunnels {
		return
	}
	all := s.externals(g)
	for _, e := range all {
		s.resource("google_compute_external_vpn_gateway", lower(e.name), func() {
			s.attr("name", quote(e.name))
			s.attr("redundancy_type", quote(e.redundancy()))
			for i, a := range e.interfaces {
				s.block("interface", func() {
					s.attr("id", fmt.Sprint(i))
					s.attr("ip_address", hclAddress(a))
				})
			}
		})
	}
	for _, tu := range s.of(g) {
		peer, number := at(all, tu.peer.Outside)
		own := lower(tu.Name)
		s.resource("google_compute_vpn_tunnel", own, func() {
			s.attr("name", quote(tu.Name))
			region()
			s.attr("vpn_gateway", "google_compute_ha_vpn_gateway."+name+".id")
			s.attr("vpn_gateway_interface", fmt.Sprint(tu.own.Instance))
			s.attr("peer_external_gateway", "google_compute_external_vpn_gateway."+lower(peer)+".id")
			s.attr("peer_external_gateway_interface", fmt.Sprint(number))
			s.attr("router", "google_compute_router."+name+".id")
			s.attr("ike_version", "2")
			s.attr("shared_secret", hclKey(tu.Key))
			s.block("cipher_suite", func() {
				s.block("phase1", func() {
					s.attr("encryption", quotes(gcpCipher))
					s.attr("integrity", quotes())
					s.attr("prf", quotes(gcpPRF))
					s.attr("dh", quotes(gcpGroup))
				})
				s.block("phase2", func() {
					s.attr("encryption", quotes(gcpCipher))
					s.attr("integrity", quotes())
					s.attr("pfs", quotes(gcpGroup))
				})
			})
		})
		s.resource("google_compute_router_interface", own, func() {
			s.attr("name", quote(tu.Name))
			region()
			s.attr("router", "google_compute_router."+name+".name")
			s.attr("ip_range", quote(tu.own.Inside.String()))
			s.attr("vpn_tunnel", "google_compute_vpn_tunnel."+own+".name")
		})
		s.resource("google_compute_router_peer", own, func() {
			s.attr("name", quote(tu.Name))
			region()
			s.attr("router", "google_compute_router."+name+".name")
			s.attr("interface", "google_compute_router_interface."+own+".name")
			s.attr("peer_ip_address", quote(tu.peer.Inside.Addr().String()))
			s.attr("peer_asn", fmt.Sprint(tu.peer.ASN))
			s.attr("advertised_route_priority", "100")
		})
	}
}
