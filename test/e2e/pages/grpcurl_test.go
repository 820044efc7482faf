package pages

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/root"
)

// grpcurl is the client of the session in docs/api.md.
const grpcurl = "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4"

// TestGRPCurl runs the session in docs/api.md. Each command must print a word of its answer.
func TestGRPCurl(t *testing.T) {
	root.Need(t, "network namespaces")
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	bin := daemon.Build(t, tree)
	install := exec.Command("go", "install", grpcurl)
	install.Env = append(os.Environ(), "CGO_ENABLED=0", "GOBIN="+bin)
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("building grpcurl: %v\n%s", err, out)
	}
	l, err := lab.New(lab.Options{})
	ok(err)
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	const api = "127.0.0.1:7443"
	node := daemon.New(l.Node("node"), bin)
	node.Args = []string{"-listen", api}
	l.Link(lab.End{Node: node.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.100/24")}, lab.End{Node: l.Node("net"), Name: "node"})
	ok(l.Up(t.Context()))
	node.Start(t)
	private, _ := daemon.Key(t)
	_, public := daemon.Key(t)
	_, err = node.CLI(t.Context(), private, "secret", "set", "lane")
	ok(err)
	node.Apply(t, "node: {name: node}\nunderlay: {interface: wan, address: 192.0.2.100}\ntunnels: [{name: aws-0, wireguard: {privateKey: lane, peerPublicKey: \""+public+"\", listenPort: 51820}}]\n")
	dir, err := node.Dir()
	ok(err)
	text, err := os.ReadFile(filepath.Join(dir, "state", "admin.yaml"))
	ok(err)
	var c daemon.Credentials
	ok(c.Read(text))
	for name, text := range map[string]string{"authority.pem": c.Authority, "certificate.pem": c.Certificate, "key.pem": c.Key} {
		ok(os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}

	page, err := os.ReadFile(filepath.Join(tree, "docs", "api.md"))
	ok(err)
	commands := regexp.MustCompile(`(?m)^\$ (grpcurl .*)$`).FindAllStringSubmatch(string(page), -1)
	words := []string{"isthmus.v1.SpecService", `"appliedGeneration": "1"`, `"name": "aws-0"`, `"aws-0"`, `"applied": true`, `"appliedGeneration": "1"`}
	if len(commands) != len(words) {
		t.Fatalf("%d commands, want %d", len(commands), len(words))
	}
	here := strings.NewReplacer("/run/isthmus/api.sock", filepath.Join(dir, "run", "api.sock"), "203.0.113.9:7443", api)
	for i, m := range commands {
		out, err := node.Exec(t.Context(), "sh", "-c", "cd "+dir+" && "+bin+"/"+here.Replace(m[1]))
		if err != nil || !strings.Contains(out, words[i]) {
			t.Errorf("%s: %v, without %q:\n%s", m[1], err, words[i], out)
		}
	}
}
