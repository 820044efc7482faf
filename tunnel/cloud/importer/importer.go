// Package importer reads the clouds' files about their VPN gateways and makes the tunnels and peers
// of a document from them. Every value has its source; missing, skipped and doubtful values are
// noted. The package is pure: files come in as bytes, and keys go out as values that do not print
// themselves.
package importer

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"go.yaml.in/yaml/v3"

	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

// MaxFile is the size in bytes of the largest file that is read.
const MaxFile = 32 << 20

// maxNotes bounds the notes; further ones are omitted.
const maxNotes = 1000

// File is a file with its name for messages.
type File struct {
	Name string
	Data []byte
}

// Secret is a key from a file. It does not print: fmt can reach only a pointer behind Format.
type Secret struct{ value *string }

func keyFrom(key, from string) Value[Secret] { return Value[Secret]{Secret{&key}, from} }

// Bytes returns the key; nil if it is unknown.
func (s Secret) Bytes() []byte {
	if s.value == nil {
		return nil
	}
	return []byte(*s.value)
}

// Known reports whether the file had the key.
func (s Secret) Known() bool { return s.value != nil }

const hidden = "(not shown)"

// Format hides the key from every verb of fmt.
func (Secret) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, hidden) }

// MarshalText hides the key from encoders.
func (Secret) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// Value is a value with its source.
type Value[T any] struct {
	Is   T
	From string // empty: the value is unknown
}

func (v Value[T]) known() bool { return v.From != "" }

// Result is what was read.
type Result struct {
	Cloud   string
	Files   []string
	Tunnels []Tunnel // in the order of names
	Routes  []Route  // for tunnels without BGP
	Notes   []string // skipped, missing and doubtful values

	names map[string]bool          // of Tunnels
	ends  map[[2]netip.Addr]string // node and gateway of each of Tunnels -> name
}

// Tunnel is one tunnel and the BGP session in it.
type Tunnel struct {
	Name  string
	Cloud string
	About string // description in the cloud's terms

	Remote       Value[netip.Addr]
	Inside       []Inside // at most one of each family; the session is between the first
	PSK          Value[Secret]
	IKE, ESP     Value[[]string]
	IKERekey     Value[time.Duration]
	ChildRekey   Value[time.Duration]
	RekeyBytes   Value[uint64]
	ASN          Value[uint32] // of the gateway; not known without BGP
	PeerAddress  Value[netip.Addr]
	HoldTime     Value[time.Duration]
	Keepalive    Value[time.Duration]
	Password     Value[Secret]
	Import       Value[[]netip.Prefix]
	ExportLimit  Value[uint32] // of prefixes, if it differs from the preset's
	RouterASN    Value[uint32] // the ASN that the cloud expects of this node
	RouterPublic Value[netip.Addr]
}

// Inside is a pair of inside addresses.
type Inside struct {
	Local Value[netip.Prefix]
	Peer  Value[netip.Addr]
}

// Route is a static route through all tunnels of a connection.
type Route struct {
	Prefix  Value[netip.Prefix]
	Tunnels []string
}

// PSKName returns the name under which the tunnel's key is stored.
func (t Tunnel) PSKName() string { return t.Name }

// PasswordName returns the name under which the session's TCP MD5 key is stored.
func (t Tunnel) PasswordName() string { return fit(t.Name, "-md5") }

