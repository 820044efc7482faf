package link

import (
	"encoding/binary"
	"maps"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/link/linktest"
)

// driver is a strict ethtool: it knows three commands, and refuses any other form of them.
type driver struct {
	t     *testing.T
	names []string
	grows bool // between the names and the values
	err   error
}

func (d *driver) ask(iface string, b []byte) error {
	order := binary.NativeEndian
	n := uint32(len(d.names))
	switch command := order.Uint32(b); {
	case iface != "eth0":
		return unix.ENODEV
	case d.err != nil:
		return d.err
	case command == unix.ETHTOOL_GSSET_INFO:
		if len(b) != 20 || order.Uint64(b[8:]) != 2 {
			d.t.Errorf("not a request for the number of statistics: %v", b)
		}
		if n == 0 {
			order.PutUint64(b[8:], 0)
			return nil
		}
		order.PutUint32(b[16:], n)
	case command == unix.ETHTOOL_GSTRINGS:
		if order.Uint32(b[4:]) != 1 || order.Uint32(b[8:]) != n || len(b) < 12+32*int(n) {
			d.t.Errorf("not a request for %d names: %v, %d bytes", n, b[:12], len(b))
		}
		for i, name := range d.names {
			copy(b[12+32*i:12+32*(i+1)], name)
		}
	case command == unix.ETHTOOL_GSTATS:
		if order.Uint32(b[4:]) != n || len(b) < 8+8*int(n) {
			d.t.Errorf("not a request for %d values: %v, %d bytes", n, b[:8], len(b))
		}
		if d.grows {
			order.PutUint32(b[4:], n+1)
		}
		for i := range d.names {
			order.PutUint64(b[8+8*i:], uint64(1000+i))
		}
	default:
		d.t.Errorf("unknown command %#x", command)
	}
	return nil
}

func TestStatistics(t *testing.T) {
	full := strings.Repeat("x", stringSize) // fills its field, so that no zero ends it
	d := &driver{t: t, names: []string{"tx_timeout", full, "bw_in_allowance_exceeded"}}
	got, err := statistics(d.ask, "eth0")
	if want := []statistic{{"tx_timeout", 1000}, {full, 1001}, {"bw_in_allowance_exceeded", 1002}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	for name, c := range map[string]struct {
		driver *driver
		iface  string
		err    string
	}{
		"no interface":  {d, "eth9", ""},
		"no statistics": {&driver{t: t}, "eth0", ""},
		"no ethtool":    {&driver{t: t, err: unix.EOPNOTSUPP}, "eth0", ""},
		"refused":       {&driver{t: t, err: unix.EPERM}, "eth0", "counting them: operation not permitted"},
		"too many":      {&driver{t: t, names: make([]string, maxStatistics+1)}, "eth0", "more than 4096"},
		"changing":      {&driver{t: t, names: d.names, grows: true}, "eth0", "changed their number"},
	} {
		got, err := statistics(c.driver.ask, c.iface)
		if len(got) > 0 || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: got %d statistics, %v", name, len(got), err)
		}
	}
}

// TestStatisticsOfKernel reads the statistics of a veth. One is the index of its peer.
func TestStatisticsOfKernel(t *testing.T) {
	l := open(t)
	linktest.Run(t, "ip", "link", "add", "a0", "type", "veth", "peer", "name", "b0")
	defer linktest.Run(t, "ip", "link", "delete", "a0")
	peer, err := l.Get("b0")
	if err != nil {
		t.Fatal(err)
	}
	all, err := statistics(l.ethtool, "a0")
	if err != nil || !slices.Contains(all, statistic{"peer_ifindex", uint64(peer.Index)}) {
		t.Errorf("got %v, %v, want a peer_ifindex of %d", all, err, peer.Index)
	}
	for _, name := range []string{"a0", "lo", "none", "a-name-of-more-than-fifteen"} {
		if got, err := l.Allowances(name); err != nil || !maps.Equal(got, map[string]uint64{}) {
			t.Errorf("%s: got %v, %v", name, got, err)
		}
	}
}
