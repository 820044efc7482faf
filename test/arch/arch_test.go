// Package arch checks the structure of the tree: it reads the imports of each room and compares
// them with a few rules.
package arch

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/test/golden"
)

const module = "github.com/isthmus-net/isthmus/"

type pkg struct {
	ImportPath string
	Name       string
	Imports    []string
	GoFiles    []string
}

func packages(t *testing.T) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Name,Imports,GoFiles", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]pkg{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimPrefix(p.ImportPath, module)] = p
	}
	return all
}

// foreign libraries, by the beginning of their path, and who may import them.
var importers = map[string][]string{
	"github.com/osrg/gobgp/":         {"bgp/gobgp"},
	"github.com/strongswan/govici/":  {"tunnel/ipsec"},
	"golang.zx2c4.com/wireguard":     {"tunnel/wireguard"},
	"github.com/vishvananda/netlink": {"router/link"},
	"github.com/google/nftables":     {"nat/nftables"},
	"github.com/coreos/go-systemd/":  {"cmd/isthmusd"},
	"github.com/spf13/cobra":         {"cmd/isthmus"},
	"golang.org/x/crypto/ssh":        {"router/spec"},
	"aead.dev/minisign":              {"image/slot"},
	"github.com/google/go-tpm/":      {"image/tpm"},
	"github.com/CycloneDX/":          {"image/build"},
	"github.com/hashicorp/hcl/":      {}, // tests alone read Terraform
	"go.yaml.in/yaml/":               {"router/spec", "cmd/isthmus", "tunnel/cloud/importer"},
	"golang.org/x/net/icmp":          {"router/egress/health", "router/echo"},
	"golang.org/x/net/bpf":           {"router/sockfilter", "tunnel/ipsec", "router/echo", "router/packets", "nat/conntrack", "router/fib/kernel"},
	"golang.org/x/net/dns/":          {"router/egress/dns"},
	"k8s.io/client-go/":              {"cmd/isthmus"},
	"golang.org/x/term":              {"cmd/isthmus"},
	"google.golang.org/grpc/":        {"router/api", "router/auth", "router/reason", "cmd/isthmus", "proto/isthmus/v1"},
	"google.golang.org/genproto/":    {"router/reason"},
}

func TestOneImporter(t *testing.T) {
	for name, p := range packages(t) {
		if strings.HasPrefix(name, "test/") {
			continue
		}
		for _, imported := range p.Imports {
			for library, rooms := range importers {
				inside := slices.ContainsFunc(rooms, func(r string) bool { return name == r || strings.HasPrefix(name, r+"/") })
				if strings.HasPrefix(imported, library) && !inside {
					t.Errorf("%s imports %s, which belongs to %v", name, imported, rooms)
				}
			}
		}
	}
}

