package nat

import "strconv"

// IP protocol numbers (IANA).
const (
	ICMP    = 1
	TCP     = 6
	UDP     = 17
	DCCP    = 33
	ICMPv6  = 58
	SCTP    = 132
	UDPLite = 136
)

// protocols has the properties of IP protocols, the most frequent ones first.
var protocols = []struct {
	number    uint8
	name      string // empty: written as its number
	policy    bool   // policies can name it
	ports     bool   // policies can name its ports
	told      bool   // ports, or an identifier, distinguish its flows behind one address
	connected bool   // its flows begin with a packet of a special kind
}{
	{number: TCP, name: "tcp", policy: true, ports: true, told: true, connected: true},
	{number: UDP, name: "udp", policy: true, ports: true, told: true},
	{number: ICMP, name: "icmp", policy: true, told: true},
	{number: ICMPv6, name: "icmpv6", told: true},
	{number: SCTP, name: "sctp", told: true, connected: true},
	{number: DCCP, told: true, connected: true},
	{number: UDPLite, told: true},
	{number: 4, name: "ipip"},
	{number: 41, name: "ipv6"},
	{number: 47, name: "gre"},
	{number: 50, name: "esp"},
	{number: 51, name: "ah"},
}

// ProtocolName returns the name of an IP protocol, as "esp", or its number if it has no well-known
// name.
func ProtocolName(protocol uint8) string {
	for i := range protocols {
		if p := &protocols[i]; p.number == protocol && p.name != "" {
			return p.name
		}
	}
	return strconv.Itoa(int(protocol))
}

// Protocols returns the IP protocols of a name or a number from 0 to 255, as "esp" or "50": "icmp"
// is that of both families. It returns false for others.
func Protocols(name string) (all []uint8, known bool) {
	if name == "icmp" {
		return []uint8{ICMP, ICMPv6}, true
	}
	if n, err := strconv.ParseUint(name, 10, 8); err == nil {
		return []uint8{uint8(n)}, true
	}
	for i := range protocols {
		if p := &protocols[i]; p.name == name && name != "" {
			return []uint8{p.number}, true
		}
	}
	return nil, false
}

// PolicyProtocol returns the IP protocol number of a name in a policy for flows of a family: "icmp"
// is ICMPv6 with IPv6. The empty name is 0, every protocol. It returns false for a name that
// policies do not have.
func PolicyProtocol(name string, ipv6 bool) (protocol uint8, known bool) {
	if name == "" {
		return 0, true
	}
	for i := range protocols {
		if p := &protocols[i]; p.policy && p.name == name {
			if ipv6 && p.number == ICMP {
				return ICMPv6, true
			}
			return p.number, true
		}
	}
	return 0, false
}

// TakesPorts reports whether a policy of a protocol may name ports.
func TakesPorts(name string) bool {
	for i := range protocols {
		if p := &protocols[i]; p.ports && p.name == name {
			return true
		}
	}
	return false
}

// Connectionless reports whether flows of an IP protocol begin with any packet. They are matched
// against the rules again when their entry is removed from the connection table, and lose nothing
// by it. TCP, DCCP and SCTP have connections.
func Connectionless(protocol uint8) bool {
	for i := range protocols {
		if p := &protocols[i]; p.number == protocol {
			return !p.connected
		}
	}
	return true
}

// Portless reports whether flows of an IP protocol have neither ports nor an identifier, as ICMP
// has, to distinguish two of them behind one address: such a flow occupies an address toward its
// destination.
func Portless(protocol uint8) bool {
	for i := range protocols {
		if p := &protocols[i]; p.number == protocol {
			return !p.told
		}
	}
	return true
}

// NotPortless returns the IP protocols that are not Portless, the most frequent ones first.
func NotPortless() (all []uint8) {
	for i := range protocols {
		if p := &protocols[i]; p.told {
			all = append(all, p.number)
		}
	}
	return all
}
