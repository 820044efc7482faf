package live

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/isthmus-net/isthmus/nat"
)

// TestExtendNeverTies extends random policies by random addresses, and looks at what the policies
// then mean.
func TestExtendNeverTies(t *testing.T) {
	conflicts, extended := 0, 0
	for seed := range uint64(400) {
		r := rand.New(rand.NewPCG(seed, 2))
		address := func() netip.Addr {
			if r.IntN(4) == 0 {
				return netip.AddrFrom16([16]byte{0x20, 1, 15: byte(r.IntN(4))})
			}
			return netip.AddrFrom4([4]byte{198, 51, 100, byte(r.IntN(6))})
		}
		table := map[string][]netip.Addr{}
		for _, n := range []string{"a.example", "b.example", "*.example.com", "*.b.example.com", "x.b.example.com"} {
			for range r.IntN(4) {
				if a := address(); !slices.Contains(table[n], a) {
					table[n] = append(table[n], a)
				}
			}
			slices.SortFunc(table[n], netip.Addr.Compare)
		}
		lookup := func(n string) []netip.Addr { return table[n] }
		var c nat.Config
		for i := range 5 {
			p := nat.Policy{Name: fmt.Sprint("p", i), Action: nat.Deny, Sources: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}}
			if r.IntN(2) == 0 {
				p.Protocol = "tcp"
			}
			if r.IntN(3) == 0 {
				a := address()
				p.Destinations = []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}
			}
			for n := range table {
				if r.IntN(2) == 0 {
					p.Names = append(p.Names, n)
				}
			}
			slices.Sort(p.Names)
			if len(p.Names)+len(p.Destinations) == 0 {
				p.Names = []string{"a.example"}
			}
			c.Policies = append(c.Policies, p)
			if len(tied(t, c)) > 0 {
				c.Policies = c.Policies[:i] // that is refused beforehand
				break
			}
		}
		before := fmt.Sprint(c)
		got, lost := Extend(c, lookup)
		if ties := tied(t, got); len(ties) > 0 {
			t.Fatalf("seed %d: %v tie in %+v", seed, ties, got.Policies)
		}
		if fmt.Sprint(c) != before {
			t.Fatalf("seed %d: the configuration was changed", seed)
		}
		for i, p := range got.Policies {
			for _, name := range p.Names {
				for _, a := range table[name] {
					lose := slices.ContainsFunc(lost, func(l Conflict) bool { return l.Policy == p.Name && l.Address == a })
					has := slices.Contains(p.Destinations, netip.PrefixFrom(a, a.BitLen()))
					if has == lose {
						t.Fatalf("seed %d: %s, address %v of %s: has it %v, lost it %v", seed, p.Name, a, name, has, lose)
					}
				}
			}
			extended += len(p.Destinations) - len(c.Policies[i].Destinations)
		}
		conflicts += len(lost)
		if again, _ := Extend(c, lookup); !reflect.DeepEqual(again, got) {
			t.Fatalf("seed %d: another result", seed)
		}
	}
	if conflicts < 100 || extended < 1000 {
		t.Errorf("only %d conflicts and %d destinations", conflicts, extended)
	}
}

func TestExtendOrder(t *testing.T) {
	all := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	a := netip.MustParseAddr("198.51.100.7")
	policy := func(name string, destinations []netip.Prefix, names ...string) nat.Policy {
		return nat.Policy{Name: name, Action: nat.Deny, Sources: all, Destinations: destinations, Names: names}
	}
	lookup := func(string) []netip.Addr { return []netip.Addr{a} }
	for want, list := range map[string][]nat.Policy{
		"static": {policy("exact", nil, "a.b.example"), policy("static", []netip.Prefix{netip.PrefixFrom(a, 32)})},
		"exact":  {policy("all", nil, "*.b.example"), policy("exact", nil, "a.b.example")},
		"first":  {policy("second", nil, "c.b.example"), policy("first", nil, "a.b.example")},
		"longer": {policy("all", nil, "*.example"), policy("longer", nil, "*.b.example")},
	} {
		c, lost := Extend(nat.Config{Policies: list}, lookup)
		d := c.Match(nat.Flow{Source: netip.MustParseAddr("10.0.0.1"), Destination: a, Protocol: 6, Port: 443})
		if d.Policy != want || len(lost) != 1 || lost[0].Winner != want {
			t.Errorf("%s decides, lost %+v, want %s", d.Policy, lost, want)
		}
	}
}

