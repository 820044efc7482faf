package nat

import (
	"net/netip"
	"slices"
)

// Attachment is an interface by which a network inside is reached. A packet may be forwarded
// between attachments, and from an attachment to the underlay; no other interface forwards.
type Attachment struct {
	// Interface is a tunnel's, a plain one, or the underlay itself. By the underlay, only packets
	// from and to Sources are inside.
	Interface string
	// Sources are the prefixes that packets may have as source when they come by the interface.
	Sources []netip.Prefix
}

// Session is an address from which BGP may come, and the interface by which it must.
type Session struct {
	Interface string
	Address   netip.Addr
}

// Door lets an attachment reach an address of the node.
type Door struct {
	Interface string
	Address   netip.Addr
	// From are the sources that may; with an attachment that has an interface of its own, all that
	// belong to it may, and From is empty.
	From []netip.Prefix
}

// API says from where the node's own API may be reached.
type API struct {
	// Port is the TCP port of the API; 0: the rules know no API.
	Port uint16
	// From are the sources that may reach it, by any interface. The loopback always may.
	From []netip.Prefix
}

// Input says what may reach the node itself, beside what Sessions, API and DNS say.
type Input struct {
	// Drop drops what is not let in: what answers the node, ICMP as far as a node needs it (RFC
	// 4890 section 4.4), answers of DHCP, what carries tunnels, and SSH. Default: what isthmus does
	// not serve itself is reached as the machine has it.
	Drop bool
	// SSH are the sources that may reach TCP port 22, by a tunnel only those that a prefix of the
	// tunnel's own has in it. With Drop.
	SSH []netip.Prefix
}

// Tunnel is the interface of a tunnel.
type Tunnel struct {
	Interface string
	// Port is the UDP port to which packets of the tunnel come. 0: it is IPsec, which comes by the
	// underlay as IKE and ESP.
	Port uint16
}

// Reason says why a packet was dropped.
type Reason string

// The reasons.
const (
	// DropGuard: the packet would have left by the underlay with a source that is not a pool's nor
	// the node's.
	DropGuard Reason = "guard"
	// DropSource: the source does not belong to the attachment by which the packet came.
	DropSource Reason = "foreign-source"
	// DropInterface: the packet came by an interface, or would have left by one, that is neither an
	// attachment nor the underlay.
	DropInterface Reason = "unknown-interface"
	// DropUnderlay: the packet came by the underlay, and belongs to no flow that began inside, no
	// DNAT and no pair of a no-nat policy.
	DropUnderlay Reason = "from-underlay"
	// DropPlatform: the packet went to an address of the cloud's platform that no policy names.
	DropPlatform Reason = "platform"
	// DropInput: the packet was for the node itself, and nothing lets it in.
	DropInput Reason = "input"
)

// Reasons lists every reason.
var Reasons = []Reason{DropGuard, DropSource, DropInterface, DropUnderlay, DropPlatform, DropInput}

// String says it in words.
func (r Reason) String() string {
	switch r {
	case DropGuard:
		return "an inside source toward the Internet"
	case DropSource:
		return "a source that does not belong to the attachment"
	case DropInterface:
		return "an interface that the document does not name"
	case DropUnderlay:
		return "from the underlay to the inside without a flow that began inside"
	case DropPlatform:
		return "to an address of the cloud's platform"
	case DropInput:
		return "to the node itself, which does not let it in"
	}
	return string(r)
}

