package main

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
)

// fleet is a home without contexts, and nodes that a context file exists for.
type fleet struct {
	t    *testing.T
	home string
}

// contextFile returns a context file for a node, with its address.
func (f *fleet) contextFile(s *apitest.Server) string {
	f.t.Helper()
	c, err := readContext(s.Context)
	if err != nil {
		f.t.Fatal(err)
	}
	c.Address = s.Address
	file := filepath.Join(f.t.TempDir(), "admin.yaml")
	if err := writeContext(file, c); err != nil {
		f.t.Fatal(err)
	}
	return file
}

func (f *fleet) run(line string) (stdout, stderr string, code int) {
	var out, errs bytes.Buffer
	a := &app{
		stdin: strings.NewReader(""), stdout: &out, stderr: &errs, now: func() time.Time { return noon }, wall: time.Now, uid: 1000,
		getenv: func(k string) string { return map[string]string{"HOME": f.home}[k] },
	}
	code = a.run(f.t.Context(), strings.Fields(line))
	return out.String(), errs.String(), code
}

// must runs a command that succeeds, and returns what it prints on standard output.
func (f *fleet) must(line string) string {
	f.t.Helper()
	out, errs, code := f.run(line)
	if code != 0 {
		f.t.Fatalf("%s: exit %d, %s", line, code, errs)
	}
	return out
}

// refused runs a command that fails with a text in its message.
func (f *fleet) refused(line, says string) {
	f.t.Helper()
	if out, errs, code := f.run(line); code == 0 || !strings.Contains(errs, says) {
		f.t.Errorf("%s: exit %d, want %q:\n%s%s", line, code, says, out, errs)
	}
}

func serve(t *testing.T) *apitest.Server {
	r := apitest.New(func() time.Time { return noon.Add(-time.Hour) })
	fill(r)
	return apitest.Serve(t, time.Now, r)
}

// TestContexts: contexts are imported under the names of their nodes, listed, chosen, renamed and
// used for single commands.
func TestContexts(t *testing.T) {
	f := &fleet{t, t.TempDir()}
	f.refused("context use hub", `context "hub": not found`)
	f.refused("get tunnels", "see isthmus context import")
	if out, errs, code := f.run("context list"); code != 0 || out != "" || !strings.Contains(errs, "no contexts") {
		t.Errorf("no contexts: exit %d, %s%s", code, out, errs)
	}
	first, second := serve(t), serve(t)
	file := f.contextFile(first)
	f.must("context import " + file)
	named := filepath.Join(f.home, ".config/isthmus/contexts/node-1.yaml")
	if info, err := os.Stat(named); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the context has the name of the node: %v, %v", info, err)
	}
	f.must("get tunnels")
	f.refused("context import "+file, "node-1.yaml exists already: replace it with --overwrite, or choose another name with --name")
	f.must("context import --overwrite " + file)
	f.refused("context import --name ../x "+file, "must be 1 to 63 letters")
	f.refused("context import --name default "+file, "must be 1 to 63 letters")
	if _, errs, _ := f.run("context import --name hub-2 " + f.contextFile(second)); !strings.Contains(errs, "isthmus context use hub-2") {
		t.Errorf("importing another one says %s", errs)
	}
	if out := f.must("context list -o name"); out != "hub-2\nnode-1\n" {
		t.Errorf("contexts are %q", out)
	}
	current := func(want string) {
		t.Helper()
		for line := range strings.Lines(f.must("context list --no-headers")) {
			if words := strings.Fields(line); (words[1] == "*") != (words[0] == want) {
				t.Errorf("%s is to be in use:\n%s", want, line)
			}
		}
	}
	current("node-1")
	second.Router.SetTunnels()
	if out := f.must("get tunnels --node hub-2 -o name"); out != "" {
		t.Errorf("--node asks another node, and gets %s", out)
	}
	f.refused("get tunnels --node hub-1", `context "hub-1": not found; did you mean hub-2?`)
	f.refused("get tunnels --node hub-2 --context x", "--node cannot be used together")
	f.must("context use hub-2")
	current("hub-2")
	var rows []contextRow
	if err := json.Unmarshal([]byte(f.must("context list -o json")), &rows); err != nil || len(rows) != 2 || !rows[0].Current || rows[1].Role != "admin" || rows[1].Address != first.Address {
		t.Errorf("as JSON: %v, %+v", err, rows)
	}
	broken := filepath.Join(f.home, ".config/isthmus/contexts/broken.yaml")
	if err := os.WriteFile(broken, []byte("address: x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, errs, code := f.run("context list"); code != 1 || !strings.Contains(out, "hub-2") || errs != "isthmus: reading context broken: certificate is not in PEM\n" {
		t.Errorf("with a broken context: exit %d, %s%s", code, out, errs)
	}
	if err := os.Remove(broken); err != nil {
		t.Fatal(err)
	}
	f.must("context rename hub-2 edge")
	current("edge")
	f.refused("context rename edge node-1", "there is a context called node-1 already")
	if out := f.must("context show node-1"); !strings.Contains(out, "address: "+first.Address) {
		t.Errorf("the context is\n%s", out)
	}
	if words, _ := f.completions("get tunnels --node "); words != "edge node-1" {
		t.Errorf("completions are %s", words)
	}
}

