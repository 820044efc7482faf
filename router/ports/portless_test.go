package ports

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
)

// TestPortless has five hosts, whose slots have one address, send packets of protocols without
// ports to one peer, through four addresses: four of them have one for themselves each, and the
// fifth is refused, shown, and served when there is another address. Ring: namespace.
func TestPortless(t *testing.T) {
	for _, protocol := range []uint8{unix.IPPROTO_ESP, unix.IPPROTO_GRE, unix.IPPROTO_IPIP, unix.IPPROTO_IPV6} {
		t.Run(nat.ProtocolName(protocol), func(t *testing.T) {
			c := newCrowd(t, 4)
			c.place()
			network, peer := fmt.Sprintf("ip4:%d", protocol), netip.MustParseAddr("198.51.100.1")
			var server net.PacketConn
			var err error
			c.Server.Do(func() { server, err = net.ListenPacket(network, peer.String()) })
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { server.Close() })
			go func() {
				for buffer := make([]byte, 2000); ; {
					n, from, err := server.ReadFrom(buffer)
					if err != nil {
						return
					}
					_, _ = server.WriteTo(buffer[:n], from)
				}
			}()
			pool := c.Config.Pools[0]
			var hosts []net.Conn
			home := pool.For(netip.MustParseAddr("10.0.0.1"), "")
			for a := netip.MustParseAddr("10.0.0.1"); len(hosts) < 5; a = a.Next() {
				if pool.For(a, "") != home {
					continue
				}
				var host net.Conn
				c.Client.Do(func() {
					host, err = (&net.Dialer{LocalAddr: &net.IPAddr{IP: a.AsSlice()}}).Dial(network, peer.String())
				})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { host.Close() })
				hosts = append(hosts, host)
			}
			// answered sends a packet in whose bytes the ports of other protocols would be, another
			// one each time.
			n := byte(0)
			heard := func(host net.Conn) error {
				n++
				// GRE has its version where it must be 0.
				sent := []byte{0, 0, 8, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n}
				_, err := host.Write(sent)
				if err == nil {
					_ = host.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
					_, err = host.Read(make([]byte, 2000))
				}
				return err
			}
			answered := func(host net.Conn) bool { return heard(host) == nil }
			until := func(what string, done func() bool) {
				t.Helper()
				for limit := time.Now().Add(time.Minute); !done(); {
					if time.Now().After(limit) {
						t.Fatalf("%s: not within a minute; %+v", what, c.keeper.Figures().Uses)
					}
				}
			}
			served := map[int]bool{}
			began := time.Now()
			until("four hosts are served", func() bool {
				for i, host := range hosts {
					if answered(host) {
						served[i] = true
					}
				}
				return len(served) >= 4
			})
			t.Logf("four hosts are served after %v", time.Since(began).Round(10*time.Millisecond))
			last := -1
			for i := range hosts {
				if !served[i] {
					last = i
				}
			}
			if last < 0 {
				t.Fatal("five hosts are served by four addresses")
			}
			service := nat.Service{Destination: peer, Protocol: protocol}
			// RFC 1812 code 13. The kernel makes no ICMP error of what it takes for a wrong
			// checksum, so of other tunnels it makes none.
			told := protocol == unix.IPPROTO_ESP || protocol == unix.IPPROTO_GRE
			until("the fifth gets an ICMP error", func() bool { return !told || errors.Is(heard(hosts[last]), unix.EHOSTUNREACH) })
			until("the fifth is refused, and shown", func() bool {
				if answered(hosts[last]) {
					t.Fatal("it is answered")
				}
				c.keeper.Recount(context.Background())
				shown := 0
				for _, u := range c.keeper.Figures().Uses {
					if u.Service == service && u.Exhausted && u.Used == 1 && u.Free() == 0 && u.Refused > 1 {
						shown++
					}
				}
				return shown == 4
			})
			more := c.Config
			added := netip.MustParseAddr("192.0.2.99")
			c.Router.Run("ip addr add 192.0.2.99/24 dev up0")
			more.Pools = []nat.Pool{{Name: "p", Addresses: append(pool.Addresses[:4:4], nat.PoolAddress{Address: added, Public: added})}}
			if err := c.Driver.Apply(context.Background(), more); err != nil {
				t.Fatal(err)
			}
			c.keeper.Use(more)
			until("another address serves the fifth", func() bool { return answered(hosts[last]) })
			for i, host := range hosts {
				if i != last && !answered(host) {
					t.Errorf("host %d is not served any more", i)
				}
			}
		})
	}
}
