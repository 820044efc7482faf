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
	"strings"
	"time"
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

	objects int    // that refer to each other
	unread  string // types of objects in the files that are not read
}

// Tunnel is one tunnel and the BGP session in it.
type Tunnel struct {
	Name  string
	Cloud string
	About string // description in the cloud's terms

	Remote        Value[netip.Addr]
	Inside        []Inside // at most one of each family; the session is between the first
	PSK           Value[Secret]
	IKE, ESP      Value[[]string]
	Encapsulation Value[string] // udpEncapsulation, if it is not the default
	IKERekey      Value[time.Duration]
	ChildRekey    Value[time.Duration]
	RekeyBytes    Value[uint64]
	ASN           Value[uint32] // of the gateway; not known without BGP
	PeerAddress   Value[netip.Addr]
	HoldTime      Value[time.Duration]
	Keepalive     Value[time.Duration]
	Password      Value[Secret]
	Import        Value[[]netip.Prefix]
	ExportLimit   Value[uint32] // of prefixes, if it differs from the preset's
	RouterASN     Value[uint32] // the ASN that the cloud expects of this node
	RouterPublic  Value[netip.Addr]
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

// Key is a key that a tunnel needs.
type Key struct {
	What string // in a sentence
	Name string // of the secret
	Key  Secret
}

// Keys returns the keys that the document names.
func (t Tunnel) Keys() []Key {
	keys := []Key{{"key", t.PSKName(), t.PSK.Is}}
	if t.ASN.known() && t.Password.known() {
		keys = append(keys, Key{"TCP MD5 key", t.PasswordName(), t.Password.Is})
	}
	return keys
}

// Import reads the files of one cloud: "aws", "azure", "gcp" or "oci". An error means that the
// files contain nothing usable.
func Import(name string, files []File) (*Result, error) {
	r := &Result{Cloud: name}
	read, ok := map[string]func(*Result, []document){"aws": readAWS, "azure": readAzure, "gcp": readGCP, "oci": readOCI}[name]
	if !ok {
		return nil, fmt.Errorf("importing from %q: must be aws, azure, gcp or oci", name)
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
		d.terraform()
		docs = append(docs, d)
	}
	r.unread = unread(docs)
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
	file  string
	from  string // the cloud that its names belong to; empty if unclear
	xml   bool
	types map[string]int // of a Terraform state: types that are not read, with their numbers
	*node
}

// parse reads a file in whatever syntax it is.
func parse(f File) (document, error) {
	d := document{file: f.Name, node: &node{list: true, line: 1}}
	all := utf8Text(f.Data)
	data := bytes.TrimSpace(all)
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
		d.node, err = awsGeneric(all)
		return d, err
	case isDevice(data):
		d.xml, d.from = true, "aws"
		d.node, err = awsDevice(all)
		return d, err
	case terraformResource.Match(terraformColor.ReplaceAll(data[:min(len(data), 1<<16)], nil)):
		d.node, err = parseTerraform(terraformColor.ReplaceAll(data, nil))
		return d, err
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
		{"oci", []string{"ocid1.ipsec", "oracle-bgp-asn", "oracle_bgp_asn", "oci_core_ipsec"}},
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
