// Package host probes the capabilities of the machine's kernel, and sets the kernel parameters that
// a router needs.
package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/netlink"
)

// Capability is something that a kernel may lack.
type Capability string

// The capabilities.
const (
	ESP           Capability = "esp"            // IPsec ESP with AES-GCM (xfrm)
	XFRMInterface Capability = "xfrm-interface" // interfaces by if_id
	WireGuard     Capability = "wireguard"      // the kernel's device
	TUN           Capability = "tun"            // needed by WireGuard in user space
	VRF           Capability = "vrf"
	NextHops      Capability = "nexthop-objects"
	NextHopGroups Capability = "nexthop-groups"
	NFTables      Capability = "nftables"
	NAT           Capability = "nat" // nftables chains of type nat
)

// Result is the result of probing one capability.
type Result struct {
	Capability Capability
	// Err is why the kernel lacks it; nil when it has it.
	Err error
}

// Probe tries each capability in a separate network namespace, which it removes. It needs
// CAP_SYS_ADMIN. An error means that nothing was probed.
func Probe() ([]Result, error) {
	var results []Result
	var err error
	onOwnThread(func() {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("making a network namespace: %w", err)
			return
		}
		if err = loopbackUp(); err != nil {
			err = fmt.Errorf("setting up a network namespace: %w", err)
			return
		}
		for _, p := range probes {
			results = append(results, Result{p.capability, p.try()})
		}
	})
	return results, err
}

// onOwnThread runs f on a thread that ends with it. It never uses the process's first thread, which
// cannot end before the process and represents the process in /proc.
func onOwnThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			onOwnThread(f) // runs on another thread while this goroutine holds the first
			return
		}
		f()
	}()
	<-done
}

// Names returns the capabilities without an error, in order.
func Names(results []Result) []string {
	var names []string
	for _, r := range results {
		if r.Err == nil {
			names = append(names, string(r.Capability))
		}
	}
	slices.Sort(names)
	return names
}

var probes = []struct {
	capability Capability
	try        func() error
}{
	{ESP, tryESP},
	{XFRMInterface, func() error { return tryLink("xfrm", netlink.AppendUint32(nil, unix.IFLA_XFRM_IF_ID, 1)) }},
	{WireGuard, func() error { return tryLink("wireguard", nil) }},
	{TUN, tryTUN},
	{VRF, func() error { return tryLink("vrf", netlink.AppendUint32(nil, unix.IFLA_VRF_TABLE, 1000)) }},
	{NextHops, func() error { return route(nextHop(1, netlink.New(unix.NHA_BLACKHOLE))) }},
	// of the next hop above
	{NextHopGroups, func() error { return route(nextHop(2, netlink.New(unix.NHA_GROUP, append(u32(1), 0, 0, 0, 0)...))) }},
	{NFTables, func() error { return netfilter(nil) }},
	{NAT, func() error { return netfilter(natChain()) }},
}

var native = binary.NativeEndian

func u32(v uint32) []byte  { return native.AppendUint32(nil, v) }
func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

// ask sends messages to the kernel and returns the first error in the answers, or nil once the
// kernel has acknowledged the message with sequence number last.
func ask(protocol int, last uint32, messages ...[]byte) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	timeout := unix.Timeval{Sec: 10}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return err
	}
	if err := unix.Sendto(fd, slices.Concat(messages...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buffer := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(fd, buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		for m, rest, ok := netlink.Next(buffer[:n]); ok; m, rest, ok = netlink.Next(rest) {
			if m.Kind != unix.NLMSG_ERROR || len(m.Body) < 4 {
				continue
			}
			if errno := m.Errno(); errno != 0 {
				return errno
			}
			if m.Sequence == last {
				return nil
			}
		}
	}
}

func route(m []byte) error { return ask(unix.NETLINK_ROUTE, 1, m) }

func nextHop(id uint32, what []byte) []byte {
	family := byte(unix.AF_UNSPEC)
	if id == 1 {
		family = unix.AF_INET
	}
	return netlink.Request(unix.RTM_NEWNEXTHOP, unix.NLM_F_ACK|unix.NLM_F_CREATE, 1, []byte{family, 0, 0, 0, 0, 0, 0, 0}, netlink.AppendUint32(nil, unix.NHA_ID, id), what)
}

// loopbackUp sets up the loopback interface, which blackhole next hops need.
func loopbackUp() error {
	m := make([]byte, unix.SizeofIfInfomsg)
	native.PutUint32(m[4:], 1) // its index in every namespace
	native.PutUint32(m[8:], unix.IFF_UP)
	native.PutUint32(m[12:], unix.IFF_UP)
	return route(netlink.Request(unix.RTM_NEWLINK, unix.NLM_F_ACK, 1, m))
}

// tryLink makes an interface of a kind.
func tryLink(kind string, data []byte) error {
	info := netlink.NewText(unix.IFLA_INFO_KIND, kind)
	if data != nil {
		info = append(info, netlink.Nest(unix.IFLA_INFO_DATA, data)...)
	}
	return route(netlink.Request(unix.RTM_NEWLINK, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL, 1,
		make([]byte, unix.SizeofIfInfomsg), netlink.NewText(unix.IFLA_IFNAME, "probe-"+kind), netlink.Nest(unix.IFLA_LINKINFO, info)))
}

// tryTUN makes an interface that goes with its file descriptor.
func tryTUN() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("probe-tun")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	return unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
}

