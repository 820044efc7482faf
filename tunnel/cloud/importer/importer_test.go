package importer

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/test/golden"
)

// read returns the files of one case, in the order of names.
func read(t testing.TB, dir string) (files []File) {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, File{e.Name(), data})
	}
	return files
}

// cases returns the directories of testdata, which are called CLOUD-CASE.
func cases(t testing.TB) []string {
	t.Helper()
	all, err := os.ReadDir("testdata")
	if err != nil {
		t.Fatal(err)
	}
	var dirs []string
	for _, e := range all {
		if e.IsDir() && strings.Contains(e.Name(), "-") {
			dirs = append(dirs, filepath.Join("testdata", e.Name()))
		}
	}
	return dirs
}

func cloudOf(dir string) string {
	name, _, _ := strings.Cut(filepath.Base(dir), "-")
	return name
}

// checked checks a part of a document by putting it into a whole one.
func checked(r *Result) error {
	asn := uint32(64999)
	own, public := "10.9.0.4", "203.0.113.254"
	for _, t := range r.Tunnels {
		if t.RouterASN.known() {
			asn = t.RouterASN.Is
		}
		if t.RouterPublic.known() && t.RouterPublic.Is.Is4() {
			public = t.RouterPublic.Is.String()
		}
		if t.Remote.Is.Is6() {
			own, public = "2001:db8::9", "2001:db8::9"
		}
	}
	text := fmt.Sprintf("node: {name: n, asn: %d, routerId: 192.0.2.1}\nunderlay: {interface: eth0, address: %q, publicAddress: %q}\n%s", asn, own, public, r.YAML())
	d, problems := spec.Decode([]byte(text))
	_, more := spec.Check(d, func(name string) (secret.Ref, bool) { return secret.Ref{Name: name}, true })
	if problems = append(problems, more...); len(problems) > 0 {
		return fmt.Errorf("%w\n%s", problems, text)
	}
	return nil
}

// TestGolden imports each case and compares what comes out; that it is a good document; and that no
// key is in it.
func TestGolden(t *testing.T) {
	for _, dir := range cases(t) {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			files := read(t, dir)
			r, err := Import(cloudOf(dir), files)
			if err != nil {
				t.Fatal(err)
			}
			got := r.YAML()
			for _, n := range r.Notes {
				got += "! " + n + "\n"
			}
			for _, tu := range r.Tunnels {
				got += fmt.Sprintf("$ %s %t\n", tu.PSKName(), tu.PSK.Is.Known())
			}
			golden.Check(t, dir+".golden", got)
			if len(r.Routers()) <= 1 {
				if err := checked(r); err != nil {
					t.Error(err)
				}
			}
			// Every key of the test's files begins with FileKey.
			text, err := json.Marshal(r)
			if all := got + string(text) + fmt.Sprintf("%v %+v %#v", r, r, r); err != nil || strings.Contains(all, "FileKey") {
				t.Errorf("a key prints itself, or %v", err)
			}
			// The same in any order of files.
			slices.Reverse(files)
			again, err := Import(cloudOf(dir), files)
			if err != nil {
				t.Fatal(err)
			}
			again.Files = r.Files
			if again.YAML() != r.YAML() {
				t.Errorf("with the files in reverse\n%s\nwant\n%s", again.YAML(), r.YAML())
			}
		})
	}
}

// TestSecret: no verb prints a key, in whatever it is.
func TestSecret(t *testing.T) {
	v := keyFrom("FileKey", "file")
	s := v.Is
	for _, verb := range "vsqxXdobcUeEfFgGtTp" {
		for _, v := range []any{s, &s, []Secret{s}, v, struct{ s Secret }{s}} {
			for _, flags := range []string{"", "+", "#", "# "} {
				got := fmt.Sprintf("%"+flags+string(verb), v)
				if strings.Contains(got, "FileKey") || strings.Contains(strings.ToLower(got), "46696c65") || strings.Contains(got, "70 105") {
					t.Errorf("%%%s%c of %T prints %s", flags, verb, v, got)
				}
			}
		}
	}
}

