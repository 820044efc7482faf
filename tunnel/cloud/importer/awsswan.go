package importer

import (
	"bytes"
	"regexp"
	"strings"
)

// Lines of the configuration that the console makes for strongSwan: ipsec.conf, ipsec.secrets, the
// commands that make VTI interfaces, and those of a BGP daemon.
var (
	swanConn     = regexp.MustCompile(`^\s*conn\s+(\S+)\s*$`)
	swanField    = regexp.MustCompile(`^\s*(leftid|right)\s*=\s*(\S+)\s*$`)
	swanKey      = regexp.MustCompile(`(\d[\d.]+)\s+(\d[\d.]+)\s*:\s*PSK\s+["']([^"']*)["']`)
	swanAddress  = regexp.MustCompile(`\bip addr(?:ess)? add (\S+) remote (\S+) dev (\S+)`)
	swanASN      = regexp.MustCompile(`^\s*router bgp (\d+)`)
	swanNeighbor = regexp.MustCompile(`^\s*neighbor (\S+) remote-as (\d+)`)
	awsVPN       = regexp.MustCompile(`\bvpn-[0-9a-f]{3,17}\b`)
)

// isSwan reports whether a text has what only that configuration has together.
func isSwan(data []byte) bool {
	return bytes.Contains(data, []byte("conn ")) && bytes.Contains(data, []byte(" type vti local ")) && swanKey.Match(data)
}

// awsSwan reads the configuration as if it were the XML. A connection and its interface have one
// name, its key has the addresses.
func awsSwan(data []byte) *node {
	root := &node{line: 1}
	connection := root.add("vpn_connection", &node{line: 1})
	tunnels, ends := map[string]*node{}, map[string]*node{}
	inside := map[string]*node{} // by address of the gateway
	var asns []*node
	tunnel := func(name string, line int) *node {
		if tunnels[name] == nil {
			tunnels[name] = connection.add("ipsec_tunnel", &node{line: line})
		}
		return tunnels[name]
	}
	if id := awsVPN.Find(data); id != nil {
		connection.set(string(id), 1, "id")
	}
	type key struct {
		remote, text string
		line         int
	}
	var keys []key
	name, number := "", 0
	data = data[:bytes.LastIndexByte(data, '\n')+1] // half of an address may be another address
	for raw := range bytes.Lines(data) {
		line := string(raw)
		number++
		if m := swanConn.FindStringSubmatch(line); m != nil {
			name = m[1]
		} else if m := swanField.FindStringSubmatch(line); m != nil && name != "" {
			t := tunnel(name, number)
			if m[1] == "right" {
				t.set(m[2], number, "vpn_gateway", "tunnel_outside_address", "ip_address")
				ends[m[2]] = t
			} else {
				t.set(m[2], number, "customer_gateway", "tunnel_outside_address", "ip_address")
			}
		} else if m := swanKey.FindStringSubmatch(line); m != nil {
			keys = append(keys, key{m[2], m[3], number})
		} else if m := swanAddress.FindStringSubmatch(line); m != nil {
			t := tunnel(m[3], number)
			own, bits, _ := strings.Cut(m[1], "/")
			peer, _, _ := strings.Cut(m[2], "/")
			t.set(own, number, "customer_gateway", "tunnel_inside_address", "ip_address")
			t.set(bits, number, "customer_gateway", "tunnel_inside_address", "network_cidr")
			t.set(peer, number, "vpn_gateway", "tunnel_inside_address", "ip_address")
			inside[peer] = t
		} else if m := swanASN.FindStringSubmatch(line); m != nil {
			asns = append(asns, &node{text: m[1], line: number})
		} else if m := swanNeighbor.FindStringSubmatch(line); m != nil {
			if t := inside[m[1]]; t != nil {
				t.set(m[2], number, "vpn_gateway", "bgp", "asn")
				if len(asns) > 0 {
					t.set(asns[len(asns)-1].text, number, "customer_gateway", "bgp", "asn")
				}
			}
		}
	}
	for _, k := range keys {
		if t := ends[k.remote]; t != nil {
			t.set(k.text, k.line, "ike", "pre_shared_key")
		}
	}
	return root
}
