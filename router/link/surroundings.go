package link

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/fib"
)

// Surroundings reads the addresses, routes and rules of the machine that are not isthmus's. It
// leaves out the canary's interface, which comes and goes without a meaning for others.
func (l *Links) Surroundings() (fib.Surroundings, error) {
	var s fib.Surroundings
	var links []netlink.Link
	if err := again(func() (err error) { links, err = l.h.LinkList(); return err }); err != nil {
		return s, fmt.Errorf("reading interfaces: %w", err)
	}
	names := make(map[int]string, len(links))
	s.Devices = make(map[string]fib.Device, len(links))
	var canary int // index; 0: none
	for _, link := range links {
		if isCanary(link) {
			canary = link.Attrs().Index
			continue
		}
		names[link.Attrs().Index] = link.Attrs().Name
		s.Devices[link.Attrs().Name] = fib.Device{Index: uint32(link.Attrs().Index), MTU: link.Attrs().MTU, Down: isDown(link.Attrs())}
		if x := link.Attrs().Xdp; x != nil && x.Attached {
			s.Filters = append(s.Filters, fmt.Sprintf("interface %s has an XDP program", link.Attrs().Name))
		}
	}
	for _, read := range []struct {
		what    string
		request int
		answer  uint16
		body    nl.NetlinkRequestData
		decode  func([]byte)
	}{
		{"addresses", unix.RTM_GETADDR, unix.RTM_NEWADDR, nl.NewIfAddrmsg(unix.AF_UNSPEC), func(m []byte) {
			if a, index, err := parseAddress(m); err == nil && a.protocol != Protocol && index != canary {
				s.Addresses = append(s.Addresses, fib.Assigned{Interface: names[index], Prefix: a.Local})
			}
		}},
		{"routes", unix.RTM_GETROUTE, unix.RTM_NEWROUTE, &nl.RtMsg{}, func(m []byte) { s.Routes = append(s.Routes, foreign(m, names, canary)...) }},
		{"queueing disciplines", unix.RTM_GETQDISC, unix.RTM_NEWQDISC, &nl.TcMsg{}, func(m []byte) {
			if index, kind := parseQdisc(m); kind == "clsact" || kind == "ingress" {
				s.Filters = append(s.Filters, fmt.Sprintf("interface %s has filters of traffic control (%s)", names[index], kind))
			}
		}},
		{"rules", unix.RTM_GETRULE, unix.RTM_NEWRULE, &nl.RtMsg{}, func(m []byte) {
			r, protocol, ok := parseRule(m)
			switch {
			case ok && protocol == Protocol && r.Table == fib.Transit.Table():
				s.Transit[family(r.IPv6)] = true
			case ok && protocol != Protocol:
				s.Rules = append(s.Rules, r)
			}
		}},
	} {
		var answers [][]byte
		err := again(func() (err error) {
			req := l.request(read.request, unix.NLM_F_DUMP)
			req.AddData(read.body)
			answers, err = req.Execute(unix.NETLINK_ROUTE, read.answer)
			return err
		})
		if err != nil {
			return s, fmt.Errorf("reading %s: %w", read.what, err)
		}
		for _, m := range answers {
			read.decode(m)
		}
	}
	slices.SortStableFunc(s.Rules, func(a, b fib.Rule) int { return int(int64(a.Priority) - int64(b.Priority)) })
	return s, nil
}

