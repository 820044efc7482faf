package nftables

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

// spread returns a pool of four addresses for all flows from 10.0.0.0/8 and 2001:db8:a::/48.
func spread() nat.Config {
	return nat.Config{
		Underlay: "up0", Attachments: inside("tun0"), Own: []netip.Addr{addr("192.0.2.1"), addr("2001:db8:ff::1")},
		Pools:    []nat.Pool{pool("p", "192.0.2.11", "192.0.2.12", "192.0.2.13", "192.0.2.14", "2001:db8:ff::11", "2001:db8:ff::12")},
		Policies: []nat.Policy{{Name: "all", Action: nat.SNAT, Sources: pfx("10.0.0.0/8", "2001:db8:a::/48"), Pool: "p"}},
	}
}

// sends sends the first packet of a flow and returns the source with which it left, zero if it did
// not.
func (s *site) sends(f nat.Flow, id uint16) netip.Addr {
	s.t.Helper()
	s.transmit(f, id, syn)
	return s.receive(50 * time.Millisecond)[id].Source
}

func place(t *testing.T, d *Driver, p ...nat.Placement) {
	t.Helper()
	if err := d.Place(context.Background(), p); err != nil {
		t.Fatal(err)
	}
}

func TestPlacement(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	if err := d.Place(context.Background(), nil); err == nil {
		t.Error("placed without rules")
	}
	c := spread()
	apply(t, d, c)
	id := uint16(0)
	for _, f := range []nat.Flow{
		{Source: addr("10.0.0.1"), Destination: addr("198.51.100.1"), Protocol: unix.IPPROTO_TCP, Port: 443},
		{Source: addr("2001:db8:a::1"), Destination: addr("2001:db8:b::1"), Protocol: unix.IPPROTO_UDP, Port: 53},
	} {
		p := c.Pools[0]
		home := p.For(f.Source, "")
		other := p.Family(f.Source.Is6())[0].Address
		if other == home {
			other = p.Family(f.Source.Is6())[1].Address
		}
		leaves := func(what string, f nat.Flow, want netip.Addr) {
			t.Helper()
			id++
			if got := s.sends(f, id); got != want {
				t.Errorf("%s: %v leaves as %v, want %v", what, f, got, want)
			}
		}
		elsewhere := f
		elsewhere.Destination = f.Destination.Next()
		placement := nat.Placement{Pool: "p", Source: f.Source, Destination: f.Destination, Address: other}

		leaves("at first", f, home)
		place(t, d, placement)
		leaves("placed", f, other)
		leaves("to another destination", elsewhere, home)
		writes := d.Writes()
		place(t, d, placement)
		if d.Writes() != writes {
			t.Error("the same placement again was written")
		}
		more := c
		more.Pools = append(slices.Clone(c.Pools), pool("q", "192.0.2.21"))
		apply(t, d, more)
		leaves("after the table was replaced", f, other)

		d = newDriver(t, s.router)
		apply(t, d, more)
		if state, err := d.Observe(context.Background()); err != nil || d.Writes() != 0 || !slices.Equal(state.Placements, []nat.Placement{placement}) {
			t.Errorf("after a restart: placements %v, %d transactions, %v", state.Placements, d.Writes(), err)
		}
		leaves("after a new start", f, other)

		down := more
		down.Pools = slices.Clone(more.Pools)
		down.Pools[0].Addresses = slices.Clone(p.Addresses)
		for i := range down.Pools[0].Addresses {
			a := &down.Pools[0].Addresses[i]
			a.Down = a.Address == other
		}
		apply(t, d, down)
		leaves("while the address is down", f, home)
		apply(t, d, more)
		leaves("when it is back", f, other)

		s.router.Run("nft add table inet stranger\nnft delete table inet stranger")
		place(t, d)
		leaves("no longer placed", f, home)
		apply(t, d, c)
	}
}

