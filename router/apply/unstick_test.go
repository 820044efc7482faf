package apply

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/test/crowd"
)

// TestPortKeeperLeavesDeadAddress: a client that goes on sending UDP from one port gets another
// address when its own goes down, and a TCP flow stays. Ring: namespace.
func TestPortKeeperLeavesDeadAddress(t *testing.T) {
	c := crowd.New(t, 2)
	u := newUnsticker(c.Flows, slog.New(slog.NewTextHandler(t.Output(), nil)))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); u.run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	u.use(c.Config, outside)

	var udp net.Conn
	var tcp net.Conn
	accepted := make(chan net.Conn, 1)
	var err error
	c.Server.Do(func() {
		var l net.Listener
		if l, err = net.Listen("tcp", "198.51.100.1:443"); err == nil {
			go func() {
				defer close(accepted)
				if conn, err := l.Accept(); err == nil {
					accepted <- conn
				}
				l.Close()
			}()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	from := net.IPv4(10, 0, 0, 5)
	c.Client.Do(func() {
		udp, err = (&net.Dialer{LocalAddr: &net.UDPAddr{IP: from, Port: 5060}}).Dial("udp", "198.51.100.1:53")
		if err == nil {
			tcp, err = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: from, Port: 5060}, Timeout: time.Minute}).Dial("tcp", "198.51.100.1:443")
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		udp.Close()
		tcp.Close()
		if server := <-accepted; server != nil {
			server.Close()
		}
	})
	answered := func() bool {
		udp.SetDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := udp.Write([]byte("request")); err != nil {
			return false
		}
		_, err := udp.Read(make([]byte, 100))
		return err == nil
	}
	for limit := time.Now().Add(time.Minute); !answered(); {
		if time.Now().After(limit) {
			t.Fatal("no answer at first")
		}
	}
	as := func(protocol uint8) (out string) {
		if err := c.Flows.Dump(ctx, unix.AF_INET, func(f *conntrack.Flow) bool {
			if f.Protocol == protocol && f.Original.Source.Port() == 5060 {
				out = f.Reply.Destination.Addr().String()
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
		return out
	}
	former := as(unix.IPPROTO_UDP)
	if former == "" || as(unix.IPPROTO_TCP) != former {
		t.Fatalf("they leave as %q and %q", former, as(unix.IPPROTO_TCP))
	}
	c.Server.Run("ip route add blackhole " + former + "/32")
	cut := time.Now()
	down := c.Config
	down.Pools = []nat.Pool{{Name: "p", Addresses: []nat.PoolAddress{c.Config.Pools[0].Addresses[0], c.Config.Pools[0].Addresses[1]}}}
	for i := range down.Pools[0].Addresses {
		down.Pools[0].Addresses[i].Down = down.Pools[0].Addresses[i].Address.String() == former
	}
	if err := c.Driver.Apply(ctx, down); err != nil {
		t.Fatal(err)
	}
	u.use(down, outside)
	for !answered() {
		if time.Since(cut) > time.Minute {
			t.Fatalf("no answer any more; the flow leaves as %s", as(unix.IPPROTO_UDP))
		}
	}
	t.Logf("answered again %v after the cut", time.Since(cut).Round(100*time.Millisecond))
	if now := as(unix.IPPROTO_UDP); now == former {
		t.Errorf("it still leaves as %s", now)
	}
	if now := as(unix.IPPROTO_TCP); now != former {
		t.Errorf("the TCP flow leaves as %q, it was %s", now, former)
	}
}

// brokenTable fails so many times.
type brokenTable struct {
	crowd.Table
	failures, asked int
}

func (b *brokenTable) End(ctx context.Context, family uint8, which func(*conntrack.Flow) bool) (int, error) {
	if b.asked++; b.asked <= b.failures {
		return 0, errors.New("no such luck")
	}
	return b.Table.End(ctx, family, which)
}

// TestUnstick takes addresses down and up.
func TestUnstick(t *testing.T) {
	first, second, six := netip.MustParseAddr("192.0.2.11"), netip.MustParseAddr("192.0.2.12"), netip.MustParseAddr("2001:db8::11")
	flow := func(protocol uint8, source string, as netip.Addr) conntrack.Flow {
		partner := netip.MustParseAddrPort("198.51.100.7:443")
		return conntrack.Flow{Protocol: protocol, Original: conntrack.Tuple{Source: netip.MustParseAddrPort(source + ":1000"), Destination: partner},
			Reply: conntrack.Tuple{Source: partner, Destination: netip.AddrPortFrom(as, 1000)}}
	}
	pool := func(down ...netip.Addr) nat.Config {
		p := nat.Pool{Name: "p"}
		for _, a := range []netip.Addr{first, second, six} {
			one := nat.PoolAddress{Address: a}
			for _, d := range down {
				one.Down = one.Down || d == a
			}
			p.Addresses = append(p.Addresses, one)
		}
		return nat.Config{Pools: []nat.Pool{p}}
	}
	blocks := func(c nat.Config) nat.Config { c.Pools[0].Blocks = &nat.Blocks{}; return c }
	const most = endsAtOnce
	for name, k := range map[string]struct {
		protocols []uint8
		flows     int // of each protocol
		failures  int
		steps     []any // configurations, and pauses between them
		left      int
	}{
		"down":                       {[]uint8{17, 1, 50, 6, 132}, 1, 0, []any{pool(first), downBeforeEnd + time.Second}, 2},
		"a flap":                     {[]uint8{17}, 1, 0, []any{pool(first), downBeforeEnd - time.Second, pool(), time.Hour}, 1},
		"not yet":                    {[]uint8{17}, 1, 0, []any{pool(first), downBeforeEnd - time.Second}, 1},
		"another one":                {[]uint8{17}, 1, 0, []any{pool(second), time.Hour}, 1},
		"all of the family":          {[]uint8{17}, 1, 0, []any{pool(first, second), time.Hour}, 1},
		"blocks":                     {[]uint8{17}, 1, 0, []any{blocks(pool(first)), time.Hour}, 1},
		"the table cannot be read":   {[]uint8{17}, 1, 3, []any{pool(first), downBeforeEnd + 4*endRetry}, 0},
		"no more than the rate":      {[]uint8{17}, 2*most + 1, 0, []any{pool(first), downBeforeEnd + 100*time.Millisecond}, most + 1},
		"no more than the rate, yet": {[]uint8{17}, 2*most + 1, 0, []any{pool(first), downBeforeEnd + time.Minute}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				table := &brokenTable{failures: k.failures}
				for _, p := range k.protocols {
					for range k.flows {
						table.Flows = append(table.Flows, flow(p, "10.0.0.1", first))
					}
				}
				// The node's own stays in any case.
				table.Flows = append(table.Flows, flow(17, first.String(), first))
				u := newUnsticker(table, slog.New(slog.DiscardHandler))
				ctx, cancel := context.WithCancel(t.Context())
				go u.run(ctx)
				for _, s := range k.steps {
					if pause, ok := s.(time.Duration); ok {
						time.Sleep(pause)
					} else {
						u.use(s.(nat.Config), outside)
					}
					synctest.Wait()
				}
				if left := len(table.Flows) - 1; left != k.left {
					t.Errorf("%d flows are left, want %d", left, k.left)
				}
				cancel()
			})
		})
	}
	t.Run("an address that goes and comes", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			table := &brokenTable{}
			u := newUnsticker(table, slog.New(slog.DiscardHandler))
			ctx, cancel := context.WithCancel(t.Context())
			go u.run(ctx)
			for range 60 { // for five minutes
				u.use(pool(first), outside)
				time.Sleep(downBeforeEnd + time.Second)
				u.use(pool(), outside)
				time.Sleep(time.Second)
			}
			if most := int(5*time.Minute/betweenEnds) + 1; table.asked == 0 || table.asked > most {
				t.Errorf("the table was walked %d times, at most %d are right", table.asked, most)
			}
			cancel()
		})
	})
	t.Run("many changes", func(t *testing.T) {
		u := newUnsticker(&crowd.Table{}, slog.New(slog.DiscardHandler))
		hits := 0
		for range 100 {
			u.end(endJob{has: func(nat.Track) bool { hits++; return false }})
		}
		for _, j := range u.jobs {
			j.has(nat.Track{})
		}
		if len(u.jobs) != maxEndJobs || hits != 100 {
			t.Errorf("%d jobs of %d changes", len(u.jobs), hits)
		}
	})
}

