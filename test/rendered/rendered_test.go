package rendered

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2/hclwrite"

	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/topology"
	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

var seed = flag.Uint64("seed", 1, "of random topologies")

// topologies returns the examples of the documentation and random ones.
func topologies(t *testing.T, n int) (out []string) {
	t.Helper()
	for _, name := range []string{"two-routers.yaml", "clouds-only.yaml"} {
		text, err := os.ReadFile("../../docs/examples/" + name)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, string(text))
	}
	for i := range n {
		out = append(out, random(rand.New(rand.NewPCG(*seed, uint64(i)))))
	}
	return out
}

func read(t *testing.T, text string, set map[string]netip.Addr) *topology.Topology {
	t.Helper()
	top, problems := topology.Read([]byte(text), set)
	if len(problems) > 0 {
		t.Fatalf("%v\n%s", problems, text)
	}
	return top
}

func render(t *testing.T, top *topology.Topology, cloud, form, part string) string {
	t.Helper()
	text, problems := top.Cloud(cloud, form, part)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	return text
}

// side reads back all clouds of a topology.
func side(t *testing.T, top *topology.Topology, form string) (out []Gateway) {
	t.Helper()
	for _, c := range top.Clouds() {
		text := render(t, top, c, form, "all")
		gateways, err := Parse(form, text)
		if err != nil {
			t.Fatalf("%s as %s: %v\n%s", c, form, err, text)
		}
		out = append(out, gateways...)
	}
	return out
}

// TestCloudSideIsTheTopology checks that a cloud reads in its commands, and in its Terraform,
// exactly the tunnels of the topology, with outside addresses that are known and with those that
// are not.
func TestCloudSideIsTheTopology(t *testing.T) {
	for i, text := range topologies(t, 40) {
		for _, set := range []map[string]netip.Addr{nil, known(read(t, text, nil))} {
			top := read(t, text, set)
			want := map[string]string{}
			for _, tu := range top.Tunnels {
				for j, e := range tu.Ends {
					// Only Azure has a configuration of a tunnel whose peer never answers.
					if e.Cloud == "" || tu.Dead != "" && e.Cloud != "azure" {
						continue
					}
					p := tu.Ends[1-j]
					inside := e.Inside
					if e.Cloud == "azure" {
						inside = netip.PrefixFrom(inside.Addr(), 32)
					}
					want[fmt.Sprintf("%s %d -> %s", e.Outside.Name, e.Instance, p.Outside)] += fmt.Sprintf("%d %s, %d %s key %s", e.ASN, inside, p.ASN, p.Inside.Addr(), tu.Key)
				}
			}
			for _, form := range topology.Forms {
				got := map[string]string{}
				for _, g := range side(t, top, form) {
					for _, tu := range g.Tunnels {
						got[fmt.Sprintf("%s %d -> %s", tu.Outside, tu.Instance, tu.PeerOutside)] += fmt.Sprintf("%d %s, %d %s key %s", g.ASN, tu.Inside, tu.PeerASN, tu.PeerInside, keyName(t, top, form, tu.PSK))
					}
				}
				if len(want) > 0 && fmt.Sprint(got) != fmt.Sprint(want) {
					t.Fatalf("topology %d as %s: the cloud reads\n%s\nwant\n%s\n%s", i, form, strings.Join(lines(got), "\n"), strings.Join(lines(want), "\n"), text)
				}
			}
		}
	}
}

func lines(m map[string]string) (out []string) {
	for k, v := range m {
		out = append(out, k+": "+v)
	}
	slices.Sort(out)
	return out
}

// keyName returns the name of the key that a reference stands for.
func keyName(t *testing.T, top *topology.Topology, form, reference string) string {
	t.Helper()
	for _, k := range top.Keys {
		if form == "cli" && reference == k.Environment || form == "terraform" && reference == "psk_"+underscores(k.Name) {
			return k.Name
		}
	}
	t.Fatalf("%s %q is not a key of the topology", form, reference)
	return ""
}