// Platform are the addresses at which clouds serve their machines: metadata, DNS, time, and all
// link-local ones. A flow to one of them leaves by the underlay only when a policy has exactly this
// address, or this prefix, as destination.
//
// Sources: AWS EC2 "Instance metadata" (169.254.169.254, fd00:ec2::254), Azure "What is IP address
// 168.63.129.16", Alibaba Cloud "Instance metadata" (100.100.100.200), RFC 3927, RFC 4291 section
// 2.5.6.
var Platform = []netip.Prefix{
	netip.MustParsePrefix("169.254.169.254/32"),
	netip.MustParsePrefix("168.63.129.16/32"),
	netip.MustParsePrefix("100.100.100.200/32"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("fd00:ec2::254/128"),
	netip.MustParsePrefix("fe80::/10"),
}

// PlatformOf returns the most specific prefix of Platform that an address is in; the zero Prefix
// when it is in none.
func PlatformOf(a netip.Addr) (in netip.Prefix) {
	for _, p := range Platform {
		if p.Contains(a) && (!in.IsValid() || p.Bits() > in.Bits()) {
			in = p
		}
	}
	return in
}

// namesPlatform says whether a destination names addresses of the platform: it is one of their
// prefixes, or within one and not larger than what serves there.
func namesPlatform(destination netip.Prefix) bool {
	in := PlatformOf(destination.Masked().Addr())
	return in.IsValid() && destination.Bits() >= in.Bits()
}

// NamesPlatform says whether a rule names addresses of the platform, so that it may lead there.
func (r *Rule) NamesPlatform() bool { return namesPlatform(r.Destination) }

// SSHByTunnel returns the sources that may reach SSH by a tunnel: those that Input names and a
// tunnel's sources have in them. A tunnel from which everything may come names none.
func (c *Config) SSHByTunnel() (may []netip.Prefix) {
	for _, p := range c.Input.SSH {
		if slices.ContainsFunc(c.Tunnels, func(t Tunnel) bool {
			return slices.ContainsFunc(c.sources(t.Interface), func(s netip.Prefix) bool { return s.Bits() > 0 && s.Bits() <= p.Bits() && s.Contains(p.Addr()) })
		}) {
			may = append(may, p)
		}
	}
	return may
}

// Arms are the prefixes of attachments that are reached by the underlay's own interface.
func (c *Config) Arms() (arms []netip.Prefix) {
	for _, a := range c.Attachments {
		if a.Interface == c.Underlay {
			arms = append(arms, a.Sources...)
		}
	}
	return distinct(arms)
}

// Attached returns the names of the interfaces that are attachments, without the underlay's, in
// order.
func (c *Config) Attached() (names []string) {
	for _, a := range c.Attachments {
		if a.Interface != c.Underlay {
			names = append(names, a.Interface)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Plain returns the names of the interfaces that are attachments, without the underlay's and
// tunnels, in order.
func (c *Config) Plain() []string {
	return slices.DeleteFunc(c.Attached(), func(name string) bool {
		return slices.ContainsFunc(c.Tunnels, func(t Tunnel) bool { return t.Interface == name })
	})
}

// sources returns the prefixes that belong to an interface.
func (c *Config) sources(iface string) (all []netip.Prefix) {
	for _, a := range c.Attachments {
		if a.Interface == iface {
			all = append(all, a.Sources...)
		}
	}
	return all
}

// Crosses says whether the first packet of a flow may go from one interface to another, by the
// sides of the interfaces and the prefixes of attachments alone: an empty Reason when it may.
// opened says that the packet is for a server behind an address of a pool. What policies then say
// about a flow that leaves by the underlay is for Match.
func (c *Config) Crosses(in, out string, f Flow, opened bool) Reason {
	attached := c.Attached()
	inside := func(iface string, a netip.Addr) bool {
		if iface == c.Underlay {
			return slices.ContainsFunc(c.Arms(), func(p netip.Prefix) bool { return p.Contains(a) })
		}
		return slices.Contains(attached, iface)
	}
	if slices.Contains(attached, in) && !slices.ContainsFunc(c.sources(in), func(p netip.Prefix) bool { return p.Contains(f.Source) }) {
		return DropSource
	}
	if in != c.Underlay && !slices.Contains(attached, in) || out != c.Underlay && !slices.Contains(attached, out) {
		return DropInterface
	}
	switch {
	case inside(in, f.Source):
		return ""
	case !inside(out, f.Destination):
		return DropUnderlay // from the underlay to the underlay
	case opened:
		return ""
	}
	for i := range c.Policies {
		p := &c.Policies[i]
		if p.Action == NoNAT && slices.ContainsFunc(p.Sources, func(s netip.Prefix) bool { return s.Contains(f.Destination) }) &&
			slices.ContainsFunc(p.Destinations, func(d netip.Prefix) bool { return d.Contains(f.Source) }) {
			return ""
		}
	}
	return DropUnderlay
}
