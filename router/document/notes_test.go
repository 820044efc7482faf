package document

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
)

// standing is a machine with certain surroundings.
type standing struct {
	counting
	seen fib.Surroundings
}

func (s standing) Surroundings() fib.Surroundings { return s.seen }

// TestSurprises: interfaces that the document does not name, an underlay address that is not there,
// and an address of the node that becomes a pool's.
func TestSurprises(t *testing.T) {
	p := netip.MustParsePrefix
	seen := fib.Surroundings{Devices: map[string]fib.Device{"eth0": {}, "eth1": {}}, Addresses: []fib.Assigned{{Interface: "eth0", Prefix: p("10.9.0.5/24")}, {Interface: "eth1", Prefix: p("10.50.0.1/24")}, {Interface: "lo", Prefix: p("127.0.0.1/8")}}}
	target := plan.Target{Underlay: spec.Underlay{Interface: "eth0", Address: netip.MustParseAddr("10.9.0.4")}}
	var got []string
	for _, n := range surprises(&spec.Spec{}, target, seen) {
		got = append(got, n.Path+" "+n.Value)
	}
	if s := strings.Join(got, "; "); s != "attachments eth1 (10.50.0.0/24); underlay.address 10.9.0.4" {
		t.Errorf("notes: %s", s)
	}
	target.NAT.Attachments, target.NAT.Underlay = []nat.Attachment{{Interface: "eth1"}}, "eth0"
	target.Underlay.Address = netip.MustParseAddr("10.9.0.5")
	if n := surprises(&spec.Spec{}, target, seen); len(n) != 0 {
		t.Errorf("notes: %v", n)
	}
	target.Underlay.Interface, got = "ens5", nil
	d, problems := spec.Decode([]byte("node: {name: a}\nunderlay: {interface: ens5, address: 10.9.0.5}\nattachments: [{name: lan, interface: eth2, sources: [10.50.0.0/16]}]\n"))
	checked, more := spec.Check(d, nil)
	if len(problems)+len(more) > 0 {
		t.Fatal(problems, more)
	}
	for _, n := range surprises(checked, target, seen) {
		got = append(got, n.Path+" "+n.Value)
	}
	if s := strings.Join(got, "; "); s != "attachments eth0 (10.9.0.0/24); attachments[0].interface eth2; underlay.interface ens5" {
		t.Errorf("notes: %s", s)
	}
	target.Underlay.Interface = "eth0"
	seen.Addresses = append(seen.Addresses, fib.Assigned{Interface: "eth0", Prefix: p("10.9.0.6/24")})
	m := &Manager{Options: Options{Machine: standing{seen: seen}}}
	target.NAT.Pools = []nat.Pool{{Name: "p", Addresses: []nat.PoolAddress{{Address: netip.MustParseAddr("10.9.0.5")}, {Address: netip.MustParseAddr("10.9.0.6")}, {Address: netip.MustParseAddr("10.9.0.7")}}}}
	changes := m.cut([]plan.Change{{Action: plan.Add, Kind: "pool", Name: "p"}}, plan.Target{}, target, netip.Addr{})
	if want := "10.9.0.6 is an address of the node, which will no longer answer there: tcp/22"; changes[0].Interrupts != want {
		t.Errorf("interrupts %q, want %q", changes[0].Interrupts, want)
	}
}
