package cloud

import (
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/tunnel/apipa"
)

const (
	ociParameters = "https://docs.oracle.com/iaas/Content/Network/Reference/supportedIPsecparams.htm"
	ociVPN        = "https://docs.oracle.com/iaas/Content/Network/Tasks/"
)

func oci() Preset {
	groups := []string{"ecp384", "ecp256", "modp2048", "modp1536", "modp1024"}
	return Preset{
		Name:  "oci",
		Title: "Oracle Cloud Infrastructure Site-to-Site VPN",

		IKEProposals:  Value[[]string]{[]string{"aes256-sha384-ecp384"}, "what Oracle recommends; one proposal fits into one packet", ociParameters},
		ESPProposals:  Value[[]string]{[]string{"aes256gcm16-ecp384", "aes256gcm16-modp1536"}, "the cipher that Oracle recommends, with the strongest group and its default", ociParameters},
		IKERekey:      Value[time.Duration]{7 * time.Hour, "before the gateway's own 8h", ociParameters},
		ChildRekey:    Value[time.Duration]{45 * time.Minute, "before the gateway's own 1h", ociParameters},
		DPDDelay:      Value[time.Duration]{10 * time.Second, "finds a dead tunnel long before BGP does", ours},
		ReplayWindow:  Value[uint32]{1024, "the gateway's own size is not published", ours},
		MTU:           Value[int]{1420, "what Oracle's configurations have, when the algorithms leave as much", ociVPN},
		MSS:           Value[uint16]{1380, "the MTU less 40", ociVPN},
		HoldTime:      Value[time.Duration]{180 * time.Second, "the gateway's own", ociVPN},
		Keepalive:     Value[time.Duration]{60 * time.Second, "the gateway's own", ociVPN},
		TTL:           Value[uint8]{1, "the session runs between the two addresses of the /30 or /31", ociVPN},
		Passive:       Value[bool]{false, "both sides open the session", ours},
		MaxPrefixes:   Value[uint32]{1000, "as to any other peer; Oracle publishes no figure", ours},
		IKELifetime:   Value[time.Duration]{8 * time.Hour, "28800s by default", ociParameters},
		ChildLifetime: Value[time.Duration]{time.Hour, "3600s by default", ociParameters},
		IKE: Value[Algorithms]{Algorithms{
			Encryption: []string{"aes256", "aes192", "aes128"},
			Integrity:  []string{"sha384", "sha256", "sha1"},
			Groups:     groups,
		}, "phase 1; a custom one must be matched exactly", ociParameters},
		ESP: Value[Algorithms]{Algorithms{
			Encryption: []string{"aes256gcm16", "aes192gcm16", "aes128gcm16", "aes256", "aes192", "aes128"},
			Integrity:  []string{"sha256", "sha1"},
			Groups:     groups,
		}, "phase 2; PFS is on by default, with group 5", ociParameters},
		Inside: Value[apipa.Rule]{apipa.Rule{
			From: []netip.Prefix{apipa.Range},
			Reserved: prefixes("169.254.10.0/23", "169.254.12.0/22", "169.254.16.0/22", "169.254.100.0/22", "169.254.104.0/22", "169.254.108.0/23",
				"169.254.192.0/21", "169.254.200.0/23"),
			Bits: []int{30, 31},
		}, "both ends of a /30 or /31 are chosen here; Oracle does not take 169.254.10.0-19.255, 100.0-109.255 and 192.0-201.255", ociVPN + "vpn_to_aws.htm"},
		GatewayASN: Value[ASNs]{asns(6142, 14544, 20054, 31898), "31898 in commercial regions, 14544 in Jovanovac, 6142 and 20054 in government ones", ociVPN},
		AddressAt:  Value[string]{"IP address of the CPE, and CPE IKE identifier of the IPSec connection", "the identifier is the CPE's address unless another is set", ociVPN},
		KeyAt:      Value[string]{"shared secret of the tunnel", "each of the two tunnels has its own", ociVPN},
		PolicyAt:   Value[string]{"phase one and phase two configuration of the tunnel", "a custom phase 1 must be matched exactly", ociParameters},
		Advice: []Value[string]{
			{"the CPE's IKE identifier is this node's public address", "Oracle takes nothing else for it", ociVPN},
			{"custom phase 1: AES_256_CBC, SHA2_384, GROUP20; phase 2 group GROUP20", "Oracle's default list is fragmented by IP", ociParameters},
		},
	}
}
