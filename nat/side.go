package nat

import (
	"errors"
	"net/netip"
	"slices"
)

// Attachment is an interface that leads to an inside network. Packets may be forwarded between
// attachments, and from an attachment to the underlay; no other interface forwards.
type Attachment struct {
	// Interface is that of a tunnel, a plain one, or the underlay itself. On the underlay, only
	// packets from and to Sources are inside.
	Interface string
	// Sources are the valid source prefixes of packets that arrive on the interface.
	Sources []netip.Prefix
}

// Session is an address that may open BGP, and the interface that it must use.
type Session struct {
	Interface string
	Address   netip.Addr
}

// Door lets an attachment reach an address of the node.
type Door struct {
	Interface string
	Address   netip.Addr
	// From are the allowed sources; for an attachment with an interface of its own, all of its
	// sources are allowed, and From is empty.
	From []netip.Prefix
}

// Metrics has the sources that may read the metrics of the node over plain HTTP.
type Metrics struct {
	// Port is the TCP port; 0: there are no metrics over plain HTTP.
	Port uint16
	From []netip.Prefix
	// Inlets are the addresses with the interfaces by which the sources may reach them. The port is
	// closed to all others but the loopback, at these addresses alone.
	Inlets []Inlet
}

// Inlet is an address of the node with an interface by which packets may come to it.
type Inlet struct {
	Interface string
	Address   netip.Addr
}

// String returns it as "169.254.80.1 by t-site".
func (i Inlet) String() string { return i.Address.String() + " by " + i.Interface }

// API has the sources that may reach the node's own API.
type API struct {
	// Port is the TCP port of the API; 0: the rules have no API.
	Port uint16
	// From are the sources that may reach it, on any interface. The loopback always may.
	From []netip.Prefix
}

// Input decides which packets may reach the node itself, besides Sessions, Lanes, API and DNS.
type Input struct {
	// Drop drops all packets except answers to the node, ICMP as far as a node needs it (RFC 4890
	// section 4.4), answers of DHCP, the packets of tunnels, and SSH. Default: isthmus does not
	// filter services that are not its own.
	Drop bool
	// SSH are the sources that may reach TCP port 22; through a tunnel only those within a prefix
	// of the tunnel's own sources. With Drop.
	SSH []netip.Prefix
}

// Tunnel is the interface of a tunnel.
type Tunnel struct {
	Interface string
	// Port is the UDP port that receives packets of the tunnel. 0: it is IPsec, which arrives on
	// the underlay as IKE and ESP.
	Port uint16
}

// Reason is the reason why a packet was dropped.
type Reason string

// The reasons.
const (
	// DropGuard: the packet would have left by the underlay with a source that belongs neither to a
	// pool nor to the node.
	DropGuard Reason = "guard"
	// DropSource: the source does not belong to the attachment on which the packet arrived.
	DropSource Reason = "foreign-source"
	// DropInterface: the packet arrived on an interface, or would have left by one, that is neither
	// an attachment nor the underlay.
	DropInterface Reason = "unknown-interface"
	// DropUnderlay: the packet arrived on the underlay, and belongs to no flow that began inside,
	// no DNAT and no pair of a no-nat policy.
	DropUnderlay Reason = "from-underlay"
	// DropPlatform: the packet went to an address of the cloud's platform that no policy names.
	DropPlatform Reason = "platform"
	// DropInput: the packet was addressed to the node itself, and no rule allows it.
	DropInput Reason = "input"
)

// Reasons lists every reason.
var Reasons = []Reason{DropGuard, DropSource, DropInterface, DropUnderlay, DropPlatform, DropInput}

// String describes the reason.
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

// PlatformOf returns the most specific prefix of Platform that contains an address; the zero Prefix
// if none does.
func PlatformOf(a netip.Addr) (in netip.Prefix) {
	for _, p := range Platform {
		if p.Contains(a) && (!in.IsValid() || p.Bits() > in.Bits()) {
			in = p
		}
	}
	return in
}

// namesPlatform reports whether a destination names addresses of the platform: it is one of their
// prefixes, or within one and not larger than the service's.
func namesPlatform(destination netip.Prefix) bool {
	in := PlatformOf(destination.Masked().Addr())
	return in.IsValid() && destination.Bits() >= in.Bits()
}

// NamesPlatform reports whether a rule names addresses of the platform, so that it may lead there.
func (r *Rule) NamesPlatform() bool { return namesPlatform(r.Destination) }

// SSHByTunnel returns the sources that may reach SSH through a tunnel: those of Input that lie
// within a tunnel's sources. A tunnel with all addresses as sources adds none.
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

// Arms returns the prefixes of attachments that are reached through the underlay's own interface.
func (c *Config) Arms() (arms []netip.Prefix) {
	for _, a := range c.Attachments {
		if a.Interface == c.Underlay {
			arms = append(arms, a.Sources...)
		}
	}
	return distinct(arms)
}

// Attached returns the names of the attachments' interfaces, without the underlay's, sorted.
func (c *Config) Attached() (names []string) {
	for _, a := range c.Attachments {
		if a.Interface != c.Underlay {
			names = append(names, a.Interface)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Plain returns the names of the attachments' interfaces, without the underlay's and tunnels,
// sorted.
func (c *Config) Plain() []string {
	return slices.DeleteFunc(c.Attached(), func(name string) bool {
		return slices.ContainsFunc(c.Tunnels, func(t Tunnel) bool { return t.Interface == name })
	})
}

// sources returns the source prefixes of an interface.
func (c *Config) sources(iface string) (all []netip.Prefix) {
	for _, a := range c.Attachments {
		if a.Interface == iface {
			all = append(all, a.Sources...)
		}
	}
	return all
}

// Crosses reports whether the first packet of a flow may go from one interface to another,
// considering only the sides of the interfaces and the prefixes of attachments: an empty Reason if
// it may. opened means that the packet is for a server behind an address of a pool. Match decides
// by policies about flows that leave by the underlay.
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

var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// Outside returns why an address is not that of a host outside of the node: what the node sends to
// the address of an operator's choice must not reach services of the machine or of its platform.
func Outside(a netip.Addr) error {
	a = a.Unmap()
	if nat64.Contains(a) {
		// A translator leads to the IPv4 address in it (RFC 6052).
		b := a.As16()
		a = netip.AddrFrom4([4]byte(b[12:]))
	}
	switch {
	case !a.IsValid() || a.IsUnspecified():
		return errors.New("is not the address of a host")
	case a.IsLoopback():
		return errors.New("is the node itself")
	case PlatformOf(a).IsValid():
		return errors.New("is a service of the cloud for the machine")
	case a.IsLinkLocalUnicast():
		return errors.New("is link-local")
	case a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return errors.New("is not the address of one host")
	}
	return nil
}
