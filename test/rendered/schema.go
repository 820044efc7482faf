package rendered

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// schema lists the arguments of an object or a command: true when it is required. "block" arguments
// are blocks of Terraform with a schema of their own.
type schema struct {
	args   map[string]bool
	blocks map[string]schema
}

// has makes a schema of required arguments and, after "|", optional ones.
func has(list string) schema {
	s := schema{args: map[string]bool{}}
	required, optional, _ := strings.Cut(list, "|")
	for _, name := range strings.Fields(required) {
		s.args[name] = true
	}
	for _, name := range strings.Fields(optional) {
		s.args[name] = false
	}
	return s
}

func (s schema) with(name string, block schema) schema {
	s.blocks = maps.Clone(s.blocks)
	if s.blocks == nil {
		s.blocks = map[string]schema{}
	}
	s.blocks[name] = block
	return s
}

// check compares the names of the arguments that an object has.
func (s schema) check(where string, given []string) error {
	for _, name := range given {
		if _, ok := s.args[name]; !ok {
			return fmt.Errorf("%s has no argument %s", where, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.args)) {
		if s.args[name] && !slices.Contains(given, name) {
			return fmt.Errorf("%s lacks %s", where, name)
		}
	}
	return nil
}

// tunnelArgs are the arguments of aws_vpn_connection for one tunnel. All are optional there; some
// are required here, since without them AWS chooses weaker algorithms or an address of its own.
func tunnelArgs() (out string) {
	for _, n := range []string{"tunnel1_", "tunnel2_"} {
		for _, a := range strings.Fields("inside_cidr preshared_key ike_versions startup_action dpd_timeout_action phase1_encryption_algorithms phase1_integrity_algorithms phase1_dh_group_numbers phase2_encryption_algorithms phase2_integrity_algorithms phase2_dh_group_numbers") {
			out += " " + n + a
		}
	}
	return out
}

// terraform has the arguments of the providers' objects that are rendered. Their documentation is
// in website/docs/r of:
//
//	terraform-provider-aws      customer_gateway, vpn_connection (.html.markdown)
//	terraform-provider-azurerm  public_ip, virtual_network_gateway, local_network_gateway,
//	                            virtual_network_gateway_connection (.html.markdown)
//	terraform-provider-google   compute_ha_vpn_gateway, compute_router,
//	                            compute_external_vpn_gateway, compute_vpn_tunnel,
//	                            compute_router_interface, compute_router_peer (.html.markdown)
//
// All are repositories of hashicorp.
var terraform = map[string]schema{
	"variable": has("type | description sensitive default"),
	"output":   has("value | sensitive description"),

	"data aws_ec2_transit_gateway":  has("id").with("lifecycle", schema{}.with("postcondition", has("condition error_message"))),
	"data aws_vpn_gateway":          has("id").with("lifecycle", schema{}.with("postcondition", has("condition error_message"))),
	"resource aws_customer_gateway": has("type ip_address | bgp_asn bgp_asn_extended device_name certificate_arn tags"),
	"resource aws_vpn_connection": has("customer_gateway_id type" + tunnelArgs() + " | transit_gateway_id vpn_gateway_id static_routes_only enable_acceleration tags " +
		"local_ipv4_network_cidr remote_ipv4_network_cidr outside_ip_address_type tunnel_inside_ip_version"),

	"data azurerm_subnet":        has("name virtual_network_name resource_group_name"),
	"resource azurerm_public_ip": has("name resource_group_name location allocation_method | sku zones tags"),
	"resource azurerm_virtual_network_gateway": has("name resource_group_name location type sku | vpn_type active_active bgp_enabled generation tags").
		with("ip_configuration", has("name subnet_id public_ip_address_id | private_ip_address_allocation")).
		with("bgp_settings", has("asn | peer_weight").with("peering_addresses", has("ip_configuration_name apipa_addresses"))),
	"resource azurerm_local_network_gateway": has("name resource_group_name location gateway_address | gateway_fqdn address_space tags").
		with("bgp_settings", has("asn bgp_peering_address | peer_weight")),
	"resource azurerm_virtual_network_gateway_connection": has("name resource_group_name location type virtual_network_gateway_id local_network_gateway_id shared_key bgp_enabled | "+
		"connection_protocol connection_mode dpd_timeout_seconds routing_weight tags use_policy_based_traffic_selectors").
		with("custom_bgp_addresses", has("primary secondary")).
		with("ipsec_policy", has("dh_group ike_encryption ike_integrity ipsec_encryption ipsec_integrity pfs_group | sa_datasize sa_lifetime")),

	"resource google_compute_ha_vpn_gateway":       has("name network | region description stack_type project"),
	"resource google_compute_router":               has("name network | region description project").with("bgp", has("asn | advertise_mode advertised_groups keepalive_interval")),
	"resource google_compute_external_vpn_gateway": has("name redundancy_type | description labels project").with("interface", has("id ip_address")),
	"resource google_compute_vpn_tunnel": has("name shared_secret vpn_gateway vpn_gateway_interface peer_external_gateway peer_external_gateway_interface router | ike_version region description project labels").
		with("cipher_suite", schema{}.with("phase1", has("encryption integrity prf dh")).with("phase2", has("encryption integrity pfs"))),
	"resource google_compute_router_interface": has("name router ip_range vpn_tunnel | region project"),
	"resource google_compute_router_peer":      has("name router interface peer_ip_address peer_asn | region advertised_route_priority advertise_mode project ip_address"),
}

// commands has the options of the commands that are rendered: the EC2 API model and `aws ec2 ...
// help`; `az network ... --help` and Microsoft's how-to guides;
// cloud.google.com/sdk/gcloud/reference/compute/... Arguments without a name count as "NAME".
var commands = map[string]schema{
	"set": has("NAME"), ":": has("NAME"), "test": has("NAME"), "echo": has("NAME"), "cat": has("NAME"),

	"aws ec2 describe-transit-gateways":  has("--transit-gateway-ids | --region --query --output"),
	"aws ec2 describe-vpn-gateways":      has("--vpn-gateway-ids | --region --query --output"),
	"aws ec2 create-customer-gateway":    has("--type --ip-address | --bgp-asn --bgp-asn-extended --tag-specifications --region --query --output"),
	"aws ec2 create-vpn-connection":      has("--type --customer-gateway-id --options | --transit-gateway-id --vpn-gateway-id --tag-specifications --region --query --output"),
	"aws ec2 wait":                       has("NAME --vpn-connection-ids | --region"),
	"aws ec2 describe-vpn-connections":   has("--vpn-connection-ids | --region --query --output"),
	"az network public-ip create":        has("--resource-group --name | --location --sku --allocation-method"),
	"az network public-ip show":          has("--resource-group --name | --query --output"),
	"az network vnet-gateway create":     has("--resource-group --name --vnet --public-ip-addresses | --location --gateway-type --vpn-type --sku --asn"),
	"az network vnet-gateway update":     has("--resource-group --name --set"),
	"az network vnet-gateway show":       has("--resource-group --name | --query --output"),
	"az network local-gateway create":    has("--resource-group --name --gateway-ip-address | --location --asn --bgp-peering-address"),
	"az network vpn-connection create":   has("--resource-group --name --vnet-gateway1 --local-gateway2 | --location --shared-key --enable-bgp"),
	"az network vpn-connection show":     has("--resource-group --name | --query --output"),
	"az resource update":                 has("--ids --set | --api-version"),
	"gcloud compute vpn-gateways create": has("NAME --network --region"),
	"gcloud compute routers create":      has("NAME --network --region --asn"),

	"az network vpn-connection ipsec-policy add":  has("--resource-group --connection-name --ike-encryption --ike-integrity --dh-group --ipsec-encryption --ipsec-integrity --pfs-group --sa-lifetime --sa-max-size"),
	"gcloud compute vpn-gateways describe":        has("NAME --region | --format"),
	"gcloud compute external-vpn-gateways create": has("NAME --interfaces"),
	"gcloud compute vpn-tunnels create":           has("NAME --flags-file --vpn-gateway --interface --peer-external-gateway --peer-external-gateway-interface --router --region | --ike-version --phase1-encryption --phase1-prf --phase1-dh --phase1-integrity --phase2-encryption --phase2-pfs --phase2-integrity"),
	"gcloud compute routers add-interface":        has("NAME --interface-name --vpn-tunnel --ip-address --mask-length --region"),
	"gcloud compute routers add-bgp-peer":         has("NAME --peer-name --interface --peer-ip-address --peer-asn --region | --advertised-route-priority"),
}
