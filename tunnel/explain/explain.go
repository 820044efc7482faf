// Package explain explains to users why a tunnel is not up, and which line of the document to
// change. It is pure: its sources are the document, the driver's observations, and the data of
// tunnel/cloud about the gateway at the other end.
package explain

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

// Document is the configuration with which observations are compared.
type Document struct {
	Tunnels []Tunnel   // in the order of the document
	Public  netip.Addr // the address of this node on the Internet
}

// Tunnel is one tunnel of a document.
type Tunnel struct {
	tunnel.Config
	Cloud string // name of a preset of tunnel/cloud; empty: none
	ASN   uint32 // ASN of a BGP peer in the tunnel; 0: none
}

// Explanation is the answer to the question why a tunnel is not up.
type Explanation struct {
	Reason tunnel.Reason
	Since  time.Time
	What   string // what happened
	Cause  string // the most likely cause
	Remedy string // what to do on this node
	There  string // what to check on the peer's side, with a cloud in that cloud's terms
	// Field is the field of the document to change, such as "tunnels[2].ipsec.psk"; empty: the
	// document is not the cause.
	Field string
	Value string // value to set there; empty: unknown
}

// Tunnel explains the state of tunnel i. It returns false when there is nothing to explain.
func (d Document) Tunnel(i int, s tunnel.State) (Explanation, bool) {
	t := d.Tunnels[i]
	if s.Failure.Reason == "" {
		return Explanation{}, false
	}
	preset, _ := cloud.Lookup(t.Cloud)
	e := explainer{d: d, t: t, s: s, i: i, cloud: preset}
	e.out.Reason, e.out.Since = s.Failure.Reason, s.Failure.Since
	switch {
	case s.Failure.Reason == tunnel.NoData || s.Failure.Reason == tunnel.OneWay:
		e.silent()
	case t.WireGuard != nil:
		e.wireguard()
	case t.IPsec != nil:
		e.explain()
	default:
		return Explanation{}, false
	}
	return e.out, true
}

type explainer struct {
	d     Document
	t     Tunnel
	i     int
	s     tunnel.State
	cloud cloud.Preset
	out   Explanation
}

func (e *explainer) field(name string) { e.out.Field = fmt.Sprintf("tunnels[%d].%s", e.i, name) }

// there adds something to check on the peer's side.
func (e *explainer) there(format string, args ...any) {
	if e.out.There != "" {
		e.out.There += "; "
	}
	e.out.There += fmt.Sprintf(format, args...)
}

// at returns where a value is set in the cloud's console, or its plain name for a peer without a
// preset.
func (e *explainer) at(v cloud.Value[string], plain string) string {
	if v.Is == "" {
		return plain + " at the peer"
	}
	return e.cloud.Name + ": " + v.Is
}

func (e *explainer) explain() {
	c, ev := e.t.IPsec, e.s.Evidence
	peer := c.RemoteAddress.String()
	switch e.s.Failure.Reason {
	case tunnel.NoAnswer, tunnel.PeerLost, tunnel.NoAnswerAuth:
		e.silence(peer)
	case tunnel.Waiting:
		e.out.What = peer + " has not called, and this node is configured to wait for it (respondOnly)"
		e.arrived()
		e.out.Cause = "the peer does not open tunnels by itself"
		if v := e.cloud.Calls; v.Is != "" {
			e.out.Cause = fmt.Sprintf("%s opens the tunnel %s", e.cloud.Name, v.Is)
		}
		e.out.Remedy = "let this node open it"
		e.field("ipsec.respondOnly")
		e.out.Value = "false"
	case tunnel.IKERefused, tunnel.IKEUnacceptable:
		e.proposals("IKE", "ipsec.ikeProposals", c.IKEProposals, ev.IKEOffer, e.cloud.IKEProposals.Is)
		if e.s.Failure.Reason == tunnel.IKERefused && ev.IKEOffer == "" {
			e.out.Cause += ", or it has no connection for this node's address " + e.d.Public.String()
			e.there("%s must be %s", e.at(e.cloud.AddressAt, "the address of this node"), e.d.Public)
		}
	case tunnel.ESPRefused, tunnel.ESPUnacceptable:
		e.proposals("ESP", "ipsec.espProposals", c.ESPProposals, ev.ESPOffer, e.cloud.ESPProposals.Is)
	case tunnel.RekeyRefused:
		e.rekey()
	case tunnel.IKEVersion:
		e.out.What = peer + " calls with IKEv1; this node supports IKEv2 only"
		e.out.Cause = "the version at the peer"
		e.out.Remedy = "nothing here"
		e.there("set the IKE version to 2")
	case tunnel.Certificate:
		e.out.What = peer + " authenticates with a certificate; this node has pre-shared keys only"
		e.out.Cause = "the authentication method at the peer"
		e.out.Remedy = "nothing here"
		e.there("set the authentication of both sides to a pre-shared key; %s must be that of secret %s", e.at(e.cloud.KeyAt, "the pre-shared key"), c.PSK.Name)
	case tunnel.AuthRefused, tunnel.KeyDiffers, tunnel.Identity:
		e.authentication(peer)
	case tunnel.TSRefused, tunnel.TSUnacceptable, tunnel.TSNarrowed:
		e.selectors(peer)
	case tunnel.ClosedByPeer:
		e.out.What = e.s.LastError
		e.out.Cause = "an operator or a program ended it there: a restart, maintenance, a changed setting, or a second tunnel that replaced this one"
		e.out.Remedy = "wait: this node opens it again"
		if c.RespondOnly {
			e.out.Remedy = "let this node open it again"
			e.field("ipsec.respondOnly")
			e.out.Value = "false"
		}
	default:
		e.out.What = e.s.LastError
		e.out.Cause = "see the log of charon (journalctl -u strongswan)"
	}
}

