package cloud

import (
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/tunnel/apipa"
)

// Sources of the facts.
const (
	ours     = "isthmus"
	rfc7296  = "RFC 7296"
	awsGuide = "https://docs.aws.amazon.com/vpn/latest/s2svpn/"
	awsModel = "EC2 API model 2016-11-15, VpnTunnelOptionsSpecification (github.com/aws/aws-cli, July 2026)"
)

// The default proposals, where the gateway accepts them.
var (
	strongIKE = []string{"aes256gcm16-prfsha384-ecp384"}
	strongESP = []string{"aes256gcm16-ecp384"}
)

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// TransitExportLimit replaces AWS's ExportLimit at a transit gateway.
var TransitExportLimit = Value[uint32]{900, "a transit gateway ends the session above 1000", awsGuide + "vpn-limits.html"}

func aws() Preset {
	lowest := "endpoints take the lowest value that both sides list, whatever comes first: one strong proposal is the way to insist"
	return Preset{
		Name:  "aws",
		Title: "AWS Site-to-Site VPN: virtual private gateway, transit gateway, Cloud WAN",

		IKEProposals:    Value[[]string]{strongIKE, lowest, awsGuide + "VPNTunnels.html"},
		ESPProposals:    Value[[]string]{strongESP, lowest + "; the group is needed, since phase 2 always has one", awsGuide + "VPNTunnels.html"},
		IKERekey:        Value[time.Duration]{7 * time.Hour, "before the gateway's own 8h: accelerated connections never renew by themselves, and lifetimes are not negotiated in IKEv2", awsGuide + "accelerated-vpn.html, " + rfc7296},
		ChildRekey:      Value[time.Duration]{45 * time.Minute, "the gateway renews 51 to 55.5 minutes after the start (1h less a margin of 270s and up to as much again); we do it first", awsModel},
		DPDDelay:        Value[time.Duration]{10 * time.Second, "the gateway gives up a peer that is silent for 30s, and probes every 10s itself", awsModel},
		ReplayWindow:    Value[uint32]{1024, "the gateway's own default", awsModel},
		MTU:             Value[int]{1438, "AES-GCM with NAT traversal, which a router in a cloud always has; other algorithms make it smaller", awsGuide + "your-cgw.html"},
		MSS:             Value[uint16]{1398, "the gateway does no path MTU discovery", awsGuide + "your-cgw.html"},
		HoldTime:        Value[time.Duration]{30 * time.Second, "what every configuration of AWS says", awsGuide + "your-cgw.html"},
		Keepalive:       Value[time.Duration]{10 * time.Second, "a third of the hold time", awsGuide + "your-cgw.html"},
		TTL:             Value[uint8]{1, "the session runs between the two addresses of the /30", awsGuide + "your-cgw.html"},
		Passive:         Value[bool]{false, "both sides open the session", ours},
		MaxPrefixes:     Value[uint32]{5000, "a transit gateway announces at most 5000, a virtual private gateway 1000", awsGuide + "vpn-limits.html"},
		ExportLimit:     Value[uint32]{90, "a virtual private gateway ends the session above 100; imports and topologies give 900 where they know a transit gateway, which ends it above 1000", awsGuide + "vpn-limits.html"},
		IKELifetime:     Value[time.Duration]{8 * time.Hour, "Phase1LifetimeSeconds is 900 to 28800", awsModel},
		ChildLifetime:   Value[time.Duration]{time.Hour, "Phase2LifetimeSeconds is 900 to 3600", awsModel},
		MaxMTU:          Value[int]{1446, "the largest that AWS names, with AES-GCM and without NAT traversal", awsGuide + "your-cgw.html"},
		AddressIdentity: Value[bool]{true, "with a pre-shared key the customer gateway is known by its address", awsGuide + "cgw-options.html"},
		MostAnnounced:   Value[uint32]{1000, "a transit gateway closes the session with Cease above 1000, a virtual private gateway above 100", awsGuide + "vpn-limits.html"},
		IKE: Value[Algorithms]{Algorithms{
			Encryption: []string{"aes256gcm16", "aes128gcm16", "aes256", "aes128"},
			Integrity:  []string{"sha384", "sha512", "sha256", "sha1"},
			Groups:     []string{"ecp384", "ecp521", "ecp256", "modp4096", "modp3072", "modp2048", "modp6144", "modp8192", "modp2048s256", "modp2048s224", "modp1024s160", "modp1024"},
		}, "Phase1EncryptionAlgorithms, Phase1IntegrityAlgorithms and Phase1DHGroupNumbers", awsModel},
		ESP: Value[Algorithms]{Algorithms{
			Encryption: []string{"aes256gcm16", "aes128gcm16", "aes256", "aes128"},
			Integrity:  []string{"sha384", "sha512", "sha256", "sha1"},
			Groups:     []string{"ecp384", "ecp521", "ecp256", "modp4096", "modp3072", "modp2048", "modp6144", "modp8192", "modp2048s256", "modp2048s224", "modp1024s160", "modp1536", "modp1024"},
			PFS:        true,
		}, "Phase2EncryptionAlgorithms, Phase2IntegrityAlgorithms and Phase2DHGroupNumbers", awsModel},
		Inside: Value[apipa.Rule]{apipa.Rule{
			From:   []netip.Prefix{apipa.Range},
			Within: []netip.Prefix{apipa.LinkLocal}, Only: true,
			Reserved:  prefixes("169.254.0.0/30", "169.254.1.0/30", "169.254.2.0/30", "169.254.3.0/30", "169.254.4.0/30", "169.254.5.0/30", "169.254.169.252/30"),
			Bits:      []int{30, 32},
			PeerFirst: true,
		}, "TunnelInsideCidr is a /30 of 169.254.0.0/16 without these", awsModel},
		RouterASN:  Value[ASNs]{asns(7224, 9059, 10124, 17943), "AWS uses these itself", awsGuide + "cgw-options.html"},
		GatewayASN: Value[ASNs]{append(asns(7224, 9059, 10124, 17943), privateASNs...), "AmazonSideAsn is a private number, 64512 by default; old gateways have one of AWS's own", awsModel},
		AddressAt:  Value[string]{"IP address of the customer gateway", "the endpoints send there and know the node by it; another address needs a new customer gateway", awsGuide + "cgw-options.html"},
		KeyAt:      Value[string]{"pre-shared key in the options of that VPN tunnel", "each of the two tunnels has its own", awsModel},
		PolicyAt:   Value[string]{"phase 1 and phase 2 algorithms in the options of that VPN tunnel", "whatever is not listed there is refused", awsModel},
		Calls:      Value[string]{"only with the startup action Start", "by default it is Add, and the gateway waits for this node", awsGuide + "initiate-vpn-tunnels.html"},
		Advice: []Value[string]{
			{"DPDTimeoutAction=restart, StartupAction=add", "the gateway then waits for this node, which keeps trying, and keeps the tunnel when a probe was lost", awsGuide + "initiate-vpn-tunnels.html"},
			{"a gateway ASN of its own for each gateway", "they all default to 64512, and a prefix from one is a loop to the other; or set asOverride on the peers", "RFC 4271 section 9.1.2"},
			{"equal preference for both tunnels", "AWS announces maintenance by a lower MED on the other tunnel", awsGuide + "VPNRoutingTypes.html"},
			{"export.maxPrefixes 900 on the peers of a transit gateway; aggregates in announce for a virtual private gateway", "they take 1000 and 100 prefixes, and what exceeds export.maxPrefixes is held back, the node's own announcements last", awsGuide + "vpn-limits.html"},
		},
	}
}
