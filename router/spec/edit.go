package spec

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strconv"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress"
)

// A document may have ten thousand policies. Decoding and checking all of them for an edit of one
// takes a hundred times as long as applying the edit. Edit checks those that are edited or could
// conflict with them. The result equals that of Decode and Check for the edited text.

// maxEdited bounds the policies of one Edit.
const maxEdited = 1000

// Edit is a change of single egress policies.
type Edit struct {
	Set    []*isthmusv1.EgressPolicy // added, or in place of those with the same names
	Delete []string                  // names

	lines    Lines // of Set
	problems Problems
	rules    int // of all policies after the edit
}

// Read adds the policies of a text, a PolicyList in YAML or JSON. Apply reports its problems.
func (e *Edit) Read(text []byte) {
	list := &isthmusv1.PolicyList{}
	e.lines, e.problems = DecodeMessage(text, list)
	if len(list.Policies) == 0 && len(e.problems) == 0 {
		e.problems = Problems{{Path: "policies", Rule: "is required", Remedy: "write each policy as in a document, as a list below `policies:`"}}
	}
	e.Set = append(e.Set, list.Policies...)
}

// Edited is a document after an Edit.
type Edited struct {
	*Spec
	Text  string
	Names []string // of the policies that differ
}

// errEdit means that a text cannot be edited although it is valid.
var errEdit = errors.New("this text cannot be edited; apply the whole document")

// Apply edits the document s, which was decoded from text. With problems it edits nothing. A policy
// that is set to its present value does not differ. The text keeps its comments except those within
// policies that are replaced or deleted. If the policies are not a list in block style, or the text
// has aliases, it is rewritten as a whole.
func (e *Edit) Apply(s *Spec, text string) (Edited, Problems, error) {
	fresh, proxies, problems := e.check(s)
	if len(problems) > 0 {
		return Edited{}, problems, nil
	}
	next := *s
	next.rules = e.rules
	next.Policies, next.Proxies = make([]nat.Policy, len(s.Policies), len(s.Policies)+len(fresh)), slices.Clone(s.Proxies)
	copy(next.Policies, s.Policies)
	out := Edited{Spec: &next, Text: text}
	var set []*isthmusv1.EgressPolicy // that differ
	for i := range fresh {
		p := &fresh[i]
		at := next.policy(p.Name)
		if at >= 0 && s.Policies[at].Equal(p) && sameProxy(proxies, s.Proxies, p.Name) {
			continue
		}
		had, has := indexProxy(next.Proxies, p.Name), indexProxy(proxies, p.Name)
		set, out.Names = append(set, e.Set[i]), append(out.Names, p.Name)
		if had >= 0 {
			next.Proxies = slices.Delete(next.Proxies, had, had+1)
		}
		if has >= 0 {
			next.Proxies = append(next.Proxies, proxies[has])
		}
		if at >= 0 {
			next.Policies[at] = *p
		} else {
			next.Policies = append(next.Policies, *p)
		}
	}
	for _, name := range e.Delete {
		if i := indexProxy(next.Proxies, name); i >= 0 {
			next.Proxies = slices.Delete(next.Proxies, i, i+1)
		}
		i := next.policy(name)
		next.Policies = slices.Delete(next.Policies, i, i+1)
	}
	out.Names = append(out.Names, e.Delete...)
	if len(out.Names) == 0 {
		return out, nil, nil
	}
	if s.layout != nil {
		edited, l, err := s.rewrite(text, set, e.Delete)
		if err == nil {
			next.layout, out.Text = l, edited
			return out, nil, nil
		} else if !errors.Is(err, errEdit) {
			return Edited{}, nil, err
		}
	}
	d, err := rewriteAll(text, set, e.Delete)
	if err != nil {
		return Edited{}, nil, err
	}
	next.lines, next.layout, out.Text = d.lines.outside(policiesField), d.layout, d.text
	return out, nil, nil
}

func indexProxy(list []egress.ProbedPool, name string) int {
	return slices.IndexFunc(list, func(p egress.ProbedPool) bool { return p.Name == name })
}

// sameProxy reports whether two lists have the same proxy of a policy.
func sameProxy(a, b []egress.ProbedPool, name string) bool {
	i, j := indexProxy(a, name), indexProxy(b, name)
	return i < 0 && j < 0 || i >= 0 && j >= 0 && reflect.DeepEqual(a[i], b[j])
}

// policy returns the index of a policy, and -1 when no policy has the name.
func (s *Spec) policy(name string) int {
	for i := range s.Policies { // an index copies no policy
		if s.Policies[i].Name == name {
			return i
		}
	}
	return -1
}

// Policy returns a policy, and nil when no policy has the name.
func (s *Spec) Policy(name string) *nat.Policy {
	if i := s.policy(name); i >= 0 {
		return &s.Policies[i]
	}
	return nil
}

