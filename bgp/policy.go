package bgp

import (
	"cmp"
	"net/netip"
	"slices"
)

// defaultLocalPreference is that of paths from external peers.
const defaultLocalPreference = 100

// Route is a path to a prefix as far as policies look at it. That of a prefix of our own has
// nothing but the prefix.
type Route struct {
	Prefix netip.Prefix
	ASPath []uint32
	Kept   bool // see Path
}

// Changes are what a policy does to a path that passes.
type Changes struct {
	LocalPreference uint32  // 0: it stays
	MED             *uint32 // nil: none is set
	// how often our ASN is put before the path, besides the once that every external peer sees
	Prepend     uint8
	NextHopSelf bool
}

// Term is a step of a policy. A path that meets all its conditions ends there: it is refused, or it
// passes with the changes. All that decides on paths is a field here, since both Policy.Decide and
// what a driver makes of a policy go by the fields.
type Term struct {
	OwnAS    bool   // condition: our ASN is in the AS path
	Kept     bool   // condition: the path is kept from external peers
	Prefixes []Rule // condition: one of them matches; nil: any prefix

	Reject bool
	Changes
}

// Policy is a list of terms. A path that meets none of them is refused (RFC 8212).
type Policy []Term

// Decide returns what becomes of a path: whether it passes, and with which changes. asn is our own.
func (p Policy) Decide(asn uint32, r Route) (Changes, bool) {
	c, why := p.decide(asn, r)
	return c, why == ""
}

// decide is Decide with the reason why the path does not pass, as far as it costs nothing: see
// unmatched.
func (p Policy) decide(asn uint32, r Route) (Changes, Reason) {
	for i := range p {
		t := &p[i]
		if t.OwnAS && !slices.Contains(r.ASPath, asn) || t.Kept && !r.Kept || t.Prefixes != nil && !Matches(t.Prefixes, r.Prefix) {
			continue
		}
		switch {
		case !t.Reject:
			return t.Changes, ""
		case t.OwnAS:
			return Changes{}, looped(asn, r)
		case t.Kept:
			return Changes{}, NotExported
		}
		return Changes{}, NotAllowed
	}
	return Changes{}, NotAllowed
}

// Matches reports whether a rule matches the prefix.
func Matches(rules []Rule, p netip.Prefix) bool {
	for i := range rules {
		if rules[i].Match(p) {
			return true
		}
	}
	return false
}

// ImportPolicy returns what the paths of the peer have to pass. asn is our own.
func (p *Peer) ImportPolicy(asn uint32) (terms Policy) {
	if p.AllowOwnAS == 0 {
		terms = append(terms, Term{OwnAS: true, Reject: true})
	}
	c := Changes{LocalPreference: p.Import.LocalPreference}
	if p.ASN != asn { // external peers have no say in it (RFC 4271 section 5.1.5)
		c.LocalPreference = cmp.Or(c.LocalPreference, defaultLocalPreference)
	}
	return terms.allow(p.Import.Allow, c)
}

// ExportPolicy returns what paths have to pass to be announced to the peer. asn is our own.
func (p *Peer) ExportPolicy(asn uint32) (terms Policy) {
	if p.ASN != asn {
		terms = append(terms, Term{Kept: true, Reject: true})
	}
	return terms.allow(p.Export.Allow, Changes{MED: p.Export.MED, Prepend: p.Export.Prepend, NextHopSelf: p.ASN == asn})
}

// allow lets pass what rules match. Without a rule nothing passes.
func (p Policy) allow(rules []Rule, c Changes) Policy {
	if len(rules) == 0 {
		return p
	}
	return append(p, Term{Prefixes: rules, Changes: c})
}

// Decider decides on the paths that a peer sends and receives: by its policies, and by the rules of
// the protocol that a speaker follows whatever its policies are.
type Decider struct {
	Peer           *Peer
	ASN            uint32 // our own
	Import, Export Policy
}

// Decider returns a Decider for the peer. asn is our own.
func (p *Peer) Decider(asn uint32) Decider {
	return Decider{Peer: p, ASN: asn, Import: p.ImportPolicy(asn), Export: p.ExportPolicy(asn)}
}

// Accept decides on a path that the peer brings.
func (d *Decider) Accept(r Route) (Changes, bool) {
	c, why := d.accept(r)
	return c, why == ""
}

// ExplainImport is Accept with the reason why the path is refused; empty: it is accepted.
func (d *Decider) ExplainImport(r Route) (Changes, Reason) {
	c, why := d.accept(r)
	if why == NotAllowed {
		why = d.Import.unmatched(r.Prefix)
	}
	return c, why
}

func (d *Decider) accept(r Route) (Changes, Reason) {
	own := 0
	for _, a := range r.ASPath {
		if a == d.ASN {
			own++
		}
	}
	switch {
	case !d.carries(r.Prefix):
		return Changes{}, OtherFamily
	case own > int(d.Peer.AllowOwnAS): // a loop (RFC 4271 section 9.1.2)
		return Changes{}, looped(d.ASN, r)
	}
	return d.Import.decide(d.ASN, r)
}

// Announce decides on a path that is the best one to its prefix, and that the peer from brings;
// nil: the prefix is our own, or the peer is not known any more.
func (d *Decider) Announce(from *Peer, r Route) (Changes, bool) {
	c, why := d.announce(from, r)
	return c, why == ""
}

// ExplainExport returns the reason why Announce refuses the path; empty: it does not.
func (d *Decider) ExplainExport(from *Peer, r Route) Reason {
	_, why := d.announce(from, r)
	if why == NotAllowed {
		why = d.Export.unmatched(r.Prefix)
	}
	return why
}

func (d *Decider) announce(from *Peer, r Route) (Changes, Reason) {
	switch {
	case !d.carries(r.Prefix):
		return Changes{}, OtherFamily
	case from != nil && from.Name == d.Peer.Name:
		return Changes{}, FromThere
	case from != nil && from.ASN == d.ASN && d.Peer.ASN == d.ASN:
		// internal peers tell each other themselves (RFC 4271 section 9.2)
		return Changes{}, BetweenInternal
	case !d.Peer.ASOverride && slices.Contains(r.ASPath, d.Peer.ASN):
		// the peer would refuse the loop
		return Changes{}, PeerLoop
	}
	return d.Export.decide(d.ASN, r)
}

// carries reports whether the session carries the prefix's address family, if the peer offers it.
func (d *Decider) carries(p netip.Prefix) bool { return d.Peer.Carries(p.Addr().Is4()) }

// Carries reports whether the session carries IPv4, or IPv6, if the peer offers it.
func (p *Peer) Carries(v4 bool) bool { return p.OtherLocal.IsValid() || p.Address.Is4() == v4 }
