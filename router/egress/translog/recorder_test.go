package translog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/test/netns"
)

// site is a namespace that translates what it sends into a sink.
type site struct {
	*netns.NS
	t testing.TB
}

func newSite(t testing.TB) site {
	ns := netns.New(t)
	ns.Run(`nft add table inet t
		nft add chain inet t out { type nat hook postrouting priority 100 ; }
		nft add rule inet t out ip saddr 10.0.0.0/8 snat ip to 192.0.2.9
		sysctl -qw net.netfilter.nf_conntrack_acct=1 net.netfilter.nf_conntrack_timestamp=1
		ip link add sink arp off type veth peer name drain
		ip link set drain up
		ip addr add 192.0.2.1/24 dev sink
		ip addr add 10.0.0.5/32 dev sink
		ip link set sink up
		ip route add default dev sink src 10.0.0.5`)
	return site{ns, t}
}

// send begins n flows from one port, to as many destinations.
func (s site) send(port, n int) {
	s.t.Helper()
	var err error
	s.Do(func() {
		var fd int
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0); err != nil {
			return
		}
		defer unix.Close(fd)
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: port})
		for i := range n {
			if err == nil {
				err = unix.Sendto(fd, []byte("hello"), 0, &unix.SockaddrInet4{Port: 53, Addr: [4]byte{198, 18, byte(i >> 8), byte(i)}})
			}
		}
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// forget ends all flows.
func (s site) forget() {
	s.t.Helper()
	var err error
	s.Do(func() {
		var fd int
		if fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER); err != nil {
			return
		}
		defer unix.Close(fd)
		// struct nlmsghdr with IPCTNL_MSG_CT_DELETE, request and acknowledgement; struct nfgenmsg
		err = unix.Sendto(fd, []byte{20, 0, 0, 0, 2, unix.NFNL_SUBSYS_CTNETLINK, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err == nil {
			_, err = unix.Read(fd, make([]byte, 4096))
		}
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// open makes a recorder that does not run yet.
func (s site) open(dir string) (r *Recorder) {
	s.t.Helper()
	var err error
	s.Do(func() { r, err = Open(dir, slog.New(slog.DiscardHandler)) })
	if err != nil {
		s.t.Fatal(err)
	}
	r.Limit(unbounded)
	r.Use(nat.Config{
		Pools:    []nat.Pool{{Name: "p", Addresses: []nat.PoolAddress{{Address: netip.MustParseAddr("192.0.2.9")}}}},
		Policies: []nat.Policy{{Name: "rest", Action: nat.SNAT, Pool: "p", Sources: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}},
	})
	return r
}

// record starts a recorder, and returns the function that stops it.
func (s site) record(dir string) (r *Recorder, stop func()) {
	s.t.Helper()
	r = s.open(dir)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	return r, func() {
		s.t.Helper()
		cancel()
		if err := <-done; err != nil {
			s.t.Error(err)
		}
		r.Close()
	}
}

// who queries until there are n answers.
func (s site) who(r *Recorder, port uint16, at time.Time, n int) (found []Record) {
	s.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		var err error
		found, err = r.Who(s.t.Context(), Query{Outside: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.9"), port), From: at, To: at})
		if err != nil {
			s.t.Fatal(err)
		}
		if len(found) == n {
			return found
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%d answers, want %d", len(found), n)
		}
	}
}

// TestRecorder follows flows from their begin to the records after their end, after a restart, and
// after an end while no recorder ran.
func TestRecorder(t *testing.T) {
	s := newSite(t)
	dir := t.TempDir()
	r, stop := s.record(dir)
	const n = 500
	s.send(3000, n)
	began := time.Now()
	check := func(what string, list []Record, lives, vanished bool) {
		t.Helper()
		seen := map[netip.AddrPort]bool{}
		for _, f := range list {
			seen[f.Destination] = true
			if f.Inside != netip.MustParseAddrPort("10.0.0.5:3000") || f.Outside != netip.MustParseAddrPort("192.0.2.9:3000") || f.Protocol != unix.IPPROTO_UDP || f.Policy != "rest" ||
				f.Start.After(began) || began.Sub(f.Start) > 5*time.Second || f.End.IsZero() != lives || f.Vanished != vanished || f.Sent != (nat.Counter{Packets: 1, Bytes: 33}) {
				t.Fatalf("%s: %+v", what, f)
			}
		}
		if len(seen) != n {
			t.Errorf("%s: %d destinations", what, len(seen))
		}
	}
	check("live", s.who(r, 3000, time.Now(), n), true, false)
	s.who(r, 3000, began.Add(-time.Minute), 0)
	time.Sleep(20 * time.Millisecond)
	s.forget()
	check("ended", s.who(r, 3000, began, n), false, false)
	s.who(r, 3000, time.Now().Add(time.Minute), 0)
	stop()

	r, stop = s.record(dir)
	check("after a restart", s.who(r, 3000, began, n), false, false)
	s.send(3000, n)
	began = time.Now()
	stop()     // makes a checkpoint
	s.forget() // without a recorder

	r, stop = s.record(dir)
	defer stop()
	check("ended without a recorder", s.who(r, 3000, began, n), false, true)
	if st := r.Status(); st.Unheard != n || st.Lost != 0 || len(st.Problems) > 0 {
		t.Errorf("%+v", st)
	}

	// Turned off and on again. Queries find live flows in any case.
	r.Limit(egress.Log{})
	time.Sleep(3 * lookEvery)
	s.send(3001, n)
	off := time.Now()
	s.forget()
	r.Limit(unbounded)
	time.Sleep(3 * lookEvery)
	s.send(3002, n)
	began = time.Now()
	s.forget()
	s.who(r, 3002, began, n)
	s.who(r, 3001, off, 0)
}

// TestRecordsOfPings looks for echo requests by the identifier with which they left. When two
// sources use the same identifier, the second leaves with another one.
func TestRecordsOfPings(t *testing.T) {
	s := newSite(t)
	r, stop := s.record(t.TempDir())
	defer stop()
	s.Run("ip addr add 10.0.0.6/32 dev sink")
	for _, source := range []string{"10.0.0.5", "10.0.0.6"} {
		// without a reply
		if out, _ := s.Try("ping -q -c 1 -W 0.1 -e 4711 -I " + source + " 198.18.0.1"); !strings.Contains(out, "1 packets transmitted") {
			t.Fatal(out)
		}
	}
	began := time.Now()
	check := func(what string, live bool) {
		t.Helper()
		for _, f := range s.who(r, 4711, began, 1) {
			if f.Inside != netip.MustParseAddrPort("10.0.0.5:4711") || f.Outside != netip.MustParseAddrPort("192.0.2.9:4711") ||
				f.Destination.Addr() != netip.MustParseAddr("198.18.0.1") || f.Protocol != unix.IPPROTO_ICMP || f.End.IsZero() != live {
				t.Errorf("%s: %+v", what, f)
			}
		}
	}
	check("live", true)
	s.forget()
	check("ended", false)
}

// TestCheckpoints makes checkpoints while flows begin and end. Each checkpoint looks for flows
// without an end event, and each flow is recorded once.
func TestCheckpoints(t *testing.T) {
	s := newSite(t)
	r := s.open(t.TempDir())
	defer r.Close()
	if err := r.events.Keep(true); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		for ctx.Err() == nil {
			r.lossy.Store(true)
			if err := r.checkpoint(ctx, time.Now()); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
	})
	wg.Go(func() {
		for ctx.Err() == nil {
			if err := r.look(ctx); err != nil {
				t.Error(err)
			}
			time.Sleep(time.Millisecond)
		}
	})
	const rounds, n = 40, 300
	for i := range rounds {
		s.send(3000+i, n)
		s.forget()
	}
	cancel()
	wg.Wait()
	for range 2 {
		r.lossy.Store(true)
		if err := r.checkpoint(t.Context(), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	waiting := r.store.shelf[0].waiting
	if st := r.Status(); len(waiting.rows) != rounds*n || st.Unheard != 0 || st.Overruns != 0 {
		t.Errorf("%d records of %d flows, %+v", len(waiting.rows), rounds*n, st)
	}
}

// TestCrash ends flows after the last checkpoint of a process that crashes. The ends that it
// recorded are not recorded again, whether they are in a journal or in a run by then.
func TestCrash(t *testing.T) {
	const n = 300
	for name, age := range map[string]time.Duration{"in a journal": 0, "in a run": 2 * runAge} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			dir := t.TempDir()
			r := s.open(dir)
			s.send(3000, n)
			if err := r.checkpoint(t.Context(), time.Now()); err != nil {
				t.Fatal(err)
			}
			s.forget()
			if err := errors.Join(r.look(t.Context()), r.store.Sync(time.Now().Add(age))); err != nil {
				t.Fatal(err)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			r = s.open(dir)
			defer r.Close()
			if err := r.checkpoint(t.Context(), time.Now()); err != nil {
				t.Fatal(err)
			}
			waiting := len(r.store.shelf[0].waiting.rows)
			if st := r.Status(); st.Unheard != 0 || int(st.Records)+waiting != n || (st.Records > 0) != (age > 0) {
				t.Errorf("%d records are pending, %+v", waiting, st)
			}
		})
	}
}

// BenchmarkEnded takes the ends of flows of 64 sources to 256 destinations, under 1,000 policies
// with ten pools.
func BenchmarkEnded(b *testing.B) {
	var c nat.Config
	for i := range 10 {
		c.Pools = append(c.Pools, nat.Pool{Name: fmt.Sprint("p", i), Addresses: []nat.PoolAddress{{Address: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})}}})
	}
	for i := range 1000 {
		c.Policies = append(c.Policies, nat.Policy{
			Name: fmt.Sprint("policy-", i), Action: nat.SNAT, Pool: fmt.Sprint("p", i%10), Sources: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 32)},
		})
	}
	var r *Recorder
	i := 0
	now := time.Now()
	f := conntrack.Flow{Status: conntrack.SourceNAT, Protocol: unix.IPPROTO_TCP, Start: now, End: now.Add(time.Second)}
	b.ReportAllocs()
	for b.Loop() {
		if i%runRows == 0 {
			b.StopTimer()
			if r != nil {
				r.store.Close()
			}
			r = &Recorder{store: open(b, b.TempDir(), unbounded), live: &checkpoint{at: map[key]int{}}}
			r.Limit(unbounded)
			r.Use(c)
			b.StartTimer()
		}
		source, destination, port := byte(i%64), netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(i / 3)}), 443), uint16(i)
		f.Original.Source = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, source}), port)
		f.Original.Destination, f.Reply.Source = destination, destination
		f.Reply.Destination = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, source % 10}), port)
		r.mu.Lock()
		r.endedLocked(&f, now)
		r.mu.Unlock()
		i++
	}
	kept := r.store.shelf[0].waiting
	if n := kept.names(); n.record(kept.rows[0]).Policy == "" {
		b.Fatal("the policy was not found")
	}
}

