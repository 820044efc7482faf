package cloud

import (
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/tunnel/apipa"
)

const (
	gcpVPN     = "https://cloud.google.com/network-connectivity/docs/vpn/"
	gcpCiphers = gcpVPN + "concepts/supported-ike-ciphers"
	gcpRouter  = "https://cloud.google.com/network-connectivity/docs/router/"
)

func gcp() Preset {
	one := "one cipher for each role: the gateway picks by its own order, so that a longer list can change cipher on renewal, and a long one is fragmented by IP, which it drops"
	groups := []string{"ecp384", "ecp521", "ecp256", "curve25519", "modp4096", "modp3072", "modp2048", "modp8192", "modp2048s224", "modp2048s256", "modp1536", "modp1024", "modp1024s160"}
	return Preset{
		Name:  "gcp",
		Title: "Google Cloud HA VPN with Cloud Router",

		IKEProposals:    Value[[]string]{strongIKE, one, gcpCiphers},
		ESPProposals:    Value[[]string]{strongESP, one + "; PFS is required", gcpCiphers},
		IKERekey:        Value[time.Duration]{8 * time.Hour, "before the gateway's own 36000s", gcpCiphers},
		ChildRekey:      Value[time.Duration]{2 * time.Hour, "before the gateway's own 10800s; a peer that deletes first drops packets", gcpCiphers},
		DPDDelay:        Value[time.Duration]{10 * time.Second, "on at the gateway, and cannot be set there", ours},
		ReplayWindow:    Value[uint32]{1024, "the gateway's own size is not published", ours},
		MTU:             Value[int]{1390, "encrypted packets have at most 1460 bytes: 1398 with AES-GCM and NAT traversal", gcpVPN + "concepts/mtu-considerations"},
		MSS:             Value[uint16]{1350, "the MTU less 40", gcpVPN + "concepts/mtu-considerations"},
		HoldTime:        Value[time.Duration]{60 * time.Second, "three times Cloud Router's keepalive; the lower hold time of both sides holds", gcpRouter},
		Keepalive:       Value[time.Duration]{20 * time.Second, "Cloud Router's default", gcpRouter},
		TTL:             Value[uint8]{1, "the session runs between the two addresses of the /30", gcpRouter},
		Passive:         Value[bool]{false, "both sides open the session", ours},
		MaxPrefixes:     Value[uint32]{5000, "subnets are announced without a limit, custom ranges up to 200", gcpRouter + "quotas"},
		ExportLimit:     Value[uint32]{4500, "Cloud Router resets the session above 5000", gcpRouter + "quotas"},
		Silent:          Value[bool]{true, "whether Cloud Router answers echo requests at its inside address is not published", gcpRouter},
		IKELifetime:     Value[time.Duration]{36000 * time.Second, "of the gateway, not configurable", gcpCiphers},
		ChildLifetime:   Value[time.Duration]{10800 * time.Second, "of the gateway, not configurable", gcpCiphers},
		AddressIdentity: Value[bool]{true, "the peer must present its public address", gcpVPN + "concepts/advanced"},
		MostAnnounced:   Value[uint32]{5000, "Cloud Router resets the session above, and drops prefixes above the quota of the region", gcpRouter + "quotas"},
		IKE: Value[Algorithms]{Algorithms{
			Encryption: []string{"aes256gcm16", "aes192gcm16", "aes128gcm16", "aes256", "aes192", "aes128", "3des"},
			Integrity:  []string{"sha384", "sha512", "sha256", "aescmac", "aesxcbc", "sha1", "md5"},
			Groups:     groups,
		}, "of IKEv2", gcpCiphers},
		ESP: Value[Algorithms]{Algorithms{
			Encryption: []string{"aes256gcm16", "aes192gcm16", "aes128gcm16", "aes256", "aes192", "aes128"},
			Integrity:  []string{"sha256", "sha512", "sha1"},
			Groups:     groups,
			PFS:        true,
		}, "of IKEv2", gcpCiphers},
		Inside: Value[apipa.Rule]{apipa.Rule{
			From:   []netip.Prefix{apipa.Range},
			Within: []netip.Prefix{apipa.LinkLocal}, Only: true,
			Bits: []int{30},
		}, "a /30 of 169.254.0.0/16, unique among the Cloud Routers of the VPC; the gateway may have either address, and gets the first of an allocated one", gcpVPN + "how-to/creating-ha-vpn"},
		GatewayASN: Value[ASNs]{privateASNs, "Cloud Router has a private number", gcpRouter},
		AddressAt:  Value[string]{"IP address of the interface of the peer (external) VPN gateway", "each tunnel is bound to one, and it cannot be changed", gcpVPN + "how-to/creating-ha-vpn"},
		KeyAt:      Value[string]{"shared secret of the VPN tunnel", "it is never shown again: make a new tunnel when it is lost", gcpVPN + "how-to/creating-ha-vpn"},
		PolicyAt:   Value[string]{"cipher suite of the VPN tunnel", "without one, the gateway takes all that it knows", gcpCiphers},
		Calls:      Value[string]{"when there is traffic", "both roles are played", gcpCiphers},
		Advice: []Value[string]{
			{"the same cipher suite on both tunnels of a pair: AES-GCM-16-256, PRF-HMAC-SHA2-384, Group-20", "the tunnels of a pair must be alike", gcpCiphers},
			{"no traffic selectors on the tunnels", "with Cloud Router they are 0.0.0.0/0", gcpVPN},
			{"advertised route priorities that are equal on both tunnels", "an unequal MED makes one of them a standby", gcpRouter},
		},
	}
}
