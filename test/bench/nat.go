package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/nftables"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/lab"
)

// policies returns a configuration with n policies for as many sources and destinations, and one
// for everything else.
func policies(n int) nat.Config {
	pool := netip.MustParseAddr("192.0.2.11")
	c := nat.Config{Underlay: "up0", Own: []netip.Addr{netip.MustParseAddr("192.0.2.1")},
		Attachments: []nat.Attachment{{Interface: "tun0", Sources: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.31.0.0/30")}}},
		Pools:       []nat.Pool{{Name: "p", Addresses: []nat.PoolAddress{{Address: pool, Public: pool}}}}}
	for i := range n {
		src := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)
		dst := netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 4), byte(i << 4)}), 28)
		c.Policies = append(c.Policies, nat.Policy{Name: fmt.Sprintf("p%05d", i), Action: nat.SNAT, Sources: []netip.Prefix{src}, Destinations: []netip.Prefix{dst}, Pool: "p"})
	}
	c.Policies = append(c.Policies, nat.Policy{Name: "rest", Action: nat.SNAT, Sources: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Pool: "p"})
	return c
}

// linearRules is the same number of policies as a list of rules, in a table of their own.
func linearRules(n int) string {
	var b strings.Builder
	b.WriteString("table inet linear {\nchain post {\ntype nat hook postrouting priority srcnat;\n")
	for i := range n {
		fmt.Fprintf(&b, "oifname up0 ip saddr 172.16.%d.%d ip daddr 198.18.0.0/15 snat ip to 192.0.2.11\n", i>>8, i&255)
	}
	b.WriteString("oifname up0 snat ip to 192.0.2.11\n}\n}\n")
	return b.String()
}

// egress is a client behind a router and a server on its underlay.
type egress struct {
	lab                    *lab.Lab
	client, router, server *lab.Node
	driver                 *nftables.Driver
	listener               net.Listener
	flow                   int
}

func (b *bench) egress(ctx context.Context) (e *egress, err error) {
	l, err := b.lab()
	if err != nil {
		return nil, err
	}
	e = &egress{lab: l, client: l.Node("client"), router: l.Node("router"), server: l.Node("server")}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	addrs := func(list ...string) (out []netip.Prefix) {
		for _, a := range list {
			out = append(out, netip.MustParsePrefix(a))
		}
		return out
	}
	l.Link(lab.End{Node: e.client, Name: "r0", Addrs: addrs("172.31.0.2/30")}, lab.End{Node: e.router, Name: "tun0", Addrs: addrs("172.31.0.1/30")})
	l.Link(lab.End{Node: e.router, Name: "up0", Addrs: addrs("192.0.2.1/24", "192.0.2.11/24")}, lab.End{Node: e.server, Name: "r0", Addrs: addrs("192.0.2.254/24")})
	e.client.IP("route add default via 172.31.0.1")
	e.client.IP("route add local 10.0.0.0/8 dev lo")
	e.router.IP("route add 10.0.0.0/8 via 172.31.0.2")
	e.router.IP("route add default via 192.0.2.254")
	e.server.IP("route add local 198.51.0.0/16 dev lo")
	if err := l.Up(ctx); err != nil {
		return nil, err
	}
	ns, err := unix.Open("/run/netns/"+e.router.Namespace, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	e.driver = nftables.New(nftables.Options{NetNS: ns})
	e.listener, err = e.server.Listen("tcp4", "0.0.0.0:443")
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := e.listener.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	return e, nil
}

func (e *egress) close() {
	if e.listener != nil {
		e.listener.Close()
	}
	if err := e.lab.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
}

// open opens TCP connections through the router, one after another and each from the next policy's
// source to its destination, and returns how many a second of CPU time: the connecting thread
// carries every packet through the router. Of the parts they are opened in, only the one counts
// that other work of the machine disturbed least.
func (e *egress) open(n, policies int) (perSecond float64, err error) {
	if err := e.router.Do(forgetFlows); err != nil {
		return 0, fmt.Errorf("emptying the connection table: %w", err)
	}
	err = e.client.Do(func() error {
		const part = 100
		for range n / part {
			start := threadTime()
			for range part {
				e.flow++
				p := e.flow % policies
				if err := connectOnce([4]byte{10, byte(p >> 8), byte(p), 1}, [4]byte{198, 51, byte(p >> 4), byte(p<<4) | 1}); err != nil {
					return fmt.Errorf("opening a connection: %w", err)
				}
			}
			perSecond = max(perSecond, part/(threadTime()-start).Seconds())
		}
		return nil
	})
	return perSecond, err
}

// connectOnce opens a TCP connection and resets it.
func connectOnce(from, to [4]byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
		unix.Bind(fd, &unix.SockaddrInet4{Addr: from}),
		unix.Connect(fd, &unix.SockaddrInet4{Addr: to, Port: 443}),
	)
}

func threadTime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t)
	return time.Duration(t.Nano())
}

