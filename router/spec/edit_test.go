package spec

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/test/root"
)

const editHead = `# a node
node: {name: hub-1, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4}
tunnels:
- {name: aws, inside: [{local: 169.254.64.2/30}], ipsec: {remoteAddress: 198.51.100.1, psk: aws-0}}
egress:
  # pools of egress
  dnsProxy: {listen: [169.254.64.2]}
  pools:
  - {name: p, addresses: [{address: 10.9.0.10, publicAddress: 203.0.113.10}, {address: 10.9.0.11}]}
  - {name: b, addresses: [{address: 10.9.0.12}], blocks: {sources: [10.1.0.0/24], size: 100}}
`

var editTails = []string{"", "announce: [10.9.0.0/24]\n", "  nameFloor: 1m\nannounce: [10.9.0.0/24]\n", "# the end\n", "\n  # between\n\n  log: {maxAge: 24h}\n", "...\n"}

// anyPolicy returns a random policy that may be valid.
func anyPolicy(r *rand.Rand, name string) *isthmusv1.EgressPolicy {
	one := func(of ...string) string { return of[r.IntN(len(of))] }
	p := &isthmusv1.EgressPolicy{Name: name, Action: one("", "", "snat", "no-nat", "deny", "reject", "dnat", "redirect", "redirect", "bad")}
	for range 1 + r.IntN(2) {
		p.Sources = append(p.Sources, one("10.1.0.0/16", "10.1.0.0/24", "10.1.0.9/32", "10.2.0.0/16", "2001:db8::/32", "0.0.0.0/0"))
	}
	for range r.IntN(3) {
		p.Destinations = append(p.Destinations, one("198.51.100.0/24", "198.51.100.7/32", "10.9.0.0/16", "2001:db8:1::/48", "10.9.0.10/32"))
	}
	if r.IntN(2) == 0 || p.Action == "dnat" || p.Action == "redirect" {
		p.Protocol = one("tcp", "udp", "icmp", "tcp")
		for range r.IntN(3) {
			p.Ports = append(p.Ports, one("443", "80-90", "90", "8000-9000"))
		}
	}
	if p.Action == "" || p.Action == "snat" || p.Action == "dnat" {
		p.Pool = one("p", "p", "p", "b", "none")
		p.Pickup = p.Action != "dnat" && r.IntN(4) == 0
	}
	if p.Action != "no-nat" && p.Action != "dnat" && r.IntN(4) == 0 {
		p.Names = []string{one("api.partner.example", "*.example.com", "www.example.com")}
	}
	if p.Action == "dnat" || p.Action == "redirect" {
		p.To = one("10.1.0.9:3128", "10.1.0.9", "10.2.0.7:80", "2001:db8::9")
	}
	if p.Action == "redirect" && r.IntN(2) == 0 {
		p.Probes = &isthmusv1.Probes{Targets: []string{"tcp://" + one("10.1.0.9:3128", "10.2.0.7:80")}, Interval: durationpb.New(5e9)}
	}
	if r.IntN(6) == 0 {
		p.Timeouts = &isthmusv1.FlowTimeouts{Udp: durationpb.New(40e9)}
	}
	return p
}

// written returns a policy as an item of a YAML list.
func written(t *testing.T, r *rand.Rand, p *isthmusv1.EgressPolicy, indent string) string {
	text, err := encode(p)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if r.IntN(3) == 0 {
		b.WriteString(indent + "# about " + p.Name + "\n")
	}
	if r.IntN(6) == 0 {
		b.WriteString("\n   # odd\n")
	}
	dash := "- "
	for line := range strings.Lines(text) {
		b.WriteString(indent + dash + line)
		dash = "  "
		if r.IntN(8) == 0 {
			b.WriteString(indent + "   # within " + p.Name + "\n")
		}
		if r.IntN(8) == 0 {
			b.WriteString("\n")
		}
	}
	return b.String()
}

