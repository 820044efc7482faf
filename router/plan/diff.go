package plan

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Action is the kind of a change.
type Action string

// The actions, as shown to users.
const (
	Add     Action = "add"
	Modify  Action = "change"
	Remove  Action = "remove"
	Replace Action = "replace"
)

// Change is one difference between two targets.
type Change struct {
	Action Action
	// Kind is "node", "underlay", "tunnel", "link", "attachment", "access", "peer", "announcement",
	// "route", "pool", "zone", "health", "names", "takeover", "proxy", "egress", "policy", "map" or
	// "log".
	Kind string
	Name string
	// Fields are "field: old -> new", "- field: element" and "+ field: element". Those of an object
	// that is added are "field: value"; after 100 objects of its kind it has none.
	Fields []string
	// Interrupts is the temporary or lasting interruption, except for the flows of Ends; empty:
	// none.
	Interrupts string
	// Ends are the established flows that end.
	Ends []nat.Ending
}

// Diff returns the changes from one target to another in the order of their execution: additions
// and changes from the underlay upward, then removals from the top down.
func Diff(a, b Target) []Change { return withBeaten(differences(a, b), b.NAT) }

func differences(a, b Target) []Change {
	var changes, removals []Change
	record := func(c []Change, r []Change) {
		changes = append(changes, c...)
		removals = append(r, removals...)
	}
	modify, differ := Modify, fields
	if a.Node.Name == "" { // the first document
		modify, differ = Add, func(_, b reflect.Value) []string { return given(b) }
	}
	if f := differ(reflect.ValueOf(a.Node), reflect.ValueOf(b.Node)); len(f) > 0 {
		c := Change{Action: modify, Kind: "node", Name: b.Node.Name, Fields: f}
		if a.Node.ASN != b.Node.ASN || a.Node.RouterID != b.Node.RouterID {
			c.Interrupts = interrupted(len(a.BGP.Peers) > 0, "every BGP session is closed and opened again")
		}
		changes = append(changes, c)
	}
	if f := differ(reflect.ValueOf(a.Underlay), reflect.ValueOf(b.Underlay)); len(f) > 0 {
		c := Change{Action: modify, Kind: "underlay", Name: b.Underlay.Interface, Fields: f}
		c.Interrupts = interrupted(modify == Modify && a.Underlay.Transit != b.Underlay.Transit, "forwarded packets take another default route, and flows over it may end")
		changes = append(changes, c)
	}
	record(diff("pool", ownFields(a.NAT.Pools), ownFields(b.NAT.Pools), func(p nat.Pool) string { return p.Name }, anyFields[nat.Pool](""), ""))
	record(diff("zone", a.NAT.Zones, b.NAT.Zones, func(z nat.Zone) string { return z.Name }, anyFields[nat.Zone](""), ""))
	record(diff("health", a.Health, b.Health, func(p egress.ProbedPool) string { return p.Name }, anyFields[egress.ProbedPool](""), "all addresses of the pool count as healthy, and its announcements are withdrawn"))
	if f := differ(reflect.ValueOf(a.Takeover), reflect.ValueOf(b.Takeover)); len(f) > 0 && (modify != Add || len(b.Takeover.Paths) > 0) {
		changes = append(changes, Change{Action: modify, Kind: "takeover", Name: "takeover", Fields: f})
	}
	if f := differ(reflect.ValueOf(a.Names), reflect.ValueOf(b.Names)); len(f) > 0 && (modify != Add || len(b.Names.Resolvers)+len(b.Names.Proxy) > 0) {
		changes = append(changes, Change{Action: modify, Kind: "names", Name: "names", Fields: f})
	}
	if a.PortlessTimeout != b.PortlessTimeout {
		changes = append(changes, Change{Action: Modify, Kind: "egress", Name: "egress", Fields: []string{"portlessTimeout"}})
	}
	if f := fields(reflect.ValueOf(a.Log), reflect.ValueOf(b.Log)); len(f) > 0 {
		c := Change{Action: Modify, Kind: "log", Name: "log", Fields: f}
		switch {
		case !a.Log.Enabled:
			c.Action, c.Fields = Add, given(reflect.ValueOf(b.Log))
		case !b.Log.Enabled:
			c = Change{Action: Remove, Kind: "log", Name: "log", Interrupts: "flows that end are not recorded any more"}
		}
		changes = append(changes, c)
	}
	record(diff("proxy", a.Proxies, b.Proxies, func(p egress.ProbedPool) string { return p.Name }, anyFields[egress.ProbedPool](""), ""))
	record(diff("policy", a.NAT.Policies, b.NAT.Policies, func(p nat.Policy) string { return p.Name }, policyFields, "other policies decide its new flows, and the guard drops those that none decides"))
	record(diff("map", a.NAT.Maps, b.NAT.Maps, func(m nat.Map) string { return m.Mapped.String() }, anyFields[nat.Map](""), ""))
	record(diff("tunnel", a.Tunnels, b.Tunnels, func(c tunnel.Config) string { return c.Name }, tunnelFields(a.NAT.Clamps, b.NAT.Clamps), "the tunnel goes down for good"))
	record(diff("link", a.Links, b.Links, func(l Link) string { return l.Name }, anyFields[Link](""), "its lanes go down for good"))
	record(diff("attachment", a.Attachments, b.Attachments, func(x Attachment) string { return x.Name }, anyFields[Attachment]("packets from it with other sources are dropped"), "packets from it are dropped, except those that peers and routes of a tunnel allow"))
	changes = append(changes, accessChanges(a.NAT, b.NAT)...)
	if !slices.Equal(a.SSHKeys, b.SSHKeys) {
		c := Change{Action: Modify, Kind: "access", Name: "ssh", Fields: []string{fmt.Sprintf("keys: %d -> %d", len(a.SSHKeys), len(b.SSHKeys))}}
		if len(b.SSHKeys) == 0 {
			c.Interrupts = "the SSH server stops, and sessions end"
		}
		changes = append(changes, c)
	}
	record(diff("export", a.Exports, b.Exports, func(e spec.Export) string { return e.Name }, anyFields[spec.Export](""), "it receives no more events"))
	record(diff("route", a.Routes, b.Routes, func(r fib.Route) string { return r.Key.String() }, anyFields[fib.Route](""), "its traffic takes another route or none"))
	record(diff("announcement", a.BGP.Announce, b.BGP.Announce, netip.Prefix.String, anyFields[netip.Prefix](""), "it is withdrawn from every peer"))
	record(diff("peer", a.BGP.Peers, b.BGP.Peers, func(p bgp.Peer) string { return p.Name }, peerFields, "the session is closed, and its routes are removed"))
	changes = append(changes, removals...)
	ends := nat.Endings(a.NAT, b.NAT)
	if len(ends) == 0 {
		return changes
	}
	type object struct{ kind, name string }
	at := make(map[object]int, len(changes))
	for i := len(changes) - 1; i >= 0; i-- {
		at[object{changes[i].Kind, changes[i].Name}] = i
	}
	for _, e := range ends {
		if i, ok := at[object{e.Kind, e.Name}]; ok {
			changes[i].Ends = append(changes[i].Ends, e)
		}
	}
	return changes
}