// below lists what a room of the project may import of the project. A room that is not listed may
// import nothing.
var below = map[string][]string{
	"router/secret":     {},
	"router/disk":       {},
	"router/sockfilter": {},
	"router/netlink":    {},
	"router/echo":       {"router/sockfilter"},
	"router/packets":    {"router/sockfilter"},
	"router/lane/stamp": {},
	"router/lane":       {"router/lane/stamp", "router/backoff"},
	"router/lane/proof": {"router/lane", "router/lane/stamp", "router/echo"},
	"router/backoff":    {},
	"tunnel":            {"router/secret"},
	"tunnel/apipa":      {},
	"tunnel/cloud":      {"tunnel/apipa"},
	// The only room that has both the observations of a driver and the properties of a cloud.
	"tunnel/explain": {"tunnel", "tunnel/cloud"},

	"tunnel/cloud/importer": {"tunnel/cloud"},

	"tunnel/liveness": {"tunnel", "router/echo"},

	"tunnel/ipsec":           {"tunnel", "router/backoff", "router/disk", "router/secret", "router/sockfilter", "router/link"},
	"tunnel/wireguard":       {"tunnel", "router/secret", "router/link"},
	"bgp":                    {"router/secret"},
	"bgp/filter":             {},
	"bgp/relay":              {"bgp/filter"},
	"bgp/gobgp":              {"bgp", "bgp/filter", "bgp/relay", "router/backoff", "router/netlink", "router/secret"},
	"nat":                    {},
	"nat/conntrack":          {"nat", "router/sockfilter", "router/netlink"},
	"router/egress":          {},
	"router/door":            {"nat", "router/bell"},
	"router/egress/takeover": {"router/backoff", "router/egress"},
	"nat/nftables":           {"nat", "nat/nftables/reach", "router/netlink"},
	"nat/nftables/reach":     {"nat"},
	"nat/placement":          {"nat"},
	"router/egress/translog": {"router/disk", "router/egress", "nat", "nat/conntrack"},
	"router/fib":             {"router/backoff"},
	"router/fib/kernel":      {"router/fib", "router/sockfilter", "router/netlink"},
	"router/link":            {"router/fib", "tunnel"},
	"router/host":            {"router/disk", "router/netlink"},
	"router/platform":        {"router/backoff"},
	"router/firstboot":       {"proto/isthmus/v1", "router/condition", "router/auth", "router/platform", "router/spec", "router/store", "router/disk"},
	"router/egress/health":   {"router/egress"},
	"router/egress/dns":      {"router/egress", "nat", "router/disk", "router/backoff"},
	"router/store":           {"router/secret", "router/disk"},
	"router/event":           {"proto/isthmus/v1", "router/bell", "router/condition"},
	"router/event/export":    {"nat", "router/backoff", "router/bell", "router/disk", "router/event", "router/secret"},
	"router/auth":            {"proto/isthmus/v1", "router/condition", "router/reason", "router/store", "router/disk"},
	"router/spec":            {"proto/isthmus/v1", "bgp", "nat", "tunnel", "tunnel/apipa", "tunnel/cloud", "router/secret", "router/egress"},
	"router/topology":        {"proto/isthmus/v1", "router/spec", "router/secret", "tunnel/apipa", "tunnel/cloud"},
	"router/plan":            {"proto/isthmus/v1", "bgp", "nat", "tunnel", "tunnel/apipa", "tunnel/cloud", "router/fib", "router/spec", "router/secret", "router/egress"},
	// The stages: none imports a later one.
	"router/condition": {"proto/isthmus/v1"},
	"router/bell":      {}, "router/fault": {}, "router/reason": {},
	"router/live":        {"bgp", "nat", "router/egress", "router/fib", "router/plan", "router/spec"},
	"router/apply":       {"bgp", "nat", "nat/conntrack", "tunnel", "router/backoff", "router/egress", "router/fib", "router/live", "router/plan"},
	"router/observe":     {"bgp", "nat", "nat/conntrack", "tunnel", "tunnel/liveness", "router/bell", "router/egress/dns", "router/egress/health", "router/fib", "router/live", "router/plan", "router/spec"},
	"router/ports":       {"nat", "nat/conntrack", "nat/placement"},
	"router/document":    {"proto/isthmus/v1", "bgp", "nat", "tunnel/explain", "router/fault", "router/fib", "router/plan", "router/secret", "router/spec", "router/store"},
	"router/capability":  {"router/lane", "tunnel", "proto/isthmus/v1", "nat", "nat/placement", "router/api", "router/apply", "router/condition", "router/document", "router/door", "router/egress", "router/egress/dns", "router/egress/health", "router/egress/takeover", "router/egress/translog", "router/event", "router/event/export", "router/fault", "router/live", "router/observe", "router/plan", "router/ports", "router/secret", "router/spec", "router/store"},
	"router/report":      {"proto/isthmus/v1", "bgp", "nat", "nat/conntrack", "tunnel", "tunnel/explain", "router/api", "router/apply", "router/bell", "router/capability", "router/condition", "router/document", "router/echo", "router/event", "router/event/export", "router/fault", "router/fib", "router/live", "router/observe", "router/packets", "router/plan", "router/spec", "router/store"},
	"router/metrics":     {"proto/isthmus/v1", "nat", "router/condition", "router/report"},
	"router":             {"router/lane/proof", "proto/isthmus/v1", "bgp", "nat", "tunnel", "tunnel/liveness", "router/apply", "router/bell", "router/capability", "router/document", "router/door", "router/echo", "router/egress", "router/egress/dns", "router/egress/health", "router/egress/takeover", "router/event", "router/event/export", "router/fib", "router/live", "router/observe", "router/packets", "router/plan", "router/ports", "router/report", "router/spec", "router/store"},
	"image/slot":         {},
	"image/tpm":          {},
	"image/helper":       {"image/slot"},
	"image/build":        {"image/slot"},
	"image/figures":      {},
	"router/machine":     {"proto/isthmus/v1", "router/condition", "router/api", "router/store", "image/helper", "image/slot"},
	"cmd/isthmus-system": {"image/helper", "image/slot", "image/tpm"},
	"router/noun":        {},
	"router/logs":        {"router/bell"},
	"router/api":         {"proto/isthmus/v1", "router/auth", "router/event", "router/fault", "router/logs", "router/noun", "router/reason", "router/store", "router/secret", "bgp"},
	"proto/isthmus/v1":   {},
	// Presets, importers and topologies are data and pure functions, which work without a node.
	"cmd/isthmus": {"proto/isthmus/v1", "router/condition", "router/event", "router/logs", "router/noun", "tunnel/cloud", "tunnel/cloud/importer", "router/topology", "router/spec", "router/disk"},
}