// full defines the result of an edit: it edits the message.
func full(m *isthmusv1.Spec, e Edit) (*isthmusv1.Spec, Problems) {
	m = proto.CloneOf(m)
	for _, p := range e.Set {
		i := slices.IndexFunc(m.Egress.Policies, func(o *isthmusv1.EgressPolicy) bool { return o.Name == p.Name })
		if i >= 0 {
			m.Egress.Policies[i] = p
		} else {
			m.Egress.Policies = append(m.Egress.Policies, p)
		}
	}
	for _, name := range e.Delete {
		m.Egress.Policies = slices.DeleteFunc(m.Egress.Policies, func(p *isthmusv1.EgressPolicy) bool { return p.Name == name })
	}
	_, problems := Check(FromMessage(m), stored)
	return m, problems
}

// TestEditIsWhole edits random documents, and compares the results with those of Decode and Check
// for the whole text.
func TestEditIsWhole(t *testing.T) {
	edits, refused, inPlace := 0, 0, 0
	seeds := root.Count(uint64(300), 60)
	for seed := range seeds {
		r := rand.New(rand.NewPCG(seed, 1))
		m := &isthmusv1.Spec{}
		if _, problems := DecodeMessage([]byte(editHead), m); len(problems) > 0 {
			t.Fatal(problems)
		}
		for i := range 1 + r.IntN(8) {
			for range 20 {
				if next, problems := full(m, Edit{Set: []*isthmusv1.EgressPolicy{anyPolicy(r, fmt.Sprint("p", i))}}); len(problems) == 0 {
					m = next
					break
				}
			}
		}
		indent := strings.Repeat(" ", 2+2*r.IntN(2))
		text := editHead + "  policies:\n"
		for _, p := range m.Egress.Policies {
			text += written(t, r, p, indent)
		}
		text += editTails[r.IntN(len(editTails))]
		if r.IntN(4) == 0 {
			text = strings.TrimSuffix(text, "\n")
		}
		switch r.IntN(10) {
		case 0:
			text = strings.ReplaceAll(text, "\n", "\r\n")
		case 1:
			text = strings.Replace(strings.Replace(text, "name: hub-1", "name: &n p", 1), "- {name: p,", "- {name: *n,", 1)
		case 2:
			m, _ := Decode([]byte(text))
			text, _ = Encode(m.Message)
		}
		s, problems := parse(text)
		if len(problems) > 0 {
			t.Fatalf("seed %d: %v\n%s", seed, problems, text)
		}
		for range 12 {
			e := Edit{}
			for range r.IntN(3) {
				e.Set = append(e.Set, anyPolicy(r, fmt.Sprint("p", r.IntN(10))))
			}
			for range r.IntN(2) + r.IntN(2) {
				e.Delete = append(e.Delete, fmt.Sprint("p", r.IntN(10)))
			}
			d, _ := Decode([]byte(text))
			_, want := full(d.Message, e)
			for _, p := range e.Set { // which full does not check
				n := 0
				for _, o := range e.Set {
					if o.Name == p.Name {
						n++
					}
				}
				if n > 1 || slices.Contains(e.Delete, p.Name) {
					want = append(want, Problem{})
				}
			}
			for i, name := range e.Delete {
				if s.policy(name) < 0 || slices.Contains(e.Delete[:i], name) {
					want = append(want, Problem{})
				}
			}
			edited, got, err := e.Apply(s, text)
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if (len(got) == 0) != (len(want) == 0) {
				t.Fatalf("seed %d: problems %v, want %v\n%s\nset %v delete %v", seed, got, want, text, e.Set, e.Delete)
			}
			if len(got) > 0 {
				refused++
				continue
			}
			edits++
			again, problems := parse(edited.Text)
			if len(problems) > 0 {
				t.Fatalf("seed %d: %v\nfrom\n%s\nto\n%s", seed, problems, text, edited.Text)
			}
			a, b := *edited.Spec, *again
			if a.layout != nil {
				inPlace++
				if strings.Count(text, "# about")+strings.Count(text, "# odd") != strings.Count(edited.Text, "# about")+strings.Count(edited.Text, "# odd") {
					t.Fatalf("seed %d: comments are lost\n%s\nto\n%s", seed, text, edited.Text)
				}
				for _, path := range []string{"node.name", "announce", "egress.nameFloor", "egress.policies"} {
					if x, y := a.Line(path), b.Line(path); x != y {
						t.Fatalf("seed %d: %s is on line %d, want %d\n%s", seed, path, x, y, edited.Text)
					}
				}
			}
			if b.layout != nil && (a.layout == nil || !slices.Equal(a.layout.items, b.layout.items) || a.layout.indent != b.layout.indent) {
				t.Fatalf("seed %d: layout %+v, want %+v\n%s", seed, a.layout, b.layout, edited.Text)
			}
			same := func(s *Spec) {
				s.lines, s.layout = nil, nil
				s.Proxies = slices.SortedFunc(slices.Values(s.Proxies), func(a, b egress.ProbedPool) int { return cmp.Compare(a.Name, b.Name) })
				if len(s.Policies) == 0 {
					s.Policies = nil
				}
			}
			same(&a)
			same(&b)
			if !reflect.DeepEqual(a, b) {
				t.Fatalf("seed %d: %+v\nwant %+v\n%s", seed, a, b, edited.Text)
			}
			for _, p := range slices.Concat(s.Policies, edited.Policies) {
				i, j := s.policy(p.Name), edited.policy(p.Name)
				differs := i < 0 || j < 0 || !s.Policies[i].Equal(&edited.Policies[j]) || !sameProxy(s.Proxies, edited.Proxies, p.Name)
				if differs != slices.Contains(edited.Names, p.Name) {
					t.Fatalf("seed %d: %v differ, %s: %v", seed, edited.Names, p.Name, differs)
				}
			}
			text, s = edited.Text, edited.Spec
		}
	}
	t.Logf("%d edits, %d of them in place; %d refused", edits, inPlace, refused)
	if n := int(seeds); edits < n || refused < n || inPlace < edits/2 {
		t.Error("these are too few")
	}
}

