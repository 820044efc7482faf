package importer

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// terraformType is the name of the field that has the type of an object of Terraform's state.
const terraformType = "terraform type"

// adapters make an object as the cloud's API has it from the attributes of a resource. Those of
// other types are listed in a note. An adapter that is nil leaves the attributes as they are, whose
// names are the API's, apart from spelling.
var adapters = map[string]func(*node) *node{
	"aws_vpn_connection": nil, "aws_customer_gateway": nil, "aws_vpn_gateway": nil, "aws_ec2_transit_gateway": nil,

	"google_compute_ha_vpn_gateway": nil, "google_compute_external_vpn_gateway": gcpPeerState, "google_compute_vpn_tunnel": gcpTunnelState, "google_compute_router": gcpRouterState,
	"google_compute_router_interface": nil, "google_compute_router_peer": nil,

	"oci_core_ipsec_connection_tunnel_management": nil,

	"azurerm_virtual_network_gateway": azureGatewayState, "azurerm_virtual_network_gateway_connection": azureConnectionState, "azurerm_local_network_gateway": azureLocalState,
	"azurerm_public_ip": nil, "azurerm_vpn_gateway": azureHubState, "azurerm_vpn_gateway_connection": azureHubConnectionState, "azurerm_vpn_site": azureSiteState,
}

// terraform replaces Terraform's state, or what terraform show -json makes of it, by a list of the
// objects in it, and counts the types of the others.
func (d *document) terraform() {
	root := d.node
	if prior := root.child("priorstate"); prior != nil { // of a plan
		root = prior
	}
	list := &node{list: true, line: 1}
	types := map[string]int{}
	instance := func(kind string, attributes *node) {
		adapt, ok := adapters[kind]
		if !ok {
			types[kind]++
			return
		}
		if adapt != nil {
			attributes = adapt(attributes)
		}
		attributes.add(terraformType, &node{text: kind, line: attributes.line})
		list.values = append(list.values, attributes)
	}
	root.walk(func(n *node) bool {
		kind := n.string("type")
		values, instances := n.child("values"), n.child("instances")
		switch {
		case kind == "" || values == nil && instances == nil:
			return true
		case instances != nil && instances.list:
			for _, i := range instances.values {
				if attributes := i.child("attributes"); attributes != nil {
					instance(kind, attributes)
				}
			}
		case len(values.keys) > 0:
			instance(kind, values)
		}
		return false
	})
	d.types = types
	if len(list.values) == 0 && len(types) == 0 {
		d.count()
		return
	}
	for _, at := range []*node{root, root.get("values")} {
		if outputs := at.child("outputs"); outputs != nil {
			list.values = append(list.values, outputs)
		}
	}
	d.node = list
}

// object makes an object of names with nodes or texts.
func object(line int, fields ...any) *node {
	n := &node{line: line}
	for i := 0; i+1 < len(fields); i += 2 {
		switch v := fields[i+1].(type) {
		case *node:
			n.add(fields[i].(string), v)
		case string:
			n.add(fields[i].(string), &node{text: v, line: line})
		}
	}
	return n
}

// listOf makes a list of objects from one.
func listOf(of *node, make func(*node) *node) *node {
	out := &node{list: true, line: of.line}
	for _, n := range of.items() {
		out.values = append(out.values, make(n))
	}
	return out
}

// first returns the first object of a block, which Terraform has in a list.
func (n *node) first(name string) *node {
	if items := n.get(name).items(); len(items) > 0 {
		return items[0]
	}
	return &node{line: n.line}
}

// either returns the first of some names that an object has: providers have renamed fields.
func (n *node) either(names ...string) *node {
	for _, name := range names {
		if n.has(name) {
			return n.get(name)
		}
	}
	return &node{line: n.line}
}

// gcpTunnelState makes the names of a tunnel's neighbours unique, as far as the state says where
// they are.
func gcpTunnelState(a *node) *node {
	if self, ok := strings.CutSuffix(a.string("self_link"), "/vpnTunnels/"+a.string("name")); ok {
		if router := a.child("router"); router != nil && router.text != "" && !strings.Contains(router.text, "/") {
			router.text = self + "/routers/" + router.text
		}
	}
	return a
}

