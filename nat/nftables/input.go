package nftables

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
)

// The input hook: packets for the node itself. Forwarded packets do not pass these rules.

const (
	// tunnelSet holds the interfaces of tunnels, portSet the UDP ports that tunnels receive on.
	tunnelSet = "tunnels"
	portSet   = "tunnel-ports"

	// errorRate and echoRate limit the ICMP packets per second that belong to no flow: errors, and
	// echo requests that do not come by a tunnel. The node that shares the pools sends its echo
	// requests by a tunnel, and a stranger must not be able to use up the limit for these.
	errorRate = 100
	echoRate  = 1000
)

func sshSet(ipv6 bool) string { return "ssh" + familyOf(ipv6).suffix }

func sshTunnelSet(ipv6 bool) string { return "ssh-tunnel" + familyOf(ipv6).suffix }

// addInput protects the BGP process and the API from strangers, and with Input.Drop all other
// ports of the node.
//
// It also keeps the node from answering packets of flows that it does not have. A packet for a
// pool's address that is not translated back belongs to no flow of this node. A reset would end a
// connection that another node may be about to take over.
func (r *ruleset) addInput(c nat.Config) {
	const bgp = 179 // RFC 4271 section 8.2.1
	input := &chain{kind: nftables.ChainTypeFilter, hook: *nftables.ChainHookInput, priority: *nftables.ChainPriorityFilter}
	refuse := goTo(dropChain(nat.DropInput))
	r.chains["input"] = input
	r.addAPI(c, input)
	if c.Underlay == "" {
		r.addServices(c, input)
		return
	}
	input.rules = append(input.rules, rule(toPort(bgp), goTo("bgp")))
	session := &chain{rules: [][]expr.Any{rule(comes(expr.CmpOpEq, "lo"), exprs(verdict(expr.VerdictAccept, "")))}}
	for _, f := range families {
		r.sets[sessionSet(f.ipv6)] = &set{shape: shape{isConcat: true}, elements: map[string]element{}}
		session.rules = append(session.rules, rule(isFamily(f), exprs(
			meta(expr.MetaKeyIIFNAME, register(0)), network(f.source, f.size, register(unix.IFNAMSIZ)),
			&expr.Lookup{SourceRegister: register(0), SetName: sessionSet(f.ipv6)}), exprs(verdict(expr.VerdictAccept, ""))))
	}
	session.rules = append(session.rules, refuse)
	r.chains["bgp"] = session
	for _, s := range c.Sessions {
		key := string(interfaceName(s.Interface)) + string(s.Address.AsSlice())
		r.sets[sessionSet(s.Address.Is6())].elements[key] = element{}
	}
	r.addDNS(c, input)
	r.addMetrics(c, input)
	for _, f := range families {
		icmp := byte(unix.IPPROTO_ICMP)
		if f.ipv6 {
			icmp = unix.IPPROTO_ICMPV6 // includes neighbour discovery
		}
		input.rules = append(input.rules, rule(isFamily(f), exprs(network(f.dst, f.size, reg1), setLookup(poolSet(f.ipv6)),
			meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpNeq, icmp)),
			state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED, expr.CmpOpEq), refuse))
		r.sets[poolSet(f.ipv6)] = &set{elements: map[string]element{}}
	}
	for _, p := range c.Pools {
		for _, a := range p.Addresses {
			if !slices.Contains(c.Own, a.Address) {
				r.sets[poolSet(a.Address.Is6())].elements[string(a.Address.AsSlice())] = element{}
			}
		}
	}
	r.addServices(c, input)
}

func sessionSet(ipv6 bool) string { return "bgp" + familyOf(ipv6).suffix }

func laneSet(ipv6 bool) string { return "lanes" + familyOf(ipv6).suffix }

func apiSet(ipv6 bool) string { return "api" + familyOf(ipv6).suffix }

// toPort matches TCP packets to a port.
func toPort(port uint16) []expr.Any {
	return exprs(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, unix.IPPROTO_TCP),
		transport(2, 2, reg1), compare(expr.CmpOpEq, binary.BigEndian.AppendUint16(nil, port)...))
}

// addAPI adds the rules for access to the API.
func (r *ruleset) addAPI(c nat.Config, input *chain) {
	if c.API.Port == 0 {
		return
	}
	pass, refuse := exprs(verdict(expr.VerdictAccept, "")), goTo(dropChain(nat.DropInput))
	input.rules = append(input.rules, rule(toPort(c.API.Port), goTo("api")))
	door := &chain{rules: [][]expr.Any{rule(comes(expr.CmpOpEq, "lo"), pass)}}
	r.chains["api"] = door
	r.addSources(door, c.API.From, apiSet, pass)
	door.rules = append(door.rules, refuse)
}