const editEgress = "node: {name: a}\nunderlay: {interface: eth0, address: 10.9.0.4}\negress:\n  pools: [{name: p, addresses: [{address: 10.9.0.10}]}]\n"

func deny(name, source string) *isthmusv1.EgressPolicy {
	return &isthmusv1.EgressPolicy{Name: name, Action: "deny", Sources: []string{source}}
}

// TestEditText checks texts in which the place of a policy is easily mistaken.
func TestEditText(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		edit Edit
		want string // how the text ends, or the error
	}{
		"flow that goes on at the margin": {
			editEgress + "  policies:\n  - {name: x, action: deny,\nsources: [10.1.0.0/16]}\nannounce: []\n", Edit{Set: []*isthmusv1.EgressPolicy{deny("y", "10.2.0.0/16")}},
			"egress:\n  pools: [{name: p, addresses: [{address: 10.9.0.10}]}]\n  policies:\n    - {name: x, action: deny, sources: [10.1.0.0/16]}\n    - name: y\n      sources:\n        - 10.2.0.0/16\n      action: deny\nannounce: []\n",
		},
		"a line break that is not a line feed": {
			"# a\u2028# b\n" + editEgress + "  policies:\n  - {name: x, action: deny, sources: [10.1.0.0/16]}\n  - {name: z, action: deny, sources: [10.3.0.0/16]}\n", Edit{Delete: []string{"x"}},
			"egress:\n  pools: [{name: p, addresses: [{address: 10.9.0.10}]}]\n  policies:\n    - {name: z, action: deny, sources: [10.3.0.0/16]}\n",
		},
		"dashes at the margin of their key": {
			editEgress + "  policies:\n  - name: x # one\n    action: deny\n    sources: [10.1.0.0/16]\n  # about maps\n  maps: []\n", Edit{Set: []*isthmusv1.EgressPolicy{deny("x", "10.2.0.0/16")}},
			"egress:\n  pools: [{name: p, addresses: [{address: 10.9.0.10}]}]\n  policies:\n  - name: x\n    sources:\n      - 10.2.0.0/16\n    action: deny\n  # about maps\n  maps: []\n",
		},
		"the last one goes": {
			editEgress + "  policies:\n  - {name: x, action: deny, sources: [10.1.0.0/16]}\n", Edit{Delete: []string{"x"}},
			"egress:\n  pools: [{name: p, addresses: [{address: 10.9.0.10}]}]\n  policies:\n",
		},
		"no policies": {
			editEgress, Edit{Set: []*isthmusv1.EgressPolicy{deny("y", "10.2.0.0/16")}},
			"egress:\n  pools: [{name: p, addresses: [{address: 10.9.0.10}]}]\n  policies:\n    - name: y\n      sources:\n        - 10.2.0.0/16\n      action: deny\n",
		},
		"a list in one line": {
			editEgress + "  policies: []\n", Edit{Set: []*isthmusv1.EgressPolicy{deny("y", "10.2.0.0/16")}},
			"egress:\n  pools: [{name: p, addresses: [{address: 10.9.0.10}]}]\n  policies:\n    - name: y\n      sources:\n        - 10.2.0.0/16\n      action: deny\n",
		},
		"JSON": {
			`{"node": {"name": "a"}, "underlay": {"interface": "eth0", "address": "10.9.0.4"}, "egress": {"policies": [{"name": "x", "action": "deny", "sources": ["10.1.0.0/16"]}]}}`,
			Edit{Set: []*isthmusv1.EgressPolicy{deny("x", "10.2.0.0/16")}}, `"egress": {"policies": [{name: x, sources: [10.2.0.0/16], action: deny}]}}` + "\n",
		},
		"an anchor that others need": {
			editEgress + "  policies:\n  - {name: x, action: deny, sources: &s [10.1.0.0/16]}\n  - {name: y, action: deny, sources: *s, protocol: tcp}\n  - {name: z, action: deny, sources: [10.3.0.0/16]}\n", Edit{Delete: []string{"x"}}, "error: " + errEdit.Error(),
		},
		"an anchor": {
			editEgress + "  policies:\n  - {name: x, action: deny, sources: &s [10.1.0.0/16]}\n  - {name: y, action: deny, sources: *s, protocol: tcp}\n", Edit{Delete: []string{"y"}},
			"egress:\n  pools: [{name: p, addresses: [{address: 10.9.0.10}]}]\n  policies:\n    - {name: x, action: deny, sources: &s [10.1.0.0/16]}\n",
		},
	} {
		s, problems := parse(c.text)
		if len(problems) > 0 {
			t.Fatalf("%s: %v", name, problems)
		}
		edited, problems, err := c.edit.Apply(s, c.text)
		if len(problems) > 0 {
			t.Errorf("%s: %v", name, problems)
			continue
		}
		got := edited.Text
		if err != nil {
			got = "error: " + err.Error()
		}
		if !strings.HasSuffix(got, c.want) {
			t.Errorf("%s:\n%s\nwant at the end\n%s", name, got, c.want)
		}
	}
}

