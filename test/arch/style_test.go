package arch

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// plain lists the rooms and pages that follow docs/style.md and must keep to it. The list only
// grows: rewrite a room, then add it.
var plain = []string{
	"CONTRIBUTING.md",
	"README.md",
	"bgp",
	"bgp/filter",
	"bgp/gobgp",
	"bgp/relay",
	"cmd/isthmus",
	"cmd/isthmus-system",
	"cmd/isthmusd",
	"docs/architecture.md",
	"docs/benchmarks.md",
	"docs/decisions/README.md",
	"docs/decisions/bgp-process.md",
	"docs/decisions/bounded-documents.md",
	"docs/decisions/charon-restart.md",
	"docs/decisions/daemon-user.md",
	"docs/decisions/doors.md",
	"docs/decisions/egress-health.md",
	"docs/decisions/egress-proof.md",
	"docs/decisions/egress-rules.md",
	"docs/decisions/flowtables.md",
	"docs/decisions/forwarding.md",
	"docs/decisions/image.md",
	"docs/decisions/one-schema.md",
	"docs/decisions/own-retries.md",
	"docs/decisions/placement.md",
	"docs/decisions/policy-edits.md",
	"docs/decisions/safe-start.md",
	"docs/decisions/seal.md",
	"docs/decisions/sides.md",
	"docs/decisions/state-format.md",
	"docs/decisions/takeover.md",
	"docs/decisions/translation-log.md",
	"docs/decisions/tunnel-is-next-hop.md",
	"docs/install/README.md",
	"docs/install/aws.md",
	"docs/install/azure.md",
	"docs/install/debian.md",
	"docs/install/first-boot.md",
	"docs/install/gcp.md",
	"docs/install/kvm.md",
	"docs/metrics.md",
	"docs/operations.md",
	"docs/quickstart.md",
	"docs/recipes.md",
	"docs/security.md",
	"docs/testing.md",
	"docs/topology.md",
	"docs/troubleshooting.md",
	"image/build",
	"image/cmd/image",
	"image/debtest",
	"image/figures",
	"image/helper",
	"image/slot",
	"image/tpm",
	"nat",
	"nat/conntrack",
	"nat/nftables",
	"nat/nftables/reach",
	"nat/placement",
	"proto/isthmus/v1",
	"router",
	"router/api",
	"router/api/apitest",
	"router/apply",
	"router/auth",
	"router/bell",
	"router/capability",
	"router/condition",
	"router/document",
	"router/echo",
	"router/egress",
	"router/egress/dns",
	"router/egress/health",
	"router/egress/takeover",
	"router/egress/translog",
	"router/event",
	"router/fault",
	"router/fib",
	"router/fib/kernel",
	"router/firstboot",
	"router/host",
	"router/lane",
	"router/lane/proof",
	"router/lane/stamp",
	"router/link",
	"router/link/linktest",
	"router/live",
	"router/logs",
	"router/machine",
	"router/metrics",
	"router/noun",
	"router/observe",
	"router/plan",
	"router/platform",
	"router/ports",
	"router/report",
	"router/secret",
	"router/sockfilter",
	"router/sockfilter/sockfiltertest",
	"router/spec",
	"router/store",
	"router/store/testdata/make",
	"router/topology",
	"test/appliance",
	"test/arch",
	"test/bench",
	"test/crowd",
	"test/e2e",
	"test/e2e/clouds",
	"test/e2e/daemon",
	"test/e2e/egress",
	"test/e2e/firstboot",
	"test/e2e/health",
	"test/e2e/hostile",
	"test/e2e/limits",
	"test/e2e/metrics",
	"test/e2e/native",
	"test/e2e/pages",
	"test/e2e/pair",
	"test/e2e/rendered",
	"test/e2e/takeover",
	"test/e2e/unit",
	"test/e2e/walk",
	"test/golden",
	"test/lab",
	"test/netns",
	"test/peer",
	"test/rendered",
	"test/root",
	"test/run",
	"test/swtpm",
	"test/traffic",
	"test/vm",
	"test/vm/cmd/vm",
	"tunnel",
	"tunnel/apipa",
	"tunnel/cloud",
	"tunnel/cloud/importer",
	"tunnel/explain",
	"tunnel/ipsec",
	"tunnel/wireguard",
}