// DiffPolicies is Diff for two targets that differ only in the policies of some names.
func DiffPolicies(a, b Target, names []string) []Change {
	edited := make(map[string]bool, len(names))
	for _, name := range names {
		edited[name] = true
	}
	// The flows that end depend on all policies without translation and all with a server. The
	// flows that a policy ends by itself depend on all policies.
	stops := slices.ContainsFunc(b.NAT.Policies, func(p nat.Policy) bool { return p.Ends && edited[p.Name] })
	some := func(t Target) Target {
		out := Target{Proxies: t.Proxies}
		out.NAT.Pools, out.NAT.Attachments = t.NAT.Pools, t.NAT.Attachments
		for i := range t.NAT.Policies {
			if p := &t.NAT.Policies[i]; stops || edited[p.Name] || p.Action == nat.NoNAT || p.To.IsValid() {
				out.NAT.Policies = append(out.NAT.Policies, *p)
			}
		}
		return out
	}
	return withBeaten(differences(some(a), some(b)), b.NAT)
}

// accessChanges returns the changes of access to the node itself.
func accessChanges(a, b nat.Config) (changes []Change) {
	if f := fields(reflect.ValueOf(a.API), reflect.ValueOf(b.API)); len(f) > 0 {
		c := Change{Action: Modify, Kind: "access", Name: "api", Fields: f}
		if lost := uncovered(a.API.From, b.API.From); len(lost) > 0 {
			c.Interrupts = "clients in " + list(lost) + " lose the API where no source covers them any more; its unix socket stays"
		}
		changes = append(changes, c)
	}
	if f := fields(reflect.ValueOf(a.Input), reflect.ValueOf(b.Input)); len(f) > 0 {
		c := Change{Action: Modify, Kind: "access", Name: "input", Fields: f}
		lost := uncovered(a.Input.SSH, b.Input.SSH)
		switch {
		case b.Input.Drop && !a.Input.Drop:
			c.Interrupts = "services of the machine that the document does not open get no new flows, and SSH from every source ends"
			if len(b.Input.SSH) > 0 {
				c.Interrupts = "services of the machine that the document does not open get no new flows, and SSH from other sources than " + list(b.Input.SSH) + " ends"
			}
		case b.Input.Drop && len(lost) > 0:
			c.Interrupts = "SSH from " + list(lost) + " ends where no source of access.ssh covers it any more"
		}
		changes = append(changes, c)
	}
	if f := fields(reflect.ValueOf(a.Metrics), reflect.ValueOf(b.Metrics)); len(f) > 0 {
		c := Change{Action: Modify, Kind: "metrics", Name: "metrics", Fields: f}
		switch lost := uncovered(a.Metrics.From, b.Metrics.From); {
		case a.Metrics.Port == 0:
			c.Action, c.Fields = Add, given(reflect.ValueOf(b.Metrics))
		case b.Metrics.Port == 0:
			c = Change{Action: Remove, Kind: "metrics", Name: "metrics", Interrupts: "Prometheus reads them no more over plain HTTP"}
		case len(lost) > 0:
			c.Interrupts = "Prometheus in " + list(lost) + " reads them no more"
		}
		changes = append(changes, c)
	}
	return changes
}