func TestRefusal(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := spread()
	c.Pools = append(c.Pools, pool("quiet", "192.0.2.21"))
	c.Pools[1].Silent = true
	c.Policies = append(c.Policies, nat.Policy{Name: "quiet", Action: nat.SNAT, Sources: pfx("10.9.0.0/16"), Pool: "quiet"})
	apply(t, d, c)
	s.inside.Run("ip addr add 10.0.0.1/32 dev in0\nip addr add 10.9.0.1/32 dev in0\nip -6 addr add 2001:db8:a::1/128 dev in0 nodad")
	refuse := func(o nat.Overload) {
		t.Helper()
		if err := d.Refuse(context.Background(), o); err != nil {
			t.Fatal(err)
		}
	}
	// try sends a packet of a new flow from a socket, and returns the error that the network
	// answers with.
	port := 2000
	try := func(network, from, to string, wait time.Duration) error {
		t.Helper()
		port++
		return s.try(network, from, to, port, wait)
	}
	tcp := nat.Exhausted{Pool: "p", Service: nat.Service{Destination: addr("198.51.100.1"), Protocol: unix.IPPROTO_TCP, Port: 443}}
	udp := nat.Exhausted{Pool: "p", Service: nat.Service{Destination: addr("2001:db8:b::1"), Protocol: unix.IPPROTO_UDP, Port: 53}}
	quiet := tcp
	quiet.Pool = "quiet"
	refuse(nat.Overload{Exhausted: []nat.Exhausted{tcp, udp, quiet}})
	for _, k := range []struct {
		network, from, to string
		want              error
	}{
		// by the second SYN: the first is dropped
		{"tcp", "10.0.0.1", "198.51.100.1:443", unix.ECONNREFUSED},
		{"tcp", "10.0.0.1", "198.51.100.1:443", unix.ECONNREFUSED},
		{"udp", "2001:db8:a::1", "[2001:db8:b::1]:53", errTimeout},
		{"udp", "2001:db8:a::1", "[2001:db8:b::1]:53", unix.EACCES}, // RFC 4443 code 1
		// it leaves unanswered
		{"tcp", "10.0.0.1", "198.51.100.1:444", errTimeout},
		{"udp", "10.0.0.1", "198.51.100.1:443", errTimeout},
		{"tcp", "10.9.0.1", "198.51.100.1:443", errTimeout},
	} {
		wait := waitTime(true)
		if k.want == errTimeout {
			wait = 2 * time.Second // a SYN is repeated after one second, and again two later
		}
		if err := try(k.network, k.from, k.to, wait); err != k.want {
			t.Errorf("%s from %s to %s: %v, want %v", k.network, k.from, k.to, err, k.want)
		}
	}
	for id, out := range s.receive(50 * time.Millisecond) {
		if out.Destination == tcp.Destination && out.Protocol == unix.IPPROTO_TCP && out.Bytes[22] == 443>>8 && out.Bytes[23] == 443&255 {
			t.Errorf("%d %v left although it was refused", id, out)
		}
	}
	m, err := d.Meter(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if n := m.Refused[nat.Use{Source: addr("10.0.0.1"), Service: tcp.Service}]; n != 3 {
		t.Errorf("%d refused TCP packets, want 3", n)
	}
	if n := m.Refused[nat.Use{Source: addr("2001:db8:a::1"), Service: udp.Service}]; n != 2 {
		t.Errorf("%d refused UDP packets, want 2", n)
	}
	if n := m.Refused[nat.Use{Pool: "quiet", Service: tcp.Service}]; n != 2 {
		t.Errorf("%d silently refused packets, want 2 (a SYN and its repetition)", n)
	}

	t.Log("what is no longer exhausted is free at once, and a replaced table keeps what is")
	refuse(nat.Overload{Exhausted: []nat.Exhausted{udp}})
	if err := try("tcp", "10.0.0.1", "198.51.100.1:443", 300*time.Millisecond); err != errTimeout {
		t.Errorf("freed: %v", err)
	}
	more := c
	more.Pools = append(slices.Clone(c.Pools), pool("q", "192.0.2.31"))
	apply(t, d, more)
	try("udp", "2001:db8:a::1", "[2001:db8:b::1]:53", 100*time.Millisecond)
	if err := try("udp", "2001:db8:a::1", "[2001:db8:b::1]:53", waitTime(true)); err != unix.EACCES {
		t.Errorf("after the table was replaced: %v", err)
	}

	t.Log("the table of connection tracking is full")
	refuse(nat.Overload{TableFull: true})
	if err := try("tcp", "10.9.0.1", "198.51.100.2:80", waitTime(true)); err != unix.ECONNREFUSED {
		t.Errorf("table full: %v", err)
	}
	// RFC 1812 code 13
	if err := try("udp", "10.0.0.1", "198.51.100.2:80", waitTime(true)); err != unix.EHOSTUNREACH {
		t.Errorf("table full: %v", err)
	}
	if m, err := d.Meter(context.Background()); err != nil || m.TableFull != 2 {
		t.Errorf("the meter has %d for a full table, want 2, %v", m.TableFull, err)
	}
	refuse(nat.Overload{})
	if err := try("tcp", "10.0.0.1", "198.51.100.2:81", 300*time.Millisecond); err != errTimeout {
		t.Errorf("no longer full: %v", err)
	}
}

// TestRefusalBesideReject refuses flows of a policy that is more specific than one that rejects:
// both are looked up at the same point.
func TestRefusalBesideReject(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := spread()
	c.Policies = append(c.Policies, nat.Policy{Name: "rest", Action: nat.Reject, Sources: pfx("0.0.0.0/0", "::/0")})
	apply(t, d, c)
	s.inside.Run("ip addr add 10.0.0.1/32 dev in0\nip -6 addr add 2001:db8:a::1/128 dev in0 nodad")
	refuse := func(o nat.Overload) {
		t.Helper()
		if err := d.Refuse(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	var all nat.Overload
	for _, k := range []struct{ from, to string }{{"10.0.0.1", "198.51.100.1"}, {"2001:db8:a::1", "2001:db8:b::1"}} {
		all.Exhausted = append(all.Exhausted, nat.Exhausted{Pool: "p", Service: nat.Service{Destination: addr(k.to), Protocol: unix.IPPROTO_TCP, Port: 443}})
	}
	for what, o := range map[string]nat.Overload{"no port is left": all, "the table is full": {TableFull: true}} {
		refuse(o)
		for i, to := range []string{"198.51.100.1:443", "[2001:db8:b::1]:443"} {
			from := []string{"10.0.0.1", "2001:db8:a::1"}[i]
			if err := s.try("tcp", from, to, 0, waitTime(true)); err != unix.ECONNREFUSED {
				t.Errorf("%s: from %s to %s: %v", what, from, to, err)
			}
		}
	}
	refuse(nat.Overload{})
}

// TestMeter checks that the meter counts flows, not packets, and survives edits and replacements
// of the table.
func TestMeter(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := spread()
	apply(t, d, c)
	f := nat.Flow{Source: addr("10.0.0.1"), Destination: addr("198.51.100.1"), Protocol: unix.IPPROTO_UDP, Port: 53}
	for i := range uint16(10) {
		s.transmit(f, i%5, 0) // five flows, two packets each
	}
	g := f
	g.Source, g.Destination, g.Protocol = addr("2001:db8:a::1"), addr("2001:db8:b::1"), unix.IPPROTO_TCP
	s.transmit(g, 100, syn)
	s.transmit(nat.Flow{Source: f.Source, Destination: f.Destination, Protocol: unix.IPPROTO_ICMP}, 101, 0)
	c.Pools = append(c.Pools, pool("q", "192.0.2.21"))
	apply(t, d, c)
	s.transmit(f, 6, 0)
	s.receive(50 * time.Millisecond)
	m, err := d.Meter(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	a := nat.Use{Pool: "p", Source: f.Source, Service: nat.Service{Destination: f.Destination, Protocol: f.Protocol, Port: f.Port}}
	b := nat.Use{Pool: "p", Source: g.Source, Service: nat.Service{Destination: g.Destination, Protocol: g.Protocol, Port: g.Port}}
	if len(m.Begun) != 2 || m.Begun[a] != 6 || m.Begun[b] != 1 {
		t.Errorf("the meter has %v", m.Begun)
	}
	if n, _, err := d.Begun(context.Background()); n != 7 || err != nil {
		t.Errorf("%d flows began, want 7, %v", n, err)
	}
}