func (f *fleet) completions(line string) (words, directive string) {
	var out bytes.Buffer
	a := &app{stdout: &out, stderr: &bytes.Buffer{}, now: time.Now, wall: time.Now, uid: 1000, getenv: func(k string) string { return map[string]string{"HOME": f.home}[k] }}
	a.run(f.t.Context(), append([]string{"__completeNoDesc"}, strings.Split(line, " ")...))
	all := strings.Fields(out.String())
	return strings.Join(all[:len(all)-1], " "), all[len(all)-1]
}

// TestOldContext: the single file of former versions goes on working, and becomes a named context
// by renaming.
func TestOldContext(t *testing.T) {
	f := &fleet{t, t.TempDir()}
	s := serve(t)
	dir := filepath.Join(f.home, ".config/isthmus")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(f.contextFile(s), filepath.Join(dir, "context.yaml")); err != nil {
		t.Fatal(err)
	}
	f.must("get tunnels")
	if out := f.must("context list -o name"); out != "default\n" {
		t.Errorf("contexts are %q", out)
	}
	f.must("context import --name other " + f.contextFile(s)) // does not take over
	if out := f.must("context show"); !strings.Contains(out, "context.yaml") {
		t.Errorf("in use is\n%s", out)
	}
	f.must("context use other")
	f.must("context use default")
	f.must("context rename default hub-1")
	if out := f.must("context show"); !strings.Contains(out, "contexts/hub-1.yaml") {
		t.Errorf("in use is\n%s", out)
	}
	f.must("get tunnels")
}

// TestImportWithoutNode: a node that does not answer is called by its address.
func TestImportWithoutNode(t *testing.T) {
	f := &fleet{t, t.TempDir()}
	s := serve(t)
	out, errs, code := f.run("--timeout 200ms --address 127.0.0.1:1 context import " + f.contextFile(s))
	if code != 0 || !strings.Contains(errs, "does not answer") || !strings.Contains(errs, "contexts/127.0.0.1.yaml") {
		t.Errorf("exit %d, %s%s", code, out, errs)
	}
	if out := f.must("context list"); !strings.Contains(out, "127.0.0.1:1 ") {
		t.Errorf("contexts are\n%s", out)
	}
}