// phrases are the patterns of docs/style.md that a program can find, each with what to write.
var phrases = []struct {
	pattern *regexp.Regexp
	instead string
}{
	{regexp.MustCompile(`(?i)\b(nobody|somebody|whoever|whomever)\b`), "name the component"},
	{regexp.MustCompile(`(?i)\b(is|are|was|were|be|been) told\b`), "say what the component receives"},
	{regexp.MustCompile(`(?i)\bhears?\b`), "receives, reads or notices"},
	{regexp.MustCompile(`(?i)\b(knows?|knew) of\b`), "has, lists or has seen"},
	{regexp.MustCompile(`(?i)\bof which\b`), "start a second sentence"},
	{regexp.MustCompile(`(?i)\banew\b`), "again"},
	{regexp.MustCompile(`(?i)\bfor ever\b`), "forever, or say how long"},
	{regexp.MustCompile(`(?i)\bin the mean\b`), "on average"},
	{regexp.MustCompile(`(?i)\bmend(s|ed|ing)?\b`), "fix, correct or repair"},
	{regexp.MustCompile(`(?i)\bbeside\b`), "besides, next to or together with"},
	{regexp.MustCompile(`(^|[.:] )What [^?.]*([.]|$)`), "start the sentence with its subject"},
	{regexp.MustCompile(`(?i)\b(is|are) no [a-z]+`), "is not a valid X, or has no X"},
}

// correct are phrases that a pattern finds although they are good English.
var correct = regexp.MustCompile(`(?i)\bthere (is|are) no |\b(is|are) no (longer|more|less|better|worse|different)\b`)

// maxColumns is the width of a line that ends in a comment; a tab counts four.
const maxColumns = 100

// examples are the variables of this file whose texts are against docs/style.md on purpose.
var examples = []string{"phrases", "refused", "refusedGo", "refusedProto", "refusedPage"}

// offences returns the phrases of a text that docs/style.md forbids.
func offences(text string) []string {
	text = correct.ReplaceAllString(strings.Join(strings.Fields(text), " "), "…")
	var found []string
	for _, p := range phrases {
		if hit := p.pattern.FindString(text); hit != "" {
			found = append(found, strconv.Quote(hit)+": "+p.instead)
		}
	}
	return found
}

// styleOf returns the offences in the comments and strings of a Go file, with their lines.
func styleOf(t *testing.T, name string, source []byte) []string {
	t.Helper()
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, name, source, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	if ast.IsGenerated(file) {
		return nil
	}
	var found []string
	report := func(at token.Pos, what []string) {
		for _, w := range what {
			found = append(found, set.Position(at).String()+": "+w)
		}
	}
	lines := strings.Split(strings.ReplaceAll(string(source), "\t", "    "), "\n")
	for _, group := range file.Comments {
		report(group.Pos(), offences(group.Text()))
		for _, c := range group.List {
			for i := range strings.Split(c.Text, "\n") {
				line := set.Position(c.Pos()).Line + i
				if n := len([]rune(lines[line-1])); n > maxColumns && !strings.HasPrefix(c.Text, "//go:") {
					report(c.Pos(), []string{"line " + strconv.Itoa(line) + " has " + strconv.Itoa(n) + " columns"})
				}
			}
		}
	}
	tags := map[*ast.BasicLit]bool{}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ImportSpec:
			return false
		case *ast.ValueSpec:
			if filepath.ToSlash(name) == "test/arch/style_test.go" && slices.Contains(examples, n.Names[0].Name) {
				return false
			}
		case *ast.Field:
			tags[n.Tag] = true
		case *ast.BasicLit:
			if text, err := strconv.Unquote(n.Value); err == nil && n.Kind == token.STRING && !tags[n] {
				report(n.Pos(), offences(text))
			}
		}
		return true
	})
	return found
}

// styleOfProto returns the offences in the comments of a .proto file, with their first lines. All
// comments there stand above a declaration, none behind one.
func styleOfProto(name string, source []byte) []string {
	var found, group []string
	for i, line := range strings.Split(string(source)+"\n", "\n") {
		comment, ok := strings.CutPrefix(strings.TrimSpace(line), "//")
		if ok {
			group = append(group, comment)
			if n := len([]rune(line)); n > maxColumns {
				found = append(found, name+":"+strconv.Itoa(i+1)+": the line has "+strconv.Itoa(n)+" columns")
			}
			continue
		}
		for _, what := range offences(strings.Join(group, " ")) {
			found = append(found, name+":"+strconv.Itoa(i+1-len(group))+": "+what)
		}
		group = nil
	}
	return found
}