// Import reads the files of one cloud: "aws", "azure" or "gcp". An error means that the files
// contain nothing usable.
func Import(name string, files []File) (*Result, error) {
	r := &Result{Cloud: name}
	read, ok := map[string]func(*Result, []document){"aws": readAWS, "azure": readAzure, "gcp": readGCP}[name]
	if !ok {
		return nil, fmt.Errorf("importing from %q: must be aws, azure or gcp", name)
	}
	var docs []document
	for _, f := range files {
		r.Files = append(r.Files, f.Name)
		if len(f.Data) > MaxFile {
			return nil, fmt.Errorf("reading %s: is larger than %d MiB, which no description of a gateway is", f.Name, MaxFile>>20)
		}
		d, err := parse(f)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", f.Name, err)
		}
		docs = append(docs, d)
	}
	read(r, docs)
	slices.SortFunc(r.Tunnels, func(a, b Tunnel) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(r.Routes, func(a, b Route) int { return a.Prefix.Is.Compare(b.Prefix.Is) })
	if len(r.Tunnels) == 0 {
		return nil, errors.New("no tunnel found: " + strings.Join(r.Notes, "; "))
	}
	return r, nil
}

// document is the content of a file: its value, or a list of its values.
type document struct {
	file string
	from string // the cloud that its names belong to; empty if unclear
	xml  bool
	*node
}

// parse reads a file in whatever syntax it is.
func parse(f File) (document, error) {
	d := document{file: f.Name, node: &node{list: true, line: 1}}
	data := bytes.TrimSpace(utf8Text(f.Data))
	if len(data) == 0 {
		return d, errors.New("is empty")
	}
	if bytes.IndexByte(data, 0) >= 0 {
		return d, errors.New("is not text in UTF-8, or in UTF-16 with a byte order mark")
	}
	d.from = guess(data)
	var err error
	switch c := data[0]; {
	case c == '<', bytes.HasPrefix(data, []byte("&lt;")), bytes.HasPrefix(data, []byte(`\u003c`)), bytes.HasPrefix(data, []byte(`\u003C`)):
		d.xml = true
		d.node, err = parseXML(unescape(data))
		return d, err
	case c == '{' || c == '[' || c == '"':
		d.values, err = parseJSON(data)
	case bytes.Contains(data, []byte("IPSec Tunnel #1")) && bytes.Contains(data, []byte("Outside IP Addresses:")):
		d.xml, d.from = true, "aws"
		d.node = awsGeneric(data)
		return d, nil
	case prose.Match(data[:min(len(data), 1<<16)]):
		return d, errors.New("is a cloud's instructions for one vendor's device; give what isthmus cloud import --help lists")
	default:
		d.values, err = parseYAML(data)
	}
	if len(d.values) == 1 {
		d.node = d.values[0]
	}
	return d, err
}

// prose matches the configurations that AWS's console makes for some vendors' devices, and the
// scripts of Azure's portal.
var prose = regexp.MustCompile(`(?i)IPSec Tunnel #1|#1: Internet Key Exchange|\[1\] (Network|Resource) parameters`)