func TestArrowsPointDown(t *testing.T) {
	for name, p := range packages(t) {
		if strings.HasPrefix(name, "test/") || strings.HasSuffix(name, "test") || name == "cmd/isthmusd" || name == "image/cmd/image" {
			// these may import everything: tests, their helper packages, the wiring of the daemon,
			// and the build of the image
			continue
		}
		allowed, known := below[name]
		if !known {
			t.Errorf("%s is a room without a rule: add what it may import", name)
		}
		for _, imported := range p.Imports {
			of, ours := strings.CutPrefix(imported, module)
			if ours && !slices.Contains(allowed, of) {
				t.Errorf("%s imports %s", name, of)
			}
			if ours && (strings.HasPrefix(of, "test/") || strings.HasSuffix(of, "test") || strings.HasPrefix(of, "cmd/")) {
				t.Errorf("%s imports %s, which is not for it", name, of)
			}
		}
	}
}

// TestDriversKeepTheirShape checks that a driver has the files in which a reader expects its parts.
func TestDriversKeepTheirShape(t *testing.T) {
	all := packages(t)
	for _, name := range []string{"tunnel/ipsec", "tunnel/wireguard", "nat/nftables", "bgp/gobgp", "router/fib/kernel"} {
		for _, file := range []string{"compile.go", "decode.go", "driver.go"} {
			if !slices.Contains(all[name].GoFiles, file) {
				t.Errorf("%s has no %s", name, file)
			}
		}
	}
	for _, name := range []string{"tunnel", "bgp", "nat", "router/fib"} {
		for _, file := range []string{"config.go", "state.go", "driver.go"} {
			if !slices.Contains(all[name].GoFiles, file) {
				t.Errorf("%s has no %s", name, file)
			}
		}
	}
}

// TestClientHasNoSockets checks that the command line, which checks documents, links nothing that
// reads or writes the kernel.
func TestClientHasNoSockets(t *testing.T) {
	cmd := exec.Command("go", "list", "-deps", "./cmd/isthmus")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	engines := []string{"nat/conntrack", "router/echo", "router/packets", "router/egress/dns", "router/egress/health", "router/egress/takeover", "router/egress/translog"}
	for _, name := range strings.Fields(string(out)) {
		room, ours := strings.CutPrefix(name, module)
		if strings.Contains(name, "/netlink") || strings.Contains(name, "/nftables") || ours && slices.Contains(engines, room) {
			t.Errorf("cmd/isthmus links %s", name)
		}
	}
}

// TestRooms checks that the table of rooms in docs/architecture.md agrees with the comments of the
// packages.
func TestRooms(t *testing.T) {
	cmd := exec.Command("go", "list", "-f", "{{.ImportPath}}\t{{.Doc}}", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	table.WriteString("| room | what lives there |\n| --- | --- |\n")
	for line := range strings.Lines(string(out)) {
		path, doc, _ := strings.Cut(strings.TrimSpace(line), "\t")
		room := strings.TrimPrefix(path, module)
		words := strings.Fields(doc)
		if room == "proto/isthmus/v1" { // its comment is generated
			words = strings.Fields("Package v1 is the schema of the document and of the API, with generated Go.")
		}
		if len(words) < 3 || words[0] != "Package" && words[0] != "Command" {
			if !strings.HasPrefix(room, "test/") { // packages of tests alone have none
				t.Errorf("%s has no comment that begins with Package or Command", room)
			}
			continue
		}
		text := strings.Join(words[2:], " ")
		fmt.Fprintf(&table, "| `%s` | %s |\n", room, strings.ToUpper(text[:1])+text[1:])
	}
	const file, begin, end = "../../docs/architecture.md", "<!-- rooms -->\n", "<!-- end of rooms -->"
	page, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, found := strings.Cut(string(page), begin)
	_, tail, ended := strings.Cut(rest, end)
	if !found || !ended {
		t.Fatalf("%s has no table of rooms", file)
	}
	golden.Check(t, file, head+begin+table.String()+end+tail)
}