// TestSidesAgree checks that each tunnel of a node's document matches one of the cloud's side:
// addresses mirrored, ASNs and keys the same, proposals in common; and that each tunnel that a
// cloud has with a node is in that node's document.
func TestSidesAgree(t *testing.T) {
	for i, text := range topologies(t, 40) {
		set := known(read(t, text, nil))
		top := read(t, text, set)
		for _, form := range topology.Forms {
			gateways := side(t, top, form)
			met, with := 0, 0
			for _, n := range top.Nodes {
				s := document(t, top, n.Name)
				var links []cloud.Link
				for _, tu := range s.Tunnels {
					if tu.IPsec != nil {
						asn := s.Peers[slices.IndexFunc(s.Peers, func(p spec.Peer) bool { return p.Tunnel == tu.Name })].ASN
						links = append(links, cloud.Link{Name: tu.Name, Cloud: tu.Cloud, Remote: tu.IPsec.RemoteAddress, PSK: keyOf[tu.Name], ASN: asn})
					}
				}
				if left := cloud.Unpaired(links); len(left) > 0 {
					t.Errorf("topology %d: node %s leaves out a tunnel that a cloud has besides %s", i, n.Name, left[0].Beside)
				}
				for _, g := range gateways {
					for _, tu := range g.Tunnels {
						if tu.PeerOutside == n.Public.String() {
							with++
						}
					}
				}
				for _, tu := range s.Tunnels {
					if tu.IPsec == nil {
						continue
					}
					met++
					peer := s.Peers[slices.IndexFunc(s.Peers, func(p spec.Peer) bool { return p.Tunnel == tu.Name })]
					g, other := meet(gateways, set, tu.IPsec.RemoteAddress, n.Public)
					in := tu.Inside[0]
					switch {
					case other == nil:
						t.Fatalf("topology %d as %s: no tunnel matches %s of %s", i, form, tu.Name, n.Name)
					case g.Cloud != tu.Cloud:
						t.Errorf("%s: cloud %s, want %s", tu.Name, tu.Cloud, g.Cloud)
					case in.Remote != other.Inside.Addr() || in.Local.Addr() != other.PeerInside:
						t.Errorf("topology %d as %s: %s: inside %s and %s, the cloud has %s and %s", i, form, tu.Name, in.Local, in.Remote, other.PeerInside, other.Inside)
					case g.Cloud != "azure" && in.Local.Masked() != other.Inside.Masked():
						t.Errorf("%s: block %s, the cloud has %s", tu.Name, in.Local.Masked(), other.Inside.Masked())
					case peer.ASN != g.ASN || s.Node.ASN != other.PeerASN || peer.Address != other.Inside.Addr():
						t.Errorf("%s: %d with %d at %s, the cloud has %d with %d at %s", tu.Name, s.Node.ASN, peer.ASN, peer.Address, other.PeerASN, g.ASN, other.Inside)
					case keyOf[tu.Name] != keyName(t, top, form, other.PSK):
						t.Errorf("%s: key %s, the cloud has %s", tu.Name, keyOf[tu.Name], other.PSK)
					case !slices.Contains(tu.IPsec.IKEProposals, other.IKE) || !slices.Contains(tu.IPsec.ESPProposals, other.ESP):
						t.Errorf("%s: proposals %v %v, the cloud has %s %s", tu.Name, tu.IPsec.IKEProposals, tu.IPsec.ESPProposals, other.IKE, other.ESP)
					case tu.IPsec.LocalIdentity != n.Public.String():
						t.Errorf("%s: identity %s", tu.Name, tu.IPsec.LocalIdentity)
					}
				}
			}
			if met != with {
				t.Errorf("topology %d as %s: the nodes have %d tunnels to clouds, and these %d to them", i, form, met, with)
			}
		}
	}
}

// meet returns the tunnel of a gateway between two outside addresses.
func meet(gateways []Gateway, outside map[string]netip.Addr, gateway, node netip.Addr) (*Gateway, *Tunnel) {
	for i := range gateways {
		for j, tu := range gateways[i].Tunnels {
			if outside[tu.Outside] == gateway && tu.PeerOutside == node.String() {
				return &gateways[i], &gateways[i].Tunnels[j]
			}
		}
	}
	return nil, nil
}

// keyOf has the name of the key of each tunnel of the document that was read last: the checked
// document has a reference instead.
var keyOf map[string]string

