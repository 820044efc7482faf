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

// Stray is a tunnel that is not in the document, but that a gateway has or tries to establish, or
// an unknown address that tries to connect.
type Stray struct {
	Address     netip.Addr // the address that tries to connect; zero: none has
	First, Last time.Time  // times of its attempts
	Attempts    uint64
	Code        string // that of a cloud.Pairing, "moved-peer" or "unknown-caller"
	ByDesign    bool   // it can never come up with this document, and the reason is known
	Cloud       string
	Beside      string // the tunnel of the document that it belongs to
	Why, Remedy string
	Source      string
}

// links returns the document's tunnels to clouds.
func (d Document) links() (out []cloud.Link) {
	for _, t := range d.Tunnels {
		if t.IPsec != nil && t.Cloud != "" {
			out = append(out, cloud.Link{Name: t.Name, Cloud: t.Cloud, Remote: t.IPsec.RemoteAddress, PSK: t.IPsec.PSK.Name, ASN: t.ASN, RespondOnly: t.IPsec.RespondOnly})
		}
	}
	return out
}

// Notes returns the tunnels that by design cannot come up with this document, or that are missing
// from it.
func (d Document) Notes() []cloud.Pairing { return cloud.Unpaired(d.links()) }

// Dead reports whether tunnel i can never come up in its present state.
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

// Strays returns an explanation for each caller, in the order of the callers, and then the tunnels
// that gateways have in addition to the document's although they have not called. states are the
// tunnels' states by name.
func (d Document) Strays(states map[string]tunnel.State, callers []tunnel.Caller) (out []Stray) {
	var missing []cloud.Pairing
	for _, p := range d.Notes() {
		if !p.Own {
			missing = append(missing, p)
		}
	}
	called := map[string]bool{}
	for _, c := range callers {
		if d.disabled(c.Address) {
			continue // it calls because it does not know that
		}
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

// disabled reports whether an address is that of the peer of a disabled tunnel.
func (d Document) disabled(a netip.Addr) bool {
	return slices.ContainsFunc(d.Tunnels, func(t Tunnel) bool { return t.Disabled && t.Outside().Addr() == a })
}

// stray explains a calling address.
func (d Document) stray(states map[string]tunnel.State, missing []cloud.Pairing) Stray {
	// A peer in the document that is silent may have another address now. One that is up has not.
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
			Why:    "most likely the other half of one of " + strings.Join(names, ", ") + "; the document has only one tunnel for each",
			Remedy: "find the address in those clouds' consoles, and add a tunnel to it"}
	case len(silent) > 0:
		return Stray{Code: "moved-peer",
			Why:    "possibly a peer of the document with a new address: no packets come from the address in " + strings.Join(silent, ", "),
			Remedy: "if it is, set that field to this address"}
	}
	return Stray{Code: "unknown-caller",
		Why:    "the document has no tunnel for this address, and none is known to be missing: the caller is a gateway that was configured with this node's address, or a scanner",
		Remedy: "add a tunnel with this ipsec.remoteAddress if you know it; until then the node only answers with a refusal"}
}
