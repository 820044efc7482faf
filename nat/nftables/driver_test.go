package nftables

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/netns"
	"net/netip"
)

// Ring: namespace.

func pfx(list ...string) (p []netip.Prefix) {
	for _, s := range list {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func newDriver(t testing.TB, ns *netns.NS) *Driver {
	t.Helper()
	f, err := os.Open(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return New(Options{NetNS: int(f.Fd())})
}

func apply(t testing.TB, d *Driver, c nat.Config) {
	t.Helper()
	if err := d.Apply(context.Background(), c); err != nil {
		t.Fatal(err)
	}
}

func pool(name string, addrs ...string) nat.Pool {
	p := nat.Pool{Name: name}
	for _, a := range addrs {
		p.Addresses = append(p.Addresses, nat.PoolAddress{Address: addr(a), Public: addr(a)})
	}
	return p
}

// example has something of everything.
func example() nat.Config {
	return nat.Config{
		Underlay: "up0",
		Own:      []netip.Addr{addr("192.0.2.1"), addr("2001:db8:ff::1")},
		Pools:    []nat.Pool{pool("partner", "192.0.2.11"), pool("web", "192.0.2.21", "192.0.2.22", "192.0.2.23", "2001:db8:ff::21", "2001:db8:ff::22")},
		Policies: []nat.Policy{
			{Name: "default", Action: nat.SNAT, Sources: pfx("10.0.0.0/8", "2001:db8:a::/48"), Pool: "web"},
			{Name: "partner", Action: nat.SNAT, Sources: pfx("10.1.0.0/16", "10.2.0.0/16"), Destinations: pfx("198.51.100.0/24"), Protocol: "tcp", Ports: []nat.PortRange{{First: 443, Last: 443}, {First: 8000, Last: 8099}}, Pool: "partner"},
			{Name: "no-smtp", Action: nat.Deny, Sources: pfx("0.0.0.0/0", "::/0"), Protocol: "tcp", Ports: []nat.PortRange{{First: 25, Last: 25}}},
			{Name: "no-ping", Action: nat.Deny, Sources: pfx("10.3.0.0/16"), Protocol: "icmp"},
		},
		Clamps: []nat.Clamp{{Interface: "tun0", IPv4: 1360, IPv6: 1340}, {Interface: "tun1", IPv4: 1300}},
	}
}

func TestApply(t *testing.T) {
	ns := netns.New(t)
	d := newDriver(t, ns)
	apply(t, d, example())
	t.Log(ns.Run("nft list table inet isthmus"))
	apply(t, d, example())
	if d.Writes() != 1 {
		t.Errorf("%d transactions, want 1", d.Writes())
	}
	_ = strings.TrimSpace
}
