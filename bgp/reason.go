package bgp

import (
	"fmt"
	"net/netip"
	"strings"
)

// Reason says why a path is not accepted, not used or not announced, for programs. Its values do
// not change.
type Reason string

// Reasons why the path of a peer is refused.
const (
	OtherFamily  Reason = "family"        // the session carries the other address family
	Loop         Reason = "as-loop"       // our ASN is in the AS path too often
	OwnOrigin    Reason = "own-origin"    // the same, and our AS is where the path begins
	NoRules      Reason = "no-rules"      // import.allow is empty
	NotAllowed   Reason = "not-allowed"   // no rule contains the prefix
	LessSpecific Reason = "less-specific" // a rule contains it, and allows only longer prefixes
	MoreSpecific Reason = "more-specific" // a rule contains it, and allows only shorter prefixes
	NotExported  Reason = "kept"          // NO_EXPORT or NO_ADVERTISE
)

// Reasons why the best path to a prefix is not announced to a peer, besides OtherFamily and those
// of rules.
const (
	FromThere       Reason = "from-there"     // the peer itself brings it
	BetweenInternal Reason = "internal-peers" // an internal peer brings it, and this one is too
	PeerLoop        Reason = "peer-as"        // the peer's ASN is in the AS path, not overridden
	NoSession       Reason = "no-session"
)

// HeldBack is the reason why a prefix that the export policy allows is not announced:
// Export.MaxPrefixes others come before it.
const HeldBack Reason = "export-limit"

// Reasons why an accepted path is not used. The path is compared with the best one of its prefix in
// this order (RFC 4271 section 9.1.2.2, with the changes of GoBGP).
const (
	ByLocalPreference Reason = "local-pref"
	ByOwn             Reason = "own"
	ByASPath          Reason = "as-path"
	ByOrigin          Reason = "origin"
	ByMED             Reason = "med"
	ByInternal        Reason = "internal"
	ByAge             Reason = "newer" // external paths only (RFC 5004)
	ByRouterID        Reason = "router-id"
	ByAddress         Reason = "address"
	// Changing means that the tables changed while they were read.
	Changing Reason = "changing"
)

// looped returns the reason to refuse a path with our ASN in it.
func looped(asn uint32, r Route) Reason {
	if n := len(r.ASPath); n > 0 && r.ASPath[n-1] == asn {
		return OwnOrigin
	}
	return Loop
}

// nearest returns the rule with the longest prefix that contains p, whatever lengths it allows.
func nearest(rules []Rule, p netip.Prefix) (near Rule, found bool) {
	for _, r := range rules {
		if r.Prefix.Bits() <= p.Bits() && r.Prefix.Contains(p.Addr()) && (!found || r.Prefix.Bits() > near.Prefix.Bits()) {
			near, found = r, true
		}
	}
	return near, found
}

// rules returns the rules of all terms that let paths pass.
func (p Policy) rules() (all []Rule) {
	for i := range p {
		if !p[i].Reject {
			all = append(all, p[i].Prefixes...)
		}
	}
	return all
}

// unmatched returns the reason to refuse a prefix that meets no term.
func (p Policy) unmatched(prefix netip.Prefix) Reason {
	rules := p.rules()
	near, found := nearest(rules, prefix)
	switch {
	case len(rules) == 0:
		return NoRules
	case !found:
		return NotAllowed
	case prefix.Bits() < int(near.Min):
		return LessSpecific
	}
	return MoreSpecific
}

// maxShown is how many rules a text names.
const maxShown = 4

// ImportText returns the reason of ExplainImport in words.
func (d *Decider) ImportText(r Route, why Reason) string {
	switch why {
	case "":
		return ""
	case Loop:
		return fmt.Sprintf("loop: AS %d of this node is in the AS path, and allowOwnAs is %d", d.ASN, d.Peer.AllowOwnAS)
	case OwnOrigin:
		return fmt.Sprintf("loop: the path begins in AS %d, that of this node, and allowOwnAs is %d", d.ASN, d.Peer.AllowOwnAS)
	case NoRules:
		return "import.allow is empty, so that nothing is accepted"
	}
	return d.text(d.Import, "import.allow", r, why)
}