func dnsSet(ipv6 bool) string { return "dns" + familyOf(ipv6).suffix }

func dnsDoors(ipv6 bool) string { return "dns-doors" + familyOf(ipv6).suffix }

func dnsSources(i int, ipv6 bool) string { return fmt.Sprintf("dns-%d-%s", i, familyOf(ipv6).suffix) }

// addDNS adds the rules that open port 53 of the node's addresses to attachments. The chain of
// sources has already checked that a packet's source belongs to its attachment.
func (r *ruleset) addDNS(c nat.Config, input *chain) {
	if len(c.DNS) == 0 {
		return
	}
	const dns = 53
	pass, refuse := exprs(verdict(expr.VerdictAccept, "")), goTo(dropChain(nat.DropInput))
	door := &chain{rules: [][]expr.Any{rule(comes(expr.CmpOpEq, "lo"), pass)}}
	for _, f := range families {
		r.sets[dnsSet(f.ipv6)] = &set{elements: map[string]element{}}
		r.sets[dnsDoors(f.ipv6)] = &set{shape: shape{isConcat: true}, elements: map[string]element{}}
		to := rule(isFamily(f), exprs(network(f.dst, f.size, reg1), setLookup(dnsSet(f.ipv6)), transport(2, 2, reg1), compare(expr.CmpOpEq, binary.BigEndian.AppendUint16(nil, dns)...)))
		for _, protocol := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			input.rules = append(input.rules, rule(exprs(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, protocol)), to, goTo("dns")))
		}
		door.rules = append(door.rules, rule(isFamily(f), exprs(
			meta(expr.MetaKeyIIFNAME, register(0)), network(f.dst, f.size, register(unix.IFNAMSIZ)),
			&expr.Lookup{SourceRegister: register(0), SetName: dnsDoors(f.ipv6)}), pass))
	}
	for i, d := range c.DNS {
		f := familyOf(d.Address.Is6())
		r.sets[dnsSet(f.ipv6)].elements[string(d.Address.AsSlice())] = element{}
		if len(d.From) == 0 {
			r.sets[dnsDoors(f.ipv6)].elements[string(interfaceName(d.Interface))+string(d.Address.AsSlice())] = element{}
			continue
		}
		r.sets[dnsSources(i, f.ipv6)] = prefixSet(d.From, f.ipv6)
		door.rules = append(door.rules, rule(comes(expr.CmpOpEq, d.Interface), isFamily(f),
			exprs(network(f.dst, f.size, reg1), compare(expr.CmpOpEq, d.Address.AsSlice()...)), inPrefixes(f, f.source, dnsSources(i, f.ipv6)), pass))
	}
	door.rules = append(door.rules, refuse)
	r.chains["dns"] = door
}

func metricsSet(ipv6 bool) string { return "metrics" + familyOf(ipv6).suffix }

func metricsDoors(ipv6 bool) string { return "metrics-doors" + familyOf(ipv6).suffix }

func metricsSources(ipv6 bool) string { return "metrics-from" + familyOf(ipv6).suffix }

// addMetrics adds the rules that open the port of the metrics at addresses of the node. Like those
// of the API they come before those for established flows, so that a source that was removed loses
// its connections too.
func (r *ruleset) addMetrics(c nat.Config, input *chain) {
	if len(c.Metrics.Inlets) == 0 {
		return
	}
	pass, refuse := exprs(verdict(expr.VerdictAccept, "")), goTo(dropChain(nat.DropInput))
	door := &chain{rules: [][]expr.Any{rule(comes(expr.CmpOpEq, "lo"), pass)}}
	for _, f := range families {
		addresses := &set{elements: map[string]element{}}
		doors := &set{shape: shape{isConcat: true}, elements: map[string]element{}}
		for _, d := range c.Metrics.Inlets {
			if d.Address.Is6() == f.ipv6 {
				addresses.elements[string(d.Address.AsSlice())] = element{}
				doors.elements[string(interfaceName(d.Interface))+string(d.Address.AsSlice())] = element{}
			}
		}
		r.sets[metricsSet(f.ipv6)], r.sets[metricsDoors(f.ipv6)] = addresses, doors
		r.sets[metricsSources(f.ipv6)] = prefixSet(c.Metrics.From, f.ipv6)
		input.rules = append(input.rules, rule(toPort(c.Metrics.Port), isFamily(f), exprs(network(f.dst, f.size, reg1), setLookup(metricsSet(f.ipv6))), goTo("metrics")))
		door.rules = append(door.rules, rule(isFamily(f), exprs(
			meta(expr.MetaKeyIIFNAME, register(0)), network(f.dst, f.size, register(unix.IFNAMSIZ)),
			&expr.Lookup{SourceRegister: register(0), SetName: metricsDoors(f.ipv6)}), inPrefixes(f, f.source, metricsSources(f.ipv6)), pass))
	}
	door.rules = append(door.rules, refuse)
	r.chains["metrics"] = door
}