// check returns the policies that are set, and their proxies.
func (e *Edit) check(s *Spec) ([]nat.Policy, []egress.ProbedPool, Problems) {
	c := s.checker(e.lines)
	c.take(e.problems)
	c.unread = e.problems.paths()
	if n := len(e.Set) + len(e.Delete); n > maxEdited {
		c.Problem("policies", strconv.Itoa(n), fmt.Sprintf("are more than the %d that one edit may change", maxEdited), "apply the whole document")
		return nil, nil, c.Problems()
	}
	c.s.Policies, c.s.Proxies = nil, nil
	edited := map[string]bool{}
	for i, name := range e.Delete {
		at := fmt.Sprintf("delete[%d]", i)
		switch {
		case edited[name]:
			c.Problem(at, name, "is listed twice", "keep one of them")
		case s.policy(name) < 0:
			c.Problem(at, name, "is not a policy of the present document", "see `isthmus get policies` for those that are")
		}
		edited[name] = true
	}
	for i, p := range e.Set {
		if edited[p.GetName()] && slices.Contains(e.Delete, p.GetName()) {
			c.Problem(fmt.Sprintf("policies[%d].name", i), p.GetName(), "is to be deleted as well", "set it or delete it")
		}
		edited[p.GetName()] = true
	}
	if slices.ContainsFunc(e.Set, func(p *isthmusv1.EgressPolicy) bool { return len(p.GetNames()) > 0 }) {
		for i := range s.Policies {
			if !edited[s.Policies[i].Name] {
				for _, name := range s.Policies[i].Names {
					c.domainNames[name] = true
				}
			}
		}
	}
	for i, p := range e.Set {
		c.policy(fmt.Sprintf("policies[%d]", i), p)
	}
	fresh, paths, proxies := c.s.Policies, c.paths, c.s.Proxies
	var former []nat.Policy
	for i := range s.Policies {
		if edited[s.Policies[i].Name] {
			former = append(former, s.Policies[i])
		}
	}
	_, gone := c.countRules(former)
	if !c.bounded(fresh, paths, s.rules-gone) {
		return nil, nil, c.Problems()
	}
	e.rules = c.s.rules
	// with selects policies of the edited document for the checks below.
	with := func(selected func(*nat.Policy) bool) {
		c.s.Policies, c.paths = nil, nil
		for i := range s.Policies {
			if p := &s.Policies[i]; !edited[p.Name] && selected(p) {
				c.s.Policies, c.paths = append(c.s.Policies, *p), append(c.paths, fmt.Sprintf("egress.policies[%d]", i))
			}
		}
		for i := range fresh {
			if selected(&fresh[i]) {
				c.s.Policies, c.paths = append(c.s.Policies, fresh[i]), append(c.paths, paths[i])
			}
		}
	}
	// Only rules with the same source tie.
	sources := map[netip.Prefix]bool{}
	for _, p := range fresh {
		for _, source := range p.Sources {
			sources[source] = true
		}
	}
	with(func(p *nat.Policy) bool {
		return slices.ContainsFunc(p.Sources, func(o netip.Prefix) bool { return sources[o] })
	})
	c.ties()
	looked := map[netip.Addr]bool{}
	// A redirect that is set may catch its proxy. So may another one once the policy that prevented
	// it is deleted.
	mayLoop := func(to netip.Addr) bool {
		return slices.ContainsFunc(fresh, func(p nat.Policy) bool { return p.To.Addr() == to }) ||
			slices.ContainsFunc(s.Policies, func(p nat.Policy) bool { return edited[p.Name] && from(&p, to) })
	}
	for _, list := range [][]nat.Policy{s.Policies, fresh} {
		for i := range list {
			to := list[i].To.Addr()
			if list[i].Action != nat.Redirect || !to.IsValid() || looked[to] || !mayLoop(to) {
				continue
			}
			looked[to] = true
			with(func(p *nat.Policy) bool { return from(p, to) })
			config := nat.Config{Pools: c.s.Pools, Policies: c.s.Policies}
			rules, err := config.Rules()
			if err != nil {
				continue
			}
			for j := range c.s.Policies {
				if c.s.Policies[j].To.Addr() == to {
					c.loop(rules, j)
				}
			}
		}
	}
	return fresh, proxies, c.Problems()
}

// from reports whether an address is a source of a policy.
func from(p *nat.Policy, a netip.Addr) bool {
	return slices.ContainsFunc(p.Sources, func(o netip.Prefix) bool { return o.Contains(a) })
}

