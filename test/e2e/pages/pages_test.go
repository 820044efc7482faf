// Package pages follows the pages for users: it runs their commands and writes their files on nodes
// of a lab, and compares the outputs that they show. The node is isthmusd with its embedded
// WireGuard; the site has wireguard-go, wg-quick and BIRD, which are not ours. Ring: namespace;
// needs root.
package pages

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/golden"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/root"
	"github.com/isthmus-net/isthmus/test/vm"
)

const tree = "../../.."

// block is a code block of a page. The HTML comment on the line before it says what it is:
//
//	<!-- node -->                 commands on this machine of the lab
//	<!-- node exit 3 -->          commands that end with this exit code
//	<!-- node prints NAME -->     commands that print a WireGuard key: NAME in later blocks
//	<!-- node until -->           commands to repeat until they print the next block
//	<!-- output -->               what the commands before it print
//	<!-- file node NAME -->       a file where the commands run, unless NAME begins with /
//	<!-- append node NAME -->     a part to add at the end of a file
//	<!-- copy node DIRECTORY -->  names of files of the tree to copy there
//	<!-- not run: REASON -->      for the reader alone
type block struct {
	line   int
	words  []string
	text   string
	at, to int // of the text in the page
}

var (
	fence  = regexp.MustCompile("(?ms)^```[a-z]*\n(.*?)^```$")
	marker = regexp.MustCompile(`<!-- (.+) -->\n$`)
)

// parse returns the blocks of a part of a page that begins with a line. A block without a comment
// is an error, because it would not be tested.
func parse(page string, first int) (blocks []block, err error) {
	for _, m := range fence.FindAllStringSubmatchIndex(page, -1) {
		b := block{line: first + strings.Count(page[:m[0]], "\n"), text: page[m[2]:m[3]], at: m[2], to: m[3]}
		comment := marker.FindStringSubmatch(page[:m[0]])
		if comment == nil {
			return nil, fmt.Errorf("line %d: no comment says where the block belongs", b.line)
		}
		b.words = strings.Fields(comment[1])
		if b.words[0] == "output" && (len(blocks) == 0 || !blocks[len(blocks)-1].commands()) {
			return nil, fmt.Errorf("line %d: an output without commands", b.line)
		}
		blocks = append(blocks, b)
	}
	return blocks, nil
}

func (b block) commands() bool {
	return !slices.Contains([]string{"output", "file", "append", "copy", "not"}, b.words[0])
}

// used reports whether blocks have something to do on a machine.
func used(blocks []block, machine string) bool {
	return machine != "" && slices.ContainsFunc(blocks, func(b block) bool {
		return b.words[0] == machine || len(b.words) > 1 && slices.Contains(strings.Split(b.words[1], ","), machine)
	})
}

// option returns the word after another one of the comment.
func (b block) option(name string) string {
	if i := slices.Index(b.words, name); i >= 0 && i+1 < len(b.words) {
		return b.words[i+1]
	}
	return ""
}

