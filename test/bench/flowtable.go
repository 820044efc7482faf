package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/vm"
)

// flowtable returns a software flowtable that takes the UDP flows that pass the forward hook. The
// counter slow counts the packets that pass this hook: those that the flowtable carries do not.
func flowtable(flags string) string {
	return "table inet fast {\nflowtable f {\nhook ingress priority 0; devices = { tun0, up0 }; " + flags + "\n}\ncounter slow {\n}\n" +
		"chain forward {\ntype filter hook forward priority 0;\nmeta l4proto udp counter name slow flow add @f\n}\n}\n"
}

// deviceChecks are a check of sources and a guard at hooks that a flowtable does not bypass: the
// ingress of a device, before the flowtable, and the egress of a device.
const deviceChecks = `table netdev checks {
	chain source {
		type filter hook ingress device tun0 priority -10;
		meta protocol ip ip saddr != { 10.0.0.0/8, 172.31.0.0/30 } drop
		meta protocol ip6 ip6 saddr != { 2001:db8:a::/48, 2001:db8:1f::/64, fe80::/10 } drop
	}
	chain guard {
		type filter hook egress device up0 priority 0;
		meta protocol ip ip saddr != { 192.0.2.1, 192.0.2.11 } drop
		meta protocol ip6 ip6 saddr != { 2001:db8:9::1, 2001:db8:9::11, fe80::/10 } drop
	}
}
`

// slow returns the packets of the counter slow; 0 when there is none.
func (r *packetRouter) slow(ctx context.Context, there bool) (n int, err error) {
	if !there {
		return 0, nil
	}
	out, err := r.router.Exec(ctx, "sh", "-c", "nft list counter inet fast slow | grep packets")
	if err != nil {
		return 0, err
	}
	if _, err := fmt.Sscanf(out, " packets %d", &n); err != nil {
		return 0, fmt.Errorf("reading a counter from %q: %w", out, err)
	}
	return n, nil
}

// tunnelEnd makes an xfrm interface and the states and policies that it needs to reach the other
// end, by ESP with a fixed key.
func tunnelEnd(n *lab.Node, name, here, there string, addrs []netip.Prefix) {
	n.IP("link add %s type xfrm dev wire if_id 1", name)
	n.IP("link set %s up", name)
	for _, a := range addrs {
		n.IP("addr add %s dev %s", a, name)
	}
	const cipher = "aead rfc4106(gcm(aes)) 0x0102030405060708090a0b0c0d0e0f1011121314 128"
	for _, ends := range [][2]string{{here, there}, {there, here}} {
		n.IP("xfrm state add src %s dst %s proto esp spi 0x%x reqid 1 mode tunnel flag af-unspec if_id 1 %s", ends[0], ends[1], 0x1000+int(ends[0][len(ends[0])-1]), cipher)
	}
	for _, all := range []string{"0.0.0.0/0", "::/0"} {
		n.IP("xfrm policy add src %s dst %s dir out if_id 1 tmpl src %s dst %s proto esp reqid 1 mode tunnel", all, all, here, there)
		for _, dir := range []string{"in", "fwd"} {
			n.IP("xfrm policy add src %s dst %s dir %s if_id 1 tmpl src %s dst %s proto esp reqid 1 mode tunnel", all, all, dir, there, here)
		}
	}
}

// takesFlowtables reports whether this kernel has flowtables, and prints why not. It removes all
// rules of the router.
func (r *packetRouter) takesFlowtables(ctx context.Context) bool {
	err := r.rules(ctx, flowtable(""))
	if err != nil {
		why, _, _ := strings.Cut(err.Error(), "\n")
		fmt.Printf("\nFlowtables are left out, since this kernel has none: %s\n", why)
	}
	return err == nil
}

