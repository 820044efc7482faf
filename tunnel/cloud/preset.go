// Package cloud describes what each cloud's own VPN gateway needs: the defaults of isthmus, and the
// values that the gateway accepts. It is data; every value has its reason and its source.
package cloud

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/tunnel/apipa"
)

// Value is one fact. A Value without a Why is not set.
type Value[T any] struct {
	Is     T
	Why    string
	Source string
}

// Preset describes one cloud's gateway.
type Preset struct {
	Name  string // the value of the field `cloud`
	Title string

	// Defaults that the document can override.
	IKEProposals    Value[[]string]
	ESPProposals    Value[[]string]
	IKERekey        Value[time.Duration]
	ChildRekey      Value[time.Duration]
	ChildRekeyBytes Value[uint64]
	DPDDelay        Value[time.Duration]
	ReplayWindow    Value[uint32]
	MTU             Value[int]
	MSS             Value[uint16]
	HoldTime        Value[time.Duration]
	Keepalive       Value[time.Duration]
	TTL             Value[uint8]
	Passive         Value[bool]
	MaxPrefixes     Value[uint32]
	ExportLimit     Value[uint32] // limit of the prefixes announced to it

	// Values that the gateway accepts.
	IKE             Value[Algorithms]
	ESP             Value[Algorithms]
	IKELifetime     Value[time.Duration] // its longest lifetime of an IKE SA
	ChildLifetime   Value[time.Duration] // its longest lifetime of a CHILD SA
	MaxMTU          Value[int]
	FixedHoldTime   Value[time.Duration] // the only hold time
	NeverOpensBGP   Value[bool]          // from link-local addresses
	Silent          Value[bool]          // does not answer echo requests at its inside address
	AddressIdentity Value[bool]          // identities must be addresses
	MostAnnounced   Value[uint32]        // prefixes that it accepts in one session
	Inside          Value[apipa.Rule]
	RouterASN       Value[ASNs] // ASNs that this node must not have
	GatewayASN      Value[ASNs] // ASNs that the gateway may have

	// Places of the settings that both sides must agree on, in the cloud's terms.
	AddressAt Value[string] // this node's outside address and identity
	KeyAt     Value[string]
	PolicyAt  Value[string] // algorithms
	Calls     Value[string] // whether the gateway initiates the IKE SA

	// Advice for the cloud's side.
	Advice []Value[string]
}

var presets = []Preset{aws(), azure(), azureVWAN(), gcp(), oci()}

// Presets returns the presets, sorted by name. The caller must not change the data behind them.
func Presets() []Preset { return slices.Clone(presets) }

// Names returns the valid values of the field `cloud`.
func Names() []string {
	var names []string
	for i := range presets {
		names = append(names, presets[i].Name)
	}
	return names
}

// Lookup returns the preset of a name. The caller must not change the data behind it.
func Lookup(name string) (Preset, bool) {
	for i := range presets {
		if presets[i].Name == name {
			return presets[i], true
		}
	}
	return Preset{}, false
}

// ASNRange is a range of autonomous system numbers, both ends included.
type ASNRange struct{ First, Last uint32 }

// ASNs is a set of autonomous system numbers.
type ASNs []ASNRange

// Has reports whether n is in the set.
func (s ASNs) Has(n uint32) bool {
	return slices.ContainsFunc(s, func(r ASNRange) bool { return r.First <= n && n <= r.Last })
}

// String lists the numbers and ranges.
func (s ASNs) String() string {
	var out []string
	for _, r := range s {
		if r.First == r.Last {
			out = append(out, strconv.FormatUint(uint64(r.First), 10))
		} else {
			out = append(out, fmt.Sprintf("%d-%d", r.First, r.Last))
		}
	}
	return strings.Join(out, ", ")
}

func asns(numbers ...uint32) (s ASNs) {
	for _, n := range numbers {
		s = append(s, ASNRange{n, n})
	}
	return s
}

// privateASNs are for private use (RFC 6996).
var privateASNs = ASNs{{64512, 65534}, {4200000000, 4294967294}}

// Setting is one line of a preset.
type Setting struct {
	Kind   string `json:"kind"` // "default", "rule", "console" or "advice"
	Name   string `json:"name"` // name of the document's field, for a default
	Value  string `json:"value"`
	Why    string `json:"why"`
	Source string `json:"source"`
}

