// Package link is the only access to the kernel's links, addresses and IPsec states (rtnetlink(7),
// netlink XFRM).
//
// Every operation reads first and writes only what differs, adds before it deletes, and changes or
// removes only interfaces whose alias (IFLA_IFALIAS) marks them as ours. A dump that the kernel
// interrupted (NLM_F_DUMP_INTR) is repeated. A read that fails is an error and never an empty
// answer.
package link

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Errors that callers distinguish.
var (
	ErrNoKind   = errors.New("the kernel has no interfaces of this kind")
	ErrNotOurs  = errors.New("an interface of this name exists that is not ours")
	ErrNotFound = errors.New("no such interface")
)

// The kinds of interface (IFLA_INFO_KIND) that Ensure supports.
const (
	Xfrm      = "xfrm"
	WireGuard = "wireguard"
	TUN       = "tun" // created by the process that serves it; Ensure only configures it
)

// Wanted is the wanted configuration of an interface.
type Wanted struct {
	Name     string
	Kind     string
	Alias    string // marks the interface as ours
	IfID     uint32 // of an xfrm interface; not 0
	Underlay string // of an xfrm interface: carries the encrypted packets; empty: none
	MTU      int    // bytes
	// Addresses are all addresses of the interface; others are removed, except IPv6 link-local
	// ones.
	Addresses []Address
	// Sysctls maps paths below /proc/sys/net, in which %s stands for the interface name, to values.
	// A path that this kernel does not have is skipped.
	Sysctls map[string]string
}

// Address is an address of an interface. With a Peer, the connected route leads to the peer alone,
// instead of the prefix.
type Address struct {
	Local netip.Prefix
	Peer  netip.Addr
}

// Link is the state of an interface.
type Link struct {
	Name  string
	Index int
	Kind  string
	Alias string
	IfID  uint32
	MTU   int
	Up    bool // IFF_UP

	RxBytes, TxBytes     uint64
	RxPackets, TxPackets uint64

	parent int
	raw    netlink.Link
}

// Links reads and writes the network namespace of the thread that called Open. Its methods are safe
// for concurrent use.
type Links struct {
	h       *netlink.Handle
	sockets map[int]*nl.SocketHandle // by protocol, for requests that the library does not support
	writes  atomic.Uint64
	mu      sync.Mutex // one Ensure, Remove or pool change at a time
}

// Open opens the sockets.
func Open() (*Links, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_XFRM)
	if errors.Is(err, unix.EPROTONOSUPPORT) { // a kernel without IPsec
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	}
	if err != nil {
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	s, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	// Strict checking makes the kernel filter an address dump by interface. Kernels before 4.20 do
	// not support it, so addresses filters the answer in any case.
	_ = unix.SetsockoptInt(s.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	l := &Links{h: h, sockets: map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}}
	if s, err = nl.Subscribe(unix.NETLINK_XFRM); err == nil {
		l.sockets[unix.NETLINK_XFRM] = &nl.SocketHandle{Socket: s}
	} else if !errors.Is(err, unix.EPROTONOSUPPORT) {
		l.Close()
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	return l, nil
}

// Close closes the sockets.
func (l *Links) Close() {
	l.h.Close()
	for _, s := range l.sockets {
		s.Close()
	}
}

// Writes returns how many changes have been made to the kernel.
func (l *Links) Writes() uint64 { return l.writes.Load() }

// Get reads one interface. The error wraps ErrNotFound when there is none of that name.
func (l *Links) Get(name string) (Link, error) {
	raw, err := l.h.LinkByName(name)
	var none netlink.LinkNotFoundError
	if errors.As(err, &none) {
		return Link{}, fmt.Errorf("reading interface %s: %w", name, ErrNotFound)
	}
	if err != nil {
		return Link{}, fmt.Errorf("reading interface %s: %w", name, err)
	}
	return fromNetlink(raw), nil
}

// List reads every interface whose alias begins with mark.
func (l *Links) List(mark string) ([]Link, error) {
	var all []netlink.Link
	err := again(func() (err error) { all, err = l.h.LinkList(); return err })
	if err != nil {
		return nil, fmt.Errorf("listing interfaces: %w", err)
	}
	var ours []Link
	for _, raw := range all {
		if strings.HasPrefix(raw.Attrs().Alias, mark) {
			ours = append(ours, fromNetlink(raw))
		}
	}
	return ours, nil
}

// Ensure creates or changes an interface. An interface with our alias and another name, kind, if_id
// or underlay is recreated, because these cannot change; everything else is changed in place. A TUN
// is not created: without one, the error wraps ErrNotFound.
func (l *Links) Ensure(w Wanted) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	link, err := l.ensureLinkLocked(w)
	if err != nil {
		return fmt.Errorf("making interface %s: %w", w.Name, err)
	}
	if err := l.configureLocked(link, w); err != nil {
		return fmt.Errorf("configuring interface %s: %w", w.Name, err)
	}
	return nil
}

