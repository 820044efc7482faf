package importer

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// maxDevice bounds the tunnels, keys, sessions and so on of a device's configuration. The console's
// have two of each.
const maxDevice = 4 * maxObjects

// deviceText is what is read of a device's configuration. Vendors name a tunnel by its interface,
// a key by the gateway's address, a session by the peer's.
type deviceText struct {
	id, gateway string
	ends        map[string]*deviceEnd // by interface
	order       []*deviceEnd
	keys        map[string]lineText // by gateway, and by Junos' name of a policy
	sessions    map[string]*deviceSession
	fields      map[string]lineText // Junos: of gateways, as "address gw-1"
	asn         lineText            // of the lines that follow
	static      bool
	section     string // the interface, or the gateway whose key is next
	number      int    // of the line
	n           int
}

// lineText is a value with its line.
type lineText struct {
	is   string
	line int
}

type deviceEnd struct {
	line                           int
	own, remote, local, bits, peer lineText // local and peer are inside
	through                        string   // Junos: the gateway's name
}

type deviceSession struct{ asn, own, hold lineText }

// devices are the vendors whose configuration is read, as AWS's console makes it.
var devices = []struct {
	is   *regexp.Regexp // in the text
	also string         // in the text too
	line func(*deviceText, string)
}{
	{swanKey, " type vti local ", (*deviceText).swanLine},
	{ciscoKey, "tunnel destination ", (*deviceText).ciscoLine},
	{junosKey, " bind-interface st0.", (*deviceText).junosLine},
}

// Lines of the configuration for strongSwan: ipsec.conf, ipsec.secrets, the commands that make VTI
// interfaces, and those of a BGP daemon.
var (
	swanConn    = regexp.MustCompile(`^\s*conn\s+(\S+)\s*$`)
	swanField   = regexp.MustCompile(`^\s*(leftid|right)\s*=\s*(\S+)\s*$`)
	swanKey     = regexp.MustCompile(`(\d[\d.]+)\s+(\d[\d.]+)\s*:\s*PSK\s+["']([^"']*)["']`)
	swanAddress = regexp.MustCompile(`\bip addr(?:ess)? add (\S+) remote (\S+) dev (\S+)`)
)

// Lines of the configuration for Cisco's IOS and ASA, with IKEv1 and IKEv2. Other devices and BGP
// daemons have those of the sessions too.
var (
	ciscoKey       = regexp.MustCompile(`(?m)^[ \t]*(?:ikev1 |ikev2 remote-authentication )?pre-shared-key (?:address (\S+) key )?(?:([0-9]) )?(\S+)[ \t]*\r?$`)
	ciscoEnd       = regexp.MustCompile(`^\s*(?:tunnel-group (\d[\d.]+) ipsec-attributes|address (\d[\d.]+)(?: 255\.255\.255\.255)?)\s*$`)
	ciscoInterface = regexp.MustCompile(`^\s*interface (Tunnel\d+)\s*$`)
	ciscoField     = regexp.MustCompile(`^\s*(ip address|tunnel source|tunnel destination) (\S+)(?: (\d[\d.]+))?\s*$`)
	ciscoRoute     = regexp.MustCompile(`^\s*ip route \S+ \S+ Tunnel\d+\b`)
	bgpOwn         = regexp.MustCompile(`^\s*router bgp (\d+)`)
	bgpNeighbor    = regexp.MustCompile(`^\s*neighbor (\S+) (?:remote-as (\d+)|timers \d+ (\d+))`)
)

// Lines of the configuration for Juniper's Junos.
var (
	junosKey     = regexp.MustCompile(`(?m)^[ \t]*set security ike policy (\S+) pre-shared-key ascii-text (\S+)[ \t]*\r?$`)
	junosGateway = regexp.MustCompile(`^\s*set security ike gateway (\S+) (address|ike-policy|local-address) (\S+)\s*$`)
	junosVPN     = regexp.MustCompile(`^\s*set security ipsec vpn (\S+) (bind-interface|ike gateway) (\S+)\s*$`)
	junosAddress = regexp.MustCompile(`^\s*set interfaces (st0\.\d+) family inet address (\S+)\s*$`)
	junosSession = regexp.MustCompile(`^\s*set protocols bgp group \S+ neighbor (\S+) (peer-as|local-as|hold-time) (\S+)\s*$`)
	junosRoute   = regexp.MustCompile(`^\s*set routing-options static route \S+ next-hop st0\.\d+\b`)
)

