package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Protocol is the origin (IFA_PROTO, Linux 5.18) of the addresses that SetPool adds, by which they are known again.
// It is the number that our routes carry as well.
const Protocol = 0x49

const ifaProto = 11 // IFA_PROTO, linux/if_addr.h

// forever is a lifetime without an end (struct ifa_cacheinfo).
const forever = 0xffffffff

type assigned struct {
	Address
	protocol uint8
	scope    uint8
	// preferred and valid are lifetimes in seconds.
	preferred, valid uint32
}

// deprecated says whether the node does not choose the address as a source by itself (RFC 6724 section 5, rule 3), and has it for good.
func (a assigned) deprecated() bool { return a.preferred == 0 && a.valid == forever }

// ensureAddressesLocked makes the addresses of an interface of ours be the wanted ones.
func (l *Links) ensureAddressesLocked(index int, wanted []Address) error {
	have, err := l.addresses(index)
	if err != nil {
		return err
	}
	wanted = compact(wanted)
	for i, w := range wanted {
		if w.Peer.IsValid() && !w.Local.IsSingleIP() {
			wanted[i].Peer = netip.Addr{} // the prefix covers the peer
		}
	}
	for _, w := range wanted {
		if !slices.ContainsFunc(have, func(a assigned) bool { return a.Address == w }) {
			// An interface has an IPv6 address once, whatever its prefix length or peer: the former one has to go first.
			if i := slices.IndexFunc(have, func(a assigned) bool { return a.Local.Addr() == w.Local.Addr() }); i >= 0 && w.Local.Addr().Is6() {
				if err := l.changeAddress(unix.RTM_DELADDR, index, have[i].Address); err != nil {
					return fmt.Errorf("removing address %s: %w", have[i].Local, err)
				}
				have = slices.Delete(have, i, i+1)
			}
			if err := l.changeAddress(unix.RTM_NEWADDR, index, w); err != nil {
				return fmt.Errorf("adding address %s: %w", w.Local, err)
			}
		}
	}
	for _, a := range have {
		linkLocal6 := a.Local.Addr().Is6() && a.scope == unix.RT_SCOPE_LINK
		if !linkLocal6 && !slices.Contains(wanted, a.Address) {
			if err := l.changeAddress(unix.RTM_DELADDR, index, a.Address); err != nil {
				return fmt.Errorf("removing address %s: %w", a.Local, err)
			}
		}
	}
	return nil
}

// SetPool makes the addresses that an earlier SetPool added to an interface be exactly the wanted ones. The interface
// need not be ours. An address that it has from elsewhere is left to its owner. Those of IPv6 are deprecated: the node's own traffic
// does not leave with them unless it asks to.
func (l *Links) SetPool(iface string, wanted []netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.setPoolLocked(iface, wanted)
	if err != nil {
		return fmt.Errorf("setting pool addresses on %s: %w", iface, err)
	}
	return nil
}

func (l *Links) setPoolLocked(iface string, wanted []netip.Addr) error {
	link, err := l.Get(iface)
	if errors.Is(err, ErrNotFound) && len(wanted) == 0 {
		return nil // they went with it
	}
	if err != nil {
		return err
	}
	have, err := l.addresses(link.Index)
	if err != nil {
		return err
	}
	for _, w := range wanted {
		i := slices.IndexFunc(have, func(a assigned) bool { return a.Local.Addr() == w })
		if i < 0 {
			one := Address{Local: netip.PrefixFrom(w, w.BitLen())}
			if err := l.changeAddress(unix.RTM_NEWADDR, link.Index, one, lifetime(w, 0)); err != nil {
				return fmt.Errorf("adding address %s: %w", w, err)
			}
		} else if a := have[i]; w.Is6() && a.protocol == Protocol && !a.deprecated() {
			if err := l.changeAddress(unix.RTM_NEWADDR, link.Index, a.Address, lifetime(w, unix.NLM_F_REPLACE)); err != nil {
				return fmt.Errorf("deprecating address %s: %w", w, err)
			}
		}
	}
	for _, a := range have {
		if a.protocol == Protocol && !slices.Contains(wanted, a.Local.Addr()) {
			if err := l.changeAddress(unix.RTM_DELADDR, link.Index, a.Address); err != nil {
				return fmt.Errorf("removing address %s: %w", a.Local, err)
			}
		}
	}
	return nil
}

// option changes a request about an address: by flags in place of NLM_F_EXCL, and by an attribute.
type option struct {
	flags     int
	attribute *nl.RtAttr
}