// TestCopiesAreAlike: however the XML was carried, the same tunnels come out.
func TestCopiesAreAlike(t *testing.T) {
	plain := read(t, "testdata/aws-xml")[0].Data
	quoted, err := json.Marshal(string(plain)) // escapes markup as Terraform does
	if err != nil {
		t.Fatal(err)
	}
	want := mustImport(t, "aws", plain)
	for name, data := range map[string][]byte{
		"UTF-16":          utf16le(string(plain)),
		"byte order mark": append([]byte{0xef, 0xbb, 0xbf}, plain...),
		"JSON text":       quoted,
		"JSON unquoted":   quoted[1 : len(quoted)-1],
		"&lt;":            []byte(strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;").Replace(string(plain))),
		"output":          []byte(`{"config": {"sensitive": true, "value": ` + string(quoted) + `}}`),
		"CRLF":            []byte(strings.ReplaceAll(string(plain), "\n", "\r\n")),
	} {
		got := mustImport(t, "aws", data)
		if got.YAML() != want.YAML() || string(got.Tunnels[0].PSK.Is.Bytes()) != "FileKeyOne1" {
			t.Errorf("%s: got\n%s\nwant\n%s", name, got.YAML(), want.YAML())
		}
	}
}

func mustImport(t *testing.T, cloud string, data []byte) *Result {
	t.Helper()
	r, err := Import(cloud, []File{{"f", data}})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestTruncated cuts each file at many places: there is an error or a note, and never a wrong
// tunnel.
func TestTruncated(t *testing.T) {
	for _, dir := range cases(t) {
		files := read(t, dir)
		whole, err := Import(cloudOf(dir), files)
		if err != nil {
			t.Fatal(err)
		}
		known := map[netip.Addr]bool{}
		for _, tu := range whole.Tunnels {
			known[tu.Remote.Is] = true
		}
		last := &files[len(files)-1]
		text := strings.TrimSpace(string(last.Data))
		for cut := 1; cut < len(text); cut += 1 + len(text)/97 {
			last.Data = []byte(text[:cut])
			r, err := Import(cloudOf(dir), files)
			if strings.HasSuffix(last.Name, ".xml") || strings.HasSuffix(last.Name, ".json") && text[0] == '[' {
				if err == nil || !strings.Contains(err.Error(), last.Name) {
					t.Errorf("%s cut at %d: got %v", last.Name, cut, err)
				}
			}
			if err != nil {
				continue
			}
			for _, tu := range r.Tunnels {
				if !known[tu.Remote.Is] {
					t.Errorf("%s cut at %d: made up %+v", last.Name, cut, tu)
				}
			}
		}
	}
}

// TestTruncatedText does the same with the console's texts.
func TestTruncatedText(t *testing.T) {
	for _, text := range []string{genericText("vpn-1", 12, 34), swanText, ciscoText, ciscoOther, junosText} {
		whole, err := Import("aws", []File{{"f", []byte(text)}})
		if err != nil {
			t.Fatal(err)
		}
		tunnels := map[netip.Addr]Tunnel{}
		for _, tu := range whole.Tunnels {
			tunnels[tu.Remote.Is] = tu
		}
		most := 0
		for cut := range text {
			r, err := Import("aws", []File{{"f", []byte(text[:cut])}})
			if err != nil {
				continue
			}
			for _, tu := range r.Tunnels {
				want := tunnels[tu.Remote.Is]
				if !want.Remote.known() || len(tu.Inside) > 0 && tu.Inside[0] != want.Inside[0] || tu.ASN.known() && tu.ASN != want.ASN ||
					tu.PSK.Is.Known() && !bytes.Equal(tu.PSK.Is.Bytes(), want.PSK.Is.Bytes()) {
					t.Errorf("%.30q cut at %d: made up %+v", text, cut, tu)
				}
			}
			most = max(most, len(r.Tunnels))
		}
		if most != len(whole.Tunnels) {
			t.Errorf("%d tunnels at most", most)
		}
	}
}

// TestRefused: what no importer can use is refused with what and where.
func TestRefused(t *testing.T) {
	for _, test := range []struct{ cloud, text, want string }{
		{"aws", "", "f: is empty"},
		{"aws", "\x7fELF\x00\x00", "f: is not text"},
		{"aws", "{\n\"a\": [1,\n2", "f: line 3: the file ends before it is complete"},
		{"aws", "{\n\"a\" 1}", "f: line 2: has no colon after a name, where it has '1'"},
		{"aws", "{\"a\": nil}", "has no value"},
		{"aws", "<a>\n<b>\n", "f: line 2: the file ends before it is complete"},
		{"aws", "<a>\n</b>", "f: line 2: is not XML"},
		{"aws", `{"VpnConnections": []}`, "f: has no VPN connection in it"},
		{"aws", "<vpn_connection id=\"vpn-1\"/>", "f:1: vpn-1: has no tunnels"},
		{"aws", strings.Repeat("[", 200), "is nested deeper than 100 levels"},
		{"aws", strings.Repeat("<a>", 200), "is nested deeper than 100 levels"},
		{"aws", `{"VpnConnectionId": "vpn-1", "State": "available", "CustomerGatewayConfiguration": "<vpn_connection>"}`, "f:1: vpn-1: its CustomerGatewayConfiguration: line 1: the file ends"},
		{"aws", "[" + strings.Repeat("[],", maxNodes) + "]", "has more than 1048576 values"},
		{"aws", "<a>" + strings.Repeat("<b/>", maxNodes/2+1) + "</a>", "has more than 1048576 values"},
		{"aws", genericText("vpn-1") + strings.Repeat("IPSec Tunnel #1\nOutside IP Addresses:\n", maxObjects+1), "f: has more than 2000 tunnels"},
		{"aws", ciscoText + manyLines("interface Tunnel%d\n tunnel destination 198.51.100.1\n"), "has more than 8000 tunnels, keys and sessions"},
		{"aws", ciscoText + manyLines("pre-shared-key address 198.51.100.%d key FileKey1\n"), "has more than 8000 tunnels, keys and sessions"},
		{"aws", ciscoText + manyLines("! Your VPN Connection ID : vpn-%d\n interface Tunnel1\n"), "has more than 8000 tunnels, keys and sessions"},
		{"aws", junosText + manyLines("set security ike gateway g%d address 198.51.100.1\n"), "has more than 8000 tunnels, keys and sessions"},
		{"aws", swanText + manyLines("conn Tunnel%d\n right=198.51.100.1\n"), "has more than 8000 tunnels, keys and sessions"},
		// in linear time
		{"aws", "resource \"aws_vpn_connection\" \"a\" {\n" + manyBlocks() + "}\n", "has no tunnels"},
		{"azure", manyTexts(), "f: has more than 5000 texts"},
		{"aws", "<a>" + strings.Repeat("x<!---->", 1<<18) + "</a>", "has no VPN connection in it"},
		{"aws", "<vpn_connection>" + strings.Repeat("<ipsec_tunnel/>", maxNotes+1) + "</vpn_connection>", "skipped; and more"},
		{"aws", `{"a": 1, "a": 2}`, `f: line 1: has "a" twice in one object`},
		{"gcp", "sharedSecret: *FileKey", "f: has an alias, which no cloud writes"},
		{"gcp", strings.Repeat("- a\n", maxYAML/4+1), "is YAML and larger than 4 MiB"},
		{"gcp", "a: &x [1]\nb: *x\n", "line 2: has an alias"},
		{"gcp", "a: [\n", "line"},
		{"oracle", "{}", "must be aws, azure, gcp or oci"},
	} {
		r, err := Import(test.cloud, []File{{"f", []byte(test.text)}})
		if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "FileKey") {
			t.Errorf("%.40q: got %v, %.200v, want %q", test.text, r, err, test.want)
		}
	}
	if _, err := Import("aws", []File{{"big.xml", make([]byte, MaxFile+1)}}); err == nil || !strings.Contains(err.Error(), "big.xml: is larger than 32 MiB") {
		t.Errorf("a large file: %v", err)
	}
}

// manyLines has a line so often that a device's configuration is refused.
func manyLines(format string) string {
	var b strings.Builder
	for i := range maxDevice {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}

// manyBlocks has blocks of as many names.
func manyBlocks() string {
	var b strings.Builder
	for i := range maxNodes / 4 {
		fmt.Fprintf(&b, "x%d {\n}\n", i)
	}
	return b.String()
}

// manyTexts is an object with as many texts of JSON.
func manyTexts() string {
	var b strings.Builder
	b.WriteString("{")
	for i := range 200000 {
		fmt.Fprintf(&b, "\"a%dText\": \"[]\",\n", i)
	}
	return b.String() + "\"z\": 1}"
}

// TestOtherClouds: each cloud's files, given to the importer of another, are recognized.
func TestOtherClouds(t *testing.T) {
	for _, dir := range cases(t) {
		for _, name := range []string{"aws", "azure", "gcp", "oci"} {
			if name == cloudOf(dir) {
				continue
			}
			if _, err := Import(name, read(t, dir)); err == nil || !strings.Contains(err.Error(), "is a file of another cloud; use isthmus cloud import "+cloudOf(dir)) {
				t.Errorf("%s as %s: %v", dir, name, err)
			}
		}
	}
}

func TestOnly(t *testing.T) {
	r, err := Import("aws", read(t, "testdata/aws-two-nodes"))
	if err != nil {
		t.Fatal(err)
	}
	r.Only(netip.MustParseAddr("203.0.113.10"))
	if len(r.Tunnels) != 2 || r.Tunnels[0].Name != "vpn-0fff-1" {
		t.Errorf("got %+v", r.Tunnels)
	}
	if err := checked(r); err != nil {
		t.Error(err)
	}
}

func fuzz(f *testing.F, cloud string) {
	add := func(files []string) {
		between := "\n"
		if !strings.ContainsAny(files[0][:1], "{[<") {
			between = "\n---\n"
		}
		f.Add([]byte(strings.Join(files, between))) // what belongs together makes tunnels
	}
	for _, dir := range cases(f) {
		if cloudOf(dir) == cloud {
			var files []string
			for _, file := range read(f, dir) {
				files = append(files, string(file.Data))
			}
			add(files)
		}
	}
	for _, s := range shapes {
		if s.cloud == cloud {
			add(s.files)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := Import(cloud, []File{{"f", data}})
		if err != nil {
			return
		}
		// Whatever it was, the text is a document, whose values may be refused but which is read as
		// it was meant.
		d, problems := spec.Decode([]byte(r.YAML()))
		if len(problems) > 0 || len(d.Message.GetTunnels()) != len(r.Tunnels) {
			t.Errorf("%v\n%s", problems, r.YAML())
		}
	})
}

func FuzzAWS(f *testing.F)   { fuzz(f, "aws") }
func FuzzAzure(f *testing.F) { fuzz(f, "azure") }
func FuzzGCP(f *testing.F)   { fuzz(f, "gcp") }
func FuzzOCI(f *testing.F)   { fuzz(f, "oci") }
