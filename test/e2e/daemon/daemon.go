// Package daemon runs isthmusd on nodes of a lab that need no charon, used as a user would: through the command line.
package daemon

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/lab"
)

// Build builds isthmusd and isthmus of the module in a directory, and returns where they are.
func Build(t testing.TB, module string) string {
	t.Helper()
	bin := t.TempDir()
	build := exec.Command("go", "build", "-o", bin, module+"/cmd/isthmusd", module+"/cmd/isthmus")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building: %v\n%s", err, out)
	}
	return bin
}

// Node is a node with isthmusd.
type Node struct {
	*lab.Node
	// Args are further arguments of isthmusd.
	Args    []string
	Process *lab.Process
	bin     string
}

// New returns a node that will run the programs in bin.
func New(n *lab.Node, bin string) *Node { return &Node{Node: n, bin: bin} }

// Start starts isthmusd, also again after it was killed, and waits until its API answers.
func (n *Node) Start(t testing.TB) {
	t.Helper()
	dir, err := n.Dir()
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(n.socket(dir))
	n.Process, err = n.Node.Start("isthmusd", append([]string{filepath.Join(n.bin, "isthmusd"), "-state", filepath.Join(dir, "state"),
		"-runtime", filepath.Join(dir, "run"), "-vici", filepath.Join(dir, "no-charon"), "-listen", ""}, n.Args...)...)
	if err == nil {
		err = lab.Until(t.Context(), 20*time.Second, func() error { _, err := n.CLI(t.Context(), "", "get", "status"); return err })
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (n *Node) socket(dir string) string { return filepath.Join(dir, "run", "api.sock") }

// Kill kills isthmusd without a chance to clean up.
func (n *Node) Kill() {
	n.Process.Signal(unix.SIGKILL)
	<-n.Process.Done()
}

// CLI runs isthmus on the node with this standard input and returns its standard output.
func (n *Node) CLI(ctx context.Context, input string, args ...string) (string, error) {
	dir, err := n.Dir()
	if err != nil {
		return "", err
	}
	return n.ExecInput(ctx, input, append([]string{filepath.Join(n.bin, "isthmus"), "--socket", n.socket(dir)}, args...)...)
}

// Program returns the path of isthmus or isthmusd.
func (n *Node) Program(name string) string { return filepath.Join(n.bin, name) }

// Prefixes parses prefixes, or addresses with a prefix length.
func Prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// Key makes a WireGuard key pair, in base64.
func Key(t testing.TB) (private, public string) {
	t.Helper()
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(k.Bytes()), base64.StdEncoding.EncodeToString(k.PublicKey().Bytes())
}