// BenchmarkCost opens TCP connections through a router, from 64 sources to 256 destinations, and
// has them end, with and without a recorder in turn. Client, router, server and recorder are all
// this process, so that its CPU time is that of the connections and of recording them, up to the
// run on disk, without checkpoints. A round is about a second of only connections. "rate" is the
// connections a second of the one connecting thread with a recorder, divided by those without;
// "rate/cpu" is the same for connections a second of CPU time.
func BenchmarkCost(b *testing.B) {
	const n, parts = 36_000, 36
	router, client, server := newSite(b), netns.New(b), netns.New(b)
	netns.Veth(router.NS, "tun0", client, "r0")
	netns.Veth(router.NS, "up0", server, "r0")
	router.Run(`ip link set sink down
		ip addr flush dev sink
		ip addr add 10.0.0.1/24 dev tun0
		ip addr add 192.0.2.1/24 dev up0
		ip addr add 192.0.2.9/32 dev up0
		ip route add 198.51.100.0/24 via 192.0.2.254
		sysctl -qw net.ipv4.ip_forward=1`)
	client.Run("ip addr add 10.0.0.5/24 dev r0\nip route add default via 10.0.0.1\nip route add local 10.0.0.64/26 dev lo")
	server.Run("ip addr add 192.0.2.254/24 dev r0\nip route add local 198.51.100.0/24 dev lo")
	var l net.Listener
	var err error
	server.Do(func() { l, err = net.Listen("tcp4", ":443") })
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	go func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			c.Close()
		}
	}()
	connect := func() (err error) {
		client.Do(func() {
			for i := range n / parts {
				var fd int
				if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0); err != nil {
					return
				}
				err = errors.Join(
					unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
					unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
					unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{10, 0, 0, 64 + byte(i%64)}}),
					unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{198, 51, 100, byte(i / 3)}, Port: 443}))
				unix.Close(fd)
				if err != nil {
					return
				}
			}
		})
		return err
	}
	// Flows end while others begin. Deleting them walks the table of all namespaces, which is not
	// work of a router. So the empty table is walked as often, and that is subtracted.
	round := func() (spent, rate float64) {
		runtime.GC()
		start, connecting := cpu(), time.Duration(0)
		for range parts {
			began := time.Now()
			if err := connect(); err != nil {
				b.Fatal(err)
			}
			connecting += time.Since(began)
			router.forget()
		}
		time.Sleep(syncEvery + 2*lookEvery)
		end := cpu()
		for range parts {
			router.forget()
		}
		return (2*end - start - cpu()).Seconds() * 1e6 / n, n / connecting.Seconds()
	}
	recorded := func() (spent, rate float64) {
		r, stop := router.record(b.TempDir())
		time.Sleep(time.Second) // until the first checkpoint has been made
		spent, rate = round()
		stop()
		shelf := r.store.shelf[0]
		if records := len(shelf.waiting.rows); records < n {
			b.Fatalf("%d records of %d connections", records, n)
		}
		// Pending rows become part of a run later.
		start := cpu()
		shelf.encoder.encode(shelf.waiting.names(), shelf.waiting.rows, 1)
		return spent + (cpu()-start).Seconds()*1e6/n, rate
	}
	round()
	var ratios, off, added, rates []float64
	for b.Loop() {
		var without, with, rate, slower float64
		if len(off)%2 == 0 {
			without, rate = round()
			with, slower = recorded()
		} else {
			with, slower = recorded()
			without, rate = round()
		}
		off, added, ratios, rates = append(off, without), append(added, with-without), append(ratios, without/with), append(rates, slower/rate)
	}
	median := func(list []float64) float64 {
		slices.Sort(list)
		return list[len(list)/2]
	}
	b.ReportMetric(median(rates), "rate")
	b.ReportMetric(median(ratios), "rate/cpu")
	b.ReportMetric(ratios[len(ratios)/4], "rate/cpu-quarter")
	b.ReportMetric(median(off), "us/connection")
	b.ReportMetric(median(added), "us/record")
}
