package topology

import (
	"fmt"
	"strconv"
	"strings"
)

// The suite that the presets of tunnel/cloud use, aes256gcm16-prfsha384-ecp384 with PFS, in AWS's
// terms (EC2 API model, VpnTunnelOptionsSpecification).
const (
	awsCipher    = "AES256-GCM-16"
	awsIntegrity = "SHA2-384"
	awsGroup     = 20
)

// awsConnection is a VPN connection of AWS: one customer gateway, two tunnels.
type awsConnection struct {
	name, customer string
	peer           End
	tunnels        []seen
	shared         bool // the customer gateway is that of an earlier connection
}

// awsConnections returns the connections of a gateway. customers has the customer gateways already
// written: AWS allows one for each address and ASN in a region.
func (s *side) awsConnections(g Gateway) (out []awsConnection) {
	for _, tu := range s.of(g) {
		name := tu.Name[:strings.LastIndex(tu.Name, "-")]
		if len(out) == 0 || out[len(out)-1].name != name {
			out = append(out, awsConnection{name: name, peer: tu.peer})
		}
		c := &out[len(out)-1]
		c.tunnels = append(c.tunnels, tu)
	}
	for i := range out {
		out[i].customer, out[i].shared = s.awsCustomer(g, out[i])
	}
	return out
}

// awsCustomer returns the name of the connection whose customer gateway another one shares.
func (s *side) awsCustomer(g Gateway, c awsConnection) (name string, shared bool) {
	for _, other := range s.t.Gateways {
		if other.Cloud != "aws" || other.Region != g.Region {
			continue
		}
		for _, tu := range s.of(other) {
			if tu.peer.Name == c.peer.Name && tu.peer.Instance == c.peer.Instance {
				name = tu.Name[:strings.LastIndex(tu.Name, "-")]
				return name, name != c.name
			}
		}
	}
	return c.name, false
}

// awsStart returns the startup action of a tunnel. A node keeps trying, but a gateway of another
// cloud may wait for AWS.
func awsStart(peer End) string {
	if peer.Cloud == "" {
		return "add"
	}
	return "start"
}

// awsASN returns the option for an ASN: above 2147483647 it is a different one (EC2 API,
// CreateCustomerGateway).
func awsASN(asn uint32, plain, extended string) (name, value string) {
	if asn > 1<<31-1 {
		plain = extended
	}
	return plain, strconv.FormatUint(uint64(asn), 10)
}

func transit(g Gateway) bool { return strings.HasPrefix(g.Network, "tgw-") }

// awsCheck stops if a gateway has another ASN: the gateway exists, and its ASN cannot be changed.
func (s *side) awsCheck(g Gateway) {
	s.line("")
	s.line("# Gateway %s, %s in %s.", g.Name, g.Network, g.Region)
	if transit(g) {
		s.command(lower(g.Name)+"_asn", "aws ec2 describe-transit-gateways", "--region "+g.Region, "--transit-gateway-ids "+g.Network,
			"--query 'TransitGateways[0].Options.AmazonSideAsn'", "--output text")
	} else {
		s.command(lower(g.Name)+"_asn", "aws ec2 describe-vpn-gateways", "--region "+g.Region, "--vpn-gateway-ids "+g.Network,
			"--query 'VpnGateways[0].AmazonSideAsn'", "--output text")
	}
	s.line(`test "$%s_asn" = %d`, lower(g.Name), g.ASN)
}