// ExportText returns the reason of ExplainExport in words.
func (d *Decider) ExportText(r Route, why Reason) string {
	switch why {
	case "":
		return ""
	case FromThere:
		return "the peer itself brings the best path"
	case BetweenInternal:
		return "an internal peer brings it, and internal peers tell each other themselves"
	case PeerLoop:
		return fmt.Sprintf("AS %d of the peer is in the AS path, so that it would refuse the loop; asOverride replaces it", d.Peer.ASN)
	case NoSession:
		return "the session is not established"
	case HeldBack:
		return fmt.Sprintf("held back: export.maxPrefixes is %d; put aggregates into announce, or raise it to what the peer takes", d.Peer.Export.MaxPrefixes)
	case NoRules:
		return "export.allow is empty, so that nothing is announced"
	}
	return d.text(d.Export, "export.allow", r, why)
}

// text returns a reason that a policy, or both directions of a session, can have.
func (d *Decider) text(policy Policy, field string, r Route, why Reason) string {
	rules := policy.rules()
	near, _ := nearest(rules, r.Prefix)
	switch why {
	case OtherFamily:
		family := "IPv6"
		if d.Peer.Address.Is4() {
			family = "IPv4"
		}
		return fmt.Sprintf("the session carries only %s, the family of its addresses", family)
	case NotAllowed:
		words := make([]string, 0, maxShown+1)
		for _, rule := range rules[:min(len(rules), maxShown)] {
			words = append(words, rule.String())
		}
		if more := len(rules) - maxShown; more > 0 {
			words = append(words, fmt.Sprintf("and %d more", more))
		}
		return fmt.Sprintf("no rule of %s contains it: %s", field, strings.Join(words, ", "))
	case LessSpecific:
		return fmt.Sprintf("too short for the rule %q of %s: a prefix must have at least /%d", near, field, near.Min)
	case MoreSpecific:
		return fmt.Sprintf("too long for the rule %q of %s: a prefix may have at most /%d", near, field, near.Max)
	case NotExported:
		return "its communities keep it from external peers (NO_EXPORT or NO_ADVERTISE, RFC 1997)"
	}
	return string(why)
}

// origins are the words for ORIGIN (RFC 4271 section 4.3).
var origins = []string{"IGP", "EGP", "INCOMPLETE"}

// OriginName returns the word for a value of ORIGIN.
func OriginName(o uint8) string {
	if int(o) < len(origins) {
		return origins[o]
	}
	return fmt.Sprint(o)
}

// lossText says in words why a path loses against the best one.
func lossText(why Reason, best, p *Attributes) string {
	by := "the path of peer " + best.Peer
	if best.Peer == "" {
		by = "this node's own path"
	}
	switch why {
	case ByLocalPreference:
		return fmt.Sprintf("LOCAL_PREF %d is lower than %d of %s", p.preference(), best.preference(), by)
	case ByOwn:
		return "this node announces the prefix itself"
	case ByASPath:
		return fmt.Sprintf("the AS path has length %d, and %s has %d", p.ASLength, by, best.ASLength)
	case ByOrigin:
		return fmt.Sprintf("ORIGIN %s is worse than %s of %s", OriginName(p.Origin), OriginName(best.Origin), by)
	case ByMED:
		return fmt.Sprintf("MED %d is higher than %d of %s", p.med(), best.med(), by)
	case ByInternal:
		return fmt.Sprintf("the peer is internal, and %s is external", by)
	case ByAge:
		return fmt.Sprintf("%s came first; %s", by, apart(best, p))
	case ByRouterID:
		return fmt.Sprintf("router ID %v is higher than %v of %s; %s", p.RouterID, best.RouterID, by, apart(best, p))
	case ByAddress:
		return fmt.Sprintf("the peer's address %v is higher than %v of %s; %s", p.Address, best.Address, by, apart(best, p))
	}
	return changingText
}

// apart says why two paths that only a last criterion distinguishes are not used together.
func apart(best, p *Attributes) string {
	return fmt.Sprintf("they are not used together, since MED is %d and %d, which is not compared between different neighbouring ASes", p.med(), best.med())
}

const changingText = "the tables changed while they were read; ask again"
