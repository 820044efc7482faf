package capability

import (
	"maps"
	"slices"
	"strings"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/egress/dns"
	"github.com/isthmus-net/isthmus/router/live"
	"github.com/isthmus-net/isthmus/router/observe"
)

// Names resolves the domain names of policies, and runs the DNS proxy for spokes.
type Names struct {
	Resolver *dns.Resolver
	Observed *observe.Observer
	// Conflicts returns the addresses of names that are not destinations of the names' policies.
	Conflicts func() []live.Conflict
}

// Capability describes Names. The job "nat" sets the names to resolve: the proxy listens after the
// rules.
func (n Names) Capability() Capability {
	return Capability{
		Name: "domain names in policies, and the DNS proxy", Section: "egress.policies.names", Nouns: []api.Noun{api.Names.From(n.List)}, Conditions: n.conditions, Run: n.Resolver.Run,
		Kinds: []*condition.Kind{
			condition.AddressesRefused, condition.AnswersRefused, condition.DNSProxyDown, condition.NameDiffers, condition.NameShared, condition.NameTooLarge,
			condition.NameUnresolved, condition.NewNamesLimited, condition.QueriesDropped,
		},
	}
}

// List returns the names of policies with their addresses, sorted.
func (n Names) List() []*isthmusv1.NameStatus {
	policies := n.Observed.Target().NAT.Policies
	byName := map[string]*isthmusv1.NameStatus{}
	gone := map[string][]*isthmusv1.GoneAddress{}
	for _, g := range n.Resolver.Lately() {
		gone[g.Name] = append(gone[g.Name], &isthmusv1.GoneAddress{Address: g.Address.String(), Since: stamp(g.At)})
	}
	for _, p := range policies {
		for _, name := range p.Names {
			if byName[name] == nil {
				s := n.Resolver.State(name)
				byName[name] = &isthmusv1.NameStatus{Name: name, Addresses: texts(s.Addresses), Next: stamp(s.Next), LastError: s.LastError, Failing: stamp(s.Failing),
					Gone: gone[name], Differs: stamp(s.Differs), Refused: texts(s.Refused)}
			}
			byName[name].Policies = append(byName[name].Policies, p.Name)
		}
	}
	out := make([]*isthmusv1.NameStatus, 0, len(byName))
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		out = append(out, byName[name])
	}
	return out
}

// deafTold is the delay before a condition reports that the DNS proxy does not listen: an interface
// may be created in that time.
const deafTold = 5 * time.Second

// maxToldConflicts bounds the refused addresses with a condition of their own: the owner of a zone
// decides how many exist.
const maxToldConflicts = 20

// conditions reports names that cannot be resolved, and addresses that two policies claim.
func (n Names) conditions() (out []*isthmusv1.Condition) {
	names := n.List()
	for _, name := range names {
		if name.LastError != "" {
			out = append(out, condition.NameUnresolved.Warning(n.Resolver.State(name.Name).Failing, "name %s of policies %s: %s; its %d addresses of that family stay for `nameGrace`", name.Name, strings.Join(name.Policies, ", "), name.LastError, n.Resolver.State(name.Name).Stale))
		}
	}
	for _, name := range names {
		if name.Differs != nil {
			out = append(out, condition.NameDiffers.Warning(n.Resolver.State(name.Name).Differs, "name %s of policies %s: each answer has addresses that were not in those before, so that clients of another resolver get addresses that are not destinations: configure them to ask `egress.dnsProxy` of this node", name.Name, strings.Join(name.Policies, ", ")))
		}
		if len(name.Refused) > 0 {
			out = append(out, condition.AddressesRefused.Warning(time.Time{}, "name %s of policies %s: %s and others are refused, since the node, a pool, the platform or an inside network uses them: write the wanted ones in `destinations`", name.Name, strings.Join(name.Policies, ", "), name.Refused[0]))
		}
	}
	if l, err, since, deaf := n.Resolver.Deaf(); deaf > 0 && time.Since(since) > deafTold {
		out = append(out, condition.DNSProxyDown.Warning(since, "the DNS proxy does not listen at %d of its addresses, the first one %v by interface %s: %s: the address must be one of this node, and no other program may listen at port 53 of it", deaf, l.Address, l.Interface, err))
	}
	if dropped, last, host := n.Resolver.Dropped(); dropped > 0 && time.Since(last) < time.Minute {
		out = append(out, condition.QueriesDropped.Warning(last, "the DNS proxy has dropped %d queries since the start, the last one of %v: a client, or all clients of a tunnel together, ask more than the resolvers answer", dropped, host))
	}
	if limited, last, iface := n.Resolver.Limited(); limited > 0 && time.Since(last) < time.Minute {
		out = append(out, condition.NewNamesLimited.Warning(last, "the DNS proxy has refused %d answers since the start, the last one to a client behind %s: they would have given names more new addresses than one attachment may (1000 at once, 100 a second): find the host that asks, or write prefixes in `destinations`", limited, iface))
	}
	if refused, last, name := n.Resolver.Refused(); refused > 0 && time.Since(last) < time.Minute {
		out = append(out, condition.AnswersRefused.Warning(last, "the DNS proxy has refused %d answers since the start, the last one for %s: they have addresses that the node, a pool, the platform or an inside network uses", refused, name))
	}
	conflicts := n.Conflicts()
	for i, c := range conflicts {
		if i == maxToldConflicts {
			out = append(out, condition.NameShared.Warning(time.Time{}, "%d more addresses of names are not destinations of their policies", len(conflicts)-i))
			break
		}
		if c.Winner == "" {
			out = append(out, condition.NameTooLarge.Warning(time.Time{}, "%v of name %s is not a destination of policy %s, since %v: give the policy fewer sources or ports, or names with fewer addresses", c.Address, c.Name, c.Policy, nat.ErrTooManyRules))
			continue
		}
		out = append(out, condition.NameShared.Warning(time.Time{}, "%v of name %s is not a destination of policy %s, since policy %s decides the same flows to it", c.Address, c.Name, c.Policy, c.Winner))
	}
	return out
}