// TestExtendKnowsWhatIsOpen has a name lead to an address of a pool at which a policy with DNAT
// listens, under either address of it.
func TestExtendKnowsWhatIsOpen(t *testing.T) {
	inside, public := netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("203.0.113.5")
	all := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	for _, a := range []netip.Addr{inside, public} {
		for _, destinations := range [][]netip.Prefix{nil, {netip.PrefixFrom(public, 32)}} {
			c, lost := Extend(nat.Config{
				Pools: []nat.Pool{{Name: "p", Addresses: []nat.PoolAddress{{Address: inside, Public: public}}}},
				Policies: []nat.Policy{
					{Name: "api", Action: nat.SNAT, Pool: "p", Sources: all, Names: []string{"api.example"}, Protocol: "tcp"},
					{Name: "open", Action: nat.DNAT, Pool: "p", Sources: all, Destinations: destinations, Protocol: "tcp", To: netip.MustParseAddrPort("10.0.1.5:8443")},
				},
			}, func(string) []netip.Addr { return []netip.Addr{a} })
			if ties := tied(t, c); len(ties) > 0 || len(lost) != 1 || lost[0].Winner != "open" {
				t.Errorf("%v, open at %v: %v tie, lost %+v", a, destinations, ties, lost)
			}
		}
	}
}

func tied(t *testing.T, c nat.Config) []nat.Tie {
	t.Helper()
	rules, err := c.Rules()
	if err != nil {
		t.Fatal(err)
	}
	return nat.Ties(rules)
}

// TestExtendIsBounded: however many addresses a name has, the rules stay as many as a document may
// have, and the addresses that are left out are reported.
func TestExtendIsBounded(t *testing.T) {
	p := nat.Policy{Name: "p", Action: nat.Deny, Protocol: "tcp", Names: []string{"a.example"}}
	for i := range 100 {
		p.Sources = append(p.Sources, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), 0}), 24))
		p.Ports = append(p.Ports, nat.PortRange{First: uint16(1 + 2*i), Last: uint16(1 + 2*i)})
	}
	lookup := func(string) (out []netip.Addr) {
		for i := range 20 {
			out = append(out, netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}))
		}
		return append(out, netip.MustParseAddr("2001:db8::1")) // no source is of its family
	}
	got, lost := Extend(nat.Config{Policies: []nat.Policy{p}}, lookup)
	const fit = nat.MaxRules / (100 * 100)
	if n := len(got.Policies[0].Destinations); n != fit+1 || len(lost) != 20-fit || lost[0].Winner != "" {
		t.Errorf("%d addresses are destinations, %d are left out: %+v", n, len(lost), lost)
	}
	tied(t, got)
}

// TestDenyByNameSparesStaticDestinations: the owner of a denied zone cannot close an address that
// another policy names.
func TestDenyByNameSparesStaticDestinations(t *testing.T) {
	a := netip.MustParseAddr("198.51.100.8")
	pfx := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	for name, k := range map[string]struct {
		action nat.Action
		other  nat.Policy
		lost   string
	}{
		"a prefix":         {nat.Deny, nat.Policy{Name: "part", Action: nat.SNAT, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.51.100.8/31")}, "part"},
		"rejected":         {nat.Reject, nat.Policy{Name: "part", Action: nat.NoNAT, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.51.0.0/16")}, "part"},
		"everything":       {nat.Deny, nat.Policy{Name: "all", Action: nat.SNAT, Sources: pfx("10.0.0.0/8"), Destinations: pfx("0.0.0.0/0")}, ""},
		"another prefix":   {nat.Deny, nat.Policy{Name: "part", Action: nat.SNAT, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.51.100.10/31")}, ""},
		"of other sources": {nat.Deny, nat.Policy{Name: "part", Action: nat.SNAT, Sources: pfx("10.9.0.0/16"), Destinations: pfx("198.51.100.8/31")}, ""},
		"another deny":     {nat.Deny, nat.Policy{Name: "part", Action: nat.Deny, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.51.100.8/31")}, ""},
		"not denied":       {nat.SNAT, nat.Policy{Name: "part", Action: nat.SNAT, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.51.100.8/31")}, ""},
	} {
		c := nat.Config{Policies: []nat.Policy{{Name: "ads", Action: k.action, Sources: pfx("10.1.0.0/16"), Names: []string{"*.ads.example"}}, k.other}}
		got, lost := Extend(c, func(string) []netip.Addr { return []netip.Addr{a} })
		winner := ""
		if len(lost) > 0 {
			winner = lost[0].Winner
		}
		if winner != k.lost || len(got.Policies[0].Destinations) != 1-len(lost) {
			t.Errorf("%s: lost to %q, want %q; destinations %v", name, winner, k.lost, got.Policies[0].Destinations)
		}
	}
}