// flowtable shows which packets of established flows a flowtable carries, and for how long it does
// so after a change that should stop them.
func (b *bench) flowtable(ctx context.Context) (err error) {
	r, err := b.packetRouter(ctx, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	if !r.takesFlowtables(ctx) {
		return nil
	}
	t := newTable("Flowtable: %d packets of a flow to the server, and as many answers", carriedPackets)
	if err := r.carried(ctx, t, "between veth"); err != nil {
		return err
	}
	missing, err := vm.Missing()
	if err != nil {
		return err
	}
	if slices.Contains(missing, "xfrm-interface") || slices.Contains(missing, "esp") {
		fmt.Printf("\nIPsec is left out, since this kernel lacks %s\n", strings.Join(missing, ", "))
	} else if err := b.carriedByIPsec(ctx, t); err != nil {
		return err
	}
	t.print(os.Stdout)
	return r.unnoticed(ctx)
}

// carriedByIPsec is carried with an xfrm interface toward the client.
func (b *bench) carriedByIPsec(ctx context.Context, t *table) (err error) {
	r, err := b.packetRouter(ctx, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	// Do not count an answer that does not come by ESP.
	if _, err := r.client.Exec(ctx, "nft", "table inet only { chain wired { type filter hook prerouting priority -300; iifname wire meta l4proto != esp drop; }; }"); err != nil {
		return err
	}
	return r.carried(ctx, t, "xfrm interface to veth")
}

// carriedPackets is how many packets carried sends in each direction.
const carriedPackets = 100

// carried counts which packets of a flow arrive, which of them pass the forward hook, and how many
// of them connection tracking counts.
func (r *packetRouter) carried(ctx context.Context, t *table, where string) error {
	if err := r.router.Sysctl("netfilter/nf_conntrack_acct", "1"); err != nil {
		return err
	}
	for _, c := range []struct{ name, rules string }{
		{"no flowtable", "table inet fast {\ncounter slow {\n}\nchain forward {\ntype filter hook forward priority 0;\ncounter name slow\n}\n}\n"},
		{"flowtable", flowtable("")},
		{"flowtable that counts", flowtable("counter;")},
	} {
		if err := r.rules(ctx, plainRules+c.rules); err != nil {
			return err
		}
		for _, p := range flowPairs {
			row := where + ", " + p.name + ", " + c.name
			if err := r.carry(ctx, t, row, p, carriedPackets); err != nil {
				return fmt.Errorf("%s: %w", row, err)
			}
		}
	}
	return nil
}

// carry sends packets over one flow, and as many answers.
func (r *packetRouter) carry(ctx context.Context, t *table, row string, p flowPair, packets int) error {
	f, err := r.open(p, 1) // a second packet may already be lost
	if err != nil {
		return err
	}
	defer f.close()
	tracked := func() (sent, received int, err error) {
		err = r.router.Do(func() error {
			c, err := conntrack.Open()
			if err != nil {
				return err
			}
			defer c.Close()
			return c.Dump(ctx, unix.AF_UNSPEC, func(f *conntrack.Flow) bool {
				if f.Protocol == unix.IPPROTO_UDP && f.Original.Destination.Port() == flowPort {
					sent, received = int(f.Sent.Packets), int(f.Received.Packets)
				}
				return true
			})
		})
		return sent, received, err
	}
	for _, way := range []struct {
		name string
		send func() error
		to   int
	}{
		{"requests", func() error { _, err := unix.Write(f.client, make([]byte, 22)); return err }, f.server},
		{"answers", func() error { return unix.Sendto(f.server, make([]byte, 22), 0, f.from) }, f.client},
	} {
		before, err := r.slow(ctx, true)
		if err != nil {
			return err
		}
		sent, received, err := tracked()
		if err != nil {
			return err
		}
		arrived := 0
		for range packets {
			if err := way.send(); err != nil && !refused(err) {
				return err
			}
			time.Sleep(time.Millisecond)
		}
		for last := time.Now(); arrived < packets && time.Since(last) < time.Second; {
			if _, _, err := unix.Recvfrom(way.to, make([]byte, 22), unix.MSG_DONTWAIT); err == nil {
				arrived, last = arrived+1, time.Now()
			} else if !errors.Is(err, unix.EAGAIN) && !refused(err) {
				return err
			}
		}
		after, err := r.slow(ctx, true)
		if err != nil {
			return err
		}
		sentNow, receivedNow, err := tracked()
		if err != nil {
			return err
		}
		t.add(row, way.name+": arrived", float64(arrived))
		t.add(row, way.name+": passed forward", float64(after-before))
		t.add(row, way.name+": counted", float64(sentNow-sent+receivedNow-received))
	}
	return nil
}

// flowPort is the server's port of a single flow.
const flowPort = 9000

// openFlow is a flow that is established.
type openFlow struct {
	client, server int
	from           unix.Sockaddr // as the server sees it
}

func (f openFlow) close() {
	unix.Close(f.client)
	unix.Close(f.server)
}

// open makes a flow and waits for its answer.
func (r *packetRouter) open(p flowPair, rounds int) (f openFlow, err error) {
	if err := r.router.Do(forgetFlows); err != nil {
		return f, fmt.Errorf("emptying the connection table: %w", err)
	}
	if f.server, err = datagram(r.server, p, p.to, flowPort); err != nil {
		return f, err
	}
	if f.client, err = datagram(r.client, p, p.from, 20000); err != nil {
		unix.Close(f.server)
		return f, err
	}
	if err = unix.Connect(f.client, socketAddress(p, p.to, flowPort)); err == nil {
		f.from, err = exchange(f.client, f.server, rounds)
	}
	if err != nil {
		f.close()
	}
	return f, err
}

// unnoticed measures for how long packets of an established flow go on when something has changed
// that should stop them.
func (r *packetRouter) unnoticed(ctx context.Context) error {
	const watched = 3 * time.Second
	shell := func(command string) func() error {
		return func() error {
			_, err := r.router.Exec(ctx, "sh", "-c", command)
			return err
		}
	}
	drop := func(family, chain string) func() error {
		return shell("nft 'table " + family + " stop { chain stopped { type filter hook " + chain + " drop; }; }'")
	}
	const routes = "ip route %[1]s blackhole 198.51.0.1/32; ip route %[1]s blackhole 2001:db8:b::1/128"
	const forwarding = "sysctl -q net.ipv4.ip_forward=%[1]d net.ipv6.conf.all.forwarding=%[1]d"
	const groups = "ip nexthop replace id 10 group %d; ip nexthop replace id 11 group %d"
	if err := shell("ip nexthop add id 1 via 192.0.2.254 dev up0; ip nexthop add id 2 via 192.0.2.253 dev up0; " +
		"ip nexthop add id 3 via 2001:db8:9::fe dev up0; ip nexthop add id 4 via 2001:db8:9::fd dev up0; " +
		fmt.Sprintf(groups, 1, 3) + "; ip route add 198.51.0.0/16 nhid 10; ip route add 2001:db8:b::/48 nhid 11")(); err != nil {
		return err
	}
	nothing := func() error { return nil }
	contenders := []struct{ row, rules string }{{"one plain rule", plainRules}, {"one plain rule, flowtable", plainRules + flowtable("")}}
	t := newTable("Flowtable: for how long packets of a flow go on after a change that stops them, milliseconds of %d", watched.Milliseconds())
	for _, c := range contenders {
		for _, change := range []struct {
			name             string
			before, do, undo func() error
		}{
			{"drop in prerouting", nothing, drop("inet", "prerouting priority -290; meta l4proto udp"), nothing},
			{"drop in forward", nothing, drop("inet", "forward priority -150; meta l4proto udp"), nothing},
			{"drop in postrouting", nothing, drop("inet", "postrouting priority 300; meta l4proto udp"), nothing},
			{"drop at the egress hook", nothing, drop("netdev", "egress device up0 priority 0; udp dport 9000"), nothing},
			{"forwarding off", nothing, shell(fmt.Sprintf(forwarding, 0)), shell(fmt.Sprintf(forwarding, 1))},
			{"route is a black hole", nothing, shell(fmt.Sprintf(routes, "add")), shell(fmt.Sprintf(routes, "del"))},
			{"next hop in the group is another", nothing, shell(fmt.Sprintf(groups, 2, 4)), shell(fmt.Sprintf(groups, 1, 3))},
			{"flow deleted, new ones dropped", drop("inet", "forward priority -150; ct state new"), func() error { return r.router.Do(forgetFlows) }, nothing},
		} {
			for _, p := range flowPairs {
				if err := r.rules(ctx, c.rules); err != nil {
					return err
				}
				lasted, err := r.lasts(p, change.before, change.do, watched)
				if err := errors.Join(err, change.undo()); err != nil {
					return fmt.Errorf("%s, %s, %s: %w", c.row, change.name, p.name, err)
				}
				t.add(change.name, c.row+", "+p.name, float64(lasted.Milliseconds()))
			}
		}
	}
	t.print(os.Stdout)
	return nil
}

// lasts opens a flow, makes a change, and returns how much later the last packet of the flow
// arrived, within a time.
func (r *packetRouter) lasts(p flowPair, before, change func() error, within time.Duration) (last time.Duration, err error) {
	f, err := r.open(p, 3)
	if err != nil {
		return 0, err
	}
	defer f.close()
	if err := before(); err != nil {
		return 0, err
	}
	if err := change(); err != nil {
		return 0, err
	}
	payload := make([]byte, 22)
	for start := time.Now(); time.Since(start) < within; time.Sleep(10 * time.Millisecond) {
		// The kernel reports the router's ICMP error once, at the next call on the socket.
		if _, err := unix.Write(f.client, payload); err != nil && !refused(err) {
			return 0, err
		}
		for {
			_, _, err := unix.Recvfrom(f.server, payload, unix.MSG_DONTWAIT)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			if err != nil {
				return 0, err
			}
			last = time.Since(start)
		}
	}
	return last, nil
}

func refused(err error) bool {
	for _, e := range []error{unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EACCES, unix.EPERM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