// tryESP adds a tunnel mode security association of documentation addresses (linux/xfrm.h, struct
// xfrm_usersa_info).
func tryESP() error {
	const (
		newSA    = 0x10 // XFRM_MSG_NEWSA
		algAEAD  = 18   // XFRMA_ALG_AEAD
		infinite = ^uint64(0)
	)
	address := func(last byte) []byte { return append([]byte{192, 0, 2, last}, make([]byte, 12)...) }
	selector := make([]byte, 56)
	native.PutUint16(selector[40:], unix.AF_INET)
	lifetime := slices.Concat(native.AppendUint64(nil, infinite), native.AppendUint64(nil, infinite), native.AppendUint64(nil, infinite),
		native.AppendUint64(nil, infinite), make([]byte, 32))
	id := slices.Concat(address(2), be32(0x100), []byte{unix.IPPROTO_ESP, 0, 0, 0})
	info := slices.Concat(selector, id, address(1), lifetime, make([]byte, 32), make([]byte, 12), u32(0), u32(0),
		native.AppendUint16(nil, unix.AF_INET), []byte{1, 0, 0, 0}) // tunnel mode
	info = append(info, make([]byte, -len(info)&7)...)
	name := make([]byte, 64)
	copy(name, "rfc4106(gcm(aes))")
	aead := slices.Concat(name, u32(288), u32(128), make([]byte, 36))
	return ask(unix.NETLINK_XFRM, 1, netlink.Request(newSA, unix.NLM_F_ACK, 1, info, netlink.New(algAEAD, aead...)))
}

// netfilter makes a table, and more in it, in one transaction.
func netfilter(more []byte) error {
	const nft = unix.NFNL_SUBSYS_NFTABLES << 8
	batch := []byte{unix.AF_UNSPEC, 0, 0, unix.NFNL_SUBSYS_NFTABLES} // resource id, big endian
	table := netlink.Request(nft|unix.NFT_MSG_NEWTABLE, unix.NLM_F_ACK|unix.NLM_F_CREATE, 2, []byte{unix.NFPROTO_INET, 0, 0, 0}, netlink.NewText(unix.NFTA_TABLE_NAME, "probe"))
	last := uint32(2)
	if more != nil {
		last = 3
	}
	return ask(unix.NETLINK_NETFILTER, last, netlink.Request(unix.NFNL_MSG_BATCH_BEGIN, 0, 1, batch), table, more, netlink.Request(unix.NFNL_MSG_BATCH_END, 0, 4, batch))
}

func natChain() []byte {
	return netlink.Request(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWCHAIN, unix.NLM_F_ACK|unix.NLM_F_CREATE, 3, []byte{unix.NFPROTO_INET, 0, 0, 0},
		netlink.NewText(unix.NFTA_CHAIN_TABLE, "probe"), netlink.NewText(unix.NFTA_CHAIN_NAME, "nat"),
		netlink.Nest(unix.NFTA_CHAIN_HOOK, netlink.New(unix.NFTA_HOOK_HOOKNUM, be32(unix.NF_INET_POST_ROUTING)...), netlink.New(unix.NFTA_HOOK_PRIORITY, be32(100)...)),
		netlink.NewText(unix.NFTA_CHAIN_TYPE, "nat"))
}