// list lists the first four prefixes, and counts the others.
func list(prefixes []netip.Prefix) string {
	const few = 4
	var names []string
	for _, p := range prefixes[:min(few, len(prefixes))] {
		names = append(names, p.String())
	}
	if more := len(prefixes) - few; more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	return strings.Join(names, ", ")
}

// uncovered returns the prefixes with an address that none of others contains.
func uncovered(prefixes, others []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(prefixes), func(p netip.Prefix) bool { return covered(p, others) })
}

func covered(p netip.Prefix, others []netip.Prefix) bool {
	var within []netip.Prefix
	for _, o := range others {
		if o.Overlaps(p) {
			if o.Bits() <= p.Bits() {
				return true
			}
			within = append(within, o)
		}
	}
	if len(within) == 0 {
		return false
	}
	upper := p.Addr().AsSlice()
	upper[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	half, _ := netip.AddrFromSlice(upper)
	return covered(netip.PrefixFrom(p.Addr(), p.Bits()+1), within) && covered(netip.PrefixFrom(half, p.Bits()+1), within)
}

func interrupted(yes bool, why string) string {
	if yes {
		return why
	}
	return ""
}

// maxDetailed bounds the objects of one kind whose fields are listed when they are added.
const maxDetailed = 100

// diff compares two lists of named objects. differ returns the fields that differ and the
// interruption that their change causes.
func diff[T any](kind string, a, b []T, name func(T) string, differ func(a, b T) ([]string, string), removal string) (changes, removals []Change) {
	had := make(map[string]T, len(a))
	for _, x := range a {
		had[name(x)] = x
	}
	added := 0
	for _, y := range b {
		x, ok := had[name(y)]
		delete(had, name(y))
		if !ok {
			c := Change{Action: Add, Kind: kind, Name: name(y)}
			if added++; added <= maxDetailed {
				c.Fields = settings(y)
			}
			changes = append(changes, c)
			continue
		}
		if f, why := differ(x, y); len(f) > 0 {
			c := Change{Action: Modify, Kind: kind, Name: name(y), Fields: f, Interrupts: why}
			if strings.HasPrefix(f[0], "kind: ") {
				c.Action = Replace
			}
			changes = append(changes, c)
		}
	}
	for _, x := range a {
		if _, gone := had[name(x)]; gone {
			removals = append(removals, Change{Action: Remove, Kind: kind, Name: name(x), Interrupts: removal})
		}
	}
	return changes, removals
}

// policyFields is anyFields for policies. It compares first, because there may be ten thousand.
func policyFields(a, b nat.Policy) ([]string, string) {
	if a.Equal(&b) {
		return nil, ""
	}
	return anyFields[nat.Policy]("")(a, b)
}

// tunnelFields compares tunnels, and with them the MSS limits of their interfaces.
func tunnelFields(a, b []nat.Clamp) func(a, b tunnel.Config) ([]string, string) {
	was, is := map[string]nat.Clamp{}, map[string]nat.Clamp{}
	for _, c := range a {
		was[c.Interface] = c
	}
	for _, c := range b {
		is[c.Interface] = c
	}
	return func(a, b tunnel.Config) (f []string, why string) {
		for _, d := range tunnel.Diff(a, b) {
			f = append(f, changes(d.Field, reflect.ValueOf(d.Old), reflect.ValueOf(d.New))...)
			if why == "" {
				why = d.Interrupts
			}
		}
		if x, y := was[a.Interface], is[b.Interface]; x.IPv4 != y.IPv4 || x.IPv6 != y.IPv6 {
			f = append(f, change("mss", fmt.Sprintf("%d, IPv6 %d", x.IPv4, x.IPv6), fmt.Sprintf("%d, IPv6 %d", y.IPv4, y.IPv6)))
		}
		return f, why
	}
}

func peerFields(a, b bgp.Peer) (f []string, why string) {
	return fields(reflect.ValueOf(a), reflect.ValueOf(b)), bgp.Interrupts(a, b)
}

// fieldName turns the name of a Go field into that of the document: "RouterID" into "routerId",
// "ASOverride" into "asOverride".
func fieldName(name string) string {
	var b strings.Builder
	runes := []rune(name)
	for i, r := range runes {
		begins := i > 0 && (!unicode.IsUpper(runes[i-1]) || i+1 < len(runes) && unicode.IsLower(runes[i+1]))
		if unicode.IsUpper(r) && !begins {
			r = unicode.ToLower(r)
		}
		b.WriteRune(r)
	}
	return b.String()
}

// ownFields leaves out whether pools are shared, which the document does not say of each pool.
func ownFields(pools []nat.Pool) []nat.Pool {
	out := slices.Clone(pools)
	for i := range out {
		out[i].Shared = false
	}
	return out
}

// settings returns the fields of a new object that are set.
func settings(object any) (f []string) {
	c, is := object.(tunnel.Config)
	if !is {
		return given(reflect.ValueOf(object))
	}
	for _, d := range tunnel.Fields(c) {
		f = append(f, values(d.Field, reflect.Value{}, reflect.ValueOf(d.New))...)
	}
	return f
}

func anyFields[T any](why string) func(a, b T) ([]string, string) {
	return func(a, b T) ([]string, string) {
		f := fields(reflect.ValueOf(a), reflect.ValueOf(b))
		return f, interrupted(len(f) > 0, why)
	}
}

// documentNames has the names in the document of fields with another name in Go.
var documentNames = map[string]string{
	"nat.Pool.Silent": "exhausted", "nat.Policy.Bypass": "whenDown", "nat.Zone.Prefixes": "sources", "nat.Input.Drop": "input",
	"nat.Metrics.Inlets": "listen", "spec.Underlay.Transit": "defaultRoute", "egress.DNS.Floor": "nameFloor", "egress.DNS.Grace": "nameGrace", "egress.DNS.Hold": "nameHold", "egress.DNS.Proxy": "dnsProxy",
}

// words has the values in the document for false and true.
var words = map[string][2]string{"exhausted": {"reject", "drop"}, "whenDown": {"block", "bypass"}, "input": {"keep", "drop"}, "defaultRoute": {"underlay", "tunnels"}}

// fields returns the exported fields in which two structs of one type differ, nested ones with
// their path.
func fields(a, b reflect.Value) []string { return compare(a, b, changes) }

// given returns the exported fields of a struct that are set, except those that name the object.
func given(v reflect.Value) []string {
	return slices.DeleteFunc(compare(reflect.Zero(v.Type()), v, values), func(f string) bool {
		return strings.HasPrefix(f, "name: ") || strings.HasPrefix(f, "key: ")
	})
}

// compare compares two structs, and describes each field in which they differ.
func compare(a, b reflect.Value, describe func(name string, x, y reflect.Value) []string) (f []string) {
	if a.Kind() != reflect.Struct {
		return nil
	}
	for i := range a.NumField() {
		t, x, y := a.Type().Field(i), a.Field(i), b.Field(i)
		if !t.IsExported() || reflect.DeepEqual(x.Interface(), y.Interface()) {
			continue
		}
		name := documentNames[a.Type().String()+"."+t.Name]
		if name == "" {
			name = fieldName(t.Name)
		}
		if x.Kind() == reflect.Pointer && !x.IsNil() && !y.IsNil() {
			x, y = x.Elem(), y.Elem()
		}
		if _, has := x.Interface().(fmt.Stringer); x.Kind() == reflect.Struct && (!has || t.Type.Kind() == reflect.Pointer) {
			for _, within := range compare(x, y, describe) {
				f = append(f, below(name, within))
			}
			continue
		}
		f = append(f, describe(name, x, y)...)
	}
	return f
}

// below returns the change of a field as that of a field of name.
func below(name, change string) string {
	for _, sign := range []string{"- ", "+ "} {
		if rest, ok := strings.CutPrefix(change, sign); ok {
			return sign + name + "." + rest
		}
	}
	return name + "." + change
}

// maxElements bounds the removed and the added elements that are listed of one field.
const maxElements = 50

// changes describes the change of a field: a list by the elements that are removed and added, each
// as "- field: element" and "+ field: element".
func changes(name string, x, y reflect.Value) (f []string) {
	if x.Kind() != reflect.Slice {
		return []string{change(name, text(name, x), text(name, y))}
	}
	elements := func(v reflect.Value) (out []string) {
		for i := range v.Len() {
			out = append(out, text(name, v.Index(i)))
		}
		return out
	}
	old, new := elements(x), elements(y)
	only := func(sign string, list, other []string) {
		have := make(map[string]bool, len(other))
		for _, e := range other {
			have[e] = true
		}
		n := 0
		for _, e := range list {
			if have[e] {
				continue
			}
			if n++; n <= maxElements {
				f = append(f, sign+" "+name+": "+e)
			}
		}
		if n > maxElements {
			f = append(f, fmt.Sprintf("%s %s: and %d more", sign, name, n-maxElements))
		}
	}
	only("-", old, new)
	only("+", new, old)
	if len(f) == 0 { // the same elements
		f = append(f, name+": in another order")
	}
	return f
}

// values describes a field that was not there before.
func values(name string, _, v reflect.Value) []string {
	if r, is := v.Interface().(secret.Ref); is { // the fingerprint is for changes
		return []string{name + ": " + r.Name}
	}
	if v.Kind() != reflect.Slice {
		return []string{name + ": " + text(name, v)}
	}
	var elements []string
	for i := range min(v.Len(), maxElements) {
		elements = append(elements, text(name, v.Index(i)))
	}
	if more := v.Len() - maxElements; more > 0 {
		elements = append(elements, fmt.Sprintf("%d more", more))
	}
	return []string{name + ": " + strings.Join(elements, ", ")}
}

// text returns a value as in the document.
func text(name string, v reflect.Value) string {
	if _, has := v.Interface().(fmt.Stringer); v.Kind() == reflect.Pointer && !v.IsNil() && !has {
		v = v.Elem()
	}
	switch x := v.Interface().(type) {
	case bool:
		if w, ok := words[name]; ok && x {
			return w[1]
		} else if ok {
			return w[0]
		}
	case time.Duration:
		s := x.String() // "48h0m0s"
		for _, zero := range []string{"m0s", "h0m"} {
			if strings.HasSuffix(s, zero) {
				s = s[:len(s)-2]
			}
		}
		return s
	}
	if _, has := v.Interface().(fmt.Stringer); v.Kind() == reflect.Struct && !has {
		var parts []string
		for i := range v.NumField() {
			if t := v.Type().Field(i); t.IsExported() && !v.Field(i).IsZero() {
				parts = append(parts, fieldName(t.Name)+" "+text(name, v.Field(i)))
			}
		}
		return strings.Join(parts, ", ")
	}
	return fmt.Sprint(v.Interface())
}

// change describes the change of a field. A missing value is a hyphen.
func change(field, old, new string) string {
	there := func(s string) string {
		switch s {
		case "", "<nil>", "[]", "0s", netip.Addr{}.String(), netip.AddrPort{}.String(), netip.Prefix{}.String():
			return "-"
		}
		return s
	}
	return field + ": " + there(old) + " -> " + there(new)
}