func gcpPeerState(a *node) *node {
	a.add("interfaces", a.get("interface"))
	return a
}

func gcpRouterState(a *node) *node {
	return object(a.line, "kind", "compute#router", "name", a.get("name"), "selfLink", a.get("self_link"), "region", a.get("region"), "project", a.get("project"), "bgp", a.first("bgp"),
		"interfaces", &node{list: true, line: a.line}, "bgpPeers", &node{list: true, line: a.line})
}

func azureGatewayState(a *node) *node {
	id := a.string("id")
	settings := a.first("bgp_settings")
	return object(a.line, "id", a.get("id"), "name", a.get("name"), "gatewayType", a.get("type"), "vpnType", a.get("vpn_type"), "sku", object(a.line, "name", a.get("sku")),
		"ipConfigurations", listOf(a.get("ip_configuration"), func(n *node) *node {
			return object(n.line, "id", id+"/ipConfigurations/"+n.string("name"), "name", n.get("name"), "privateIPAddress", n.get("private_ip_address"), "publicIPAddress", object(n.line, "id", n.get("public_ip_address_id")))
		}),
		"bgpSettings", object(settings.line, "asn", settings.get("asn"), "bgpPeeringAddresses", listOf(settings.get("peering_addresses"), func(n *node) *node {
			return object(n.line, "ipconfigurationId", id+"/ipConfigurations/"+n.string("ip_configuration_name"), "customBgpIpAddresses", n.get("apipa_addresses"),
				"defaultBgpIpAddresses", n.get("default_addresses"), "tunnelIpAddresses", n.get("tunnel_ip_addresses"))
		})))
}

func azureConnectionState(a *node) *node {
	return object(a.line, "id", a.get("id"), "name", a.get("name"), "connectionType", a.get("type"), "connectionProtocol", a.get("connection_protocol"), "enableBgp", a.either("bgp_enabled", "enable_bgp"), "sharedKey", a.get("shared_key"),
		"authenticationType", a.get("authentication_type"), "useLocalAzureIpAddress", a.get("local_azure_ip_address_enabled"), "usePolicyBasedTrafficSelectors", a.get("use_policy_based_traffic_selectors"), "trafficSelectorPolicies", a.get("traffic_selector_policy"),
		"virtualNetworkGateway1", object(a.line, "id", a.get("virtual_network_gateway_id")), "localNetworkGateway2", object(a.line, "id", a.get("local_network_gateway_id")),
		"instanceBgpAddresses", a.first("custom_bgp_addresses"),
		"ipsecPolicies", listOf(a.get("ipsec_policy"), func(n *node) *node {
			return object(n.line, "dhGroup", n.get("dh_group"), "ikeEncryption", n.get("ike_encryption"), "ikeIntegrity", n.get("ike_integrity"), "ipsecEncryption", n.get("ipsec_encryption"), "ipsecIntegrity", n.get("ipsec_integrity"),
				"pfsGroup", n.get("pfs_group"), "saDataSizeKilobytes", n.get("sa_datasize"), "saLifeTimeSeconds", n.get("sa_lifetime"))
		}))
}

func azureLocalState(a *node) *node {
	return object(a.line, "id", a.get("id"), "name", a.get("name"), "gatewayIpAddress", a.get("gateway_address"), "fqdn", a.get("gateway_fqdn"), "bgpSettings", a.first("bgp_settings"),
		"localNetworkAddressSpace", object(a.line, "addressPrefixes", a.get("address_space")))
}

func azureHubState(a *node) *node {
	settings := a.first("bgp_settings")
	instances := &node{list: true, line: settings.line}
	for _, name := range []string{"instance_0_bgp_peering_address", "instance_1_bgp_peering_address"} {
		if n := settings.first(name); !n.empty() {
			instances.values = append(instances.values, object(n.line, "ipconfigurationId", n.get("ip_configuration_id"), "customBgpIpAddresses", n.get("custom_ips"), "defaultBgpIpAddresses", n.get("default_ips"), "tunnelIpAddresses", n.get("tunnel_ips")))
		}
	}
	return object(a.line, "id", a.get("id"), "name", a.get("name"), "virtualHub", object(a.line, "id", a.get("virtual_hub_id")), "bgpSettings", object(settings.line, "asn", settings.get("asn"), "bgpPeeringAddresses", instances))
}