// document returns the checked document of a node. It must pass `isthmus validate`.
func document(t *testing.T, top *topology.Topology, name string) *spec.Spec {
	t.Helper()
	text, problems := top.Document(name)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	d, problems := spec.Decode([]byte(text))
	keyOf = map[string]string{}
	for _, tu := range d.Message.GetTunnels() {
		keyOf[tu.GetName()] = tu.GetIpsec().GetPsk()
	}
	s, more := spec.Check(d, func(string) (secret.Ref, bool) { return secret.Ref{}, true })
	if problems = append(problems, more...); len(problems) > 0 {
		t.Fatalf("node %s: %v\n%s", name, problems, text)
	}
	if _, _, problems := plan.Make(s, plan.Ledger{}, plan.Machine{Can: func(string) bool { return true }}); len(problems) > 0 {
		t.Fatalf("node %s: %v\n%s", name, problems, text)
	}
	return s
}

// TestGatewaysAgree checks that, where two gateways are linked, each live tunnel of one matches one
// of the other, and that a tunnel that is dead by design matches none.
func TestGatewaysAgree(t *testing.T) {
	for i, text := range topologies(t, 40) {
		set := known(read(t, text, nil))
		top := read(t, text, set)
		live := map[string]bool{}
		for _, tu := range top.Tunnels {
			a, b := tu.Ends[0], tu.Ends[1]
			live[a.Outside.String()+" "+b.Outside.String()] = tu.Dead == ""
			live[b.Outside.String()+" "+a.Outside.String()] = tu.Dead == ""
		}
		all := map[string]Tunnel{}
		asn := map[string]uint32{}
		for _, g := range side(t, top, "terraform") {
			for _, tu := range g.Tunnels {
				k := set[tu.Outside].String() + " " + tu.PeerOutside
				all[k], asn[k] = tu, g.ASN
			}
		}
		for k, tu := range all {
			if slices.ContainsFunc(top.Nodes, func(n topology.Node) bool { return n.Public.String() == tu.PeerOutside }) {
				continue
			}
			back := tu.PeerOutside + " " + set[tu.Outside].String()
			other, ok := all[back]
			if ok != live[k] {
				t.Errorf("topology %d: %s is met: %v, live: %v", i, k, ok, live[k])
			}
			if ok && (tu.PeerInside != other.Inside.Addr() || other.PeerInside != tu.Inside.Addr() || tu.PSK != other.PSK || tu.IKE != other.IKE || tu.ESP != other.ESP ||
				tu.PeerASN != asn[back] || !tu.Start && !other.Start) {
				t.Errorf("topology %d: %+v\ndoes not fit %+v", i, tu, other)
			}
		}
	}
}

// TestFormatted checks that Terraform is as `terraform fmt` leaves it.
func TestFormatted(t *testing.T) {
	for _, text := range topologies(t, 5) {
		top := read(t, text, nil)
		for _, c := range top.Clouds() {
			for _, part := range topology.Parts {
				text := render(t, top, c, "terraform", part)
				if got := string(hclwrite.Format([]byte(text))); got != text {
					t.Errorf("%s: formatted it is\n%s\nnot\n%s", c, got, text)
				}
			}
		}
	}
}

// TestPartsAreTheWhole checks that gateways and tunnels apart have every object of the whole, once.
func TestPartsAreTheWhole(t *testing.T) {
	for _, text := range topologies(t, 5) {
		top := read(t, text, nil)
		for _, c := range top.Clouds() {
			blocks := func(text string) (out []string) {
				for _, b := range strings.Split(text, "\n\n")[1:] {
					out = append(out, strings.TrimSpace(b))
				}
				slices.Sort(out)
				return out
			}
			whole := blocks(render(t, top, c, "terraform", "all"))
			parts := append(blocks(render(t, top, c, "terraform", "gateways")), blocks(render(t, top, c, "terraform", "tunnels"))...)
			slices.Sort(parts)
			if !slices.Equal(whole, parts) {
				t.Errorf("%s: the parts differ from the whole:\n%s\n---\n%s", c, strings.Join(parts, "\n"), strings.Join(whole, "\n"))
			}
		}
	}
}