func (l *Links) ensureLinkLocked(w Wanted) (Link, error) {
	var parent int
	if w.Kind == Xfrm && w.Underlay != "" {
		u, err := l.Get(w.Underlay)
		if err != nil {
			return Link{}, fmt.Errorf("finding the underlay: %w", err)
		}
		parent = u.Index
	}
	have, err := l.Get(w.Name)
	if err == nil {
		same := have.Kind == w.Kind && have.IfID == w.IfID && have.parent == parent
		switch {
		case same && have.Alias == w.Alias:
			return have, nil
		case same && have.Alias == "" && !have.Up:
			return have, nil // made by us and not yet marked: the alias is set before IFF_UP
		case have.Alias != w.Alias:
			return Link{}, ErrNotOurs
		}
		if err := l.delete(have); err != nil {
			return Link{}, err
		}
	} else if !errors.Is(err, ErrNotFound) {
		return Link{}, err
	}
	attrs := netlink.LinkAttrs{Name: w.Name, ParentIndex: parent, TxQLen: -1}
	var raw netlink.Link
	switch w.Kind {
	case Xfrm:
		raw = &netlink.Xfrmi{LinkAttrs: attrs, Ifid: w.IfID}
	case WireGuard:
		raw = &netlink.Wireguard{LinkAttrs: attrs}
	default:
		return Link{}, fmt.Errorf("kind %s: %w", w.Kind, ErrNotFound)
	}
	err = l.h.LinkAdd(raw)
	// the if_id is taken, perhaps by our interface under an earlier name
	if errors.Is(err, unix.EEXIST) && w.Kind == Xfrm {
		var former []Link
		if former, err = l.List(w.Alias); err != nil {
			return Link{}, err
		}
		for _, f := range former {
			if f.Alias == w.Alias && f.Kind == Xfrm {
				if err := l.delete(f); err != nil {
					return Link{}, err
				}
			}
		}
		err = l.h.LinkAdd(raw)
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return Link{}, fmt.Errorf("kind %s: %w", w.Kind, ErrNoKind)
	}
	if err != nil {
		return Link{}, err
	}
	l.writes.Add(1)
	return l.Get(w.Name)
}

func (l *Links) configureLocked(link Link, w Wanted) error {
	if link.Alias != w.Alias {
		if err := l.write(l.h.LinkSetAlias(link.raw, w.Alias)); err != nil {
			return fmt.Errorf("setting the alias: %w", err)
		}
	}
	// Without promote_secondaries, deleting an address also deletes the others of its prefix,
	// including one that was just added to replace it.
	if err := l.Sysctl("ipv4/conf/"+w.Name+"/promote_secondaries", "1"); err != nil {
		return err
	}
	for key, value := range w.Sysctls {
		if err := l.Sysctl(fmt.Sprintf(key, w.Name), value); err != nil {
			return err
		}
	}
	if w.MTU != 0 && link.MTU != w.MTU {
		if err := l.write(l.h.LinkSetMTU(link.raw, w.MTU)); err != nil {
			return fmt.Errorf("setting the MTU: %w", err)
		}
	}
	if !link.Up {
		if err := l.write(l.h.LinkSetUp(link.raw)); err != nil {
			return fmt.Errorf("setting it up: %w", err)
		}
	}
	// Last, because an interface that comes up later does not get the routes to its IPv6 peers.
	return l.ensureAddressesLocked(link.Index, w.Addresses)
}

// Sysctl writes a value below /proc/sys/net when it differs. A path that does not exist is skipped.
func (l *Links) Sysctl(path, value string) error {
	path = "/proc/sys/net/" + path
	have, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) || err == nil && strings.TrimSpace(string(have)) == value {
		return nil
	}
	if err == nil {
		err = l.write(os.WriteFile(path, []byte(value), 0))
	}
	if err != nil {
		return fmt.Errorf("setting sysctl: %w", err)
	}
	return nil
}

// Remove deletes every interface of the given kinds with exactly this alias. None is not an error.
func (l *Links) Remove(alias string, kinds ...string) error {
	if alias == "" {
		return errors.New("removing an interface: no alias")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	ours, err := l.List(alias)
	if err != nil {
		return err
	}
	for _, link := range ours {
		if link.Alias == alias && slices.Contains(kinds, link.Kind) {
			if err := l.delete(link); err != nil {
				return fmt.Errorf("removing interface %s: %w", link.Name, err)
			}
		}
	}
	return nil
}

func (l *Links) delete(link Link) error {
	err := l.h.LinkDel(link.raw)
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return l.write(err)
}

// write counts a change that succeeded.
func (l *Links) write(err error) error {
	if err == nil {
		l.writes.Add(1)
	}
	return err
}

// again retries a dump that the kernel interrupted because the table changed meanwhile.
func again(dump func() error) error {
	var err error
	for range 10 {
		if err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
	}
	return err
}

func fromNetlink(raw netlink.Link) Link {
	a := raw.Attrs()
	link := Link{
		Name: a.Name, Index: a.Index, Kind: raw.Type(), Alias: a.Alias, MTU: a.MTU,
		Up: a.RawFlags&unix.IFF_UP != 0, raw: raw,
	}
	if raw.Type() == "tuntap" {
		link.Kind = TUN
	}
	if x, ok := raw.(*netlink.Xfrmi); ok {
		link.IfID = x.Ifid
		link.parent = x.ParentIndex
	}
	if s := a.Statistics; s != nil {
		link.RxBytes, link.TxBytes, link.RxPackets, link.TxPackets = s.RxBytes, s.TxBytes, s.RxPackets, s.TxPackets
	}
	return link
}

// compact returns the addresses without duplicates, in order.
func compact(a []Address) []Address {
	a = slices.Clone(a)
	slices.SortFunc(a, func(x, y Address) int {
		if c := x.Local.Compare(y.Local); c != 0 {
			return c
		}
		return x.Peer.Compare(y.Peer)
	})
	return slices.Compact(a)
}
