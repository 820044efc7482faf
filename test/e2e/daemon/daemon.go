// Package daemon runs isthmusd on nodes of a lab that need no charon, used in the same way as by a
// user: through the command line.
package daemon

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
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
	// Args are further arguments of isthmusd; unless they change it, isthmusd drops packets that
	// nothing admits. Under are the words before its name: a program that becomes isthmusd.
	Args, Under []string

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
	n.Process, err = n.Node.Start("isthmusd", slices.Concat(n.Under, []string{filepath.Join(n.bin, "isthmusd"), "-state", filepath.Join(dir, "state"),
		"-runtime", filepath.Join(dir, "run"), "-vici", filepath.Join(dir, "no-charon"), "-listen", "", "-input", "drop"}, n.Args)...)
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

// Apply applies a document, waits until it is carried out, and returns the printed changes.
func (n *Node) Apply(t testing.TB, document string) string {
	t.Helper()
	changes, err := n.CLI(t.Context(), document, "apply", "-f", "-")
	if err != nil {
		t.Fatal(err)
	}
	n.Settled(t)
	return changes
}

// Settled waits until the present document has been applied.
func (n *Node) Settled(t testing.TB) {
	t.Helper()
	n.Status(t, 20*time.Second, func(s *isthmusv1.SystemStatus) bool { return s.Generation > 0 && s.Generation == s.AppliedGeneration })
}

// Status waits until a condition on "get status" holds.
func (n *Node) Status(t testing.TB, limit time.Duration, is func(*isthmusv1.SystemStatus) bool) {
	t.Helper()
	err := lab.Until(t.Context(), limit, func() error {
		s := &isthmusv1.SystemStatus{}
		if err := n.Get(t.Context(), "status", s); err != nil {
			return err
		}
		if !is(s) {
			return fmt.Errorf("status: %v", s)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Get reads the answer of "get" for a noun.
func (n *Node) Get(ctx context.Context, noun string, into proto.Message) error {
	out, err := n.CLI(ctx, "", "get", noun, "-o", "json")
	if err != nil {
		return err
	}
	return protojson.Unmarshal([]byte(out), into)
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