var (
	fence  = regexp.MustCompile("(?s)```.*?```|<!-- rooms -->.*<!-- end of rooms -->|\nThis page is made from .*")
	inline = regexp.MustCompile("`[^`]*`")
)

// styleOfPage returns the offences in the prose of a page: paragraphs, rows and headings, without
// code and generated parts.
func styleOfPage(name string, source []byte) []string {
	prose := inline.ReplaceAllString(fence.ReplaceAllString(string(source), ""), "`code`")
	prose = regexp.MustCompile(`(?m)^(\||[-*] |#)`).ReplaceAllString(prose, "\n$1")
	var found []string
	for _, paragraph := range strings.Split(prose, "\n\n") {
		for _, cell := range strings.Split(paragraph, "|") {
			for _, what := range offences(strings.TrimLeft(cell, "#-* ")) {
				found = append(found, name+": "+what)
			}
		}
	}
	return found
}

// refused has a text for each of phrases.
var refused = []string{
	"the key that Nobody has", "the driver is told the key", "it hears a message", "it knows of a peer",
	"pools of which flows end", "it begins anew", "it waits for ever", "0.11 s in the mean", "mend the syntax",
	"the clock beside it", "It waits. What uses it is changed at once.", `"x" is no prefix`,
}

// refusedGo has two offences, a comment and a string, refusedProto two comments, and refusedPage a
// cell.
var (
	refusedGo    = "package p\n\n// " + strings.Repeat("x", 100) + "\nvar s = \"is no name\"\n\ntype t struct {\n\tF int `x:\"is no name\"`\n}\n"
	refusedProto = "// The key\n// that somebody has.\nmessage M {\n  string what = 1;\n  // " + strings.Repeat("x", 100) + "\n}\n"
	refusedPage  = "It runs `is no name`.\n\n```\n` beside\n```\n\n| a | beside it |\n"
)

// TestOffences checks that each pattern finds its phrase, and that none finds good English.
func TestOffences(t *testing.T) {
	if len(refused) != len(phrases) {
		t.Fatalf("%d texts for %d patterns", len(refused), len(phrases))
	}
	for i, text := range refused {
		if !phrases[i].pattern.MatchString(text) || len(offences(text)) != 1 {
			t.Errorf("%q: %q", text, offences(text))
		}
	}
	for _, text := range []string{
		"the peer is no longer up", "there is no route", "in the meantime", "besides it", "the amendment", "What now? Wait.",
	} {
		if found := offences(text); found != nil {
			t.Errorf("%q: %q", text, found)
		}
	}
	if found := styleOf(t, "p.go", []byte(refusedGo)); len(found) != 2 {
		t.Errorf("a comment and a string: %q", found)
	}
	if found := styleOf(t, "p.pb.go", []byte("// Code generated by x. DO NOT EDIT.\n"+refusedGo)); found != nil {
		t.Errorf("a generated file: %q", found)
	}
	if found := styleOfProto("p.proto", []byte(refusedProto)); len(found) != 2 || !strings.HasPrefix(found[0], "p.proto:1:") {
		t.Errorf("a .proto file: %q", found)
	}
	if found := styleOfPage("p.md", []byte(refusedPage)); len(found) != 1 {
		t.Errorf("a page: %q", found)
	}
}

func TestStyle(t *testing.T) {
	for _, room := range plain {
		at := filepath.Join("../..", room)
		files, err := filepath.Glob(filepath.Join(at, "*.go"))
		if strings.HasSuffix(room, ".md") {
			files = []string{at}
		}
		protos, _ := filepath.Glob(filepath.Join(at, "*.proto"))
		files = append(files, protos...)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s has no files: %v", room, err)
		}
		for _, name := range files {
			source, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			found := styleOfPage
			switch filepath.Ext(name) {
			case ".proto":
				found = styleOfProto
			case ".go":
				found = func(name string, source []byte) []string { return styleOf(t, name, source) }
			}
			for _, what := range found(strings.TrimPrefix(name, "../../"), source) {
				t.Error(what)
			}
		}
	}
}