// unescape decodes XML that was copied out of another file with that file's escapes.
func unescape(data []byte) []byte {
	if data[0] == '\\' {
		// A JSON string without its quotes: Terraform escapes markup.
		data = []byte(strings.NewReplacer(`\u003c`, "<", `\u003C`, "<", `\u003e`, ">", `\u003E`, ">", `\u0026`, "&", `\"`, `"`, `\n`, "\n", `\t`, "\t", `\r`, "", `\\`, `\`).Replace(string(data)))
	}
	if bytes.HasPrefix(data, []byte("&lt;")) {
		// The Query API: the XML reader decodes it.
		if root, err := parseXML(slices.Concat([]byte("<x>"), data, []byte("</x>"))); err == nil {
			return []byte(root.string("x"))
		}
	}
	return data
}

// guess returns the cloud of a file by the names in it; empty if unclear.
func guess(data []byte) string {
	best, most := "", 0
	for _, c := range []struct {
		name  string
		words []string
	}{
		{"aws", []string{"vpn_connection", "VpnConnection", "vpnConnectionId", "customer_gateway", "CustomerGateway"}},
		{"azure", []string{"Microsoft.Network", "vpnSiteConfiguration", "bgpPeeringAddresses", "BgpPeeringAddresses", "virtualNetworkGateway"}},
		{"gcp", []string{"compute#", "googleapis.com/compute", "sharedSecretHash", "vpnGatewayInterface", "linkedVpnTunnel"}},
	} {
		n := 0
		for _, w := range c.words {
			n += bytes.Count(data, []byte(w))
		}
		if n > most {
			best, most = c.name, n
		}
	}
	return best
}

// nothing notes that a file has no object of a kind.
func (r *Result) nothing(d document, what string) {
	if d.from != "" && d.from != r.Cloud {
		r.note(d, nil, "is a file of another cloud; use isthmus cloud import %s", d.from)
		return
	}
	r.note(d, nil, "has no %s in it", what)
}

func (r *Result) note(d document, at *node, format string, args ...any) {
	if len(r.Notes) >= maxNotes {
		if len(r.Notes) == maxNotes {
			r.Notes = append(r.Notes, "and more")
		}
		return
	}
	where := d.file
	if at != nil && at.line > 0 {
		where += ":" + strconv.Itoa(at.line)
	}
	r.Notes = append(r.Notes, printable(where+": "+fmt.Sprintf(format, args...)))
}

// add adds a tunnel under a free name, and returns the name. A duplicate is omitted and noted.
func (r *Result) add(d document, at *node, t Tunnel) (name string, added bool) {
	if r.names == nil {
		r.names, r.ends = map[string]bool{}, map[[2]netip.Addr]string{}
	}
	ends := [2]netip.Addr{t.RouterPublic.Is, t.Remote.Is}
	if other, ok := r.ends[ends]; ok {
		r.note(d, at, "%s leads from the same node to the same gateway, %s, as %s; left out", t.Name, t.Remote.Is, other)
		return "", false
	}
	base := t.Name
	for i := 2; r.names[t.Name]; i++ {
		t.Name = fit(base, fmt.Sprintf("-%d", i))
	}
	r.names[t.Name], r.ends[ends] = true, t.Name
	r.Tunnels = append(r.Tunnels, t)
	return t.Name, true
}

// route adds a static route, or adds tunnels to the existing one for the prefix.
func (r *Result) route(p Value[netip.Prefix], tunnels []string) {
	i := slices.IndexFunc(r.Routes, func(o Route) bool { return o.Prefix.Is == p.Is })
	if i < 0 {
		i = len(r.Routes)
		r.Routes = append(r.Routes, Route{Prefix: p})
	}
	r.Routes[i].Tunnels = slices.Sorted(slices.Values(append(r.Routes[i].Tunnels, tunnels...)))
}

// Routers returns the public addresses of the nodes that the tunnels are for.
func (r *Result) Routers() (out []netip.Addr) {
	for _, t := range r.Tunnels {
		if a := t.RouterPublic; a.known() && !slices.Contains(out, a.Is) {
			out = append(out, a.Is)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// Only keeps the tunnels for one node.
func (r *Result) Only(public netip.Addr) {
	r.Tunnels = slices.DeleteFunc(r.Tunnels, func(t Tunnel) bool { return t.RouterPublic.Is != public })
	var routes []Route
	for _, route := range r.Routes {
		route.Tunnels = slices.DeleteFunc(slices.Clone(route.Tunnels), func(name string) bool {
			return !slices.ContainsFunc(r.Tunnels, func(t Tunnel) bool { return t.Name == name })
		})
		if len(route.Tunnels) > 0 {
			routes = append(routes, route)
		}
	}
	r.Routes = routes
}

var notInNames = regexp.MustCompile(`[^a-z0-9]+`)

// nameOf makes the name of a document's object from the cloud's names.
func nameOf(parts ...string) string {
	s := strings.Trim(notInNames.ReplaceAllString(strings.ToLower(strings.Join(parts, "-")), "-"), "-")
	if s == "" {
		return "tunnel"
	}
	return fit(s, "")
}

// fit cuts a name so that it has at most 63 characters with its suffix.
func fit(name, suffix string) string {
	return strings.TrimRight(name[:min(len(name), 63-len(suffix))], "-") + suffix
}

func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// address parses an address; an invalid one is noted.
func (r *Result) address(d document, n *node, what string) (a Value[netip.Addr]) {
	text := n.string()
	if text == "" {
		return a
	}
	v, err := netip.ParseAddr(text)
	if err != nil || v.Zone() != "" {
		r.note(d, n, "%s: %q is not an address", what, short(text))
		return a
	}
	return Value[netip.Addr]{v, what}
}

// asn parses an autonomous system number.
func (r *Result) asn(d document, n *node, what string) (a Value[uint32]) {
	text := n.string()
	if text == "" {
		return a
	}
	v, err := strconv.ParseUint(text, 10, 32)
	if err != nil || v == 0 {
		r.note(d, n, "%s: %q is not an AS number", what, short(text))
		return a
	}
	return Value[uint32]{uint32(v), what}
}

// seconds parses a number of seconds from 1 to a year; 0 is Terraform's form of unset.
func (r *Result) seconds(d document, n *node, what string) (v Value[time.Duration]) {
	text := n.string()
	if text == "" || text == "0" {
		return v
	}
	s, err := strconv.ParseUint(text, 10, 32)
	if err != nil || s > 365*86400 {
		r.note(d, n, "%s: %q is not a number of seconds", what, short(text))
		return v
	}
	return Value[time.Duration]{time.Duration(s) * time.Second, what}
}

// short bounds a text of unknown length.
func short(s string) string {
	if len(s) > 40 {
		return s[:40] + "..."
	}
	return s
}

// earlier returns a lifetime for this node that is shorter than the gateway's, if the preset's is
// not.
func (r *Result) earlier(d document, at *node, theirs Value[time.Duration], preset, least time.Duration) (v Value[time.Duration]) {
	if !theirs.known() || theirs.Is > preset {
		return v
	}
	ours := (theirs.Is - time.Minute).Truncate(time.Minute)
	if ours < least {
		r.note(d, at, "%s: the gateway renews after %v, which is sooner than this node can, %v", theirs.From, theirs.Is, least)
		ours = least
	}
	return Value[time.Duration]{ours, "before the gateway's " + theirs.Is.String() + ", " + theirs.From}
}

// YAML formats the tunnels, peers and static routes as parts of a document, with comments.
func (r *Result) YAML() string {
	var b strings.Builder
	line := func(indent int, text, comment string) {
		b.WriteString(strings.Repeat("  ", indent) + text)
		if comment != "" {
			b.WriteString(" # " + printable(comment))
		}
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, "# From %s, by isthmus cloud import %s. Omitted fields come from `cloud`: see isthmus cloud show.\n", printable(strings.Join(r.Files, ", ")), r.Cloud)
	for _, a := range r.Routers() {
		asns := map[uint32]bool{}
		for _, t := range r.Tunnels {
			if t.RouterPublic.Is == a && t.RouterASN.known() && !asns[t.RouterASN.Is] {
				asns[t.RouterASN.Is] = true
				fmt.Fprintf(&b, "# The node needs underlay.publicAddress %s (%s) and node.asn %d (%s).\n", a, t.RouterPublic.From, t.RouterASN.Is, t.RouterASN.From)
			}
		}
		if len(asns) == 0 {
			fmt.Fprintf(&b, "# The node needs underlay.publicAddress %s.\n", a)
		}
	}
	b.WriteString("tunnels:\n")
	for _, t := range r.Tunnels {
		line(1, "# "+printable(t.About), "")
		line(1, "- name: "+quote(t.Name), "")
		line(2, "cloud: "+t.Cloud, "")
		if len(t.Inside) > 0 {
			line(2, "inside:", "")
		}
		for _, in := range t.Inside {
			line(3, "- local: "+quote(in.Local.Is.String()), in.Local.From)
			line(4, "remote: "+quote(in.Peer.Is.String()), in.Peer.From)
		}
		line(2, "ipsec:", "")
		line(3, "remoteAddress: "+quote(t.Remote.Is.String()), t.Remote.From)
		psk := "the name of the secret; " + t.PSK.From
		if !t.PSK.Is.Known() {
			psk = "MISSING here: store it with isthmus secret set " + t.PSKName()
		}
		line(3, "psk: "+quote(t.PSKName()), psk)
		for _, p := range []struct {
			field string
			v     Value[[]string]
		}{{"ikeProposals", t.IKE}, {"espProposals", t.ESP}} {
			if p.v.known() {
				line(3, p.field+": ["+strings.Join(p.v.Is, ", ")+"]", p.v.From)
			}
		}
		if t.IKERekey.known() {
			line(3, "ikeRekey: "+t.IKERekey.Is.String(), t.IKERekey.From)
		}
		if t.ChildRekey.known() {
			line(3, "childRekey: "+t.ChildRekey.Is.String(), t.ChildRekey.From)
		}
		if t.RekeyBytes.known() {
			line(3, fmt.Sprintf("childRekeyBytes: %d", t.RekeyBytes.Is), t.RekeyBytes.From)
		}
	}
	if slices.ContainsFunc(r.Tunnels, func(t Tunnel) bool { return t.ASN.known() }) {
		b.WriteString("peers:\n")
	}
	for _, t := range r.Tunnels {
		if !t.ASN.known() {
			continue
		}
		line(1, "- name: "+quote(t.Name), "")
		line(2, "tunnel: "+quote(t.Name), "")
		line(2, fmt.Sprintf("asn: %d", t.ASN.Is), t.ASN.From)
		if t.PeerAddress.known() {
			line(2, "address: "+quote(t.PeerAddress.Is.String()), t.PeerAddress.From)
		}
		if t.HoldTime.known() {
			line(2, "holdTime: "+t.HoldTime.Is.String(), t.HoldTime.From)
		}
		if t.Keepalive.known() {
			line(2, "keepalive: "+t.Keepalive.Is.String(), t.Keepalive.From)
		}
		if t.Password.known() {
			line(2, "password: "+quote(t.PasswordName()), "MISSING here: store it with isthmus secret set "+t.PasswordName()+"; "+t.Password.From)
		}
		if t.Import.known() {
			line(2, "import:", "")
			line(3, "allow:", t.Import.From)
			for _, p := range t.Import.Is {
				line(4, "- prefix: "+quote(p.String()), "")
			}
		}
		if t.ExportLimit.known() {
			line(2, "export:", "")
			line(3, fmt.Sprintf("maxPrefixes: %d", t.ExportLimit.Is), t.ExportLimit.From)
		}
		if t.Import.known() {
			line(2, "# Nothing is announced until `export` names it.", "")
		} else {
			line(2, "# Nothing is accepted or announced until `import` and `export` name it.", "")
		}
	}
	if len(r.Routes) > 0 {
		b.WriteString("staticRoutes:\n")
	}
	for _, route := range r.Routes {
		line(1, "- prefix: "+quote(route.Prefix.Is.String()), route.Prefix.From)
		var names []string
		for _, name := range route.Tunnels {
			names = append(names, quote(name))
		}
		line(2, "tunnels: ["+strings.Join(names, ", ")+"]", "")
	}
	return b.String()
}

// quote quotes a text that YAML would read as another value: IPv6 addresses have colons, and a name
// may be a number.
func quote(s string) string {
	var n yaml.Node
	if err := yaml.Unmarshal([]byte(s), &n); err != nil || n.Content[0].Tag != "!!str" || strings.Contains(s, ":") {
		return strconv.Quote(s)
	}
	return s
}

func preset(name string) cloud.Preset {
	p, _ := cloud.Lookup(name)
	return p
}