var (
	awsVPN = regexp.MustCompile(`\bvpn-[0-9a-f]{3,17}\b`)
	awsIDs = regexp.MustCompile(`\bYour (VPN Connection|Virtual Private Gateway) ID\s*:\s*(\S+)`)
)

// isDevice reports whether a text has what only the configuration of one of the devices has.
func isDevice(data []byte) bool { return lineOf(data) != nil }

func lineOf(data []byte) func(*deviceText, string) {
	for _, v := range devices {
		if bytes.Contains(data, []byte(v.also)) && v.is.Match(data) {
			return v.line
		}
	}
	return nil
}

// awsDevice reads a device's configuration as if it were the XML.
func awsDevice(data []byte) (*node, error) {
	root, read := &node{line: 1}, lineOf(data)
	t := newDeviceText()
	t.id = string(awsVPN.Find(data))
	data = data[:bytes.LastIndexByte(data, '\n')+1] // half of an address may be another address
	for raw := range bytes.Lines(data) {
		line := string(raw)
		t.number++
		if m := awsIDs.FindStringSubmatch(line); m != nil && m[1] == "VPN Connection" && m[2] != t.id {
			t.build(root) // a second file follows the first
			next := newDeviceText()
			next.id, next.number, next.n = m[2], t.number, t.n
			t = next
		} else if m != nil && m[1] != "VPN Connection" {
			t.gateway = m[2]
		}
		if read(t, line); t.n > maxDevice {
			return nil, fmt.Errorf("line %d: has more than %d tunnels, keys and sessions; give the configuration of a connection alone", t.number, maxDevice)
		}
	}
	t.build(root)
	return root, nil
}

func newDeviceText() *deviceText {
	return &deviceText{ends: map[string]*deviceEnd{}, keys: map[string]lineText{}, sessions: map[string]*deviceSession{}, fields: map[string]lineText{}}
}

// at returns a value of the present line.
func (t *deviceText) at(is string) lineText { t.n++; return lineText{is, t.number} }

func (t *deviceText) end(name string) *deviceEnd {
	if t.ends[name] == nil {
		t.n++
		t.ends[name] = &deviceEnd{line: t.number}
		t.order = append(t.order, t.ends[name])
	}
	return t.ends[name]
}

func (t *deviceText) session(peer string) *deviceSession {
	if t.sessions[peer] == nil {
		t.n++
		t.sessions[peer] = &deviceSession{}
	}
	return t.sessions[peer]
}

func (t *deviceText) swanLine(line string) {
	if m := swanConn.FindStringSubmatch(line); m != nil {
		t.section = m[1]
	} else if m := swanField.FindStringSubmatch(line); m != nil && t.section != "" {
		if e := t.end(t.section); m[1] == "right" {
			e.remote = t.at(m[2])
		} else {
			e.own = t.at(m[2])
		}
	} else if m := swanKey.FindStringSubmatch(line); m != nil {
		t.keys[m[2]] = t.at(m[3])
	} else if m := swanAddress.FindStringSubmatch(line); m != nil {
		e := t.end(m[3])
		local, bits, _ := strings.Cut(m[1], "/")
		peer, _, _ := strings.Cut(m[2], "/")
		e.local, e.bits, e.peer = t.at(local), t.at(bits), t.at(peer)
	} else {
		t.bgpLine(line)
	}
}

func (t *deviceText) ciscoLine(line string) {
	if m := ciscoInterface.FindStringSubmatch(line); m != nil {
		t.section = m[1]
		t.end(m[1])
	} else if m := ciscoEnd.FindStringSubmatch(line); m != nil {
		t.section = m[1] + m[2] // one of them
	} else if m := ciscoKey.FindStringSubmatch(line); m != nil {
		remote := m[1]
		if remote == "" {
			remote = t.section
		}
		// Other numbers mean that the device has encrypted the key.
		if m[2] == "" || m[2] == "0" {
			t.keys[remote] = t.at(m[3])
		}
	} else if m := ciscoField.FindStringSubmatch(line); m != nil && t.ends[t.section] != nil {
		e := t.ends[t.section]
		switch m[1] {
		case "ip address":
			bits, _ := net.IPMask(net.ParseIP(m[3]).To4()).Size()
			e.local, e.bits = t.at(m[2]), t.at(strconv.Itoa(bits))
		case "tunnel source":
			if _, err := netip.ParseAddr(m[2]); err == nil { // else it is an interface
				e.own = t.at(m[2])
			}
		case "tunnel destination":
			e.remote = t.at(m[2])
		}
	} else if ciscoRoute.MatchString(line) {
		t.static = true
	} else {
		t.bgpLine(line)
	}
}