// forgetFlows empties the connection tracking of the calling thread's namespace.
func forgetFlows() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	const deleteAll = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2 // IPCTNL_MSG_CT_DELETE
	if err := unix.Sendto(fd, request(deleteAll, unix.NLM_F_ACK, []byte{unix.AF_UNSPEC, 0, 0, 0}), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		return err
	}
	messages(buf[:n], func(kind uint16, body []byte) {
		if code := int32(binary.NativeEndian.Uint32(body)); kind == unix.NLMSG_ERROR && code < 0 {
			err = unix.Errno(-code)
		}
	})
	return err
}

// nat measures what policies cost a new connection, and what a change of one policy costs.
func (b *bench) nat(ctx context.Context) error {
	e, err := b.egress(ctx)
	if err != nil {
		return err
	}
	defer e.close()
	n := b.size(10_000)
	one, all := policies(1), policies(n)
	if one.Links, err = links(e.router); err != nil {
		return err
	}
	all.Links = one.Links
	dir, err := e.router.Dir()
	if err != nil {
		return err
	}
	script := dir + "/linear.nft"
	if err := os.WriteFile(script, []byte(linearRules(n)), 0o600); err != nil {
		return err
	}
	flows := newTable("Egress: new connections a second of CPU time through %d policies", n)
	many := fmt.Sprint(n, " policies")
	few, full := newTable(""), newTable("")
	const plain = "table inet linear {\nchain post {\ntype nat hook postrouting priority srcnat;\noifname up0 snat ip to 192.0.2.11\n}\n}\n"
	for name, rules := range map[string]string{"plain": plain, "sides": plain + sidesAlone, "policy": policyAlone + sidesAlone} {
		if err := os.WriteFile(dir+"/"+name+".nft", []byte(rules), 0o600); err != nil {
			return err
		}
	}
	for range 2 * b.rounds { // the rounds are short
		// Before and after, so that a drift of the machine shows in neither.
		for _, c := range []struct {
			row         string
			config      nat.Config
			connections int
		}{{"one", one, 5000}, {"all", all, 10_000}, {"one", one, 5000}} {
			if err := e.driver.Apply(ctx, c.config); err != nil {
				return err
			}
			rate, err := e.open(c.connections, n)
			if err != nil {
				return err
			}
			few.add(c.row, "rate", rate)
		}
		for _, c := range []struct {
			row, script string
			connections int
		}{{"plain", dir + "/plain.nft", 5000}, {"sides", dir + "/sides.nft", 5000}, {"policy", dir + "/policy.nft", 5000}, {"linear", script, 500}} {
			if _, err := e.router.Exec(ctx, "sh", "-c", "nft flush ruleset; nft -f "+c.script); err != nil {
				return err
			}
			rate, err := e.open(c.connections, n)
			if err != nil {
				return err
			}
			full.add(c.row, "rate", rate)
			if _, err := e.router.Exec(ctx, "nft", "flush", "ruleset"); err != nil {
				return err
			}
		}
	}
	before := few.cells[[2]string{"one", "rate"}]
	for i, rate := range few.cells[[2]string{"all", "rate"}] {
		flows.add(many, "connections/s", rate)
		flows.add("one policy", "connections/s", (before[2*i]+before[2*i+1])/2)
		flows.add("one plain rule", "connections/s", full.cells[[2]string{"plain", "rate"}][i])
		flows.add("plain, sides by hand", "connections/s", full.cells[[2]string{"sides", "rate"}][i])
		flows.add("one policy and sides by hand", "connections/s", full.cells[[2]string{"policy", "rate"}][i])
		flows.add("linear rules", "connections/s", full.cells[[2]string{"linear", "rate"}][i])
	}
	flows.print(os.Stdout, "one policy", "one plain rule", "plain, sides by hand", "one policy and sides by hand", "linear rules")
	return b.edits(ctx, e, n)
}