// TestEditMistakes checks that problems have the field of the edit, and that nothing is edited.
func TestEditMistakes(t *testing.T) {
	var names []string
	for i := range maxNames {
		names = append(names, fmt.Sprintf("n%d.example", i))
	}
	base := editEgress + "  policies:\n" +
		"  - {name: names, action: deny, sources: [10.7.0.0/16], names: [" + strings.Join(names, ", ") + "]}\n" +
		"  - {name: caught, action: redirect, sources: [10.3.0.0/16], protocol: tcp, ports: [\"80\"], to: 10.3.0.9:80}\n" +
		"  - {name: free, sources: [10.3.0.9/32], protocol: tcp, ports: [\"80\"], pool: p}\n" +
		"  - {name: x, action: deny, sources: [10.1.0.0/16]}\n"
	s, problems := parse(base)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	for text, c := range map[string]struct {
		remove []string
		want   string
	}{
		"policies: [{name: y, sources: [10.1.0.0/33], action: deny}]":         {nil, `line 1: policies[0].sources[0]: "10.1.0.0/33" is not a valid prefix`},
		"policies:\n- {name: y, sources: [10.1.0.0/24]}":                      {nil, "line 2: policies[0].pool: is required"},
		"policies:\n- {name: y, sources: [10.9.0.0/16], pool: p, source: []}": {nil, `line 2: policies[0].source: is an unknown field; did you mean "sources"?`},
		"policy: {}":   {nil, "policy: is an unknown field"},
		"policies: []": {nil, "policies: is required"},
		"{":            {nil, "is not valid YAML"},
		"":             {nil, "is empty; write at least `policies`"},
		"# none\n":     {nil, "is empty"},
		"policies:\n- {name: y, sources: [10.1.0.0/16], pool: p}":                                               {nil, `line 2: policies[0]: "y" decides the same flows as egress.policies[3] (x)`},
		"policies:\n- {name: y, sources: [10.9.0.0/16], pool: p}\n- {name: y, sources: [10.9.0.0/17], pool: p}": {nil, `line 3: policies[1].name: "y" is the name of policies[0].name too`},
		"policies:\n- {name: y, sources: [10.9.0.0/16], pool: p}\n- {name: z, sources: [10.9.0.0/16], pool: p}": {nil, `line 3: policies[1]: "z" decides the same flows as policies[0] (y)`},
		"policies:\n- {name: y, sources: [10.9.0.0/16], pool: p, names: [more.example]}":                        {nil, `"more.example" is one name more than 1000`},
		"policies:\n- {name: x, sources: [10.9.0.0/16], pool: p}":                                               {[]string{"x"}, `line 2: policies[0].name: "x" is to be deleted as well`},
		"policies:\n- {name: free, sources: [10.3.0.8/32], pool: p}":                                            {nil, `egress.policies[1].to: "10.3.0.9:80" is among the sources`},
		"policies:\n- {name: other, sources: [10.3.0.8/32], pool: p}":                                           {[]string{"free"}, `egress.policies[1].to: "10.3.0.9:80" is among the sources`},
		"policies:\n- {name: other, sources: [10.3.0.7/32], pool: p}":                                           {[]string{"absent"}, `delete[0]: "absent" is not a policy of the present document`},
		"policies:\n- {name: other, sources: [10.3.0.6/32], pool: p}":                                           {[]string{"x", "x"}, `delete[1]: "x" is listed twice`},
	} {
		e := Edit{Delete: c.remove}
		e.Read([]byte(text))
		edited, problems, err := e.Apply(s, base)
		if err != nil || len(problems) != 1 || !strings.Contains(problems[0].String(), c.want) || edited.Spec != nil {
			t.Errorf("%s: %v, %v, want %s", text, problems, err, c.want)
		}
	}
	e := Edit{Delete: []string{"x"}, Set: make([]*isthmusv1.EgressPolicy, maxEdited)}
	if _, problems, _ := e.Apply(s, base); len(problems) != 1 || !strings.Contains(problems[0].String(), `"1001" are more than the 1000 that one edit may change`) {
		t.Error(problems)
	}
	// The name is free once its policy is deleted.
	e = Edit{Delete: []string{"names"}}
	e.Read([]byte("policies: [{name: y, sources: [10.9.0.0/16], pool: p, names: [more.example]}]"))
	if _, problems, err := e.Apply(s, base); err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
}