// addSources adds rules for packets whose source is in one of the prefixes.
func (r *ruleset) addSources(door *chain, from []netip.Prefix, name func(ipv6 bool) string, then []expr.Any) {
	for _, f := range families {
		r.sets[name(f.ipv6)] = prefixSet(from, f.ipv6)
		door.rules = append(door.rules, rule(isFamily(f), inPrefixes(f, f.source, name(f.ipv6)), then))
	}
}

// addServices adds, with Input.Drop, the rules for all other traffic that the node accepts, and
// drops the rest.
func (r *ruleset) addServices(c nat.Config, input *chain) {
	if !c.Input.Drop {
		return
	}
	const ssh = 22
	pass, refuse := exprs(verdict(expr.VerdictAccept, "")), goTo(dropChain(nat.DropInput))
	byTunnel := exprs(meta(expr.MetaKeyIIFNAME, reg1), setLookup(tunnelSet))
	udp := exprs(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, unix.IPPROTO_UDP))
	ports := func(source, destination uint16) []expr.Any {
		return rule(udp, exprs(transport(0, 4, reg1), compare(expr.CmpOpEq, binary.BigEndian.AppendUint32(nil, uint32(source)<<16|uint32(destination))...)))
	}

	const stamp = 862 // RFC 8762 section 4.1
	for _, f := range families {
		r.sets[laneSet(f.ipv6)] = &set{shape: shape{isConcat: true}, elements: map[string]element{}}
	}
	for _, l := range c.Lanes {
		r.sets[laneSet(l.Address.Is6())].elements[string(interfaceName(l.Interface))+string(l.Address.AsSlice())] = element{}
	}
	r.sets[tunnelSet], r.sets[portSet] = &set{elements: map[string]element{}}, &set{elements: map[string]element{}}
	ipsec := false
	for _, t := range c.Tunnels {
		r.sets[tunnelSet].elements[string(interfaceName(t.Interface))] = element{}
		if t.Port != 0 {
			r.sets[portSet].elements[string(binary.BigEndian.AppendUint16(nil, t.Port))] = element{}
		}
		ipsec = ipsec || t.Port == 0
	}

	r.chains["ssh-tunnel"], r.chains["ssh"] = &chain{}, &chain{rules: [][]expr.Any{rule(byTunnel, goTo("ssh-tunnel"))}}
	r.addSources(r.chains["ssh-tunnel"], c.SSHByTunnel(), sshTunnelSet, pass)
	r.addSources(r.chains["ssh"], c.Input.SSH, sshSet, pass)
	for _, name := range []string{"ssh", "ssh-tunnel"} {
		r.chains[name].rules = append(r.chains[name].rules, refuse)
	}
	r.addICMP(byTunnel, pass, refuse)

	v4, v6 := familyOf(false), familyOf(true)
	input.rules = append(input.rules,
		rule(comes(expr.CmpOpEq, "lo"), pass),
		rule(isFamily(v4), isICMP(v4), goTo("icmp-4")),
		rule(isFamily(v6), isICMP(v6), goTo("icmp-6")),
		// Before established flows, so that a source that was removed from the list loses its
		// connections too.
		rule(toPort(ssh), goTo("ssh")))
	for _, f := range families {
		input.rules = append(input.rules, rule(udp, isFamily(f), exprs(
			transport(2, 2, reg1), compare(expr.CmpOpEq, binary.BigEndian.AppendUint16(nil, stamp)...),
			meta(expr.MetaKeyIIFNAME, register(0)), network(f.source, f.size, register(unix.IFNAMSIZ)),
			&expr.Lookup{SourceRegister: register(0), SetName: laneSet(f.ipv6)}), pass))
	}
	input.rules = append(input.rules,
		rule(underWay(), pass),
		rule(byTunnel, refuse),
		rule(udp, exprs(transport(2, 2, reg1), setLookup(portSet)), pass),
		// DHCP servers answer to an address that the node does not have yet, or to the broadcast
		// address (RFC 2131 section 4.1, RFC 8415 section 7.2).
		rule(isFamily(v4), ports(67, 68), pass),
		rule(isFamily(v6), ports(547, 546), isIn(v6, v6.dst, netip.MustParsePrefix("fe80::/10")), pass))
	if ipsec {
		outside := comes(expr.CmpOpEq, c.Underlay)
		input.rules = append(input.rules, rule(outside, exprs(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, unix.IPPROTO_ESP)), pass))
		for _, port := range []uint16{500, 4500} { // RFC 7296 section 2, RFC 3948
			input.rules = append(input.rules, rule(outside, udp, exprs(transport(2, 2, reg1), compare(expr.CmpOpEq, binary.BigEndian.AppendUint16(nil, port)...)), pass))
		}
	}
	input.rules = append(input.rules, refuse)
}