// Settings returns all settings of a preset, for display.
func (p Preset) Settings() []Setting {
	var out []Setting
	kind := "default"
	add := func(name, value, why, source string) {
		if why != "" {
			out = append(out, Setting{kind, name, value, why, source})
		}
	}
	add("ipsec.ikeProposals", strings.Join(p.IKEProposals.Is, ", "), p.IKEProposals.Why, p.IKEProposals.Source)
	add("ipsec.espProposals", strings.Join(p.ESPProposals.Is, ", "), p.ESPProposals.Why, p.ESPProposals.Source)
	add("ipsec.ikeRekey", span(p.IKERekey.Is), p.IKERekey.Why, p.IKERekey.Source)
	add("ipsec.childRekey", span(p.ChildRekey.Is), p.ChildRekey.Why, p.ChildRekey.Source)
	add("ipsec.childRekeyBytes", fmt.Sprint(p.ChildRekeyBytes.Is), p.ChildRekeyBytes.Why, p.ChildRekeyBytes.Source)
	add("ipsec.dpdDelay", span(p.DPDDelay.Is), p.DPDDelay.Why, p.DPDDelay.Source)
	add("ipsec.replayWindow", fmt.Sprint(p.ReplayWindow.Is), p.ReplayWindow.Why, p.ReplayWindow.Source)
	add("mtu", fmt.Sprint(p.MTU.Is), p.MTU.Why, p.MTU.Source)
	add("mss", fmt.Sprint(p.MSS.Is), p.MSS.Why, p.MSS.Source)
	add("probe", fmt.Sprint(!p.Silent.Is), p.Silent.Why, p.Silent.Source)
	add("peer.holdTime", span(p.HoldTime.Is), p.HoldTime.Why, p.HoldTime.Source)
	add("peer.keepalive", span(p.Keepalive.Is), p.Keepalive.Why, p.Keepalive.Source)
	add("peer.ttl", fmt.Sprint(p.TTL.Is), p.TTL.Why, p.TTL.Source)
	add("peer.passive", fmt.Sprint(p.Passive.Is), p.Passive.Why, p.Passive.Source)
	add("peer.maxPrefixes", fmt.Sprint(p.MaxPrefixes.Is), p.MaxPrefixes.Why, p.MaxPrefixes.Source)
	add("peer.export.maxPrefixes", fmt.Sprint(p.ExportLimit.Is), p.ExportLimit.Why, p.ExportLimit.Source)
	kind = "rule"
	add("IKE algorithms", p.IKE.Is.String(), p.IKE.Why, p.IKE.Source)
	add("ESP algorithms", p.ESP.Is.String(), p.ESP.Why, p.ESP.Source)
	add("IKE SA lifetime", "at most "+span(p.IKELifetime.Is), p.IKELifetime.Why, p.IKELifetime.Source)
	add("CHILD SA lifetime", "at most "+span(p.ChildLifetime.Is), p.ChildLifetime.Why, p.ChildLifetime.Source)
	add("MTU", fmt.Sprintf("at most %d", p.MaxMTU.Is), p.MaxMTU.Why, p.MaxMTU.Source)
	add("BGP hold time", "exactly "+span(p.FixedHoldTime.Is), p.FixedHoldTime.Why, p.FixedHoldTime.Source)
	add("who opens BGP", "this node", p.NeverOpensBGP.Why, p.NeverOpensBGP.Source)
	add("identities", "addresses", p.AddressIdentity.Why, p.AddressIdentity.Source)
	add("prefixes announced to it", fmt.Sprintf("at most %d", p.MostAnnounced.Is), p.MostAnnounced.Why, p.MostAnnounced.Source)
	add("inside addresses", describeInside(p.Inside.Is), p.Inside.Why, p.Inside.Source)
	add("this node's ASN", "not "+p.RouterASN.Is.String(), p.RouterASN.Why, p.RouterASN.Source)
	add("gateway's ASN", p.GatewayASN.Is.String(), p.GatewayASN.Why, p.GatewayASN.Source)
	kind = "console"
	add("this node's address", p.AddressAt.Is, p.AddressAt.Why, p.AddressAt.Source)
	add("pre-shared key", p.KeyAt.Is, p.KeyAt.Why, p.KeyAt.Source)
	add("algorithms", p.PolicyAt.Is, p.PolicyAt.Why, p.PolicyAt.Source)
	add("opens the tunnel", p.Calls.Is, p.Calls.Why, p.Calls.Source)
	kind = "advice"
	for _, a := range p.Advice {
		add("cloud side", a.Is, a.Why, a.Source)
	}
	return out
}

// span formats a duration without its zeros: "8h", "45m", "10s".
func span(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func describeInside(r apipa.Rule) string {
	list := func(word string, all any) string { return word + strings.Trim(fmt.Sprint(all), "[]") }
	parts := []string{list("allocated from ", r.From)}
	if r.Only {
		parts = append(parts, "link-local only")
	}
	if len(r.Within) > 0 {
		parts = append(parts, list("link-local ones in ", r.Within))
	}
	if len(r.Reserved) > 0 {
		parts = append(parts, list("never ", r.Reserved))
	}
	if len(r.Bits) > 0 {
		parts = append(parts, list("prefix lengths ", r.Bits))
	}
	if r.PeerFirst {
		parts = append(parts, "gateway has the first host address of its /30, this node the second")
	}
	if r.Single {
		parts = append(parts, "one address for this node in all tunnels, one for each gateway instance")
	}
	return strings.Join(parts, "; ")
}