// arrived adds whether the peer's address has sent any packet.
func (e *explainer) arrived() {
	switch {
	case !e.s.Heard.IsZero():
		e.out.What += "; the last IKE packet from that address came at " + clock(e.s.Heard)
	case !e.s.Listening.IsZero():
		e.out.What += "; no IKE packet at all has come from that address since " + clock(e.s.Listening)
	}
}

func clock(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func (e *explainer) silence(peer string) {
	public := e.d.Public
	e.field("ipsec.remoteAddress")
	switch heard := !e.s.Heard.IsZero(); {
	case e.s.Failure.Reason == tunnel.NoAnswerAuth:
		e.out.What = peer + " answers IKE_SA_INIT and does not answer IKE_AUTH"
		e.arrived()
		e.out.Cause = "IKE_AUTH goes to UDP port 4500 when there is a NAT in between, and that port is filtered; or it is larger than the path MTU and its IP fragments are dropped; or the peer does not answer a wrong identity or key"
		e.out.Remedy = "let UDP port 4500 pass in both directions (security group, network security group, firewall rule); a path that drops fragments needs a smaller MTU on the underlay interface"
		e.out.Field = ""
	case e.s.Failure.Reason == tunnel.PeerLost:
		e.out.What = peer + " stopped answering on a tunnel that was up"
		e.arrived()
		e.out.Cause = "the peer or the path to it is down"
		e.out.Remedy = "nothing here, unless the peer has moved to another address"
	case heard && e.s.Evidence.HalfOpen:
		e.out.What = peer + " does not answer IKE_SA_INIT; it calls this node itself, gets an answer, and does not continue"
		e.arrived()
		e.out.Cause = "this node's packets do not reach the peer: UDP ports 500 and 4500 are filtered on the path"
		e.out.Remedy = "let UDP ports 500 and 4500 leave this node and reach the peer"
		e.out.Field = ""
	case heard:
		e.out.What = peer + " does not answer IKE_SA_INIT, although it sends to this node"
		e.arrived()
		e.out.Cause = fmt.Sprintf("the path from the peer is open; this node's packets are filtered on the path to it, or the peer does not accept %s as its peer", public)
		e.out.Remedy = "let UDP ports 500 and 4500 leave this node and reach the peer"
		e.out.Field = ""
	default:
		e.out.What = peer + " does not answer IKE_SA_INIT"
		e.arrived()
		e.out.Cause = fmt.Sprintf("UDP port 500 is filtered here or there, %s is not the peer's address, or the peer has no connection for %s and keeps silent", peer, public)
		e.out.Remedy = "compare the address with the peer's, and let UDP ports 500 and 4500 pass in both directions"
		if v := e.cloud.Calls; v.Is != "" {
			e.out.Cause += fmt.Sprintf("; it need not call by itself: %s opens the tunnel %s", e.cloud.Name, v.Is)
		}
	}
	e.there("%s must be %s", e.at(e.cloud.AddressAt, "the address of this node"), public)
}

// proposals explains that the two sides have no common proposal.
func (e *explainer) proposals(kind, field string, ours []string, offer string, preset []string) {
	e.field(field)
	e.out.What = fmt.Sprintf("the peer accepted none of our %s proposals %s (NO_PROPOSAL_CHOSEN)", kind, strings.Join(ours, ", "))
	if r := e.s.Failure.Reason; r == tunnel.IKEUnacceptable || r == tunnel.ESPUnacceptable {
		e.out.What = fmt.Sprintf("the peer proposed none of our %s proposals %s", kind, strings.Join(ours, ", "))
	}
	wants, ok := notation(offer)
	switch classical := classicalOnly(ours); {
	case offer == "" && len(classical) > 0 && !slices.Equal(classical, ours):
		e.out.Cause = "the peer has other algorithms, or does not support the additional key exchanges of all our proposals (RFC 9370)"
		e.out.Remedy, e.out.Value = "leave the additional key exchanges out, or set them at the peer", list(classical)
	case offer == "":
		e.out.Cause = "the peer has other algorithms; it does not say which, and has not called by itself since"
		e.out.Remedy = "set the peer's algorithms"
		if len(preset) > 0 && !slices.Equal(ours, preset) {
			e.out.Remedy = "set the peer's algorithms, or omit the field to use the ones recommended for " + e.cloud.Name
			e.out.Value = list(preset)
		}
	case !ok:
		e.out.What += "; its last offer was " + offer
		e.out.Cause = "the peer wants algorithms that this node does not support"
		e.out.Remedy = "set both sides to the same"
	default:
		e.out.What += "; its last offer was " + offer
		e.out.Cause = "the peer wants " + wants
		e.out.Remedy, e.out.Value = "set the algorithms that the peer wants", list([]string{wants})
		if additional(wants) {
			e.out.Cause += ", with an additional key exchange (RFC 9370), such as a post-quantum one"
			e.out.Remedy += "; charon must be 6.0 or later and have them, so make them optional at the peer otherwise"
		}
		if weak(wants) {
			e.out.Remedy = "set the algorithms that the peer wants, which are weak; it is better to set the peer to " + strings.Join(ours, " or ")
		}
	}
	e.there("%s must include %s", e.at(e.cloud.PolicyAt, kind+" algorithms"), strings.Join(ours, " or "))
}

func list(proposals []string) string { return "[" + strings.Join(proposals, ", ") + "]" }

// rekey explains why a CHILD SA that is up cannot be renewed. Its first keys come from IKE_AUTH,
// which negotiates no group (RFC 7296, section 1.2), so that a difference shows only at the first
// rekeying.
func (e *explainer) rekey() {
	ours := e.t.IPsec.ESPProposals
	e.field("ipsec.espProposals")
	e.out.What = fmt.Sprintf("the tunnel is up, but its keys cannot be renewed with %s (NO_PROPOSAL_CHOSEN): it goes down when they expire", strings.Join(ours, ", "))
	wants, ok := notation(e.s.Evidence.ESPOffer)
	own := group(ours)
	switch {
	case ok && group([]string{wants}) == "" && own != "":
		e.out.Cause = "the peer has no perfect forward secrecy; its last offer was " + wants
		e.out.Remedy, e.out.Value = "leave the group out", list([]string{wants})
	case ok:
		e.out.Cause = "the peer renews with " + wants
		e.out.Remedy, e.out.Value = "set the algorithms that the peer wants", list([]string{wants})
	case own == "":
		e.out.Cause = "the peer wants perfect forward secrecy, that is a group; it has not said which"
		e.out.Remedy = "add the peer's group to the proposals"
		if p := e.cloud.ESPProposals.Is; group(p) != "" {
			e.out.Value = list(p)
		}
	default:
		e.out.Cause = "the peer has no perfect forward secrecy, or another group than " + own
		e.out.Remedy = "set the peer's group, or none when it has none"
		var without []string
		for _, p := range ours {
			without = append(without, ungrouped(p))
		}
		e.out.Value = list(without)
	}
	if own != "" {
		e.there("%s: the PFS group must be %s", e.at(e.cloud.PolicyAt, "ESP algorithms"), own)
	} else {
		e.there("%s: PFS must be off", e.at(e.cloud.PolicyAt, "ESP algorithms"))
	}
}

func (e *explainer) authentication(peer string) {
	c, ev := e.t.IPsec, e.s.Evidence
	other := ev.Identity != "" && ev.Identity != c.RemoteIdentity
	calls := ev.CalledUs != "" && ev.CalledUs != c.LocalIdentity
	switch {
	case e.s.Failure.Reason == tunnel.KeyDiffers || ev.OtherKey && e.s.Failure.Reason != tunnel.Identity:
		e.out.What = peer + " proved to have another pre-shared key (the signatures differ)"
		e.out.Cause = "the stored secret " + c.PSK.Name + " is not the peer's key: it is that of another tunnel, a former one, or ends with a space or newline"
		e.newKey()
	case other:
		e.out.What = fmt.Sprintf("%s calls itself %s; %s is expected", peer, ev.Identity, c.RemoteIdentity)
		e.out.Cause = "the peer has that identity"
		if a, err := netip.ParseAddr(ev.Identity); err == nil && a.IsPrivate() {
			e.out.Cause = "the peer is behind a NAT and presents its private address"
		}
		e.out.Remedy, e.out.Value = "set the identity that the peer presents, if it is the right peer", ev.Identity
		e.field("ipsec.remoteIdentity")
		if calls {
			e.there("it calls this node %s, which calls itself %s", ev.CalledUs, c.LocalIdentity)
		}
	case calls:
		e.out.What = fmt.Sprintf("%s asked for %s; this node calls itself %s", peer, ev.CalledUs, c.LocalIdentity)
		e.out.Cause = "the peer is set to another identity of this node"
		e.out.Remedy, e.out.Value = "set the identity that the peer expects", ev.CalledUs
		e.field("ipsec.localIdentity")
		e.there("%s must be %s", e.at(e.cloud.AddressAt, "the remote identity"), c.LocalIdentity)
	case e.s.Failure.Reason == tunnel.Identity:
		e.out.What = fmt.Sprintf("%s presented another identity than %s", peer, c.RemoteIdentity)
		e.out.Cause = "the peer has another identity"
		e.out.Remedy = "set the identity that the peer presents"
		e.field("ipsec.remoteIdentity")
	default:
		e.out.What = peer + " refused this node's authentication (AUTHENTICATION_FAILED), and does not say why"
		e.out.Cause = fmt.Sprintf("most often another pre-shared key than secret %s; otherwise the peer does not expect this node as %s", c.PSK.Name, c.LocalIdentity)
		e.newKey()
		if a, err := netip.ParseAddr(c.LocalIdentity); err != nil || a != e.d.Public {
			e.out.Remedy += fmt.Sprintf("; or set ipsec.localIdentity to %s, the public address", e.d.Public)
		}
		e.there("%s must be %s", e.at(e.cloud.AddressAt, "the remote identity"), c.LocalIdentity)
	}
}

func (e *explainer) newKey() {
	name := e.t.IPsec.PSK.Name
	e.field("ipsec.psk")
	e.out.Remedy = fmt.Sprintf("store the peer's key again: isthmus secret set %s", name)
	e.there("%s must be that of secret %s", e.at(e.cloud.KeyAt, "the pre-shared key"), name)
}

func (e *explainer) selectors(peer string) {
	four, six := false, false
	for _, in := range e.t.Inside {
		four, six = four || in.Local.Addr().Is4(), six || in.Local.Addr().Is6()
	}
	ours := "0.0.0.0/0"
	switch {
	case four && six:
		ours = "0.0.0.0/0 and ::/0"
	case six:
		ours = "::/0"
	}
	e.out.What = fmt.Sprintf("%s refused our traffic selectors %s (TS_UNACCEPTABLE)", peer, ours)
	e.out.Cause = "the peer is policy-based, or configured for certain networks"
	if e.s.Evidence.Selectors != "" {
		e.out.What = fmt.Sprintf("%s has the traffic selectors %s; ours are %s", peer, e.s.Evidence.Selectors, ours)
	}
	if e.s.Failure.Reason == tunnel.TSNarrowed {
		e.out.What += ": the tunnel is up, and the rest is dropped"
	}
	e.out.Remedy = "nothing here: routes decide what enters the tunnel"
	if four && six {
		e.out.Cause += ", or to one address family"
		e.out.Remedy = "remove the inside addresses of the family that the peer does not have: the selectors follow them"
		e.field("inside")
	}
	switch e.cloud.Name {
	case "aws":
		e.there("aws: local and remote IPv4 network CIDR of the VPN connection must be 0.0.0.0/0")
	case "azure", "azure-vwan":
		e.there("%s: policy based traffic selectors of the connection must be disabled", e.cloud.Name)
	case "gcp":
		e.there("gcp: the VPN tunnel must be created with a Cloud Router, without traffic selectors")
	default:
		e.there("make the peer route-based, or set its selectors to %s", ours)
	}
}
