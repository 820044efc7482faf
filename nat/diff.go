package nat

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
)

// Track is an established flow, in addresses.
type Track struct {
	Source, Destination netip.Addr // of its first packet, as it came
	LeavesAs, GoesTo    netip.Addr // source and destination with which that packet left
	Protocol            uint8      // IP protocol number
	// destination ports of that packet as it came and as it went on; 0 without ports
	Port, ServerPort uint16
}

// Ending is a set of flows that end when one configuration replaces another.
type Ending struct {
	// of the object whose change ends them: "underlay" (its interface), "pool", "policy", or "map"
	// (its mapped prefix)
	Kind, Name string
	Flows      string // the flows, as text after the object: "from 203.0.113.9"
	// Has reports whether a flow is in the set. It does not have the flow's interfaces, and may
	// return true for flows of others.
	Has func(Track) bool
}

// Endings returns the established flows that end when b replaces a. Policies decide when a flow
// begins, so few changes end one: its source address is removed, it is untranslated and the guard
// no longer has its prefixes, a map no longer translates its spoke as before, or it is
// connectionless and goes to a server that another one has replaced.
func Endings(a, b Config) (out []Ending) {
	kept := b.addresses()
	address := func(kind, name string, at, public netip.Addr) {
		if !slices.Contains(kept, at) {
			out = append(out, Ending{Kind: kind, Name: name, Flows: "from " + public.String(), Has: func(t Track) bool {
				// Flows to it from inside are turned back inside, and never leave with it.
				turned := t.LeavesAs == t.Destination && t.Source != at
				return (t.LeavesAs == at || t.Destination == at) && !turned
			}})
			kept = append(kept, at) // reported once
		}
	}
	for _, p := range a.Pools {
		for _, o := range p.Addresses {
			address("pool", p.Name, o.Address, o.Public)
		}
	}
	for _, o := range a.Own {
		address("underlay", b.Underlay, o, o)
	}

	plain := slices.DeleteFunc(slices.Clone(b.Policies), func(p Policy) bool { return p.Action != NoNAT })
	same := make(map[string]bool, len(plain)) // prefixes of those policies; there may be thousands
	for i := range plain {
		same[plain[i].prefixes()] = true
	}
	for _, p := range a.Policies {
		if p.Action != NoNAT || same[p.prefixes()] {
			continue
		}
		// The guard checks the packets of flows from inside, and the answers of those from outside.
		lost := func(from, to netip.Addr) bool {
			return p.between(from, to) && !slices.ContainsFunc(plain, func(q Policy) bool { return q.between(from, to) })
		}
		out = append(out, Ending{Kind: "policy", Name: p.Name, Flows: "without translation", Has: func(t Track) bool {
			return t.LeavesAs == t.Source && (lost(t.Source, t.GoesTo) || lost(t.Destination, t.Source))
		}})
	}
	out = append(out, moved(a, b)...)
	out = append(out, stopped(a, b)...)

	for _, m := range a.Maps {
		i := slices.IndexFunc(b.Maps, func(n Map) bool { return n.Mapped == m.Mapped })
		if i < 0 || b.Maps[i].Inside != m.Inside || !subset(m.Interfaces, b.Maps[i].Interfaces) {
			out = append(out, Ending{Kind: "map", Name: m.Mapped.String(), Flows: "of " + m.Mapped.String(), Has: touches(m.Mapped)})
		}
	}
	for _, n := range b.Maps {
		i := slices.IndexFunc(a.Maps, func(m Map) bool { return n.Mapped == m.Mapped })
		if i < 0 || a.Maps[i].Inside != n.Inside || !subset(n.Interfaces, a.Maps[i].Interfaces) {
			out = append(out, Ending{Kind: "map", Name: n.Mapped.String(), Flows: "of " + n.Inside.String(), Has: touches(n.Inside)})
		}
	}
	return out
}

