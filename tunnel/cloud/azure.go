package cloud

import (
	"time"

	"github.com/isthmus-net/isthmus/tunnel/apipa"
)

const (
	azureFAQ     = "https://learn.microsoft.com/azure/vpn-gateway/vpn-gateway-vpn-faq"
	azureDevices = "https://learn.microsoft.com/azure/vpn-gateway/vpn-gateway-about-vpn-devices"
	azureAPIPA   = "https://learn.microsoft.com/azure/vpn-gateway/vpn-gateway-howto-aws-bgp"
	azureLab     = "github.com/mddazure/vpn-bgp-apipa"
	azureEcho    = "https://github.com/MicrosoftDocs/azure-docs/issues/118269"
	vwanFile     = "https://learn.microsoft.com/azure/virtual-wan/virtual-wan-site-to-site-portal"
	vwanIPsec    = "https://learn.microsoft.com/azure/virtual-wan/virtual-wan-ipsec"
)

func azure() Preset {
	custom := "insists on a custom policy: the default ones have group 2 only and no PFS; a custom policy replaces them in both roles"
	return Preset{
		Name:  "azure",
		Title: "Azure VPN Gateway, route-based",

		IKEProposals:    Value[[]string]{strongIKE, custom, azureFAQ},
		ESPProposals:    Value[[]string]{strongESP, custom + "; to a policy with PFS None give aes256gcm16, since a group then fails at the first renewal", azureDevices},
		IKERekey:        Value[time.Duration]{7 * time.Hour, "before the gateway's own 8h, which is fixed", azureFAQ},
		ChildRekey:      Value[time.Duration]{6 * time.Hour, "before the gateway's 27000s; lifetimes need not match", azureFAQ},
		ChildRekeyBytes: Value[uint64]{90_000_000_000, "before the gateway's 102400000 KB, which is 11 minutes at 1.25 Gbit/s", azureFAQ},
		DPDDelay:        Value[time.Duration]{10 * time.Second, "the gateway gives up a peer after 45s", azureFAQ},
		ReplayWindow:    Value[uint32]{1024, "the gateway's own size is not published", ours},
		MTU:             Value[int]{1400, "one of the two limits that Azure demands", azureDevices},
		MSS:             Value[uint16]{1350, "one of the two limits that Azure demands", azureDevices},
		HoldTime:        Value[time.Duration]{180 * time.Second, "fixed on the gateway", azureFAQ},
		Keepalive:       Value[time.Duration]{60 * time.Second, "fixed on the gateway", azureFAQ},
		TTL:             Value[uint8]{255, "the gateway's instance is not at the other end of a /30: multihop is needed", azureLab},
		Passive:         Value[bool]{false, "with link-local addresses the gateway never opens the session", azureFAQ},
		MaxPrefixes:     Value[uint32]{4000, "what the gateway sends is not published; the same as it takes", azureFAQ},
		ExportLimit:     Value[uint32]{3600, "the gateway ends the session above 4000", azureFAQ},
		IKE: Value[Algorithms]{Algorithms{
			Encryption: []string{"aes256gcm16", "aes128gcm16", "aes256", "aes192", "aes128", "3des"},
			Integrity:  []string{"sha384", "sha256", "sha1", "md5"},
			Groups:     []string{"ecp384", "ecp256", "modp2048", "modp2048s256", "modp1024", "modp768"},
		}, "what a custom policy can have", azureFAQ},
		ESP: Value[Algorithms]{Algorithms{
			Encryption: []string{"aes256gcm16", "aes192gcm16", "aes128gcm16", "aes256", "aes192", "aes128", "3des"},
			Integrity:  []string{"sha256", "sha1", "md5"},
			Groups:     []string{"ecp384", "ecp256", "modp2048", "modp2048s256", "modp1024", "modp768"},
		}, "what a custom policy can have; PFS may be None", azureFAQ},
		IKELifetime:   Value[time.Duration]{8 * time.Hour, "28800s, fixed", azureFAQ},
		ChildLifetime: Value[time.Duration]{172799 * time.Second, "the longest of a custom policy, 27000s by default", "https://registry.terraform.io/providers/hashicorp/azurerm/latest/docs/resources/virtual_network_gateway_connection"},
		FixedHoldTime: Value[time.Duration]{180 * time.Second, "keepalive 60s and hold time 180s cannot be changed, and peers must have the same", azureFAQ},
		NeverOpensBGP: Value[bool]{true, "the gateway opens sessions only from its private address", azureFAQ},
		Silent:        Value[bool]{true, "the gateway does not answer echo requests at its own addresses", azureEcho},
		MostAnnounced: Value[uint32]{4000, "the gateway closes the session above", azureFAQ},
		Inside: Value[apipa.Rule]{apipa.Rule{
			From:   prefixes("169.254.21.0/24", "169.254.22.0/24"),
			Within: prefixes("169.254.21.0/24", "169.254.22.0/24"),
			Bits:   []int{32, 31, 30},
			Single: true,
		}, "link-local addresses only from 169.254.21.0 to 169.254.22.255; the local network gateway has one BGP address, which both instances use", azureAPIPA},
		RouterASN: Value[ASNs]{
			append(asns(8074, 8075, 12076, 23456, 65515), ASNs{{64496, 64511}, {65517, 65520}, {65535, 65551}}...),
			"reserved by Azure and IANA", azureFAQ,
		},
		GatewayASN: Value[ASNs]{
			// All ASNs that are not reserved: 65515 is the default.
			ASNs{{1, 8073}, {8076, 12075}, {12077, 23455}, {23457, 64495}, {64512, 65516}, {65521, 65534}, {65552, 4294967294}},
			"65515 by default, and any that is not reserved", azureFAQ,
		},
		AddressAt: Value[string]{"IP address of the local network gateway", "the instances send there", azureFAQ},
		KeyAt:     Value[string]{"shared key of the connection", "both instances have the same", azureFAQ},
		PolicyAt:  Value[string]{"IPsec / IKE policy of the connection", "a custom one is exactly one combination", azureFAQ},
		Calls:     Value[string]{"from each instance, unless the connection mode is ResponderOnly", "the mode is Default otherwise, in which both sides begin", "https://registry.terraform.io/providers/hashicorp/azurerm/latest/docs/resources/virtual_network_gateway_connection"},
		Advice: []Value[string]{
			{"az network vpn-connection ipsec-policy add --ike-encryption GCMAES256 --ike-integrity SHA384 --dh-group ECP384 --ipsec-encryption GCMAES256 --ipsec-integrity GCMAES256 --pfs-group ECP384 --sa-lifetime 27000 --sa-max-size 102400000", "the custom policy that fits the proposals", azureFAQ},
			{"name the custom BGP address of each instance on every connection (gatewayCustomBgpIpAddresses)", "else all connections use the first", azureAPIPA},
			{"never put this node's BGP address into the address space of the local network gateway", "Azure adds its host route itself", azureFAQ},
		},
	}
}

func azureVWAN() Preset {
	p := azure()
	p.Name, p.Title = "azure-vwan", "Azure Virtual WAN, VPN site"
	p.ChildRekey = Value[time.Duration]{45 * time.Minute, "before the 3600s of the site file", vwanFile}
	p.ESPProposals.Source, p.IKEProposals.Source = vwanIPsec, vwanIPsec
	p.GatewayASN = Value[ASNs]{asns(65515), "hubs have 65515, always", vwanFile}
	p.AddressAt = Value[string]{"IP address of the link of the VPN site", "the instances send there", vwanFile}
	p.KeyAt.Source, p.KeyAt.Is = vwanFile, "PSK of the VPN connection"
	p.PolicyAt.Source, p.PolicyAt.Is = vwanIPsec, "IPsec policy of the link's VPN connection"
	p.Advice = []Value[string]{
		{"a custom policy on each link: GCMAES256, SHA384, ECP384, GCMAES256, ECP384, 3600s, 102400000 KB", "the default policies have group 2 only and no PFS", vwanIPsec},
		{"asOverride on the peers when two hubs are to reach each other through this node", "all hubs have 65515, and a prefix from one is a loop to the other", "RFC 4271 section 9.1.2"},
	}
	return p
}