// masks are the parts of an output that differ from one run to the next.
var masks = []struct {
	is *regexp.Regexp
	as string
}{
	{regexp.MustCompile(`[A-Za-z0-9+/]{43}=`), "KEY"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)?|\b\d\d:\d\d:\d\d(\.\d+)?\b`), "TIME"},
	{regexp.MustCompile(`= [\d./]+ ms`), "= TIMES"},
	{regexp.MustCompile(`\b(\d+(\.\d+)?(h|m|s|ms|µs))+\b|\b\d+(\.\d+)? ms\b`), "TIME"},
	{regexp.MustCompile(`\b\d+(\.\d+)?( ?[kKMGT]i?)?( ?B|iB| bytes| packets)\b`), "AMOUNT"},
	{regexp.MustCompile(`sha256:[0-9a-f]+|\b[0-9a-f]{16,64}\b`), "DIGEST"},
	{regexp.MustCompile(`:(3[2-9]|[4-6]\d)\d{3}\b`), ":PORT"},
	{regexp.MustCompile(`\(\S+, up `), "(VERSION, up "},
	{regexp.MustCompile(`(\d+/\d+)[ \t]+\d+/\d+`), "$1 MESSAGES"},
	{regexp.MustCompile(`[ \t]+`), " "},
	{regexp.MustCompile(`(?m)^ | $`), ""},
}

// shape is an output without what differs from one run to the next.
func shape(output string) string {
	for _, m := range masks {
		output = m.is.ReplaceAllString(output, m.as)
	}
	return strings.TrimSpace(output)
}

// world is what the pages assume: two nodes with public addresses, one with a network behind it,
// two sites with the same private prefix, and a partner. A page gets the machines that it names.
//
//	desk  --- site  --- net --- node --- lan
//	desk2 --- site2 --- net --- node2
//	                    net --- partner
type world struct {
	*testing.T
	lab      *lab.Lab
	machines map[string]*lab.Node
	under    map[string][]string // what runs a program on the machine
	values   map[string]string   // of the page's words in capitals
}

func (w *world) ok(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// begin makes the world. peers is where BIRD is, bin has the programs that are built.
func begin(t *testing.T, bin, peers string, blocks []block) *world {
	w := &world{T: t, machines: map[string]*lab.Node{}, under: map[string][]string{}, values: map[string]string{}}
	l, err := lab.New(lab.Options{})
	w.ok(err)
	w.lab = l
	t.Cleanup(func() { w.ok(l.Close()) })
	w.machines["net"], w.machines["partner"] = l.Node("net"), l.Node("partner")
	for _, name := range []string{"node", "node2", "site", "site2", "desk", "desk2", "lan"} {
		if used(blocks, name) || used(blocks, map[string]string{"desk2": "site2"}[name]) {
			w.machines[name] = l.Node(name)
		}
	}
	m := w.machines
	net := m["net"]
	net.Bridge("front", daemon.Prefixes("203.0.113.1/24")...)
	net.Bridge("sites", daemon.Prefixes("198.51.100.1/24")...)
	for _, x := range []struct{ name, bridge, address, gateway string }{
		{"node", "front", "203.0.113.9/24", "203.0.113.1"},
		{"node2", "front", "203.0.113.20/24", "203.0.113.1"},
		{"site", "sites", "198.51.100.7/24", "198.51.100.1"},
		{"site2", "sites", "198.51.100.8/24", "198.51.100.1"},
	} {
		if m[x.name] == nil {
			continue
		}
		net.Port(x.bridge, lab.End{Node: m[x.name], Name: "eth0", Addrs: daemon.Prefixes(x.address)})
		m[x.name].IP("route add default via %s", x.gateway)
	}
	for _, x := range []struct{ router, port, prefix, name, host string }{
		{"net", "partner", "192.0.2.1/24", "partner", "192.0.2.80/24"},
		{"node", "eth1", "10.50.0.1/24", "lan", "10.50.0.7/24"},
		{"site", "eth1", "10.20.0.1/24", "desk", "10.20.0.7/24"},
		{"site2", "eth1", "10.20.0.1/24", "desk2", "10.20.0.7/24"},
	} {
		if m[x.router] == nil || m[x.name] == nil {
			continue
		}
		l.Link(lab.End{Node: m[x.router], Name: x.port, Addrs: daemon.Prefixes(x.prefix)}, lab.End{Node: m[x.name], Name: "eth0", Addrs: daemon.Prefixes(x.host)})
		m[x.name].IP("route add default via %s", strings.TrimSuffix(x.prefix, "/24"))
	}
	w.ok(l.Up(t.Context()))
	for name := range m {
		w.files(name, bin, peers)
	}
	for _, name := range []string{"node", "node2"} {
		if m[name] == nil {
			continue
		}
		n := daemon.New(m[name], bin)
		n.Start(t)
		t.Cleanup(func() {
			if log, _ := os.ReadFile(n.Process.Log); t.Failed() {
				t.Logf("log of %s:\n%s", name, log[max(0, len(log)-6000):])
			}
		})
	}
	return w
}

// files gives a machine of the lab a file system of its own as far as the pages' commands write to
// it: /etc, /run and the directory in which they run.
func (w *world) files(name, bin, peers string) {
	w.Helper()
	n := w.machines[name]
	dir, err := n.Dir()
	w.ok(err)
	// BIRD is the guest's, run with the guest's libraries; systemctl starts it as its unit does.
	const script = `set -e
cd "$1"; tree=$2
mkdir -p etc home programs
cp -a /etc/. etc
mkdir -p etc/wireguard etc/bird
mount --bind etc /etc
mount -t tmpfs run /run
mkdir -p /run/bird "$1"
mount -c --bind . "$1"
for p in bird birdc; do
	printf '#!/bin/sh\nexec %s/usr/lib64/ld-linux-x86-64.so.2 --library-path %s/usr/lib/x86_64-linux-gnu %s/usr/sbin/%s "$@"\n' "$tree" "$tree" "$tree" $p > programs/$p
done
printf '#!/bin/sh\n[ "$*" = "restart bird" ] && exec bird -c /etc/bird/bird.conf\necho "not expected: systemctl $*" >&2; exit 1\n' > programs/systemctl
chmod +x programs/*
touch ready
exec sleep infinity`
	holder, err := n.Start("files", "unshare", "--mount", "sh", "-c", script, "sh", dir, peers)
	w.ok(err)
	path := dir + "/programs:" + bin + ":" + os.Getenv("PATH")
	w.under[name] = []string{"nsenter", "--mount", "--target", fmt.Sprint(holder.Pid()), "env", "-C", dir + "/home", "PATH=" + path,
		"ISTHMUS_SOCKET=" + dir + "/run/api.sock", "LC_ALL=C"}
	w.ok(lab.Until(w.Context(), 10*time.Second, func() error {
		_, err := os.Stat(dir + "/ready")
		return err
	}))
}

// run runs commands on a machine as a reader does, and returns their output.
func (w *world) run(b block) (string, error) {
	machine := b.words[0]
	if w.machines[machine] == nil {
		return "", fmt.Errorf("the lab has no machine %q", machine)
	}
	out, err := w.machines[machine].ExecInput(w.Context(), "exec 2>&1\n"+w.replace(b.text), append(slices.Clone(w.under[machine]), "sh", "-e", "-s")...)
	want, got := b.option("exit"), "0"
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		got = fmt.Sprint(exit.ExitCode())
	}
	switch {
	case want != "" && got != want:
		return out, fmt.Errorf("exit code %s, want %s: %w", got, want, err)
	case want == "":
		return out, err
	}
	return out, nil
}

// replace puts the values in that the page names in capitals.
func (w *world) replace(text string) string {
	for name, value := range w.values {
		text = strings.ReplaceAll(text, name, value)
	}
	return text
}

// shows reports whether an output is the page's, in which a line "..." stands for any lines.
func (w *world) shows(out string, shown *block) bool {
	var pattern strings.Builder
	for line := range strings.Lines(shape(w.replace(shown.text))) {
		if line = strings.TrimSpace(line); line == "..." {
			pattern.WriteString(`(.*\n)*`)
		} else {
			pattern.WriteString(regexp.QuoteMeta(line) + `\n`)
		}
	}
	return regexp.MustCompile("^" + pattern.String() + "$").MatchString(strings.TrimPrefix(shape(out)+"\n", "\n"))
}

// place writes a file of a page, on one machine or on several.
func (w *world) place(b block) {
	w.Helper()
	if len(b.words) != 3 {
		w.Fatalf("line %d: want machines and a name", b.line)
	}
	redirect := map[string]string{"file": ">", "append": ">>"}[b.words[0]]
	for machine := range strings.SplitSeq(b.words[1], ",") {
		_, err := w.machines[machine].ExecInput(w.Context(), w.replace(b.text), append(slices.Clone(w.under[machine]), "sh", "-c", "cat "+redirect+` "$1"`, "sh", b.words[2])...)
		w.ok(err)
	}
}

// copy copies samples of the tree to a machine.
func (w *world) copy(b block) {
	w.Helper()
	for _, name := range strings.Fields(b.text) {
		text, err := os.ReadFile(filepath.Join(tree, b.words[2], name))
		w.ok(err)
		w.place(block{line: b.line, words: []string{"file", b.words[1], name}, text: string(text)})
	}
}

// follow does what the blocks say, and returns the texts of the outputs that the page should have:
// the present ones where nothing but times, keys and amounts differ.
func (w *world) follow(blocks []block) map[int]string {
	w.Helper()
	outputs := map[int]string{}
	for i, b := range blocks {
		began := time.Now()
		switch b.words[0] {
		case "not", "output":
		case "file", "append":
			w.place(b)
		case "copy":
			w.copy(b)
		default:
			var shown *block
			if i+1 < len(blocks) && blocks[i+1].words[0] == "output" {
				shown = &blocks[i+1]
			}
			out, err := w.run(b)
			if slices.Contains(b.words, "until") {
				_ = lab.Until(w.Context(), time.Minute, func() error {
					if err == nil && w.shows(out, shown) || golden.Updating() && time.Since(began) > settled {
						return nil
					}
					out, err = w.run(b)
					return errNotYet
				})
			}
			if err != nil {
				w.Fatalf("line %d: %v\n%s", b.line, err, out)
			}
			w.Logf("line %d: %.1f s", b.line, time.Since(began).Seconds())
			if name := b.option("prints"); name != "" {
				if w.values[name] = masks[0].is.FindString(out); w.values[name] == "" {
					w.Fatalf("line %d: no key is printed: %q", b.line, out)
				}
			}
			if shown == nil {
				continue
			}
			outputs[i+1] = shown.text
			if !w.shows(out, shown) {
				for name, value := range w.values {
					out = strings.ReplaceAll(out, value, name)
				}
				outputs[i+1] = out
				w.Logf("line %d prints\n%s", b.line, out)
			}
		}
	}
	return outputs
}

// settled is how long -update waits for an output that the page does not have yet.
const settled = 15 * time.Second

var errNotYet = errors.New("another output than the page's")

// TestPages follows the pages. The quick start is one world, and each recipe is one.
func TestPages(t *testing.T) {
	root.Need(t, "network namespaces")
	image, err := vm.Build(t.Context(), t.Output())
	if err != nil {
		t.Fatal(err)
	}
	bin := daemon.Build(t, tree)
	build := exec.Command("go", "build", "-o", filepath.Join(bin, "wireguard-go"), "golang.zx2c4.com/wireguard")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building wireguard-go: %v\n%s", err, out)
	}
	for _, name := range []string{"quickstart.md", "recipes.md"} {
		file := filepath.Join(tree, "docs", name)
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var page strings.Builder
		first := 1
		for _, part := range parts(string(text)) {
			lines := strings.Count(part, "\n")
			title, _, _ := strings.Cut(strings.TrimLeft(part, "# "), "\n")
			t.Run(title, func(t *testing.T) {
				blocks, err := parse(part, first)
				if err != nil {
					t.Fatalf("%s, %q: %v", name, title, err)
				}
				if len(blocks) > 0 {
					outputs := begin(t, bin, image.Tree(), blocks).follow(blocks)
					for i, b := range slices.Backward(blocks) {
						if out, ok := outputs[i]; ok {
							part = part[:b.at] + out + part[b.to:]
						}
					}
				}
			})
			page.WriteString(part)
			first += lines
		}
		golden.Check(t, file, page.String())
	}
}

// parts splits the page of recipes, so that each recipe is complete.
func parts(page string) (parts []string) {
	if !strings.HasPrefix(page, "# Recipes") {
		return []string{page}
	}
	for {
		i := strings.Index(page[1:], "\n## ")
		if i < 0 {
			return append(parts, page)
		}
		parts, page = append(parts, page[:i+2]), page[i+2:]
	}
}
