package topology

import (
	"fmt"
	"slices"
	"strings"
)

// azurePolicy is the custom policy for the suite that the presets of tunnel/cloud use, as pairs of
// the argument's name in Terraform and its value; the command line has hyphens instead of
// underscores, and two names of its own (Azure's FAQ on cryptographic requirements).
var azurePolicy = [][2]string{
	{"ike_encryption", "GCMAES256"}, {"ike_integrity", "SHA384"}, {"dh_group", "ECP384"},
	{"ipsec_encryption", "GCMAES256"}, {"ipsec_integrity", "GCMAES256"}, {"pfs_group", "ECP384"},
	{"sa_lifetime", "27000"}, {"sa_datasize", "102400000"},
}

// azureConnection is a connection of Azure with its local network gateway. Both instances attempt
// it.
type azureConnection struct {
	name, key string
	peer      End
	custom    [2]string // BGP address of each instance
}

func (s *side) azureConnections(g Gateway) (out []azureConnection) {
	for _, tu := range s.t.Tunnels { // dead ones too: they have the address of the other instance
		own, peer, ok := tu.seenFrom(g.Name)
		if !ok {
			continue
		}
		i := slices.IndexFunc(out, func(c azureConnection) bool { return c.name == tu.Connection })
		if i < 0 {
			i = len(out)
			out = append(out, azureConnection{name: tu.Connection, key: tu.Key, peer: peer})
		}
		out[i].custom[own.Instance] = own.Inside.Addr().String()
	}
	return out
}

// azureCustom returns the BGP addresses of an instance in all connections.
func azureCustom(all []azureConnection, instance int) (out []string) {
	for _, c := range all {
		if !slices.Contains(out, c.custom[instance]) {
			out = append(out, c.custom[instance])
		}
	}
	return out
}

func (s *side) azureCLI(g Gateway) {
	in := "--resource-group " + g.Group
	at := "--location " + g.Region
	all := s.azureConnections(g)
	if s.gateways {
		s.line("")
		s.line("# Gateway %s in %s. To be made it takes up to an hour; leave out what exists.", g.Name, g.Region)
		for i := range 2 {
			s.command("", "az network public-ip create", in, at, fmt.Sprintf("--name %s-ip%d", g.Name, i), "--sku Standard", "--allocation-method Static")
		}
		s.command("", "az network vnet-gateway create", in, at, "--name "+g.Name, "--vnet "+g.Network, "--gateway-type Vpn", "--vpn-type RouteBased", "--sku VpnGw2AZ",
			fmt.Sprintf("--public-ip-addresses %s-ip0 %s-ip1", g.Name, g.Name), fmt.Sprintf("--asn %d", g.ASN))
		update := []string{in, "--name " + g.Name}
		for i := range 2 {
			update = append(update, fmt.Sprintf(`--set 'bgpSettings.bgpPeeringAddresses[%d].customBgpIpAddresses=["%s"]'`, i, strings.Join(azureCustom(all, i), `","`)))
		}
		if len(all) > 0 {
			s.command("", "az network vnet-gateway update", update...)
		}
		for i := range 2 {
			name := fmt.Sprintf("%s_%d", upper(g.Name), i)
			s.command(name, "az network public-ip show", in, fmt.Sprintf("--name %s-ip%d", g.Name, i), "--query ipAddress", "--output tsv")
			s.own = append(s.own, [2]string{name})
		}
	}
	if !s.tunnels {
		return
	}
	s.line("")
	s.line("# The two instances of gateway %s.", g.Name)
	for i := range 2 {
		s.command(fmt.Sprintf("%s_config%d", lower(g.Name), i), "az network vnet-gateway show", in, "--name "+g.Name,
			fmt.Sprintf("--query 'bgpSettings.bgpPeeringAddresses[%d].ipconfigurationId'", i), "--output tsv")
	}
	for _, c := range all {
		s.line("")
		s.line("# Connection %s with %s.", c.name, c.peer.Name)
		s.command("", "az network local-gateway create", in, at, "--name "+c.name, "--gateway-ip-address "+shellAddress(c.peer.Outside),
			fmt.Sprintf("--asn %d", c.peer.ASN), "--bgp-peering-address "+c.peer.Inside.Addr().String())
		// "@-" as a value means standard input, without the last newline (azure-cli-core,
		// _expand_file_prefixed_files).
		s.commandWithKey("az network vpn-connection create", []string{in, at, "--name " + c.name, "--vnet-gateway1 " + g.Name, "--local-gateway2 " + c.name,
			"--enable-bgp", "--shared-key @-"}, "$"+s.t.key(c.key).Environment)
		policy := []string{in, "--connection-name " + c.name}
		for _, p := range azurePolicy {
			option := map[string]string{"sa_datasize": "sa-max-size"}[p[0]]
			if option == "" {
				option = strings.ReplaceAll(p[0], "_", "-")
			}
			policy = append(policy, "--"+option+" "+p[1])
		}
		s.command("", "az network vpn-connection ipsec-policy add", policy...)
		s.command(lower(c.name)+"_id", "az network vpn-connection show", in, "--name "+c.name, "--query id", "--output tsv")
		var custom []string
		for i := range 2 {
			custom = append(custom, fmt.Sprintf(`{\"customBgpIpAddress\": \"%s\", \"ipConfigurationId\": \"$%s_config%d\"}`, c.custom[i], lower(g.Name), i))
		}
		// vpn-connection update has no option for it.
		s.command("", "az resource update", fmt.Sprintf(`--ids "$%s_id"`, lower(c.name)), "--api-version 2023-11-01",
			fmt.Sprintf(`--set "properties.gatewayCustomBgpIpAddresses=[%s]"`, strings.Join(custom, ", ")))
	}
}