// edits measures what it takes to add and remove one of n policies: in the driver; as an element of
// a map of as many, by nft; and through the API of isthmusd, alone and as a whole document.
func (b *bench) edits(ctx context.Context, e *egress, n int) error {
	t := newTable("Egress: one of %d policies added or removed", n)
	timed := func(row, column string, do func() error) error {
		start := time.Now()
		err := do()
		t.add(row, column, time.Since(start).Seconds()*1000)
		return err
	}
	all, more := policies(n), policies(n+1)
	if err := e.driver.Apply(ctx, all); err != nil {
		return err
	}
	dir, err := e.router.Dir()
	if err != nil {
		return err
	}
	element := func(i int) string {
		p := &more.Policies[i]
		return fmt.Sprintf("%v . %v . 0-255 . 0-65535", p.Sources[0], p.Destinations[0])
	}
	var script strings.Builder
	script.WriteString("table inet cli {\nmap m {\ntype ipv4_addr . ipv4_addr . inet_proto . inet_service : verdict\nflags interval\nelements = {\n")
	for i := range n {
		script.WriteString(element(i) + " : accept,\n")
	}
	script.WriteString("}\n}\n}\n")
	if err := os.WriteFile(dir+"/map.nft", []byte(script.String()), 0o600); err != nil {
		return err
	}
	if _, err := e.router.Exec(ctx, "nft", "-f", dir+"/map.nft"); err != nil {
		return err
	}
	nft := func(verb string) func() error {
		return func() error {
			_, err := e.router.Exec(ctx, "nft", verb, "element", "inet", "cli", "m", "{", element(n), ":", "accept", "}")
			return err
		}
	}
	apply := func(c nat.Config) func() error { return func() error { return e.driver.Apply(ctx, c) } }
	for range 4 * b.rounds {
		err := errors.Join(
			apply(all)(), // it reads back the changes of nft, which is not part of an edit
			timed("driver", "add ms", apply(more)), timed("driver", "the same ms", apply(more)), timed("driver", "remove ms", apply(all)),
			timed("nft, one map", "add ms", nft("add")), timed("nft, one map", "remove ms", nft("delete")))
		if err != nil {
			return err
		}
	}
	if _, err := e.router.Exec(ctx, "nft", "delete", "table", "inet", "cli"); err != nil {
		return err
	}
	bin, err := buildDaemon(ctx, e.lab)
	if err != nil {
		return err
	}
	p, c, _, err := startDaemon(ctx, e.router, bin)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, _, err := c.apply(ctx, policyDocument(all)); err != nil {
		log, _ := os.ReadFile(p.Log)
		return fmt.Errorf("%w: %s", err, log)
	}
	seen, err := watchCommits(e.router)
	if err != nil {
		return err
	}
	defer seen.close()
	last := &isthmusv1.EditPoliciesRequest{Text: "policies:\n" + policyItem(&more.Policies[n])}
	for range 4 * b.rounds {
		for _, turn := range []struct {
			column  string
			changes bool
			edit    *isthmusv1.EditPoliciesRequest
		}{{"add ms", true, last}, {"the same ms", false, last}, {"remove ms", true, &isthmusv1.EditPoliciesRequest{Delete: []string{more.Policies[n].Name}}}} {
			time.Sleep(50 * time.Millisecond) // the API takes 100 calls a second
			if err := timed("one policy through the API", turn.column, func() error {
				_, err := c.spec.EditPolicies(ctx, turn.edit)
				if err == nil && turn.changes {
					err = seen.wait()
				}
				return err
			}); err != nil {
				return err
			}
		}
	}
	for range 2 * b.rounds {
		for _, turn := range []struct {
			column  string
			changes bool
			text    string
		}{{"add ms", true, policyDocument(more)}, {"the same ms", false, policyDocument(more)}, {"remove ms", true, policyDocument(all)}} {
			if err := timed("whole document through the API", turn.column, func() error {
				_, err := c.spec.Apply(ctx, &isthmusv1.ApplyRequest{Source: &isthmusv1.Source{Source: &isthmusv1.Source_Text{Text: turn.text}}})
				if err == nil && turn.changes {
					err = seen.wait()
				}
				return err
			}); err != nil {
				return err
			}
		}
	}
	t.print(os.Stdout)
	return nil
}

// commits receives notifications of nftables transactions.
type commits struct{ fd int }

func watchCommits(n *lab.Node) (*commits, error) {
	fd, err := netlinkSocket(n, unix.NETLINK_NETFILTER, 1<<(unix.NFNLGRP_NFTABLES-1))
	return &commits{fd}, err
}

func (c *commits) close() { unix.Close(c.fd) }

// wait returns when a transaction is in force.
func (c *commits) wait() error {
	buf := make([]byte, 64<<10)
	const newGeneration = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		n, _, err := unix.Recvfrom(c.fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("waiting for rules: %w", err)
		}
		in := false
		messages(buf[:n], func(kind uint16, _ []byte) { in = in || kind == newGeneration })
		if in {
			return nil
		}
	}
	return errors.New("waiting for rules: none came")
}

// policyDocument returns the document of a configuration from policies.
func policyDocument(c nat.Config) string {
	var b strings.Builder
	b.WriteString("node: {name: bench}\nunderlay: {interface: up0, address: 192.0.2.1}\negress:\n  pools:\n  - {name: p, addresses: [{address: 192.0.2.11}]}\n  policies:\n")
	for i := range c.Policies {
		b.WriteString("  " + policyItem(&c.Policies[i]))
	}
	return b.String()
}

// policyItem returns the line of a policy.
func policyItem(p *nat.Policy) string {
	to := ""
	if len(p.Destinations) > 0 {
		to = fmt.Sprintf(", destinations: [%v]", p.Destinations[0])
	}
	return fmt.Sprintf("- {name: %s, sources: [%v], pool: %s%s}\n", p.Name, p.Sources[0], p.Pool, to)
}