func azureHubConnectionState(a *node) *node {
	return object(a.line, "id", a.get("id"), "name", a.get("name"), "vpnLinkConnections", listOf(a.get("vpn_link"), func(n *node) *node {
		return object(n.line, "name", n.get("name"), "sharedKey", n.get("shared_key"), "enableBgp", n.either("bgp_enabled", "enable_bgp"), "vpnConnectionProtocolType", n.get("protocol"), "vpnSiteLink", object(n.line, "id", n.get("vpn_site_link_id")),
			"usePolicyBasedTrafficSelectors", n.get("policy_based_traffic_selector_enabled"), "useLocalAzureIpAddress", n.get("local_azure_ip_address_enabled"),
			"vpnGatewayCustomBgpAddresses", listOf(n.get("custom_bgp_address"), func(c *node) *node {
				return object(c.line, "ipConfigurationId", c.get("ip_configuration_id"), "customBgpIpAddress", c.get("ip_address"))
			}),
			"ipsecPolicies", listOf(n.get("ipsec_policy"), func(p *node) *node {
				return object(p.line, "dhGroup", p.get("dh_group"), "ikeEncryption", p.get("ike_encryption_algorithm"), "ikeIntegrity", p.get("ike_integrity_algorithm"), "ipsecEncryption", p.get("encryption_algorithm"),
					"ipsecIntegrity", p.get("integrity_algorithm"), "pfsGroup", p.get("pfs_group"), "saDataSizeKilobytes", p.get("sa_data_size_kb"), "saLifeTimeSeconds", p.get("sa_lifetime_sec"))
			}))
	}))
}

func azureSiteState(a *node) *node {
	return object(a.line, "id", a.get("id"), "name", a.get("name"), "vpnSiteLinks", listOf(a.get("link"), func(n *node) *node {
		bgp := n.first("bgp")
		return object(n.line, "id", n.get("id"), "name", n.get("name"), "ipAddress", n.get("ip_address"), "fqdn", n.get("fqdn"), "bgpProperties", object(bgp.line, "asn", bgp.get("asn"), "bgpPeeringAddress", bgp.get("peering_address")))
	}))
}

// Lines of terraform show and terraform state show.
var (
	terraformColor    = regexp.MustCompile("\x1b\\[[0-9;]*m")
	terraformResource = regexp.MustCompile(`(?m)^\s*(resource|data) "([\w-]+)" "[^"\n]+" \{\s*$`)
	terraformBlock    = regexp.MustCompile(`^"?([\w./:-]+)"?(?:\s+"[^"]*")*\s+\{$`)
	terraformField    = regexp.MustCompile(`^"?([^"=]*?)"?\s*=\s*(.*)$`)
)

// sensitiveValue is what a text has in the place of a value that Terraform does not show.
const sensitiveValue = "(sensitive value)"

