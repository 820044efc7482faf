package cloud

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// Link is a document's configuration of one tunnel to a cloud's gateway.
type Link struct {
	Name        string     // of the tunnel
	Cloud       string     // of a preset
	Remote      netip.Addr // outside address of the gateway
	PSK         string     // name of the secret
	ASN         uint32     // of the gateway's BGP session; 0: none
	RespondOnly bool
}

// Pairing is a tunnel that a cloud has, or attempts, and that cannot come up with the present
// document.
type Pairing struct {
	Code   string // "second-endpoint", "second-instance", "other-interface" or "both-wait"
	Cloud  string
	Beside string // the tunnel of the document that it belongs to
	// Own means that it is that tunnel itself.
	Own bool
	// Sure means that the cloud always has it; otherwise it depends on the cloud's settings.
	Sure   bool
	Why    string
	Remedy string
	Source string
}

// serial is the suffix that distinguishes the tunnels of one connection, also in the importers'
// names.
var serial = regexp.MustCompile(`[-.]?[0-9]+$`)

// Unpaired returns the pairings that a document omits, in the order of the links. A connection of
// AWS has two tunnels, a gateway of Azure or Google two sides. Tunnels of the document belong to
// the same one if their names share a prefix, otherwise by the gateway's ASN and, at Azure, the
// key, which is unique to a connection.
func Unpaired(links []Link) (out []Pairing) {
	groups := map[Link][]Link{}
	base := func(l Link) Link { return Link{Cloud: l.Cloud, Name: serial.ReplaceAllString(l.Name, "")} }
	named := map[Link]int{}
	for _, l := range links {
		named[base(l)]++
	}
	var order []Link
	for _, l := range links {
		key := Link{Cloud: l.Cloud, ASN: l.ASN}
		switch {
		case strings.HasPrefix(l.Cloud, "azure"):
			key = Link{Cloud: l.Cloud, PSK: l.PSK}
		case named[base(l)] > 1:
			key = base(l)
		}
		if !slices.Contains(order, key) {
			order = append(order, key)
		}
		groups[key] = append(groups[key], l)
	}
	for _, key := range order {
		group := groups[key]
		last := group[len(group)-1]
		if len(group)%2 == 1 {
			if p := half(last); p.Code != "" {
				out = append(out, p)
			}
		}
		for _, l := range group {
			if l.Cloud == "aws" && l.RespondOnly {
				out = append(out, Pairing{
					Code: "both-wait", Cloud: l.Cloud, Beside: l.Name, Own: true,
					Why:    "AWS's endpoint waits for this node unless its startup action is Start, and this node waits for it (respondOnly): neither calls the other",
					Remedy: "leave respondOnly out, or set the startup action of the VPN tunnel to Start",
					Source: awsGuide + "initiate-vpn-tunnels.html",
				})
			}
		}
	}
	slices.SortStableFunc(out, func(a, b Pairing) int {
		at := func(p Pairing) int { return slices.IndexFunc(links, func(l Link) bool { return l.Name == p.Beside }) }
		return at(a) - at(b)
	})
	return out
}

// half returns the pairing that a tunnel without its second one omits.
func half(l Link) Pairing {
	p := Pairing{Cloud: l.Cloud, Beside: l.Name}
	switch l.Cloud {
	case "aws":
		p.Code, p.Sure, p.Source = "second-endpoint", true, awsGuide+"VPNTunnels.html"
		p.Why = "a VPN connection of AWS has two tunnels, each with an outside address of its own; the document has one, so that the other stays DOWN in the console"
		p.Remedy = "add a tunnel to the connection's other outside address, or accept the DOWN"
	case "oci":
		p.Code, p.Sure, p.Source = "second-endpoint", true, ociParameters
		p.Why = "an IPSec connection of Oracle has two tunnels, each with an outside address of its own; the document has one, so that the other stays down in the console"
		p.Remedy = "add a tunnel to the connection's other address, or accept that"
	case "azure":
		p.Code, p.Source = "second-instance", "https://learn.microsoft.com/azure/vpn-gateway/about-active-active-gateways"
		p.Why = "an active-active gateway of Azure makes a tunnel from each of its two instances to the address of the local network gateway, each from an address of its own; the document has one of them"
		p.Remedy = "add a tunnel to the other instance's public address, with the same psk; nothing is left out when the gateway is active-standby"
	case "azure-vwan":
		p.Code, p.Sure, p.Source = "second-instance", true, vwanFile
		p.Why = "a virtual hub's gateway makes a tunnel from each of its two instances to each link, each from an address of its own; the document has one of them"
		p.Remedy = "add a tunnel to the other instance's address (Instance0 and Instance1 of the site file), with the same psk"
	case "gcp":
		p.Code, p.Source = "other-interface", gcpVPN+"how-to/creating-ha-vpn"
		p.Why = "an HA VPN gateway of Google has two interfaces, and each VPN tunnel there is bound to one of them and to one interface of the peer gateway; the document has one of them, and a VPN tunnel from the other interface to this node is tried and never comes up"
		p.Remedy = "add a tunnel to the gateway's other interface; nothing is left out when that has no VPN tunnel to this node"
	}
	return p
}
