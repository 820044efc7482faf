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

// protocols is what is known of IP protocols. Those that most packets have come first.
var protocols = []struct {
	number    uint8
	name      string // empty: its number stands for it
	policy    bool   // policies name it
	ports     bool   // policies name its ports
	told      bool   // ports, or an identifier, tell its flows apart behind one address
	connected bool   // its flows begin with a packet of their own kind
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

// ProtocolName returns the name of an IP protocol, as "esp", or its number where it has no
// well-known one.
func ProtocolName(protocol uint8) string {
	for i := range protocols {
		if p := &protocols[i]; p.number == protocol && p.name != "" {
			return p.name
		}
	}
	return strconv.Itoa(int(protocol))
}

// PolicyProtocol returns the IP protocol number that a name in a policy has with flows of a family:
// "icmp" is ICMPv6 with IPv6. The empty name is 0, every protocol. It returns false for a name that
// policies do not know.
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

// TakesPorts says whether a policy of a protocol may name ports.
func TakesPorts(name string) bool {
	for i := range protocols {
		if p := &protocols[i]; p.ports && p.name == name {
			return true
		}
	}
	return false
}

// Connectionless says whether flows of an IP protocol begin with any packet. They ask the rules
// again when they are taken out of the table of connection tracking, and lose nothing by it. TCP,
// DCCP and SCTP have connections.
func Connectionless(protocol uint8) bool {
	for i := range protocols {
		if p := &protocols[i]; p.number == protocol {
			return !p.connected
		}
	}
	return true
}

// Portless says whether flows of an IP protocol have no ports, nor an identifier as ICMP has, by
// which two could be told apart behind one address: such a flow has an address for itself toward
// its destination.
func Portless(protocol uint8) bool {
	for i := range protocols {
		if p := &protocols[i]; p.number == protocol {
			return !p.told
		}
	}
	return true
}

// NotPortless returns the IP protocols that are not Portless. Those that most packets have come
// first.
func NotPortless() (all []uint8) {
	for i := range protocols {
		if p := &protocols[i]; p.told {
			all = append(all, p.number)
		}
	}
	return all
}
