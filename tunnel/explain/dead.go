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

// Stray is a tunnel that is not in the document: one that a gateway has or tries to make all the same, or the calls of
// somebody unknown.
type Stray struct {
	Address     netip.Addr // that calls; zero: none does, or none has called yet
	First, Last time.Time  // of its calls
	Attempts    uint64
	Code        string // of cloud.Pairing, "moved-peer" or "unknown-caller"
	ByDesign    bool   // it never comes up with this document, and it is known why
	Cloud       string
	Beside      string // tunnel of the document that it belongs to
	Why, Remedy string
	Source      string
}

// links are the document's tunnels to clouds.
func (d Document) links() (out []cloud.Link) {
	for _, t := range d.Tunnels {
		if t.IPsec != nil && t.Cloud != "" {
			out = append(out, cloud.Link{Name: t.Name, Cloud: t.Cloud, Remote: t.IPsec.RemoteAddress, PSK: t.IPsec.PSK.Name, ASN: t.ASN, RespondOnly: t.IPsec.RespondOnly})
		}
	}
	return out
}

// Notes returns what of the document's tunnels cannot come up, or is left out of it, by design.
func (d Document) Notes() []cloud.Pairing { return cloud.Unpaired(d.links()) }

// Dead tells whether tunnel i can come up in its present state at all.
func (d Document) Dead(i int, s tunnel.State) (cloud.Pairing, bool) {
	if s.Failure.Reason != tunnel.Waiting || !s.Heard.IsZero() {
		return cloud.Pairing{}, false
	}
	for _, p := range d.Notes() {
		if p.Own && p.Beside == d.Tunnels[i].Name {
			return p, true
		}
	}
	return cloud.Pairing{}, false
}

// Strays says of each caller what it is, in the order of the callers, and then what gateways have beside the document's
// tunnels although it has not called. states are the tunnels' by name.
func (d Document) Strays(states map[string]tunnel.State, callers []tunnel.Caller) (out []Stray) {
	var missing []cloud.Pairing
	for _, p := range d.Notes() {
		if !p.Own {
			missing = append(missing, p)
		}
	}
	called := map[string]bool{}
	for _, c := range callers {
		s := d.stray(states, missing)
		s.Address, s.First, s.Last, s.Attempts = c.Address, c.First, c.Last, c.Attempts
		called[s.Beside] = s.ByDesign
		out = append(out, s)
	}
	for _, p := range missing {
		if p.Sure && !called[p.Beside] {
			out = append(out, Stray{Code: p.Code, ByDesign: true, Cloud: p.Cloud, Beside: p.Beside, Why: p.Why, Remedy: p.Remedy, Source: p.Source})
		}
	}
	return out
}

// stray says what an address may be that calls.
func (d Document) stray(states map[string]tunnel.State, missing []cloud.Pairing) Stray {
	// A gateway that is in the document and silent may have moved. One that is up has not.
	var silent []string
	for i, t := range d.Tunnels {
		s, seen := states[t.Name]
		if t.IPsec != nil && t.IPsec.RemoteAddress.IsValid() && seen && s.Heard.IsZero() &&
			slices.Contains([]tunnel.Reason{tunnel.NoAnswer, tunnel.PeerLost, tunnel.Waiting}, s.Failure.Reason) {
			silent = append(silent, fmt.Sprintf("tunnels[%d].ipsec.remoteAddress (%s)", i, t.Name))
		}
	}
	switch {
	case len(missing) == 1:
		p := missing[0]
		return Stray{Code: p.Code, ByDesign: true, Cloud: p.Cloud, Beside: p.Beside, Source: p.Source,
			Why:    "most likely the other half of " + p.Beside + ": " + p.Why,
			Remedy: p.Remedy}
	case len(missing) > 1:
		var names []string
		for _, p := range missing {
			names = append(names, p.Beside+" ("+p.Cloud+")")
		}
		return Stray{Code: "unpaired", ByDesign: true,
			Why:    "most likely the other half of one of " + strings.Join(names, ", ") + ", of which the document has one tunnel each",
			Remedy: "find the address in those clouds' consoles, and add a tunnel to it"}
	case len(silent) > 0:
		return Stray{Code: "moved-peer",
			Why:    "perhaps a peer of the document with another address: nothing comes from that of " + strings.Join(silent, ", "),
			Remedy: "if it is, set that field to this address"}
	}
	return Stray{Code: "unknown-caller",
		Why:    "no tunnel of the document is for this address, and none is known to be missing: a gateway that was given this node's address, or a scanner",
		Remedy: "add a tunnel with this ipsec.remoteAddress if you know it; nothing is answered but a refusal"}
}
