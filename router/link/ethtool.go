package link

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxStatistics bounds the statistics of a driver that are read. An adapter with many queues
	// has some thousands.
	maxStatistics = 4096
	// statisticsSet is ETH_SS_STATS (linux/ethtool.h), stringSize ETH_GSTRING_LEN.
	statisticsSet = 1
	stringSize    = 32
	// allowanceSuffix ends the names of the counters of packets beyond an allowance. The driver ena
	// of AWS has them (ena_stats_eni_strings).
	allowanceSuffix = "_allowance_exceeded"
)

// ethtool carries out a command of linux/ethtool.h on an interface, in place.
type ethtool func(iface string, command []byte) error

// Allowances reads how many packets the cloud has held back or dropped because they were beyond
// what it grants the machine, by the kind of allowance, as "bw_in" or "conntrack". An interface
// that does not exist, or whose driver has no such counters, has none.
func (l *Links) Allowances(iface string) (map[string]uint64, error) {
	all, err := statistics(l.ethtool, iface)
	if err != nil {
		return nil, fmt.Errorf("reading the driver's counters of %s: %w", iface, err)
	}
	out := map[string]uint64{}
	for _, s := range all {
		if kind, ok := strings.CutSuffix(s.name, allowanceSuffix); ok {
			out[kind] = s.value
		}
	}
	return out, nil
}

// ethtool uses a netlink socket, because the kernel takes the command on any socket of the network
// namespace (sock_do_ioctl).
func (l *Links) ethtool(iface string, command []byte) error {
	var request struct { // struct ifreq
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	if copy(request.name[:unix.IFNAMSIZ-1], iface) < len(iface) {
		return unix.ENODEV
	}
	request.data = unsafe.Pointer(&command[0])
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(l.sockets[unix.NETLINK_ROUTE].Socket.GetFd()), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	runtime.KeepAlive(command)
	if errno != 0 {
		return errno
	}
	return nil
}

type statistic struct {
	name  string
	value uint64
}

// statistics reads the statistics of an interface's driver; see ethtool_get_strings and
// ethtool_get_stats in the kernel.
func statistics(ask ethtool, iface string) ([]statistic, error) {
	order := binary.NativeEndian
	info := make([]byte, 20) // struct ethtool_sset_info with one length
	order.PutUint32(info, unix.ETHTOOL_GSSET_INFO)
	order.PutUint64(info[8:], 1<<statisticsSet)
	if err := ask(iface, info); errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENODEV) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("counting them: %w", err)
	}
	n := order.Uint32(info[16:])
	if order.Uint64(info[8:]) != 1<<statisticsSet || n == 0 {
		return nil, nil
	}
	if n > maxStatistics {
		return nil, fmt.Errorf("counting them: the driver has %d, more than %d", n, maxStatistics)
	}
	// A kernel may ignore the length in the request, and write as many as the driver has at that
	// moment. The buffers have room for twice the bound.
	names := make([]byte, 12+2*maxStatistics*stringSize) // struct ethtool_gstrings
	order.PutUint32(names, unix.ETHTOOL_GSTRINGS)
	order.PutUint32(names[4:], statisticsSet)
	order.PutUint32(names[8:], n)
	if err := ask(iface, names); err != nil {
		return nil, fmt.Errorf("reading their names: %w", err)
	}
	values := make([]byte, 8+2*maxStatistics*8) // struct ethtool_stats
	order.PutUint32(values, unix.ETHTOOL_GSTATS)
	order.PutUint32(values[4:], n)
	if err := ask(iface, values); err != nil {
		return nil, fmt.Errorf("reading their values: %w", err)
	}
	if order.Uint32(names[8:]) != n || order.Uint32(values[4:]) != n {
		return nil, errors.New("reading their values: the driver changed their number meanwhile")
	}
	out := make([]statistic, n)
	for i := range out {
		name, _, _ := bytes.Cut(names[12+i*stringSize:12+(i+1)*stringSize], []byte{0})
		out[i] = statistic{string(name), order.Uint64(values[8+8*i:])}
	}
	return out, nil
}