// TestEditProxy checks that an edit of a policy changes its probed proxy.
func TestEditProxy(t *testing.T) {
	text := editEgress + "  policies:\n  - {name: x, action: deny, sources: [10.1.0.0/16]}\n"
	s, problems := parse(text)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	redirect := func(probes string) Edit {
		e := Edit{}
		e.Read([]byte("policies: [{name: r, action: redirect, sources: [10.3.0.0/24], protocol: tcp, ports: [\"80\"], to: 10.4.0.9:80" + probes + "}]"))
		return e
	}
	for i, e := range []Edit{redirect(""), redirect(", probes: {}"), redirect(", probes: {interval: 7s}"), redirect(", probes: {interval: 7s}"), redirect(""), redirect(", probes: {}"), {Delete: []string{"r"}}} {
		edited, problems, err := e.Apply(s, text)
		if err != nil || len(problems) > 0 {
			t.Fatal(i, err, problems)
		}
		want, _ := parse(edited.Text)
		if fmt.Sprintf("%+v", edited.Proxies) != fmt.Sprintf("%+v", want.Proxies) || (len(edited.Names) == 0) != (i == 3) {
			t.Errorf("step %d: %+v, want %+v; %v differ", i, edited.Proxies, want.Proxies, edited.Names)
		}
		s, text = edited.Spec, edited.Text
	}
}

