package link

import (
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/router/link/linktest"
)

// TestRouteTransit checks the rules of forwarded packets: they are made once, the rules of others
// stay, wrong ones of ours go, and the kernel decides by them.
func TestRouteTransit(t *testing.T) {
	l := open(t)
	run := func(command string) string {
		words := strings.Fields(command)
		return linktest.Run(t, words[0], words[1:]...)
	}
	run("ip link add ist-t type veth peer name ist-u")
	t.Cleanup(func() { // other tests have the same namespace
		run("ip link del ist-t")
		run("ip rule del priority 20000 lookup 77")
	})
	for _, dev := range []string{"ist-t", "ist-u"} {
		run("ip link set " + dev + " up")
	}
	run("ip addr add 198.18.9.100/24 dev ist-t")
	run("ip addr add 172.16.0.1/24 dev ist-u")
	run("ip route add default via 198.18.9.1 metric 10")
	run("ip route add default dev ist-u table 18772")
	run("ip rule add from 10.0.0.0/8 lookup 77 priority 20000")
	run("ip rule add lookup 78 priority 150 protocol 73")
	run("sysctl -qw net.ipv4.ip_forward=1")
	rules := func() string { return run("ip rule") + run("ip -6 rule") }
	way := func(what string) string { return run("ip route get 198.19.200.7 " + what) }
	const forwarded = "from 172.16.0.10 iif ist-u"

	before := l.Writes()
	for range 2 {
		if err := l.RouteTransit(true); err != nil {
			t.Fatal(err)
		}
	}
	got := rules()
	if strings.Count(got, "suppress_prefixlength 0") != 2 || strings.Count(got, "lookup 18772") != 2 || strings.Contains(got, "lookup 78") || !strings.Contains(got, "lookup 77") {
		t.Errorf("rules\n%s", got)
	}
	if n := l.Writes() - before; n != 5 {
		t.Errorf("%d writes, want 5: one rule removed, two added for each family", n)
	}
	if s, err := l.Surroundings(); err != nil || s.Transit != [2]bool{true, true} || len(s.Doubts("ist-t", pfx("198.19.200.0/24"))) != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	if w := way(forwarded); !strings.Contains(w, "dev ist-u") {
		t.Errorf("a forwarded packet: %s", w)
	}
	if w := way(""); !strings.Contains(w, "dev ist-t") {
		t.Errorf("a packet of the node: %s", w)
	}
	if w := run("ip route get 198.18.9.7 " + forwarded); !strings.Contains(w, "dev ist-t") {
		t.Errorf("a forwarded packet to a connected network: %s", w)
	}

	if n, err := l.ClearTransit(); err != nil || n != 4 {
		t.Errorf("%d removed, %v", n, err)
	}
	if got := rules(); strings.Contains(got, "18772") || !strings.Contains(got, "lookup 77") {
		t.Errorf("rules\n%s", got)
	}
	if s, err := l.Surroundings(); err != nil || s.Transit != [2]bool{} {
		t.Errorf("%+v, %v", s.Transit, err)
	}
	if w := way(forwarded); !strings.Contains(w, "dev ist-t") {
		t.Errorf("a forwarded packet: %s", w)
	}
}