// TestAllNodes: -A shows the objects of all nodes, and those that do not answer as errors.
func TestAllNodes(t *testing.T) {
	f := &fleet{t, t.TempDir()}
	f.refused("get tunnels -A", "there are no contexts")
	first, second := serve(t), serve(t)
	f.must("context import --name hub-1 " + f.contextFile(first))
	f.must("context import --name hub-2 " + f.contextFile(second))
	second.Router.SetTunnels(&isthmusv1.TunnelStatus{Name: "only-2", State: "up"})
	rows := func(line string) (out []string) {
		t.Helper()
		for l := range strings.Lines(f.must(line)) {
			words := strings.Fields(l)
			out = append(out, strings.Join(words[:min(2, len(words))], " "))
		}
		return out
	}
	if got, want := strings.Join(rows("get tunnels -A"), ", "), "NODE TUNNEL, hub-1 aws-0, hub-1 site-0, hub-1 vwan-1, hub-2 only-2"; got != want {
		t.Errorf("tunnels: %s, want %s", got, want)
	}
	if got, want := strings.Join(rows("get tunnels only-2 aws-0 -A --no-headers"), ", "), "hub-1 aws-0, hub-2 only-2"; got != want {
		t.Errorf("named tunnels: %s, want %s", got, want)
	}
	f.refused("get tunnels none aws-0 -A", `tunnel "none": not found on any node`)
	if out := f.must("get pools -A -o name"); out != "hub-1/main\nhub-2/main\n" {
		t.Errorf("names: %s", out)
	}
	if got, want := strings.Join(rows("get status --all-nodes"), ", "), "NODE NODE, hub-1 node-1, hub-2 node-1"; got != want {
		t.Errorf("status: %s, want %s", got, want)
	}
	f.refused("get tunnels -A --node hub-1", "--all-nodes cannot be used together")
	if out, errs, code := f.run("get tunnels -A -w"); code != 2 {
		t.Errorf("-A -w: exit %d, %s%s", code, out, errs)
	}

	f.run("--timeout 200ms --address 127.0.0.1:1 context import --name gone " + f.contextFile(first))
	out, errs, code := f.run("get tunnels -A --no-headers")
	if code != 1 || strings.Count(out, "\n") != 4 || !strings.HasPrefix(errs, "isthmus: gone: the daemon at 127.0.0.1:1 cannot be reached") || strings.Count(errs, "\n") != 1 {
		t.Errorf("with a node that is away: exit %d, %s%s", code, out, errs)
	}
	out, _, code = f.run("get tunnels -A -o json")
	var answers []struct {
		Node, Error string
		Answer      struct{ Tunnels []struct{ Name string } }
	}
	if err := json.Unmarshal([]byte(out), &answers); err != nil || code != 1 || len(answers) != 3 || answers[0].Error == "" || len(answers[1].Answer.Tunnels) != 3 || answers[2].Node != "hub-2" {
		t.Errorf("as JSON: exit %d, %v, %s", code, err, out)
	}
}

// TestOtherAuthority: a context of another node is refused in words, by whichever side notices
// first.
func TestOtherAuthority(t *testing.T) {
	f := &fleet{t, t.TempDir()}
	first, second := serve(t), serve(t)
	file := f.contextFile(first)
	f.refused("get tunnels --context "+file+" --address "+second.Address, "isthmus: the node at "+second.Address+" has a certificate of another authority than the context: the context is for another node, or of a former authority; import a new one with isthmus context import\n")
	mine, theirs := mustContext(t, file), mustContext(t, second.Context)
	mine.Authority, mine.Address = theirs.Authority, second.Address
	file = filepath.Join(t.TempDir(), "mixed.yaml")
	if err := writeContext(file, mine); err != nil {
		t.Fatal(err)
	}
	f.refused("get tunnels --context "+file, "isthmus context show\n")
}

// TestWarnOfEndNamesTheNode: the command that a warning gives renews the certificate that it is
// about.
func TestWarnOfEndNamesTheNode(t *testing.T) {
	var errs bytes.Buffer
	a := &app{nodeName: "hub-1", stderr: &errs, wall: func() time.Time { return noon }}
	a.warnOfEnd("hub-1.yaml", &x509.Certificate{NotBefore: noon.Add(-364 * 24 * time.Hour), NotAfter: noon.Add(10 * 24 * time.Hour)})
	if !strings.Contains(errs.String(), "run: isthmus client renew --node hub-1\n") {
		t.Errorf("it says %s", errs.String())
	}
}