// TestStrict checks that a wrong name, a missing argument, a reference to nothing and a key in
// plain text are found. Each case is a change of the rendered text.
func TestStrict(t *testing.T) {
	top := read(t, topologies(t, 0)[0], nil)
	for _, c := range []struct{ cloud, form, from, to string }{
		{"aws", "terraform", "tunnel1_preshared_key ", "tunnel1_pre_shared_key "},
		{"aws", "terraform", `  tunnel2_phase1_dh_group_numbers      = [20]` + "\n", ""},
		{"aws", "terraform", "= aws_customer_gateway.aws_hub_1.id", "= aws_customer_gateway.aws_hub_3.id"},
		{"aws", "terraform", "sensitive   = true", "sensitive   = false"},
		{"aws", "terraform", "[20]", "[2]"},
		{"aws", "terraform", "169.254.95.80/30", "169.254.95.81/30"},
		{"azure", "terraform", "bgp_enabled                = true", "enable_bgp                 = true"},
		{"azure", "terraform", "pfs_group        = \"ECP384\"\n", "\n"},
		{"azure", "terraform", "var.psk_azure_hub_1\n", "var.psk_azure_hub_9\n"},
		{"azure", "terraform", "peering_addresses {", "peering_address {"},
		{"azure", "terraform", `primary   = "169.254.21.66"`, `primary   = "169.254.21.70"`},
		{"gcp", "terraform", "shared_secret ", "secret "},
		{"gcp", "terraform", "TWO_IPS_REDUNDANCY", "FOUR_IPS_REDUNDANCY"},
		{"gcp", "terraform", "vpn_gateway_interface           = 0\n", "\n"},
		{"aws", "cli", "--bgp-asn 64620", "--asn 64620"},
		{"aws", "cli", `"PreSharedKey"`, `"PresharedKey_"`},
		{"aws", "cli", `"$aws_hub_1_cgw"`, `"$aws_hub_3_cgw"`},
		{"aws", "cli", "<<OPTIONS", "| cat <<OPTIONS"},
		{"aws", "cli", "<<OPTIONS", "<<'OPTIONS'"},
		{"azure", "cli", "--bgp-peering-address", "--bgp-address"},
		{"azure", "cli", "  --pfs-group ECP384 \\\n", ""},
		{"azure", "cli", " \\\n  --enable-bgp", ""},
		{"gcp", "cli", "--peer-asn 64620", "--asn 64620"},
		{"gcp", "cli", "'$PSK_GCP_HUB_1_0'", "'f00t'"},
		{"gcp", "cli", "--flags-file /dev/stdin", "--flags-file flags"},
		{"gcp", "cli", "\n--shared-secret: ", "\n--secret: "},
		{"azure", "cli", "--shared-key @-", "--shared-key @key"},
		{"gcp", "cli", "--interfaces 0=", "--interfaces 1="},
	} {
		text := render(t, top, c.cloud, c.form, "all")
		if _, err := Parse(c.form, text); err != nil {
			t.Fatalf("%s as %s: %v", c.cloud, c.form, err)
		}
		changed := strings.Replace(text, c.from, c.to, 1)
		if changed == text {
			t.Errorf("%s as %s has no %q", c.cloud, c.form, c.from)
		} else if _, err := Parse(c.form, changed); err == nil {
			t.Errorf("%s as %s: %q instead of %q is not found", c.cloud, c.form, c.to, c.from)
		}
	}
}

// TestInsideAddressesNeverClash checks that over all nodes and clouds of a topology no two ends
// share an address, except a node's in one connection of Azure, and that each cloud accepts its
// own.
func TestInsideAddressesNeverClash(t *testing.T) {
	for i, text := range topologies(t, 100) {
		owner := map[netip.Addr]string{}
		for _, tu := range read(t, text, nil).Tunnels {
			if tu.Dead != "" {
				continue
			}
			for j, e := range tu.Ends {
				who := e.Name + " in " + tu.Connection
				if e.Cloud != "" {
					who = fmt.Sprintf("%s %d in %s", e.Name, e.Instance, tu.Name)
				}
				if other, ok := owner[e.Inside.Addr()]; ok && other != who {
					t.Errorf("topology %d: %s has %s of %s", i, who, e.Inside, other)
				}
				owner[e.Inside.Addr()] = who
				peer := tu.Ends[1-j]
				if p, ok := cloud.Lookup(peer.Cloud); ok && e.Cloud == "" {
					if rule, _ := p.Inside.Is.Check(e.Inside, peer.Inside.Addr()); rule != "" {
						t.Errorf("topology %d: %s: %s's gateway refuses it: %s", i, tu.Name, peer.Cloud, rule)
					}
				}
			}
		}
	}
}