// BenchmarkEdit edits one of ten thousand policies.
// FuzzEdit checks for any document and edit that the edited text and the edited message agree.
func FuzzEdit(f *testing.F) {
	x := "  - {name: x, action: deny, sources: [10.1.0.0/16]}\n"
	f.Add(editEgress+"  policies:\n"+x, "policies:\n- {name: y, sources: [10.2.0.0/16], pool: p}\n", "x")
	f.Add(editEgress+"  policies:\n    # x\n    - name: x\n      action: deny\n      sources:\n      - 10.1.0.0/16\n\n  # end\nannounce: [10.0.0.0/8]\n", "", "x")
	f.Add(editEgress+"  policies: [{name: x, action: deny, sources: [10.1.0.0/16]}]\n", "policies: [{name: x, action: deny, sources: [10.3.0.0/16]}]", "")
	f.Add(editHead+"  policies:\r\n"+x, "{policies: [{name: z, names: [a.example], sources: [10.1.0.0/24], pool: b}]}", "")
	f.Add(editEgress, "policies:\n- name: z\n  action: deny\n  sources: [10.1.0.0/24]", "z")
	f.Fuzz(func(t *testing.T, text, set, gone string) {
		s, problems := parse(text)
		if len(problems) > 0 {
			return
		}
		e := Edit{}
		if set != "" {
			e.Read([]byte(set))
		}
		if gone != "" {
			e.Delete = []string{gone}
		}
		edited, problems, err := e.Apply(s, text)
		if err != nil || len(problems) > 0 {
			return
		}
		d, _ := Decode([]byte(text))
		if d.Message.Egress == nil {
			d.Message.Egress = &isthmusv1.Egress{}
		}
		want, problems := full(d.Message, e)
		if len(problems) > 0 {
			t.Fatalf("accepted: %v\n%s\nset %s\ndelete %q", problems, text, set, gone)
		}
		got, problems := Decode([]byte(edited.Text))
		if len(problems) > 0 || !proto.Equal(got.Message, want) {
			t.Fatalf("%v\nfrom\n%s\nset %s\ndelete %q\nto\n%s", problems, text, set, gone, edited.Text)
		}
	})
}

func BenchmarkEdit(b *testing.B) {
	var text strings.Builder
	text.WriteString(editEgress + "  policies:\n")
	for i := range 10_000 {
		fmt.Fprintf(&text, "  - {name: p%05d, sources: [10.%d.%d.0/24], pool: p, destinations: [198.51.%d.%d/28]}\n", i, i>>8, i&255, i>>4&255, i<<4&255)
	}
	s, problems := parse(text.String())
	if len(problems) > 0 {
		b.Fatal(problems)
	}
	for what, e := range map[string]Edit{
		"add":    {Set: []*isthmusv1.EgressPolicy{{Name: "q", Sources: []string{"10.250.0.0/24"}, Pool: "p"}}},
		"remove": {Delete: []string{"p05000"}},
	} {
		b.Run(what, func(b *testing.B) {
			for b.Loop() {
				if _, problems, err := e.Apply(s, text.String()); err != nil || len(problems) > 0 {
					b.Fatal(err, problems)
				}
			}
		})
	}
}