// Stopper returns a function that returns the policy which ends an established flow, nil if none
// does. The function is nil if no policy of the configuration ends flows.
func (c *Config) Stopper() func(Track) *Policy {
	if !slices.ContainsFunc(c.Policies, func(p Policy) bool { return p.Ends }) {
		return nil
	}
	index := c.Index()
	ends := func(t Track, to netip.Addr, port uint16) *Policy {
		if p := index.Find(Flow{Source: t.Source, Destination: to, Protocol: t.Protocol, Port: port}); p != nil && p.Ends {
			return p
		}
		return nil
	}
	return func(t Track) *Policy {
		if t.LeavesAs == t.Source && t.GoesTo == t.Destination && c.inside(t.GoesTo) {
			return nil // policies do not match flows that stay inside
		}
		if p := ends(t, t.Destination, t.Port); p != nil || t.GoesTo == t.Destination {
			return p
		}
		return ends(t, t.GoesTo, t.ServerPort)
	}
}

// stopped returns the endings of flows that policies of b end and those of a did not.
func stopped(a, b Config) (out []Ending) {
	samePolicies := slices.EqualFunc(a.Policies, b.Policies, func(p, q Policy) bool { return p.Equal(&q) })
	if samePolicies || !slices.ContainsFunc(b.Policies, func(p Policy) bool { return p.Ends }) {
		return nil
	}
	before, after := sync.OnceValue(a.Stopper), sync.OnceValue(b.Stopper)
	for i := range b.Policies {
		p := &b.Policies[i]
		if !p.Ends {
			continue
		}
		name := p.Name
		out = append(out, Ending{Kind: "policy", Name: name, Flows: "that it stops", Has: func(t Track) bool {
			if q := after()(t); q == nil || q.Name != name {
				return false
			}
			had := before()
			return had == nil || had(t) == nil
		}})
	}
	return out
}

// moved returns the endings of flows that a policy of a sent to a server or proxy, and that one of
// b would send to another one. The removal of a policy ends none.
func moved(a, b Config) (out []Ending) {
	sends := func(p Policy) bool { return p.To.IsValid() }
	next := Config{Pools: b.Pools}
	same := map[string]*Policy{}
	for i := range b.Policies {
		if p := &b.Policies[i]; sends(*p) {
			next.Policies = append(next.Policies, *p)
			same[p.Name] = p
		}
	}
	if len(next.Policies) == 0 {
		return nil
	}
	pools := a.pools()
	for i := range a.Policies {
		p := &a.Policies[i]
		if q := same[p.Name]; !sends(*p) || p.Protocol == "tcp" || q != nil && q.To == p.To {
			continue
		}
		pool := pools[p.Pool]
		if pool == nil {
			pool = &Pool{}
		}
		former := Config{Pools: []Pool{*pool}, Policies: []Policy{*p}}
		out = append(out, Ending{Kind: "policy", Name: p.Name, Flows: "to " + server(p.To), Has: func(t Track) bool {
			if !Connectionless(t.Protocol) || t.GoesTo != p.To.Addr() || t.GoesTo == t.Destination {
				return false
			}
			flow, goes := Flow{Source: t.Source, Destination: t.Destination, Protocol: t.Protocol, Port: t.Port}, netip.AddrPortFrom(t.GoesTo, t.ServerPort)
			to := next.Match(flow).To
			return former.Match(flow).To == goes && to.IsValid() && to != goes
		}})
	}
	return out
}

// server returns the server or proxy of a policy, in the form of the document.
func server(to netip.AddrPort) string {
	if to.Port() == 0 {
		return to.Addr().String()
	}
	return to.String()
}

// prefixes returns the sources and destinations in order, as a key.
func (p *Policy) prefixes() string {
	var key []byte
	for _, list := range [][]netip.Prefix{p.Sources, p.Destinations} {
		key = binary.BigEndian.AppendUint32(key, uint32(len(list)))
		for _, o := range list {
			key = append(key, byte(o.Addr().BitLen()), byte(o.Bits()))
			key = append(key, o.Addr().AsSlice()...)
		}
	}
	return string(key)
}

// between reports whether a source and a destination are among the policy's.
func (p *Policy) between(source, destination netip.Addr) bool {
	return slices.ContainsFunc(p.Sources, func(o netip.Prefix) bool { return o.Contains(source) }) &&
		slices.ContainsFunc(p.Destinations, func(o netip.Prefix) bool { return o.Contains(destination) })
}

func subset(a, b []string) bool {
	return !slices.ContainsFunc(a, func(s string) bool { return !slices.Contains(b, s) })
}

// touches returns a function that reports whether a flow comes from a prefix or goes to it.
func touches(p netip.Prefix) func(Track) bool {
	return func(t Track) bool { return p.Contains(t.Source) || p.Contains(t.GoesTo) }
}