// bgpLine reads the sessions of Cisco's and other devices.
func (t *deviceText) bgpLine(line string) {
	if m := bgpOwn.FindStringSubmatch(line); m != nil {
		t.asn = t.at(m[1])
	} else if m := bgpNeighbor.FindStringSubmatch(line); m != nil {
		s := t.session(m[1])
		s.own = t.asn
		if m[2] != "" {
			s.asn = t.at(m[2])
		} else {
			s.hold = t.at(m[3])
		}
	}
}

func (t *deviceText) junosLine(line string) {
	if m := junosKey.FindStringSubmatch(line); m != nil {
		// A key that begins with $ is encrypted by the device.
		if key := strings.Trim(m[2], `"`); !strings.HasPrefix(key, "$") {
			t.keys[m[1]] = t.at(key)
		}
	} else if m := junosGateway.FindStringSubmatch(line); m != nil {
		t.fields[m[2]+" "+m[1]] = t.at(m[3])
	} else if m := junosVPN.FindStringSubmatch(line); m != nil {
		t.fields[m[2]+" "+m[1]] = t.at(m[3])
		if through, bound := t.fields["ike gateway "+m[1]], t.fields["bind-interface "+m[1]]; through.is != "" && bound.is != "" {
			t.end(bound.is).through = through.is
		}
	} else if m := junosAddress.FindStringSubmatch(line); m != nil {
		local, bits, _ := strings.Cut(m[2], "/")
		e := t.end(m[1])
		e.local, e.bits = t.at(local), t.at(bits)
	} else if m := junosSession.FindStringSubmatch(line); m != nil {
		switch s := t.session(m[1]); m[2] {
		case "peer-as":
			s.asn = t.at(m[3])
		case "local-as":
			s.own = t.at(m[3])
		case "hold-time":
			s.hold = t.at(m[3])
		}
	} else if junosRoute.MatchString(line) {
		t.static = true
	}
}

// build adds a connection with what was read, as the XML has it.
func (t *deviceText) build(root *node) {
	if len(t.order) == 0 {
		return
	}
	connection := root.add("vpn_connection", &node{line: 1})
	connection.set(t.id, 1, "id")
	if t.gateway != "" {
		connection.set(t.gateway, 1, "vpn_gateway_id")
	}
	if t.static && len(t.sessions) == 0 {
		connection.set("NoBGPVPNConnection", 1, "vpn_connection_attributes")
	}
	for _, e := range t.order {
		x := connection.add("ipsec_tunnel", &node{line: e.line})
		set := func(v lineText, path ...string) {
			if v.is != "" {
				x.set(v.is, v.line, path...)
			}
		}
		key := e.remote.is
		if e.through != "" {
			e.remote, e.own = t.fields["address "+e.through], t.fields["local-address "+e.through]
			key = t.fields["ike-policy "+e.through].is
		}
		set(e.own, "customer_gateway", "tunnel_outside_address", "ip_address")
		set(e.remote, "vpn_gateway", "tunnel_outside_address", "ip_address")
		set(t.keys[key], "ike", "pre_shared_key")
		set(e.local, "customer_gateway", "tunnel_inside_address", "ip_address")
		set(e.bits, "customer_gateway", "tunnel_inside_address", "network_cidr")
		if e.peer.is == "" {
			e.peer = lineText{insidePeer(e.local.is, e.bits.is), e.local.line}
		}
		set(e.peer, "vpn_gateway", "tunnel_inside_address", "ip_address")
		if s := t.sessions[e.peer.is]; s != nil {
			set(s.asn, "vpn_gateway", "bgp", "asn")
			set(s.hold, "vpn_gateway", "bgp", "hold_time")
			set(s.own, "customer_gateway", "bgp", "asn")
		}
	}
}

// insidePeer returns the gateway's inside address, which is the first of the block; empty if the
// block has no other address.
func insidePeer(local, bits string) string {
	p, err := netip.ParsePrefix(local + "/" + bits)
	if first := p.Masked().Addr().Next(); err == nil && first != p.Addr() && p.Contains(first) {
		return first.String()
	}
	return ""
}