// checker returns a checker with the facts of a checked document that policies depend on.
func (s *Spec) checker(lines Lines) *checker {
	c := newChecker(Document{lines: lines}, nil)
	c.s, c.proxy = *s, len(s.Names.Proxy) > 0
	for _, p := range s.Pools {
		for _, a := range p.Addresses {
			c.sources[a.Address] = p.Name
		}
	}
	return c
}

// rewrite edits the policies in place. It decodes again each policy that it removes or extends, and
// returns errEdit when that is not the expected one.
func (s *Spec) rewrite(text string, set []*isthmusv1.EgressPolicy, gone []string) (string, *layout, error) {
	l := *s.layout
	l.items = slices.Clone(l.items)
	if len(l.items) != len(s.Policies) {
		return "", nil, errEdit
	}
	order := make([]string, len(s.Policies), len(s.Policies)+len(set)) // of the items
	for i := range s.Policies {
		order[i] = s.Policies[i].Name
	}
	// is reports whether an item is the expected policy.
	is := func(i int) bool {
		from, to := l.item(text, i)
		list := &isthmusv1.PolicyList{}
		d := decode([]byte("policies:\n"+text[from:to]), list)
		if len(d.problems.found) > 0 || len(list.Policies) != 1 {
			return false
		}
		c := s.checker(nil)
		c.s.Policies, c.s.Proxies = nil, nil
		c.policy("", list.Policies[0])
		return len(c.problems.found) == 0 && c.s.Policies[0].Equal(&s.Policies[s.policy(order[i])]) && sameProxy(c.s.Proxies, s.Proxies, order[i])
	}
	if n := len(order); n > 0 && !is(n-1) { // no next item marks its end
		return "", nil, errEdit
	}
	for _, p := range set {
		put, err := encode(p)
		if err != nil {
			return "", nil, err
		}
		i := slices.Index(order, p.Name)
		switch {
		case i < 0:
			text = l.add(text, put)
			order = append(order, p.Name)
			continue
		case !is(i):
			return "", nil, errEdit
		}
		text = l.replace(text, i, put)
	}
	for _, name := range gone {
		i := slices.Index(order, name)
		if !is(i) {
			return "", nil, errEdit
		}
		text = l.remove(text, i)
		order = slices.Delete(order, i, i+1)
	}
	if problems := Fits(text); len(problems) > 0 {
		return "", nil, fmt.Errorf("editing the document: the outcome %s", problems[0].Rule)
	}
	return text, &l, nil
}

// rewritten is a document with a text that was rewritten as a whole.
type rewritten struct {
	Document
	text string
}

// rewriteAll edits the policies of any text, and rewrites it as a whole.
func rewriteAll(text string, set []*isthmusv1.EgressPolicy, gone []string) (rewritten, error) {
	was, problems := Decode([]byte(text))
	var root yaml.Node
	if err := yaml.Unmarshal([]byte(text), &root); err != nil || len(problems) > 0 || len(root.Content) != 1 {
		return rewritten{}, errEdit
	}
	want := was.Message
	if want.Egress == nil {
		want.Egress = &isthmusv1.Egress{}
	}
	list := child(child(root.Content[0], "egress", yaml.MappingNode), "policies", yaml.SequenceNode)
	if len(list.Content) != len(want.Egress.Policies) {
		return rewritten{}, errEdit
	}
	if len(list.Content) == 0 {
		list.Style = 0
	}
	at := func(name string) int {
		return slices.IndexFunc(want.Egress.Policies, func(p *isthmusv1.EgressPolicy) bool { return p.GetName() == name })
	}
	for _, p := range set {
		n, err := nodeOf(p)
		if err != nil {
			return rewritten{}, err
		}
		if i := at(p.GetName()); i >= 0 {
			list.Content[i], want.Egress.Policies[i] = n, p
		} else {
			list.Content, want.Egress.Policies = append(list.Content, n), append(want.Egress.Policies, p)
		}
	}
	for _, name := range gone {
		i := at(name)
		list.Content = slices.Delete(list.Content, i, i+1)
		want.Egress.Policies = slices.Delete(want.Egress.Policies, i, i+1)
	}
	out, err := encodeNode(&root)
	if err != nil {
		return rewritten{}, errEdit // an alias refers to a removed anchor
	}
	d, problems := Decode([]byte(out))
	if len(problems) > 0 || !proto.Equal(d.Message, want) {
		return rewritten{}, errEdit
	}
	return rewritten{d, out}, nil
}

// child returns the value of a key of a mapping, and adds one when the key has none.
func child(n *yaml.Node, key string, kind yaml.Kind) *yaml.Node {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	v := value(n, key)
	if v == nil {
		v = &yaml.Node{Kind: kind}
		n.Content = append(n.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: key}, v)
	}
	for v.Kind == yaml.AliasNode {
		v = v.Alias
	}
	if isNull(v) {
		*v = yaml.Node{Kind: kind}
	}
	return v
}
