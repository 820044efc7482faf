package nftables

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/traffic"
)

// doorman records which packets pass our rules on their way to the node itself: a second table,
// behind ours, stores their ids in sets.
type doorman struct{ *sides }

func newDoorman(t *testing.T) doorman {
	d := doorman{newSides(t)}
	file := filepath.Join(t.TempDir(), "seen.nft")
	var rules strings.Builder
	rules.WriteString("table inet seen {\n")
	for _, name := range []string{"came", "past"} {
		fmt.Fprintf(&rules, "set %s4 {\ntypeof ip id\nflags dynamic\nsize 65535\n}\nset %s6 {\ntypeof ip6 flowlabel\nflags dynamic\nsize 65535\n}\n", name, name)
	}
	for name, hook := range map[string]string{"came": "prerouting priority -450", "past": "input priority 100"} {
		fmt.Fprintf(&rules, "chain %s {\ntype filter hook %s\nmeta nfproto ipv4 add @%s4 { ip id }\nmeta nfproto ipv6 add @%s6 { ip6 flowlabel }\n}\n", name, hook, name, name)
	}
	rules.WriteString("}\n")
	if err := os.WriteFile(file, []byte(rules.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	d.router.Run("nft -f " + file)
	return d
}

// ids returns the ids in a set.
func (d doorman) ids(set string) map[uint16]bool {
	d.t.Helper()
	var answer struct {
		Nftables []struct {
			Set struct{ Elem []uint32 }
		}
	}
	if err := json.Unmarshal([]byte(d.router.Run("nft -j list set inet seen "+set)), &answer); err != nil {
		d.t.Fatal(err)
	}
	ids := map[uint16]bool{}
	for _, part := range answer.Nftables {
		for _, id := range part.Set.Elem {
			ids[uint16(id)] = true
		}
	}
	return ids
}

// seen returns which IPv4 and IPv6 packets passed, and clears the record. It waits until all
// packets that were sent have reached the node.
func (d doorman) seen(sent4, sent6 []uint16) (four, six map[uint16]bool) {
	d.t.Helper()
	for set, sent := range map[string][]uint16{"came4": sent4, "came6": sent6} {
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			came := d.ids(set)
			if !slices.ContainsFunc(sent, func(id uint16) bool { return !came[id] }) {
				break
			}
			if time.Now().After(deadline) {
				d.t.Fatalf("of %d packets %d came", len(sent), len(came))
			}
		}
	}
	// the last packet has arrived, but the rules may still be processing it
	time.Sleep(10 * time.Millisecond)
	four, six = d.ids("past4"), d.ids("past6")
	d.router.Run("nft flush set inet seen came4\nnft flush set inet seen came6\nnft flush set inet seen past4\nnft flush set inet seen past6")
	return four, six
}

// sent is seen for packets of one family.
func (d doorman) sent(six bool, ids ...uint16) map[uint16]bool {
	d.t.Helper()
	if six {
		_, past := d.seen(nil, ids)
		return past
	}
	past, _ := d.seen(ids, nil)
	return past
}

// upTo returns the ids from 1 to n.
func upTo(n uint16) (ids []uint16) {
	for id := range n {
		ids = append(ids, id+1)
	}
	return ids
}

// knock is a packet to the node.
type knock struct {
	by                  string
	source, destination netip.Addr
	protocol            uint8
	from, to            uint16 // ports
	kind                uint8  // of ICMP
	hops                byte
}

// bytes returns the packet without its network header.
func (k knock) bytes(id uint16) (l4 []byte) {
	at := -1
	switch k.protocol {
	case unix.IPPROTO_TCP:
		l4, at = make([]byte, 20), 16
		l4[12], l4[13] = 5<<4, syn
	case unix.IPPROTO_UDP:
		l4, at = make([]byte, 12), 6
		l4[5] = 12
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		l4, at = make([]byte, 64), 2
		l4[0] = k.kind
		binary.BigEndian.PutUint16(l4[4:], id)
	default:
		l4 = make([]byte, 24)
	}
	if k.protocol == unix.IPPROTO_TCP || k.protocol == unix.IPPROTO_UDP {
		binary.BigEndian.PutUint16(l4, k.from)
		binary.BigEndian.PutUint16(l4[2:], k.to)
	}
	switch {
	case at < 0:
	case k.protocol == unix.IPPROTO_ICMP:
		binary.BigEndian.PutUint16(l4[at:], traffic.Checksum(l4))
	default:
		pseudo := slices.Concat(k.source.AsSlice(), k.destination.AsSlice(), []byte{0, k.protocol, 0, byte(len(l4))}, l4)
		binary.BigEndian.PutUint16(l4[at:], traffic.Checksum(pseudo))
	}
	return l4
}

func anyContains(prefixes []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// lets reports whether the first packet of a flow to the node passes the rules, by the
// documentation of nat.Config.
func (k knock) lets(c nat.Config) bool {
	document := c.Underlay != ""
	local := netip.MustParsePrefix("fe80::/10").Contains(k.source)
	neighbour := k.protocol == unix.IPPROTO_ICMPV6 && k.kind >= 133 && k.kind <= 137 && k.hops == 255
	if slices.Contains(c.Attached(), k.by) && !local && !neighbour && !slices.ContainsFunc(c.Attachments, func(a nat.Attachment) bool { return a.Interface == k.by && anyContains(a.Sources, k.source) }) {
		return false
	}
	tunnel := slices.ContainsFunc(c.Tunnels, func(t nat.Tunnel) bool { return t.Interface == k.by })
	tcp, udp := k.protocol == unix.IPPROTO_TCP, k.protocol == unix.IPPROTO_UDP
	switch {
	case tcp && k.to == c.API.Port:
		return anyContains(c.API.From, k.source)
	case document && tcp && k.to == 179:
		return slices.Contains(c.Sessions, nat.Session{Interface: k.by, Address: k.source})
	case document && (tcp || udp) && k.to == 53 && slices.ContainsFunc(c.DNS, func(d nat.Door) bool { return d.Address == k.destination }):
		return slices.ContainsFunc(c.DNS, func(d nat.Door) bool { return d.Address == k.destination && d.Interface == k.by })
	case document && tcp && k.to == c.Metrics.Port && slices.ContainsFunc(c.Metrics.Inlets, func(i nat.Inlet) bool { return i.Address == k.destination }):
		return slices.ContainsFunc(c.Metrics.Inlets, func(i nat.Inlet) bool { return i.Address == k.destination && i.Interface == k.by }) && anyContains(c.Metrics.From, k.source)
	case document && isPool(c, k.destination) && k.protocol != unix.IPPROTO_ICMP && k.protocol != unix.IPPROTO_ICMPV6:
		return false
	case !c.Input.Drop:
		return true
	case k.protocol == unix.IPPROTO_ICMP:
		return slices.Contains([]uint8{3, 8, 11, 12}, k.kind)
	case k.protocol == unix.IPPROTO_ICMPV6:
		return k.kind >= 1 && k.kind <= 4 || k.kind == 128 || k.kind >= 133 && k.kind <= 136 && k.hops == 255 ||
			(k.kind >= 130 && k.kind <= 132 || k.kind == 143) && k.hops == 1
	case tcp && k.to == 22 && !tunnel:
		return anyContains(c.Input.SSH, k.source)
	case tcp && k.to == 22:
		// these are within the sources of tun0
		return anyContains(pfx("10.0.0.0/24", "2001:db8:a:1::/64"), k.source)
	case udp && k.to == 862 && slices.Contains(c.Lanes, nat.Session{Interface: k.by, Address: k.source}):
		return true
	case tunnel:
		return false
	case udp && slices.ContainsFunc(c.Tunnels, func(t nat.Tunnel) bool { return t.Port == k.to }):
		return true
	case udp && k.source.Is4() && k.from == 67 && k.to == 68:
		return true
	case k.by == "up0" && slices.ContainsFunc(c.Tunnels, func(t nat.Tunnel) bool { return t.Port == 0 }):
		return udp && (k.to == 500 || k.to == 4500) || k.protocol == unix.IPPROTO_ESP
	}
	return false
}

func inputConfig(drop bool) nat.Config {
	c := sidesConfig()
	c.Policies = nil
	c.API = nat.API{Port: 7443, From: pfx("10.0.1.0/24", "172.16.1.0/24", "198.51.100.0/24", "2001:db8:b::/64", "2001:db8:d::/64")}
	c.Input = nat.Input{Drop: drop, SSH: pfx("10.0.0.0/24", "10.2.0.0/15", "172.16.0.0/24", "192.168.0.0/24", "198.51.100.0/25", "2001:db8:a:1::/64", "2001:db8::/33")}
	c.Tunnels = []nat.Tunnel{{Interface: "tun0"}, {Interface: "wg7", Port: 51820}}
	c.Sessions = []nat.Session{{Interface: "tun0", Address: addr("10.0.0.7")}, {Interface: "tun0", Address: addr("2001:db8:a::7")}}
	c.Lanes = []nat.Session{{Interface: "tun0", Address: addr("10.0.0.7")}, {Interface: "tun1", Address: addr("2001:db8:c::7")}}
	c.DNS = []nat.Door{{Interface: "tun0", Address: addr("192.0.2.1")}, {Interface: "tun1", Address: addr("2001:db8:ff::1")}}
	c.Metrics = nat.Metrics{Port: 9100, From: pfx("10.0.0.0/24", "10.3.0.0/24", "172.16.0.0/24", "198.51.100.0/24", "2001:db8:a::/64", "2001:db8:c::/64"),
		Inlets: []nat.Inlet{{Interface: "tun0", Address: addr("192.0.2.1")}, {Interface: "tun1", Address: addr("192.0.2.1")}, {Interface: "tun1", Address: addr("2001:db8:ff::1")}}}
	return c
}

// TestInput sends packets of every protocol from every side to every address of the node, with and
// without a document, under drop and under keep. The packets that pass must be those that a model
// of the configuration accepts, and every other packet must be counted.
func TestInput(t *testing.T) {
	w := newDoorman(t)
	d := newDriver(t, w.router)
	random := rand.New(rand.NewPCG(5, 11))
	addresses := map[bool][]netip.Addr{}
	for _, text := range strings.Fields(`10.0.0.7 10.0.1.7 10.3.0.7 10.9.1.7 172.16.0.7 172.16.1.7 192.168.0.7 192.168.1.7 198.51.100.7 198.51.100.200 8.8.8.8 169.254.169.254
		2001:db8:a::7 2001:db8:a:1::7 2001:db8:c::7 2001:db8:d::7 2001:db8:b::7 2001:db8:8000::7 fe80::7`) {
		addresses[addr(text).Is6()] = append(addresses[addr(text).Is6()], addr(text))
	}
	near := map[string]string{"tun0": "10.0.0.7 2001:db8:a::7 10.3.0.7 2001:db8:a:1::7", "tun1": "172.16.0.7 2001:db8:c::7 172.16.1.7 fe80::7", "mgmt0": "192.168.0.7 2001:db8:d::7 192.168.1.7 fe80::7", "up0": "198.51.100.7 2001:db8:b::7 198.51.100.200 fe80::7"}
	own := map[bool][]netip.Addr{false: {addr("192.0.2.1"), addr("192.0.2.11"), addr("198.18.0.10")}, true: {addr("2001:db8:ff::1"), addr("2001:db8:ff::11"), addr("2001:db8:d::10")}}
	pick := func(from ...uint8) uint8 { return from[random.IntN(len(from))] }
	make := func(id uint16) knock {
		six := random.IntN(2) == 0
		k := knock{by: []string{"tun0", "tun1", "mgmt0", "up0"}[random.IntN(4)], hops: []byte{1, 64, 255}[random.IntN(3)], from: 1024 + id}
		k.source, k.destination = addresses[six][random.IntN(len(addresses[six]))], own[six][random.IntN(3)]
		if random.IntN(2) == 0 { // a source that is allowed on the interface
			k.source = addr(strings.Fields(near[k.by])[2*random.IntN(2)+b2i(six)])
		}
		k.protocol = pick(unix.IPPROTO_TCP, unix.IPPROTO_TCP, unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP, unix.IPPROTO_ICMP, unix.IPPROTO_ESP, unix.IPPROTO_AH, unix.IPPROTO_GRE, unix.IPPROTO_IGMP, 112, 89, 132, 4, 41)
		switch k.protocol {
		case unix.IPPROTO_TCP:
			k.to = []uint16{22, 53, 80, 179, 7443, 9100}[random.IntN(6)]
		case unix.IPPROTO_UDP:
			k.to = []uint16{53, 68, 500, 546, 862, 862, 4500, 33434, 51820}[random.IntN(9)]
			if random.IntN(2) == 0 && k.to == 68 {
				k.from = 67
			}
		case unix.IPPROTO_ICMP:
			if k.kind = pick(0, 3, 4, 5, 8, 9, 10, 11, 12, 13, 15, 17); six {
				k.protocol, k.kind = unix.IPPROTO_ICMPV6, pick(1, 2, 3, 4, 127, 128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 141, 142, 143, 144, 151, 200)
			}
		}
		return k
	}
	withoutIPsec := inputConfig(true)
	withoutIPsec.Tunnels = []nat.Tunnel{{Interface: "tun0", Port: 51821}, {Interface: "wg7", Port: 51820}}
	for _, k := range []struct {
		name   string
		config nat.Config
	}{
		{"drop", inputConfig(true)},
		{"drop without IPsec", withoutIPsec},
		{"keep", inputConfig(false)},
		{"drop without a document", nat.Config{API: inputConfig(true).API, Input: inputConfig(true).Input}},
		{"keep without a document", nat.Config{API: inputConfig(true).API}},
	} {
		t.Run(k.name, func(t *testing.T) {
			apply(t, d, k.config)
			counted := func() (n uint64) {
				state, err := d.Observe(context.Background())
				if err != nil || state.Guarded != (k.config.Underlay != "") {
					t.Fatal(state, err)
				}
				return state.Drops[nat.DropInput].Packets + state.Drops[nat.DropSource].Packets
			}
			let, kept := 0, 0
			w.seen(nil, nil)
			before := counted()
			for round := range 10 {
				w.forgetFlows()
				knocks := map[uint16]knock{}
				// Two packets with one key would be one flow, which an answer establishes.
				said := map[string]bool{}
				for id := uint16(1); id <= 250; id++ {
					n := make(id)
					if key := fmt.Sprint(n.source, n.destination, n.protocol); n.protocol == unix.IPPROTO_UDP && n.from == 67 || n.protocol != unix.IPPROTO_TCP && n.protocol != unix.IPPROTO_UDP {
						if said[key] && n.protocol != unix.IPPROTO_ICMP && n.protocol != unix.IPPROTO_ICMPV6 {
							continue
						}
						said[key] = true
					}
					knocks[id] = n
					if err := w.taps[n.by].SendPacket(n.source, n.destination, n.protocol, id, n.hops, n.bytes(id)); err != nil {
						t.Fatal(err)
					}
				}
				var sent4, sent6 []uint16
				for id, n := range knocks {
					if n.source.Is6() {
						sent6 = append(sent6, id)
					} else {
						sent4 = append(sent4, id)
					}
				}
				four, six := w.seen(sent4, sent6)
				for id, n := range knocks {
					past := four[id]
					if n.source.Is6() {
						past = six[id]
					}
					if want := n.lets(k.config); past != want {
						t.Errorf("round %d: %+v got past: %v, want %v", round, n, past, want)
					} else if want {
						let++
					} else {
						kept++
					}
				}
				if t.Failed() {
					t.Fatal(w.router.Run("nft list table inet isthmus"))
				}
			}
			t.Logf("%d let in, %d not", let, kept)
			if n := counted() - before; n < uint64(kept) || let < 100 || kept < 20 {
				t.Errorf("%d were counted; %d let in, %d not", n, let, kept)
			}
		})
	}
}

// TestInputAnswers checks that under drop the node's own flows get answers and errors about
// themselves, and that redirects change nothing. Errors and echo requests from strangers are
// limited, and do not use up the limit that the other node needs.
func TestInputAnswers(t *testing.T) {
	w := newDoorman(t)
	d := newDriver(t, w.router)
	apply(t, d, inputConfig(true))
	for _, family := range []struct{ own, far, network, echo string }{{"192.0.2.1", "198.51.100.7", "udp4", "10.0.0.7"}, {"2001:db8:ff::1", "2001:db8:b::7", "udp6", "2001:db8:a::7"}} {
		own, far := addr(family.own), addr(family.far)
		var local netip.AddrPort
		w.router.Do(func() {
			c, err := net.DialUDP(family.network, &net.UDPAddr{IP: own.AsSlice()}, &net.UDPAddr{IP: far.AsSlice(), Port: 9})
			if err == nil {
				defer c.Close()
				local = c.LocalAddr().(*net.UDPAddr).AddrPort()
				_, err = c.Write([]byte("x"))
			}
			if err != nil {
				t.Error(err)
			}
		})
		protocol, unreachable, redirect, request := uint8(unix.IPPROTO_ICMP), uint8(3), uint8(5), uint8(8)
		if own.Is6() {
			protocol, unreachable, redirect, request = unix.IPPROTO_ICMPV6, 2, 137, 128
		}
		w.seen(nil, nil)
		send := func(id uint16, k knock, quoted []byte) bool {
			t.Helper()
			k.source, k.destination = far, own
			l4 := k.bytes(id)
			if quoted != nil {
				l4 = append(l4[:8], quoted...)
				l4[2], l4[3] = 0, 0
				sum := traffic.Checksum(l4)
				if own.Is6() {
					sum = traffic.Checksum(slices.Concat(far.AsSlice(), own.AsSlice(), []byte{0, protocol, 0, byte(len(l4))}, l4))
				}
				binary.BigEndian.PutUint16(l4[2:], sum)
			}
			hops := byte(64)
			if redirect == k.kind {
				hops = 255
			}
			if err := w.taps["up0"].SendPacket(far, own, k.protocol, id, hops, l4); err != nil {
				t.Fatal(err)
			}
			return w.sent(own.Is6(), id)[id]
		}
		udp := make([]byte, 8)
		binary.BigEndian.PutUint16(udp, local.Port())
		binary.BigEndian.PutUint16(udp[2:], 9)
		udp[5] = 9
		quoted := slices.Concat([]byte{0x45, 0, 0, 29, 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, own.AsSlice(), far.AsSlice(), udp)
		if own.Is6() {
			quoted = slices.Concat([]byte{0x60, 0, 0, 0, 0, 9, unix.IPPROTO_UDP, 64}, own.AsSlice(), far.AsSlice(), udp)
		} else {
			binary.BigEndian.PutUint16(quoted[10:], traffic.Checksum(quoted[:20]))
		}
		// and so that none is left for errors about no flow
		if n := w.drained(t, own.Is6()); n < errorRate {
			t.Errorf("%s: %d errors were let in at once, want %d", family.network, n, errorRate)
		}
		for _, k := range []struct {
			what string
			knock
			quoted []byte
			want   bool
		}{
			{"an error about the flow", knock{protocol: protocol, kind: unreachable}, quoted, true},
			{"a redirect about the flow", knock{protocol: protocol, kind: redirect}, quoted, false},
			{"an answer", knock{protocol: unix.IPPROTO_UDP, from: 9, to: local.Port()}, nil, true},
			{"another port", knock{protocol: unix.IPPROTO_UDP, from: 9, to: local.Port() ^ 1}, nil, false},
		} {
			if got := send(60001, k.knock, k.quoted); got != k.want {
				t.Errorf("%s: %s got in: %v", family.network, k.what, got)
			}
		}

		// Echo requests from strangers are limited, those by a tunnel are not.
		flood := func(by string, source netip.Addr) (n int, took time.Duration) {
			began := time.Now()
			for id := range uint16(4000) {
				k := knock{source: source, destination: own, protocol: protocol, kind: request}
				if err := w.taps[by].SendPacket(source, own, protocol, id+1, 64, k.bytes(id+1)); err != nil {
					t.Fatal(err)
				}
			}
			past := w.sent(own.Is6(), upTo(4000)...)
			return len(past), time.Since(began)
		}
		w.forgetFlows()
		if n, took := flood("up0", far); n < echoRate || n > echoRate+int(echoRate*took.Seconds())+1 || n >= 4000 && took < 2*time.Second {
			t.Errorf("%s: %d of 4000 echo requests of a stranger were let in within %v", family.network, n, took)
		}
		if n, _ := flood("tun0", addr(family.echo)); n < 4000 {
			t.Errorf("%s: %d of 4000 echo requests by a tunnel were let in", family.network, n)
		}
	}
}

// drained sends errors about flows that do not exist until no more pass, and returns how many did.
func (d doorman) drained(t *testing.T, six bool) int {
	t.Helper()
	k := knock{source: addr("198.51.100.200"), destination: addr("192.0.2.1"), protocol: unix.IPPROTO_ICMP, kind: 3}
	if six {
		k = knock{source: addr("2001:db8:b::99"), destination: addr("2001:db8:ff::1"), protocol: unix.IPPROTO_ICMPV6, kind: 1}
	}
	for id := range uint16(1000) {
		if err := d.taps["up0"].SendPacket(k.source, k.destination, k.protocol, id+1, 64, k.bytes(id+1)); err != nil {
			t.Fatal(err)
		}
	}
	n := len(d.sent(six, upTo(1000)...))
	if n >= 1000 {
		t.Errorf("errors about no flow are not limited")
	}
	return n
}

// TestWithoutDocument checks that a node without a document forwards nothing to the addresses of
// its platform and, under drop, nothing at all. Under keep, all other packets are forwarded as the
// machine is set up.
func TestWithoutDocument(t *testing.T) {
	s := newSides(t)
	d := newDriver(t, s.router)
	for _, drop := range []bool{true, false} {
		apply(t, d, nat.Config{Input: nat.Input{Drop: drop}})
		s.forgetFlows()
		id := uint16(0)
		send := func(by, source, destination string, passes bool) {
			t.Helper()
			id++
			if err := s.taps[by].Send(nat.Flow{Source: addr(source), Destination: addr(destination), Protocol: unix.IPPROTO_UDP, Port: 80}, id, 0); err != nil {
				t.Fatal(err)
			}
			out := s.taps[s.way(addr(destination))]
			if _, here := s.arrivals(out, 50*time.Millisecond)[id]; here != passes {
				t.Errorf("drop %v: by %s %s > %s came out: %v", drop, by, source, destination, here)
			}
		}
		for _, platform := range []string{"169.254.169.254", "169.254.7.7", "168.63.129.16", "100.100.100.200"} {
			send("tun0", "10.0.0.7", platform, false)
			send("mgmt0", "192.168.0.7", platform, false)
		}
		send("tun0", "2001:db8:a::7", "fd00:ec2::254", false)
		send("tun0", "10.0.0.7", "198.51.100.7", !drop)
		send("tun0", "10.0.0.7", "172.16.0.7", !drop)
		send("tun0", "2001:db8:a::7", "2001:db8:b::7", !drop)
		state, err := d.Observe(t.Context())
		if err != nil || !state.Present || state.Guarded || state.Drops[nat.DropPlatform].Packets < 9 {
			t.Errorf("drop %v: state %+v, %v", drop, state, err)
		}
	}
}
