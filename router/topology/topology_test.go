package topology

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/test/root"
)

var seed = flag.Uint64("seed", 1, "of random topologies")

func example(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/examples/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func read(t *testing.T, text string) *Topology {
	t.Helper()
	top, problems := Read([]byte(text), nil)
	if len(problems) > 0 {
		t.Fatalf("%v\n%s", problems, text)
	}
	return top
}

// TestDeadByDesign counts the tunnels that Azure attempts and no gateway answers in the full mesh
// of three clouds.
func TestDeadByDesign(t *testing.T) {
	type count struct{ attempts, live int }
	got := map[string]count{}
	for _, tu := range read(t, example(t, "clouds-only.yaml")).Tunnels {
		k := tu.Ends[0].Cloud + "-" + tu.Ends[1].Cloud
		c := got[k]
		c.attempts++
		if tu.Dead == "" {
			c.live++
		}
		got[k] = c
	}
	want := map[string]count{"aws-azure": {8, 4}, "aws-gcp": {4, 4}, "azure-gcp": {4, 2}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, tu := range read(t, example(t, "two-routers.yaml")).Tunnels {
		if tu.Dead != "" {
			t.Errorf("%s is dead: %s", tu.Name, tu.Dead)
		}
	}
}

// TestOrderChangesNothing: every output is the same when the lists of the document are in another
// order.
func TestOrderChangesNothing(t *testing.T) {
	// 60 connections in Azure's 64 slots: some names choose the same.
	crowd := "gateways:\n- {name: azure, cloud: azure, asn: 65001, region: westeurope, network: vnet, resourceGroup: hub}\nnodes:\n"
	links := "links:\n"
	for i := range 60 {
		crowd += fmt.Sprintf("- {name: hub-%d, asn: 64620, publicAddress: 203.0.113.%d, interface: eth0}\n", i, i+1)
		links += fmt.Sprintf("- between: [azure, hub-%d]\n", i)
	}
	for name, text := range map[string]string{"two routers": example(t, "two-routers.yaml"), "clouds only": example(t, "clouds-only.yaml"), "crowd": crowd + links} {
		want := outputs(t, read(t, text))
		for i := range root.Count(20, 5) {
			if got := outputs(t, read(t, shuffled(text, rand.New(rand.NewPCG(*seed, uint64(i)))))); got != want {
				t.Fatalf("%s: another order, another output", name)
			}
		}
	}
}

// outputs returns everything that is rendered.
func outputs(t *testing.T, top *Topology) string {
	t.Helper()
	var b strings.Builder
	for _, c := range top.Clouds() {
		for _, form := range Forms {
			text, problems := top.Cloud(c, form, "all")
			if len(problems) > 0 {
				t.Fatal(problems)
			}
			b.WriteString(text)
		}
	}
	for _, n := range top.Nodes {
		b.WriteString(fmt.Sprint(top.document(n, Address.String)))
	}
	return strings.ReplaceAll(b.String(), "  ", " ") // the text form of protobuf varies its spaces
}

// shuffled puts the items of each top list into another order: those begin with "- " in the first
// column.
func shuffled(text string, r *rand.Rand) string {
	var out, items []string
	flush := func() {
		r.Shuffle(len(items), func(i, j int) { items[i], items[j] = items[j], items[i] })
		out = append(out, items...)
		items = nil
	}
	for line := range strings.Lines(text) {
		switch {
		case strings.HasPrefix(line, "- "):
			items = append(items, line)
		case strings.HasPrefix(line, "  ") && len(items) > 0:
			items[len(items)-1] += line
		default:
			flush()
			out = append(out, line)
		}
	}
	flush()
	return strings.Join(out, "")
}

// TestAnotherLinkLeavesTheRest: a link that is added leaves the addresses of the others alone.
func TestAnotherLinkLeavesTheRest(t *testing.T) {
	text := example(t, "two-routers.yaml")
	before := read(t, text)
	text = strings.Replace(text, "gateways:\n", "gateways:\n- {name: aaa, cloud: aws, asn: 65100, region: us-east-1, network: vgw-0123456789abcdef0}\n", 1)
	text = strings.Replace(text, "links:\n", "links:\n- between: [aaa, hub-1]\n- between: [aaa, azure]\n", 1)
	after := read(t, text)
	if len(after.Tunnels) != len(before.Tunnels)+10 {
		t.Fatalf("%d tunnels, want %d", len(after.Tunnels), len(before.Tunnels)+10)
	}
	for _, tu := range before.Tunnels {
		if !slices.Contains(after.Tunnels, tu) {
			t.Errorf("%s has changed", tu.Name)
		}
	}
}

// TestKeysNeverPrinted: what may be a key by mistake is in no message, and no rendered text has
// anything but references.
func TestKeysNeverPrinted(t *testing.T) {
	const key = "k 3y-that.is-real"
	text := example(t, "two-routers.yaml")
	_, problems := Read([]byte(strings.Replace(text, "AZURE_KEY_1", `"`+key+`"`, 1)), nil)
	if len(problems) == 0 || strings.Contains(problems.Error(), key) {
		t.Errorf("got %v", problems)
	}
}

// TestApart: spokes without a common group are not announced to each other, and what policies
// cannot keep apart is refused.
func TestApart(t *testing.T) {
	text := strings.Replace(example(t, "two-routers.yaml"), "spokes: [vpc-a, vnet-a, net-a]", "spokes: [vpc-a, vnet-a]", 1)
	top := read(t, text)
	m := top.document(*top.node("hub-1"), Address.String)
	for _, p := range m.Peers {
		for _, r := range p.GetExport().GetAllow() {
			if strings.HasPrefix(p.Name, "gcp") || r.Prefix == "10.0.1.0/24" {
				t.Errorf("%s is announced to %s", r.Prefix, p.Name)
			}
		}
	}
	egress := "  egress:\n    pools: [{name: p, addresses: [{address: 10.9.0.5}]}]\n    policies: [{name: a, sources: [172.16.0.0/16], pool: p}]\n- name: hub-2\n"
	for what, c := range map[string]struct{ text, path string }{
		"gateways linked":  {strings.Replace(text, "links:\n", "links:\n- between: [aws, gcp]\n", 1), "links[0].between"},
		"a shared default": {strings.Replace(text, "- name: hub-2\n", egress, 1), "nodes[0].egress"},
	} {
		_, problems := Read([]byte(c.text), nil)
		if len(problems) != 1 || problems[0].Path != c.path {
			t.Errorf("%s: got %v", what, problems)
		}
	}
	whole := read(t, strings.Replace(example(t, "two-routers.yaml"), "- name: hub-2\n", egress, 1))
	m = whole.document(*whole.node("hub-1"), Address.String)
	for _, p := range m.Peers {
		def := slices.ContainsFunc(p.GetExport().GetAllow(), func(r *isthmusv1.PrefixRule) bool { return r.Prefix == "0.0.0.0/0" })
		if want := strings.HasPrefix(p.Name, "aws"); def != want {
			t.Errorf("%s is given the default route: %v, want %v", p.Name, def, want)
		}
	}
	if fmt.Sprint(m.Announce) != "[0.0.0.0/0]" {
		t.Errorf("announces %v", m.Announce)
	}
	byPool := strings.Replace(strings.Replace(example(t, "two-routers.yaml"), "- name: hub-2\n", egress, 1), "{name: p, ", `{name: p, announce: ["0.0.0.0/0"], `, 1)
	whole = read(t, byPool)
	if m = whole.document(*whole.node("hub-1"), Address.String); len(m.Announce) > 0 {
		t.Errorf("announces %v, which the pool does while it is healthy", m.Announce)
	}
}

// TestProblems: each mistake is found at its field, with nothing else.
func TestProblems(t *testing.T) {
	text := example(t, "two-routers.yaml")
	for what, c := range map[string]struct{ from, to, path string }{
		"unknown field":     {"lanes: 2", "lane: 2", "links[6].lane"},
		"too many lanes":    {"lanes: 2", "lanes: 17", "links[6].lanes"},
		"reserved number":   {"asn: 65002", "asn: 23456", "gateways[0].asn"},
		"same number":       {"asn: 64621", "asn: 64620", "links[6].between"},
		"of the cloud":      {"asn: 64620", "asn: 65520", "nodes[0].asn"},
		"interface":         {"interface: eth0\n  wireguardPublicKey: 5", "interface: a b\n  wireguardPublicKey: 5", "nodes[0].interface"},
		"unknown address":   {"name: GCP_1", "name: GCP_2", "addresses[3].name"},
		"address of a node": {"198.51.100.21", "203.0.113.9", "addresses"},
		"unknown key":       {"name: azure-hub-1,", "name: azure-hub-3,", "keys[0].name"},
		"injection":         {"file: /etc/isthmus/keys/gcp-hub-1-0", "file: /etc/$(reboot)", "keys[1].file"},
		"other's gateway":   {"resourceGroup: hub", "resourceGroup: 'a\"b'", "gateways[1].resourceGroup"},
	} {
		_, problems := Read([]byte(strings.Replace(text, c.from, c.to, 1)), nil)
		if len(problems) == 0 || !slices.ContainsFunc(problems, func(p spec.Problem) bool { return p.Path == c.path }) {
			t.Errorf("%s: want a problem at %s, got %v", what, c.path, problems)
		}
		for _, p := range problems {
			if p.Remedy == "" || p.Line == 0 && p.Path != "addresses" {
				t.Errorf("%s: %v has no remedy or no line", what, p)
			}
		}
	}
}

// TestNumbersOfLinkedGateways: AWS takes no customer with one of its own numbers, and Azure may
// have them.
func TestNumbersOfLinkedGateways(t *testing.T) {
	_, problems := Read([]byte(strings.Replace(example(t, "clouds-only.yaml"), "asn: 65001", "asn: 7224", 1)), nil)
	if len(problems) != 1 || problems[0].Path != "gateways[1].asn" {
		t.Errorf("got %v", problems)
	}
}

// FuzzRead: whatever the text is, there is a topology that renders, or a problem.
func FuzzRead(f *testing.F) {
	for _, name := range []string{"two-routers.yaml", "clouds-only.yaml"} {
		text, err := os.ReadFile("../../docs/examples/" + name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text))
	}
	f.Fuzz(func(t *testing.T, text string) {
		if top, problems := Read([]byte(text), nil); len(problems) == 0 {
			outputs(t, top)
		}
	})
}

// TestBounds: one more of anything is refused before it is worked on.
func TestBounds(t *testing.T) {
	for path, most := range map[string]int{"nodes": maxNodes, "gateways": maxGateways, "spokes": maxSpokes, "links": maxLinks, "groups": maxGroups} {
		text := path + ":\n" + strings.Repeat("- {}\n", most+1)
		if _, problems := Read([]byte(text), nil); len(problems) != 1 || problems[0].Path != path {
			t.Errorf("%s: %d problems, want one: %.200v", path, len(problems), problems)
		}
	}
}