// parseTerraform reads the text of terraform show or terraform state show into what show -json has.
// It is a reader of lines and not of HCL, because the text is one value a line.
func parseTerraform(data []byte) (*node, error) {
	root := &node{list: true, line: 1}
	type level struct {
		*node
		blocks map[string]*node // a search of the names would be quadratic
	}
	var stack []level
	skip, number, nodes := "", 0, 0
	fail := func(err error) (*node, error) { return nil, fmt.Errorf("line %d: %w", number, err) }
	for raw := range bytes.Lines(data) {
		number++
		line := strings.TrimSpace(string(raw))
		if skip != "" {
			if line == skip {
				skip = ""
			}
			continue
		}
		if nodes++; nodes > maxNodes {
			return fail(errNodes)
		}
		if len(stack) > maxDepth {
			return fail(fmt.Errorf("is nested deeper than %d levels", maxDepth))
		}
		if len(stack) == 0 {
			if m := terraformResource.FindStringSubmatch(line); m != nil {
				values := &node{line: number}
				root.values = append(root.values, object(number, "type", m[2], "values", values))
				stack = append(stack, level{node: values, blocks: map[string]*node{}})
			}
			continue // outputs, comments
		}
		top := stack[len(stack)-1]
		if i := strings.Index(line, " # "); i >= 0 && !strings.Contains(line[i:], `"`) {
			line = strings.TrimSpace(line[:i])
		}
		name, value := "", strings.TrimSuffix(line, ",")
		switch value {
		case "}", "]", "})", "])":
			stack = stack[:len(stack)-1]
			continue
		case "":
			continue
		}
		if strings.HasPrefix(line, "#") || strings.HasPrefix(line, "//") {
			continue
		}
		if !top.list {
			if m := terraformBlock.FindStringSubmatch(line); m != nil {
				block := &node{line: number}
				list := top.blocks[m[1]]
				if list == nil {
					list = top.add(m[1], &node{list: true, line: number})
					top.blocks[m[1]] = list
				}
				list.values = append(list.values, block)
				stack = append(stack, level{node: block, blocks: map[string]*node{}})
				continue
			}
			m := terraformField.FindStringSubmatch(value)
			if m == nil {
				return fail(errors.New("is not a line of terraform show; give terraform show -json"))
			}
			name, value = m[1], m[2]
		}
		v := &node{line: number}
		switch marker, heredoc := strings.CutPrefix(value, "<<"); {
		case heredoc:
			skip = strings.TrimPrefix(marker, "-")
		case value == "{" || value == "[" || value == "jsonencode({" || value == "jsonencode([":
			v.list = strings.HasSuffix(value, "[")
			stack = append(stack, level{node: v, blocks: map[string]*node{}})
		case value == "jsonencode(":
			skip = ")"
		case value == "[]":
			v.list = true
		case strings.HasPrefix(value, `"`):
			if json.Unmarshal([]byte(value), &v.text) != nil {
				return fail(errors.New("has a text without its closing quote"))
			}
		case strings.HasPrefix(value, "("):
			// Only a hidden key is noted; other hidden values are treated as missing.
			if k := norm(name); strings.Contains(k, "key") || strings.Contains(k, "secret") {
				v.text = sensitiveValue
			}
		case value == "null", value == "{}":
		case json.Valid([]byte(value)):
			v.text = value
		default:
			return fail(errors.New("has an expression: this is Terraform's configuration, and its state is needed; give terraform show -json"))
		}
		if top.list {
			top.values = append(top.values, v)
		} else {
			top.add(name, v)
		}
	}
	if len(stack) > 0 || skip != "" {
		return fail(errEnd)
	}
	return root, nil
}

// Types of objects of the clouds' APIs that are read.
var readTypes = map[string]bool{
	"compute#vpngateway": true, "compute#vpntunnel": true, "compute#router": true, "compute#externalvpngateway": true,
	"virtualnetworkgateways": true, "connections": true, "localnetworkgateways": true, "publicipaddresses": true, "vpngateways": true, "vpnconnections": true, "vpnsites": true, "vpnsitelinks": true,
	"vpnlinkconnections": true,
}

// count counts the types of the objects that are not read.
func (d *document) count() {
	d.walk(func(n *node) bool {
		for _, name := range []string{"kind", "type"} {
			text := n.string(name)
			kind := strings.ToLower(text)
			_, azure := strings.CutPrefix(kind, "microsoft.network/")
			if !azure && (!strings.HasPrefix(kind, "compute#") || strings.HasSuffix(kind, "list")) {
				continue
			}
			if azure {
				kind = kind[strings.LastIndexByte(kind, '/')+1:]
			}
			if !readTypes[kind] {
				d.types[text]++
			}
		}
		return true
	})
}

// unread lists the types of objects in the files that are not read, in the order of names.
func unread(docs []document) string {
	all := map[string]bool{}
	for _, d := range docs {
		for kind := range d.types {
			all[kind] = true
		}
	}
	names := slices.Sorted(maps.Keys(all))
	more := ""
	if n := len(names) - 12; n > 0 {
		names, more = names[:12], fmt.Sprintf(" and %d more types", n)
	}
	for i, name := range names {
		names[i] = short(name)
	}
	return strings.Join(names, ", ") + more
}
