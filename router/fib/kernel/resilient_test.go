package kernel

import (
	"context"
	"maps"
	"net"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/test/netns"
)

// TestResilient has 400 flows over three lanes. A lane that dies loses its own buckets and no other
// one; while flows go on, a lane that returns takes none; when they pause, it takes its share.
// Ring: namespace.
func TestResilient(t *testing.T) {
	lanes := []string{"t0", "t1", "t2"}
	ns := newNamespace(t, lanes...)
	ns.Run("ip addr add 10.0.0.1/32 dev t0\nsysctl -qw net.ipv4.fib_multipath_hash_policy=1")
	for _, n := range lanes {
		ns.Run("ip neigh add 169.254.1.1 lladdr 02:00:00:00:00:01 dev " + n + " nud permanent")
	}
	d := newDriver(t, ns)
	f, _ := run(t, &strict{d, t})
	route := fib.Route{Key: fib.Main(pfx("10.99.0.0/16")), Resilient: true}
	for _, n := range lanes {
		route.NextHops = append(route.NextHops, hop(n, "169.254.1.1"))
	}
	f.Update([]fib.Route{route})
	f.Synced()
	settle(t, f)

	// A connected socket would keep the lane of its first packet.
	var socket net.PacketConn
	var err error
	ns.Do(func() { socket, err = net.ListenPacket("udp4", "10.0.0.1:9000") })
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	// talk sends a packet of each flow. A bucket that is used in the jiffy in which it got its
	// member counts as unused (nh_res_bucket_idle_point of net/ipv4/nexthop.c); a jiffy has 10 ms
	// at most.
	talk := func() {
		time.Sleep(20 * time.Millisecond)
		for i := range 400 {
			to := &net.UDPAddr{IP: net.IPv4(10, 99, 0, byte(i%200+1)), Port: 9000 + i/200}
			if _, err := socket.WriteTo([]byte("x"), to); err != nil {
				t.Error(err)
			}
		}
	}
	count := func(buckets []string) map[string]int {
		n := map[string]int{}
		for _, b := range buckets {
			n[b]++
		}
		return n
	}
	talk()
	before := bucketsOf(ns)
	if n := count(before); len(before) != 128 || len(n) != 3 || slices.Max(slices.Collect(maps.Values(n)))-slices.Min(slices.Collect(maps.Values(n))) > 1 {
		t.Fatalf("%d buckets: %v", len(before), n)
	}
	gone := strings.Fields(ns.Run("ip -o nexthop show dev t1"))[1]
	f.SetAlive(fib.NextHop{Interface: "t1"}, false)
	settle(t, f)
	dead := bucketsOf(ns)
	for i, member := range before {
		if member != gone && dead[i] != member {
			t.Errorf("bucket %d of a living lane moved from %s to %s", i, member, dead[i])
		}
		if dead[i] == gone {
			t.Errorf("bucket %d still leads into the dead lane", i)
		}
	}

	for tries := 0; ; tries++ {
		before := bucketsOf(ns)
		talk()
		began := time.Now()
		f.SetAlive(fib.NextHop{Interface: "t1"}, true)
		settle(t, f)
		moved := 0
		for i, member := range bucketsOf(ns) {
			if member != before[i] {
				moved++
			}
		}
		// A bucket that none of the flows uses is idle.
		if used := 128 - moved; used >= 100 {
			break
		}
		if pause := time.Since(began); pause < idleTimer*10*time.Millisecond || tries == 20 {
			t.Fatalf("%d of 128 buckets moved to a lane that returned, while flows used most of them %v before", moved, pause)
		}
		f.SetAlive(fib.NextHop{Interface: "t1"}, false)
		settle(t, f)
	}
	// The flows pause.
	deadline := time.Now().Add(30 * time.Second)
	for {
		n := count(bucketsOf(ns))
		if len(n) == 3 && slices.Min(slices.Collect(maps.Values(n))) >= 42 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a lane that returned has no share of idle buckets: %v", n)
		}
		time.Sleep(50 * time.Millisecond)
	}

	var got map[string]int
	ns.Do(func() { got, err = Shares(context.Background()) })
	if err != nil || len(got) != 3 || got["t0"]+got["t1"]+got["t2"] != 128 || got["t1"] < 42 {
		t.Errorf("shares %v, %v", got, err)
	}

	// All dead: the group is a black hole, and the same group afterwards.
	for _, n := range lanes {
		f.SetAlive(fib.NextHop{Interface: n}, false)
	}
	settle(t, f)
	if out, err := ns.Try("ip route get 10.99.0.1"); err == nil {
		t.Errorf("with all lanes dead: %s", out)
	}
	f.SetAlive(fib.NextHop{Interface: "t2"}, true)
	settle(t, f)
	if out := ns.Run("ip route get 10.99.0.1"); !strings.Contains(out, "dev t2") {
		t.Errorf("with one lane: %s", out)
	}
}

var memberOf = regexp.MustCompile(`nhid (\d+)`)

// bucketsOf returns the nexthop object of each bucket, in their order, as iproute2 shows them.
func bucketsOf(ns *netns.NS) (out []string) {
	for _, m := range memberOf.FindAllStringSubmatch(ns.Run("ip nexthop bucket show"), -1) {
		out = append(out, m[1])
	}
	return out
}
