package nftables

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/netns"
)

// TestForeign checks that rules of other tables that may change packets are reported with their
// names, in every family and at every hook, and that rules which only match, count or drop are
// not.
func TestForeign(t *testing.T) {
	ns := netns.New(t)
	netns.Veth(ns, "up0", ns, "far0")
	d := newDriver(t, ns)
	apply(t, d, example())
	cases := map[string]string{
		"table inet fw { set trusted { type ipv4_addr; }; chain i { type filter hook input priority 0; policy drop; ct state established accept; tcp dport 22 counter accept; ip saddr @trusted log drop; limit rate 1/second reject; }; }": "",
		"table ip evil { chain p { type nat hook postrouting priority 50; oifname up0 masquerade; }; }":                                                                                                                                     "chain p of table ip evil, which may change packets (masq)",
		"table ip evil { chain p { type filter hook postrouting priority 310; oifname up0 ip saddr set 10.66.66.66; }; }":                                                                                                                   "(payload)",
		"table ip6 evil { chain p { type nat hook prerouting priority 50; ip6 daddr 2001:db8::1 dnat to 2001:db8::2; }; }":                                                                                                                  "table ip6 evil, which may change packets (nat)",
		"table ip evil { chain p { type filter hook prerouting priority -310; ip saddr 10.50.0.0/16 notrack; }; }":                                                                                                                          "(notrack)",
		"table inet evil { chain p { type filter hook forward priority 1; jump q; }; chain q { meta mark set 7; }; }":                                                                                                                       "chain q of table inet evil, which may change packets (meta)",
		"table netdev evil { chain p { type filter hook ingress device up0 priority 0; ip saddr 10.0.0.1 ip saddr set 10.0.0.2; }; }":                                                                                                       "table netdev evil",
		"table netdev evil { chain p { type filter hook ingress device up0 priority 0; fwd to far0; }; }":                                                                                                                                   "(fwd)",
		"table ip isthmus { chain p { type nat hook postrouting priority 50; masquerade; }; }":                                                                                                                                              "table ip isthmus",
		"table ip evil { chain p { type route hook output priority 0; ct mark set 1; }; }":                                                                                                                                                  "(ct)",
		"table inet evil { chain p { type filter hook forward priority 0; tcp option maxseg size set 500; }; }":                                                                                                                             "(exthdr)",
	}
	// Some kernels have no flowtables.
	const flowtable = "table inet evil { flowtable f { hook ingress priority 0; devices = { up0 }; }; }"
	if _, err := ns.Try("nft " + flowtable); err == nil {
		ns.Run("nft delete table inet evil")
		cases[flowtable] = "flowtable f of table inet evil"
	}
	t.Logf("%d cases", len(cases))
	for command, want := range cases {
		ns.Run("nft " + command)
		found, err := d.Foreign(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got := strings.Join(found, "; ")
		if (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", command, got, want)
		}
		words := strings.Fields(command)
		ns.Run("nft delete table " + words[1] + " " + words[2])
	}
}

// TestForeignFlowtable decodes a flowtable as the kernel sends it. Ring: pure.
func TestForeignFlowtable(t *testing.T) {
	attrs := []byte{9, 0, 1, 0, 'f', 'a', 's', 't', 0, 0, 0, 0, 6, 0, 2, 0, 'f', 0, 0, 0}
	if got, want := offloads(unix.NFPROTO_INET, attrs), "flowtable f of table inet fast, whose flows bypass the rules"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
