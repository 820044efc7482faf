package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/tunnel"
)

// Protocol is the origin (IFA_PROTO, Linux 5.18) that marks the addresses of AddPool and of
// tunnels. Our routes carry the same number.
const Protocol = 0x49

const ifaProto = 11 // IFA_PROTO, linux/if_addr.h

// forever is an infinite lifetime (struct ifa_cacheinfo).
const forever = 0xffffffff

type assigned struct {
	Address
	protocol uint8
	scope    uint8
	// preferred and valid are lifetimes in seconds.
	preferred, valid uint32
}

// deprecated reports whether the address is never chosen as a source by default (RFC 6724 section
// 5, rule 3), and does not expire.
func (a assigned) deprecated() bool { return a.preferred == 0 && a.valid == forever }

// ensureAddressesLocked sets the addresses of one of our interfaces.
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
			// An interface has an IPv6 address only once, whatever its prefix length or peer, so
			// the old one is removed first.
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

// AddPool adds missing pool addresses to interfaces, which need not be ours. Existing addresses
// keep their origin. IPv6 addresses are deprecated, so that the node's own traffic uses them as a
// source only on request. AddPool continues after an interface that fails.
func (l *Links) AddPool(wanted map[string][]netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, iface := range slices.Sorted(maps.Keys(wanted)) {
		if err := l.addPoolLocked(iface, wanted[iface]); err != nil {
			errs = append(errs, fmt.Errorf("adding pool addresses to %s: %w", iface, err))
		}
	}
	return errors.Join(errs...)
}

func (l *Links) addPoolLocked(iface string, wanted []netip.Addr) error {
	if len(wanted) == 0 {
		return nil
	}
	link, err := l.Get(iface)
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
	return nil
}

// PrunePool removes the addresses that AddPool has added to any interface, in this process or an
// earlier one, and that are not wanted on that interface. It keeps addresses of tunnels, which
// carry the same origin. It continues after an address that cannot be removed.
func (l *Links) PrunePool(wanted map[string][]netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	added, err := l.poolLocked()
	if err != nil {
		return fmt.Errorf("reading pool addresses: %w", err)
	}
	var errs []error
	for _, p := range added {
		if slices.Contains(wanted[p.iface], p.Local.Addr()) {
			continue
		}
		if err := l.changeAddress(unix.RTM_DELADDR, p.index, p.Address); err != nil {
			errs = append(errs, fmt.Errorf("removing pool address %s of %s: %w", p.Local, p.iface, err))
		}
	}
	return errors.Join(errs...)
}

// pooled is a pool address with its interface.
type pooled struct {
	assigned
	iface string
	index int
}

// poolLocked returns the addresses that AddPool has added to any interface.
func (l *Links) poolLocked() (out []pooled, err error) {
	var links []netlink.Link
	if err := again(func() (err error) { links, err = l.h.LinkList(); return err }); err != nil {
		return nil, fmt.Errorf("listing interfaces: %w", err)
	}
	names := map[int]string{}
	for _, one := range links {
		if a := one.Attrs(); !strings.HasPrefix(a.Alias, tunnel.Mark) {
			names[a.Index] = a.Name
		}
	}
	err = l.eachAddress(0, func(a assigned, index int) {
		if name, ok := names[index]; ok && a.protocol == Protocol {
			out = append(out, pooled{a, name, index})
		}
	})
	return out, err
}

// option changes a request about an address: flags replace NLM_F_EXCL, and an attribute is added.
type option struct {
	flags     int
	attribute *nl.RtAttr
}

// lifetime makes an IPv6 address valid forever and not preferred. IPv4 has no deprecated addresses.
func lifetime(a netip.Addr, flags int) option {
	if !a.Is6() {
		return option{flags: flags}
	}
	info := make([]byte, 16) // struct ifa_cacheinfo: preferred, valid, cstamp, tstamp
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
		// a tunnel has no other host, and a pool address is needed at once
		msg.Flags = unix.IFA_F_NODAD
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
func (l *Links) addresses(index int) (all []assigned, err error) {
	err = l.eachAddress(index, func(a assigned, on int) {
		if on == index {
			all = append(all, a)
		}
	})
	return all, err
}

// eachAddress calls see with every address and the index of its interface. With an index other than
// 0, the kernel may omit the addresses of other interfaces.
func (l *Links) eachAddress(index int, see func(assigned, int)) error {
	type one struct {
		assigned
		index int
	}
	var all []one
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
			all = append(all, one{a, on})
		}
		return nil
	})
	if errors.Is(err, unix.ENODEV) {
		return ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("reading addresses: %w", err)
	}
	for _, a := range all {
		see(a.assigned, a.index)
	}
	return nil
}

func (l *Links) request(command, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(command, flags)
	req.Sockets = l.sockets
	return req
}

// parseAddress decodes the body of an RTM_NEWADDR message and returns the index of the interface as
// well.
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