func (s *side) azureTerraform(g Gateway) {
	name := lower(g.Name)
	all := s.azureConnections(g)
	place := func() {
		s.attr("resource_group_name", quote(g.Group))
		s.attr("location", quote(g.Region))
	}
	if s.gateways {
		s.line("")
		s.line("# Gateway %s in %s.", g.Name, g.Region)
		s.block(fmt.Sprintf(`data "azurerm_subnet" %q`, name), func() {
			s.attr("name", quote("GatewaySubnet"))
			s.attr("virtual_network_name", quote(g.Network))
			s.attr("resource_group_name", quote(g.Group))
		})
		for i := range 2 {
			s.resource("azurerm_public_ip", fmt.Sprintf("%s_%d", name, i), func() {
				s.attr("name", quote(fmt.Sprintf("%s-ip%d", g.Name, i)))
				place()
				s.attr("allocation_method", quote("Static"))
				s.attr("sku", quote("Standard"))
			})
			s.own = append(s.own, [2]string{fmt.Sprintf("%s_%d", upper(g.Name), i), fmt.Sprintf("azurerm_public_ip.%s_%d.ip_address", name, i)})
		}
		s.resource("azurerm_virtual_network_gateway", name, func() {
			s.attr("name", quote(g.Name))
			place()
			s.attr("type", quote("Vpn"))
			s.attr("vpn_type", quote("RouteBased"))
			s.attr("sku", quote("VpnGw2AZ"))
			s.attr("active_active", "true")
			s.attr("bgp_enabled", "true")
			for i := range 2 {
				s.block("ip_configuration", func() {
					s.attr("name", quote(fmt.Sprintf("instance%d", i)))
					s.attr("public_ip_address_id", fmt.Sprintf("azurerm_public_ip.%s_%d.id", name, i))
					s.attr("subnet_id", "data.azurerm_subnet."+name+".id")
				})
			}
			s.block("bgp_settings", func() {
				s.attr("asn", fmt.Sprint(g.ASN))
				for i := range 2 {
					s.block("peering_addresses", func() {
						s.attr("ip_configuration_name", quote(fmt.Sprintf("instance%d", i)))
						s.attr("apipa_addresses", quotes(azureCustom(all, i)...))
					})
				}
			})
		})
	}
	if !s.tunnels {
		return
	}
	for _, c := range all {
		s.resource("azurerm_local_network_gateway", lower(c.name), func() {
			s.attr("name", quote(c.name))
			place()
			s.attr("gateway_address", hclAddress(c.peer.Outside))
			s.block("bgp_settings", func() {
				s.attr("asn", fmt.Sprint(c.peer.ASN))
				s.attr("bgp_peering_address", quote(c.peer.Inside.Addr().String()))
			})
		})
		s.resource("azurerm_virtual_network_gateway_connection", lower(c.name), func() {
			s.attr("name", quote(c.name))
			place()
			s.attr("type", quote("IPsec"))
			s.attr("virtual_network_gateway_id", "azurerm_virtual_network_gateway."+name+".id")
			s.attr("local_network_gateway_id", "azurerm_local_network_gateway."+lower(c.name)+".id")
			s.attr("connection_protocol", quote("IKEv2"))
			s.attr("shared_key", hclKey(c.key))
			s.attr("bgp_enabled", "true")
			s.block("custom_bgp_addresses", func() {
				s.attr("primary", quote(c.custom[0]))
				s.attr("secondary", quote(c.custom[1]))
			})
			s.block("ipsec_policy", func() {
				for _, p := range azurePolicy {
					value := quote(p[1])
					if strings.HasPrefix(p[0], "sa_") {
						value = p[1]
					}
					s.attr(p[0], value)
				}
			})
		})
	}
}
