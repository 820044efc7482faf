package rendered

import (
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"

	"github.com/isthmus-net/isthmus/router/topology"
)

// random makes a topology with up to four nodes and six gateways, where most pairs that can be
// linked are.
func random(r *rand.Rand) string {
	var nodes, gateways, spokes, links strings.Builder
	var names []string
	type gateway struct{ name, cloud string }
	var all []gateway
	for i := range r.IntN(5) {
		key := make([]byte, 32)
		for j := range key {
			key[j] = byte(r.Uint32())
		}
		name := fmt.Sprintf("hub-%d", i)
		fmt.Fprintf(&nodes, "- {name: %s, asn: %d, publicAddress: 203.0.113.%d, address: 10.9.%d.4, interface: eth0, wireguardPublicKey: %s}\n", name, 64620+i, 9+i, i, base64.StdEncoding.EncodeToString(key))
		names = append(names, name)
	}
	for i := range 1 + r.IntN(6) {
		cloud := []string{"aws", "azure", "gcp"}[r.IntN(3)]
		g := gateway{fmt.Sprintf("g%d-%s", i, cloud), cloud}
		network := map[string]string{"aws": "tgw-0123456789abcdef0", "azure": "vnet, resourceGroup: rg", "gcp": "vpc"}[cloud]
		if cloud == "aws" && r.IntN(2) == 0 {
			network = fmt.Sprintf("vgw-0123456789abcdef%d", i)
		} else if cloud == "aws" {
			network = fmt.Sprintf("tgw-0123456789abcdef%d", i)
		}
		fmt.Fprintf(&gateways, "- {name: %s, cloud: %s, asn: %d, region: r%d, network: %s}\n", g.name, cloud, 65000+i, r.IntN(2), network)
		fmt.Fprintf(&spokes, "- {name: s%d, gateway: %s, prefixes: [10.%d.0.0/16]}\n", i, g.name, 100+i)
		for _, n := range names {
			if r.IntN(4) > 0 {
				fmt.Fprintf(&links, "- between: [%s, %s]\n", g.name, n)
			}
		}
		for _, o := range all {
			if o.cloud != cloud && r.IntN(2) == 0 {
				fmt.Fprintf(&links, "- between: [%s, %s]\n", g.name, o.name)
			}
		}
		all = append(all, g)
	}
	for i := range names {
		for j := range i {
			if r.IntN(2) == 0 {
				fmt.Fprintf(&links, "- {between: [%s, %s], lanes: %d}\n", names[i], names[j], 1+r.IntN(4))
			}
		}
	}
	text := "gateways:\n" + gateways.String() + "spokes:\n" + spokes.String()
	if nodes.Len() > 0 {
		text += "nodes:\n" + nodes.String()
	}
	if len(all) > 1 {
		text += "groups:\n- name: all\n  spokes: ["
		for i := range all {
			text += fmt.Sprintf("s%d, ", i)
		}
		text += "]\n"
	}
	if links.Len() > 0 {
		text += "links:\n" + links.String()
	}
	return text
}

// known gives every outside address of a topology a value.
func known(top *topology.Topology) map[string]netip.Addr {
	out := map[string]netip.Addr{}
	for i, o := range top.Outside() {
		out[o.Name] = netip.AddrFrom4([4]byte{198, 51, 100, byte(1 + i)})
	}
	return out
}