func (s *side) awsCLI(g Gateway) {
	if s.gateways {
		s.awsCheck(g)
	}
	if !s.tunnels {
		return
	}
	for _, c := range s.awsConnections(g) {
		s.line("")
		s.line("# Connection %s with %s.", c.name, c.peer.Name)
		if !c.shared {
			option, asn := awsASN(c.peer.ASN, "--bgp-asn", "--bgp-asn-extended")
			s.command(lower(c.customer)+"_cgw", "aws ec2 create-customer-gateway", "--region "+g.Region, "--type ipsec.1",
				"--ip-address "+shellAddress(c.peer.Outside), option+" "+asn,
				fmt.Sprintf("--tag-specifications 'ResourceType=customer-gateway,Tags=[{Key=Name,Value=%s}]'", c.customer),
				"--query CustomerGateway.CustomerGatewayId", "--output text")
		}
		gateway := "--vpn-gateway-id "
		if transit(g) {
			gateway = "--transit-gateway-id "
		}
		vpn := lower(c.name) + "_vpn"
		// Keys go through standard input, because other users can see the arguments of a command.
		s.line(`%s=$(aws ec2 create-vpn-connection \`, vpn)
		s.line("  --region %s --type ipsec.1 \\", g.Region)
		s.line(`  --customer-gateway-id "$%s_cgw" %s%s \`, lower(c.customer), gateway, g.Network)
		s.line("  --tag-specifications 'ResourceType=vpn-connection,Tags=[{Key=Name,Value=%s}]' \\", c.name)
		s.line("  --query VpnConnection.VpnConnectionId --output text \\")
		s.line("  --options file:///dev/stdin <<OPTIONS")
		s.line(`{"StaticRoutesOnly": false, "TunnelOptions": [`)
		for i, tu := range c.tunnels {
			comma := ","
			if i == len(c.tunnels)-1 {
				comma = "]}"
			}
			list := func(v any) string {
				if text, ok := v.(string); ok {
					return fmt.Sprintf(`[{"Value": %q}]`, text)
				}
				return fmt.Sprintf(`[{"Value": %d}]`, v)
			}
			s.line(`  {"TunnelInsideCidr": "%s", "PreSharedKey": "$%s",`, tu.own.Inside.Masked(), s.t.key(tu.Key).Environment)
			s.line(`   "IKEVersions": %s,`, list("ikev2"))
			s.line(`   "Phase1EncryptionAlgorithms": %s, "Phase1IntegrityAlgorithms": %s, "Phase1DHGroupNumbers": %s,`, list(awsCipher), list(awsIntegrity), list(awsGroup))
			s.line(`   "Phase2EncryptionAlgorithms": %s, "Phase2IntegrityAlgorithms": %s, "Phase2DHGroupNumbers": %s,`, list(awsCipher), list(awsIntegrity), list(awsGroup))
			s.line(`   "StartupAction": %q, "DPDTimeoutAction": "restart"}%s`, awsStart(tu.peer), comma)
		}
		s.line("OPTIONS")
		s.line(")")
		s.command("", "aws ec2 wait vpn-connection-available", "--region "+g.Region, fmt.Sprintf(`--vpn-connection-ids "$%s"`, vpn))
		for _, tu := range c.tunnels {
			s.command(tu.own.Outside.Name, "aws ec2 describe-vpn-connections", "--region "+g.Region, fmt.Sprintf(`--vpn-connection-ids "$%s"`, vpn),
				fmt.Sprintf(`--query "VpnConnections[0].Options.TunnelOptions[?TunnelInsideCidr=='%s'].OutsideIpAddress | [0]"`, tu.own.Inside.Masked()), "--output text")
			s.own = append(s.own, [2]string{tu.own.Outside.Name})
		}
	}
}

func (s *side) awsTerraform(g Gateway) {
	kind, asn, attribute := "aws_vpn_gateway", "tonumber(self.amazon_side_asn)", "vpn_gateway_id"
	if transit(g) {
		kind, asn, attribute = "aws_ec2_transit_gateway", "self.amazon_side_asn", "transit_gateway_id"
	}
	if s.gateways {
		s.line("")
		s.line("# Gateway %s, in %s: the provider must be configured for this region.", g.Name, g.Region)
		s.block(fmt.Sprintf("data %q %q", kind, lower(g.Name)), func() {
			s.attr("id", quote(g.Network))
			s.block("lifecycle", func() {
				s.block("postcondition", func() {
					s.attr("condition", fmt.Sprintf("%s == %d", asn, g.ASN))
					s.attr("error_message", quote(fmt.Sprintf("AmazonSideAsn of %s must be %d, as the topology says.", g.Network, g.ASN)))
				})
			})
		})
	}
	if !s.tunnels {
		return
	}
	for _, c := range s.awsConnections(g) {
		if !c.shared {
			s.resource("aws_customer_gateway", lower(c.customer), func() {
				s.attr(awsASN(c.peer.ASN, "bgp_asn", "bgp_asn_extended"))
				s.attr("ip_address", hclAddress(c.peer.Outside))
				s.attr("type", quote("ipsec.1"))
				s.attr("tags", fmt.Sprintf("{ Name = %s }", quote(c.customer)))
			})
		}
		s.resource("aws_vpn_connection", lower(c.name), func() {
			s.attr("customer_gateway_id", "aws_customer_gateway."+lower(c.customer)+".id")
			s.attr(attribute, "data."+kind+"."+lower(g.Name)+".id")
			s.attr("type", quote("ipsec.1"))
			s.attr("static_routes_only", "false")
			for i, tu := range c.tunnels {
				p := fmt.Sprintf("tunnel%d_", i+1)
				s.attr(p+"inside_cidr", quote(tu.own.Inside.Masked().String()))
				s.attr(p+"preshared_key", hclKey(tu.Key))
				s.attr(p+"ike_versions", quotes("ikev2"))
				for _, phase := range []string{"phase1_", "phase2_"} {
					s.attr(p+phase+"encryption_algorithms", quotes(awsCipher))
					s.attr(p+phase+"integrity_algorithms", quotes(awsIntegrity))
					s.attr(p+phase+"dh_group_numbers", fmt.Sprintf("[%d]", awsGroup))
				}
				s.attr(p+"startup_action", quote(awsStart(tu.peer)))
				s.attr(p+"dpd_timeout_action", quote("restart"))
			}
			s.attr("tags", fmt.Sprintf("{ Name = %s }", quote(c.name)))
		})
		for i, tu := range c.tunnels {
			// The provider identifies the two tunnels by their inside_cidr.
			s.own = append(s.own, [2]string{tu.own.Outside.Name, fmt.Sprintf("aws_vpn_connection.%s.tunnel%d_address", lower(c.name), i+1)})
		}
	}
}
