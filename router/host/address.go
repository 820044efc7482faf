package host

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// addressProtocol marks the addresses that isthmus has added (IFA_PROTO, since Linux 5.18). Others are never removed.
const addressProtocol = 0x49

// ifaProto is IFA_PROTO of linux/if_addr.h.
const ifaProto = 11

// SetAddresses gives an interface the wanted addresses, each as a host of its own (/32 or /128), and takes away those
// that it gave earlier and that are not wanted any more. Addresses that someone else gave are left alone, wanted or not. It
// returns how many were added or removed. It acts in the calling thread's network namespace.
func SetAddresses(name string, want []netip.Addr) (changed int, err error) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return 0, fmt.Errorf("reading interface %s: %w", name, err)
	}
	have, err := addresses(uint32(link.Index))
	if err != nil {
		return 0, fmt.Errorf("reading addresses of %s: %w", name, err)
	}
	var errs []error
	do := func(what string, kind, flags uint16, a netip.Addr) {
		if err := route(addressMessage(kind, flags, uint32(link.Index), a)); err != nil {
			errs = append(errs, fmt.Errorf("%s address %v of %s: %w", what, a, name, err))
			return
		}
		changed++
	}
	for _, a := range want {
		if _, ok := have[a]; !ok {
			do("adding", unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, a)
			have[a] = addressProtocol // a second mention adds nothing
		}
	}
	for a, protocol := range have {
		if protocol == addressProtocol && !slices.Contains(want, a) {
			do("removing", unix.RTM_DELADDR, 0, a)
		}
	}
	return changed, errors.Join(errs...)
}

func addressMessage(kind, flags uint16, link uint32, a netip.Addr) []byte {
	family, size := byte(unix.AF_INET), byte(32)
	if a.Is6() {
		family, size = unix.AF_INET6, 128
	}
	header := append([]byte{family, size, unix.IFA_F_NODAD, unix.RT_SCOPE_UNIVERSE}, u32(link)...)
	return message(kind, flags|unix.NLM_F_ACK, 1, header, attr(unix.IFA_LOCAL, a.AsSlice()), attr(unix.IFA_ADDRESS, a.AsSlice()),
		attr(ifaProto, []byte{addressProtocol}))
}

// addresses returns the addresses of an interface, with the protocol that gave them.
func addresses(link uint32) (map[netip.Addr]byte, error) {
	const attempts = 10
	for range attempts {
		b, err := syscall.NetlinkRIB(unix.RTM_GETADDR, unix.AF_UNSPEC)
		if err != nil {
			return nil, err
		}
		messages, err := syscall.ParseNetlinkMessage(b)
		if err != nil {
			return nil, err
		}
		found, interrupted := map[netip.Addr]byte{}, false
		for _, m := range messages {
			interrupted = interrupted || m.Header.Flags&unix.NLM_F_DUMP_INTR != 0
			if m.Header.Type != unix.RTM_NEWADDR || len(m.Data) < unix.SizeofIfAddrmsg || native.Uint32(m.Data[4:]) != link {
				continue
			}
			attrs, err := syscall.ParseNetlinkRouteAttr(&m)
			if err != nil {
				return nil, err
			}
			var local, address netip.Addr
			var protocol byte
			for _, a := range attrs {
				switch a.Attr.Type {
				case unix.IFA_LOCAL:
					local, _ = netip.AddrFromSlice(a.Value)
				case unix.IFA_ADDRESS: // of the peer on a point-to-point link, else the same
					address, _ = netip.AddrFromSlice(a.Value)
				case ifaProto:
					protocol = a.Value[0]
				}
			}
			if !local.IsValid() {
				local = address
			}
			found[local] = protocol
		}
		if !interrupted {
			return found, nil
		}
	}
	return nil, fmt.Errorf("interrupted %d times by changes", attempts)
}