// lifetime has an IPv6 address valid for good and not preferred. Those of IPv4 have no such thing.
func lifetime(a netip.Addr, flags int) option {
	if !a.Is6() {
		return option{flags: flags}
	}
	info := make([]byte, 16) // struct ifa_cacheinfo: preferred, valid, and when it was made and changed
	binary.NativeEndian.PutUint32(info[4:], forever)
	return option{flags, nl.NewRtAttr(unix.IFA_CACHEINFO, info)}
}

func (l *Links) changeAddress(command, index int, a Address, options ...option) error {
	local := a.Local.Addr()
	family := unix.AF_INET
	if local.Is6() {
		family = unix.AF_INET6
	}
	msg := nl.NewIfAddrmsg(family)
	msg.Index = uint32(index)
	msg.Prefixlen = uint8(a.Local.Bits())
	if local.Is6() {
		msg.Flags = unix.IFA_F_NODAD // a tunnel has no other host, and a pool address is in use at once
	}
	peer := a.Peer
	if !peer.IsValid() {
		peer = local
	}
	flags := unix.NLM_F_ACK
	if command == unix.RTM_NEWADDR {
		flags |= unix.NLM_F_CREATE | unix.NLM_F_EXCL
	}
	for _, o := range options {
		if o.flags != 0 {
			flags = flags&^unix.NLM_F_EXCL | o.flags
		}
	}
	req := l.request(command, flags)
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFA_LOCAL, local.AsSlice()))
	req.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, peer.AsSlice()))
	req.AddData(nl.NewRtAttr(ifaProto, []byte{Protocol}))
	for _, o := range options {
		if o.attribute != nil {
			req.AddData(o.attribute)
		}
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	gone := command == unix.RTM_DELADDR && errors.Is(err, unix.EADDRNOTAVAIL)
	if gone || command == unix.RTM_NEWADDR && errors.Is(err, unix.EEXIST) {
		return nil
	}
	return l.write(err)
}

// addresses reads all addresses of one interface.
func (l *Links) addresses(index int) ([]assigned, error) {
	var all []assigned
	err := again(func() error {
		all = nil
		msg := nl.NewIfAddrmsg(unix.AF_UNSPEC)
		msg.Index = uint32(index)
		req := l.request(unix.RTM_GETADDR, unix.NLM_F_DUMP)
		req.AddData(msg)
		answers, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWADDR)
		if err != nil {
			return err
		}
		for _, m := range answers {
			a, on, err := parseAddress(m)
			if err != nil {
				return err
			}
			if on == index {
				all = append(all, a)
			}
		}
		return nil
	})
	if errors.Is(err, unix.ENODEV) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("reading addresses: %w", err)
	}
	return all, nil
}

func (l *Links) request(command, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(command, flags)
	req.Sockets = l.sockets
	return req
}

// parseAddress decodes the body of an RTM_NEWADDR message and returns the index of the interface as well.
func parseAddress(m []byte) (assigned, int, error) {
	if len(m) < unix.SizeofIfAddrmsg {
		return assigned{}, 0, errors.New("decoding an address: message too short")
	}
	head := nl.DeserializeIfAddrmsg(m)
	attrs, err := nl.ParseRouteAttr(m[unix.SizeofIfAddrmsg:])
	if err != nil {
		return assigned{}, 0, fmt.Errorf("decoding an address: %w", err)
	}
	a := assigned{scope: head.Scope}
	var local, address netip.Addr
	for _, attr := range attrs {
		switch attr.Attr.Type {
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(attr.Value)
		case unix.IFA_ADDRESS:
			address, _ = netip.AddrFromSlice(attr.Value)
		case unix.IFA_CACHEINFO:
			if len(attr.Value) >= 8 {
				a.preferred, a.valid = binary.NativeEndian.Uint32(attr.Value), binary.NativeEndian.Uint32(attr.Value[4:])
			}
		case ifaProto:
			if len(attr.Value) == 1 {
				a.protocol = attr.Value[0]
			}
		}
	}
	if !local.IsValid() {
		local = address // IPv6 without a peer
	}
	if !local.IsValid() || int(head.Prefixlen) > local.BitLen() {
		return assigned{}, 0, errors.New("decoding an address: no valid address in it")
	}
	a.Local = netip.PrefixFrom(local, int(head.Prefixlen))
	if address.IsValid() && address != local {
		a.Peer = address
	}
	return a, int(head.Index), nil
}