// TestFlowsEnd denies a host, with one exception, and ends what another has under way. Ring:
// namespace.
func TestFlowsEnd(t *testing.T) {
	c := crowd.New(t, 1)
	c.Server.Run("ip addr add 198.51.100.2/24 dev lo")
	u := newUnsticker(c.Flows, slog.New(slog.NewTextHandler(t.Output(), nil)))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); u.run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	u.use(c.Config, outside)

	service := c.Listen(t, ":443")
	denied := service.Connect(t, "10.0.0.5", "198.51.100.1:443")
	spared := service.Connect(t, "10.0.0.5", "198.51.100.2:443")
	other := service.Connect(t, "10.0.0.6", "198.51.100.1:443")
	c.Ask(t, "10.0.0.5", "198.51.100.1:53")
	c.Ask(t, "10.0.0.6", "198.51.100.1:53")
	if a, b := c.Of(t, "10.0.0.5"), c.Of(t, "10.0.0.6"); a != 3 || b != 2 {
		t.Fatalf("%d and %d flows, want 3 and 2", a, b)
	}

	prefix := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	next := c.Config
	next.Policies = append(next.Policies[:1:1],
		nat.Policy{Name: "stop", Action: nat.Deny, Sources: prefix("10.0.0.5/32"), Ends: true},
		nat.Policy{Name: "but", Action: nat.SNAT, Sources: prefix("10.0.0.0/16"), Destinations: prefix("198.51.100.2/32"), Pool: "p"})
	endings := nat.Endings(c.Config, next)
	if len(endings) != 1 || endings[0].Name != "stop" {
		t.Fatalf("endings: %+v", endings)
	}
	if n, err := observe.CountFlows(ctx, c.Flows, endings); err != nil || n[0] != 2 {
		t.Errorf("the plan counts %v flows (%v), want 2", n, err)
	}
	if err := c.Driver.Apply(ctx, next); err != nil {
		t.Fatal(err)
	}
	if !denied.Passes(time.Minute) {
		t.Fatal("a flow under way does not pass although nothing has ended it: the test shows nothing")
	}
	u.use(next, outside)
	for limit := time.Now().Add(time.Minute); c.Of(t, "10.0.0.5") != 1; {
		if time.Now().After(limit) {
			t.Fatalf("%d flows of the denied host, want the spared one", c.Of(t, "10.0.0.5"))
		}
		time.Sleep(10 * time.Millisecond)
	}
	if denied.Passes(time.Second) {
		t.Error("the ended flow still passes")
	}
	if !spared.Passes(time.Minute) {
		t.Error("the flow of a policy that beats the denial does not pass")
	}
	if !other.Passes(time.Minute) || c.Of(t, "10.0.0.6") != 2 {
		t.Error("a flow of another host does not pass")
	}
}

// outside is where no test of this file sends untranslated packets.
func outside(netip.Addr) bool { return false }