// isICMP matches the ICMP packets of a family.
func isICMP(f family) []expr.Any {
	protocol := byte(unix.IPPROTO_ICMP)
	if f.ipv6 {
		protocol = unix.IPPROTO_ICMPV6
	}
	return exprs(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, protocol))
}

// addICMP adds the chains of ICMP: the types that RFC 4890 section 4.4 requires a node to accept,
// and their equivalents in IPv4. Redirects, node information and router renumbering are not among
// them.
func (r *ruleset) addICMP(byTunnel, pass, refuse []expr.Any) {
	types := func(first, last byte) []expr.Any {
		return exprs(transport(0, 1, reg1), compare(expr.CmpOpGte, first), compare(expr.CmpOpLte, last))
	}
	// the IPv6 hop limit
	hops := func(limit byte) []expr.Any { return exprs(network(7, 1, reg1), compare(expr.CmpOpEq, limit)) }
	few := func(rate uint64) []expr.Any {
		return exprs(&expr.Limit{Type: expr.LimitTypePkts, Rate: rate, Unit: expr.LimitTimeSecond, Burst: uint32(rate)})
	}
	related := state(expr.CtStateBitRELATED, expr.CmpOpNeq)
	r.chains["icmp-4"] = &chain{rules: [][]expr.Any{
		// source quench, redirect: conntrack relates them to the flow that they quote
		rule(types(4, 5), refuse),
		rule(related, pass),
		rule(types(3, 3), few(errorRate), pass),   // destination unreachable
		rule(types(11, 12), few(errorRate), pass), // time exceeded, parameter problem
		rule(types(0, 0), isEstablished(), pass),  // echo reply
		rule(types(8, 8), byTunnel, pass),         // echo request
		rule(types(8, 8), few(echoRate), pass),
		refuse,
	}}
	r.chains["icmp-6"] = &chain{rules: [][]expr.Any{
		// router solicitation and advertisement, neighbour solicitation and advertisement (RFC
		// 4861)
		rule(types(133, 136), hops(255), pass),
		rule(types(130, 132), hops(1), pass), // multicast listener discovery (RFC 2710)
		rule(types(143, 143), hops(1), pass), // its second version (RFC 3810)
		rule(related, pass),
		// destination unreachable, packet too big, time exceeded, parameter problem
		rule(types(1, 4), few(errorRate), pass),
		rule(types(129, 129), isEstablished(), pass), // echo reply
		rule(types(128, 128), byTunnel, pass),        // echo request
		rule(types(128, 128), few(echoRate), pass),
		refuse,
	}}
}

// addNoForward keeps a node without a document from forwarding to addresses of the platform, and
// with Input.Drop from forwarding at all.
func (r *ruleset) addNoForward(c nat.Config) {
	forward := &chain{kind: nftables.ChainTypeFilter, hook: *nftables.ChainHookForward, priority: *nftables.ChainPriorityMangle}
	for _, p := range nat.Platform {
		f := familyOf(p.Addr().Is6())
		forward.rules = append(forward.rules, rule(isFamily(f), isIn(f, f.dst, p), goTo(dropChain(nat.DropPlatform))))
	}
	if c.Input.Drop {
		forward.rules = append(forward.rules, goTo(dropChain(nat.DropInterface)))
	}
	r.chains["forward"] = forward
}