// foreign decodes the body of an RTM_NEWROUTE message. It returns nothing for routes of isthmus,
// which may be a hundred thousand, and for next hops through the canary's interface.
func foreign(m []byte, names map[int]string, canary int) (out []fib.Foreign) {
	if len(m) < unix.SizeofRtMsg {
		return nil
	}
	head := nl.DeserializeRtMsg(m)
	if head.Protocol == fib.Protocol || head.Flags&unix.RTM_F_CLONED != 0 || head.Table == fib.TableLocal ||
		head.Type != unix.RTN_UNICAST || head.Family != unix.AF_INET && head.Family != unix.AF_INET6 {
		return nil
	}
	attrs, err := nl.ParseRouteAttr(m[unix.SizeofRtMsg:])
	if err != nil {
		return nil
	}
	r := fib.Foreign{Table: uint32(head.Table)}
	to := netip.IPv4Unspecified()
	if head.Family == unix.AF_INET6 {
		to = netip.IPv6Unspecified()
	}
	var hops []byte
	for _, a := range attrs {
		switch a.Attr.Type &^ unix.NLA_F_NESTED {
		case unix.RTA_DST:
			if addr, ok := netip.AddrFromSlice(a.Value); ok {
				to = addr
			}
		case unix.RTA_TABLE:
			r.Table = binary.NativeEndian.Uint32(a.Value)
		case unix.RTA_OIF:
			index := int(binary.NativeEndian.Uint32(a.Value))
			if index == canary {
				return nil
			}
			r.Interface = names[index]
		case unix.RTA_PRIORITY:
			r.Metric = binary.NativeEndian.Uint32(a.Value)
		case unix.RTA_GATEWAY:
			r.Gateway, _ = netip.AddrFromSlice(a.Value)
		case unix.RTA_MULTIPATH:
			hops = a.Value
		}
	}
	r.Prefix = netip.PrefixFrom(to, int(head.Dst_len))
	if hops == nil {
		return []fib.Foreign{r}
	}
	for len(hops) >= unix.SizeofRtNexthop {
		n := int(binary.NativeEndian.Uint16(hops))
		if n < unix.SizeofRtNexthop || n > len(hops) {
			break
		}
		index, inside := int(binary.NativeEndian.Uint32(hops[4:])), hops[unix.SizeofRtNexthop:n]
		hops = hops[min((n+3)&^3, len(hops)):]
		if index == canary {
			continue
		}
		hop := r
		hop.Interface = names[index]
		if inner, err := nl.ParseRouteAttr(inside); err == nil {
			for _, a := range inner {
				if a.Attr.Type == unix.RTA_GATEWAY {
					hop.Gateway, _ = netip.AddrFromSlice(a.Value)
				}
			}
		}
		out = append(out, hop)
	}
	return out
}

// parseQdisc decodes the body of an RTM_NEWQDISC message.
func parseQdisc(m []byte) (index int, kind string) {
	if len(m) < nl.SizeofTcMsg {
		return 0, ""
	}
	attrs, err := nl.ParseRouteAttr(m[nl.SizeofTcMsg:])
	if err != nil {
		return 0, ""
	}
	for _, a := range attrs {
		if a.Attr.Type == nl.TCA_KIND {
			kind = strings.TrimRight(string(a.Value), "\x00")
		}
	}
	return int(nl.DeserializeTcMsg(m).Ifindex), kind
}

// family returns 0 for IPv4, and 1 for IPv6.
func family(ipv6 bool) int {
	if ipv6 {
		return 1
	}
	return 0
}

// parseRule decodes the body of an RTM_NEWRULE message. It also returns who made the rule
// (FRA_PROTOCOL).
func parseRule(m []byte) (r fib.Rule, protocol byte, ok bool) {
	if len(m) < unix.SizeofRtMsg {
		return r, 0, false
	}
	// struct fib_rule_hdr has the same size and begins with the same fields
	head := nl.DeserializeRtMsg(m)
	if head.Family != unix.AF_INET && head.Family != unix.AF_INET6 {
		return r, 0, false
	}
	attrs, err := nl.ParseRouteAttr(m[unix.SizeofRtMsg:])
	if err != nil {
		return r, 0, false
	}
	const toTable = 1 // FR_ACT_TO_TBL
	r = fib.Rule{IPv6: head.Family == unix.AF_INET6, Table: uint32(head.Table), Plain: head.Dst_len == 0 && head.Src_len == 0 && head.Tos == 0 && head.Flags&2 == 0 && head.Type == toTable}
	for _, a := range attrs {
		switch a.Attr.Type {
		case nl.FRA_PRIORITY:
			r.Priority = binary.NativeEndian.Uint32(a.Value)
		case nl.FRA_PROTOCOL:
			if len(a.Value) > 0 {
				protocol = a.Value[0]
			}
		case nl.FRA_TABLE:
			r.Table = binary.NativeEndian.Uint32(a.Value)
		case nl.FRA_FWMARK, nl.FRA_FWMASK, nl.FRA_IIFNAME, nl.FRA_OIFNAME, nl.FRA_GOTO, nl.FRA_SRC, nl.FRA_DST, nl.FRA_IP_PROTO, nl.FRA_SPORT_RANGE, nl.FRA_DPORT_RANGE, nl.FRA_UID_RANGE, nl.FRA_L3MDEV, nl.FRA_TUN_ID:
			r.Plain = false
		}
	}
	return r, protocol, true
}

// isDown reports whether an interface cannot carry packets. Many virtual ones have no operational
// state.
func isDown(a *netlink.LinkAttrs) bool {
	switch a.OperState {
	case netlink.OperDown, netlink.OperLowerLayerDown, netlink.OperNotPresent:
		return true
	}
	return a.Flags&net.FlagUp == 0
}
