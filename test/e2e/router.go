package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
)

// Router is isthmusd with its charon on the node of Clouds, used as a user would: through the command line.
type Router struct {
	Clouds *Clouds
	Charon *peer.Charon
	Daemon *lab.Process
	// Dir holds the daemon's state, its runtime directory and what it logs.
	Dir string
	bin string // directory of isthmusd and isthmus
}

// StartRouter starts charon and isthmusd on the node, from the programs in bin.
func (c *Clouds) StartRouter(ctx context.Context, bin string) (*Router, error) {
	dir, err := c.Node.Dir()
	if err != nil {
		return nil, fmt.Errorf("starting the router: %w", err)
	}
	r := &Router{Clouds: c, Dir: dir, bin: bin}
	if err := r.StartCharon(ctx); err != nil {
		return nil, err
	}
	return r, r.StartDaemon(ctx)
}

// StartCharon starts charon, also again after it was killed.
func (r *Router) StartCharon(ctx context.Context) (err error) {
	r.Charon, err = peer.StartCharon(ctx, r.Clouds.Node, peer.CharonOptions{})
	return err
}

// Socket is the path of the unix socket of the API.
func (r *Router) Socket() string { return filepath.Join(r.Dir, "run", "api.sock") }

// StartDaemon starts isthmusd and waits until its API answers.
func (r *Router) StartDaemon(ctx context.Context) (err error) {
	os.Remove(r.Socket())
	r.Daemon, err = r.Clouds.Node.Start("isthmusd", filepath.Join(r.bin, "isthmusd"),
		"-state", filepath.Join(r.Dir, "state"), "-runtime", filepath.Join(r.Dir, "run"), "-vici", r.Charon.Socket, "-listen", NodePrivate.Addr().String()+":7443")
	if err != nil {
		return err
	}
	return lab.Until(ctx, 60*time.Second, func() error {
		select {
		case <-r.Daemon.Done():
			return fmt.Errorf("isthmusd ended: %w", r.Daemon.Err())
		default:
		}
		_, err := r.CLI(ctx, "get", "status")
		return err
	})
}

// Kill kills isthmusd like a loss of power would: without a chance to clean up.
func (r *Router) Kill() {
	r.Daemon.Signal(unix.SIGKILL)
	<-r.Daemon.Done()
}

// CLI runs isthmus on the node, over the unix socket, and returns its standard output.
func (r *Router) CLI(ctx context.Context, args ...string) (string, error) {
	return r.CLIInput(ctx, "", args...)
}

// CLIInput is CLI with standard input.
func (r *Router) CLIInput(ctx context.Context, input string, args ...string) (string, error) {
	argv := append([]string{filepath.Join(r.bin, "isthmus"), "--socket", r.Socket()}, args...)
	return r.Clouds.Node.ExecInput(ctx, input, argv...)
}

// Apply sets the secrets of the topology and applies a document.
func (r *Router) Apply(ctx context.Context, document string) error {
	_, err := r.CLIInput(ctx, document, "apply", "-f", "-")
	return err
}

// SetSecrets stores the keys of the topology under the names that Document uses.
func (r *Router) SetSecrets(ctx context.Context) error {
	var errs []error
	set := func(name, value string) {
		_, err := r.CLIInput(ctx, value, "secret", "set", name)
		errs = append(errs, err)
	}
	for _, g := range r.Clouds.Gateways() {
		for i, p := range g.Config.Peerings {
			set(fmt.Sprintf("%s-%d", g.Name, i), p.PSK)
		}
	}
	set("site", r.Clouds.NodeKey.Private)
	return errors.Join(errs...)
}

// Document is what makes the node a router between the three clouds and the site, with one address toward the partner.
func (c *Clouds) Document() string {
	var b, peers strings.Builder
	fmt.Fprintf(&b, "node: {name: hub-1, asn: %d}\n", NodeASN)
	fmt.Fprintf(&b, "underlay: {interface: %s, address: %s, publicAddress: %s}\n", Uplink, NodePrivate.Addr(), NodePublic)
	b.WriteString("tunnels:\n")
	export := fmt.Sprintf("{allow: [{prefix: %s, le: 24}, {prefix: %s, le: 24}, {prefix: %s, le: 24}, {prefix: %s, le: 24}, {prefix: 0.0.0.0/0}]}", VPC, VNet, Subnet, Office)
	for _, g := range c.Gateways() {
		for i, p := range g.Config.Peerings {
			name := fmt.Sprintf("%s-%d", g.Name, i)
			inside := fmt.Sprintf("{local: %s/30}", p.Router)
			if g == c.Azure {
				inside = fmt.Sprintf("{local: %s/32, remote: %s}", p.Router, p.Inside)
			}
			fmt.Fprintf(&b, "- name: %s\n  ipsec: {remoteAddress: %s, psk: %s}\n  inside: [%s]\n", name, p.Outside, name, inside)
			fmt.Fprintf(&peers, "- name: %s\n  tunnel: %s\n  asn: %d\n  holdTime: %s\n", name, name, g.Config.ASN, g.Config.Hold)
			if g == c.Azure {
				peers.WriteString("  ttl: 4\n")
			}
			fmt.Fprintf(&peers, "  import: {allow: [{prefix: %s, le: 24}]}\n  export: %s\n", g.Config.Announce[0], export)
		}
	}
	fmt.Fprintf(&b, "- name: site\n  wireguard: {privateKey: site, peerPublicKey: %s, endpoint: %s:%d, listenPort: %d}\n  inside: [{local: %s}]\n",
		c.SiteKey.Public, SiteOutside, SitePort, NodePort, c.NodeInside)
	fmt.Fprintf(&peers, "- name: site\n  tunnel: site\n  asn: %d\n  import: {allow: [{prefix: %s}]}\n  export: %s\n", SiteASN, Office, export)
	b.WriteString("peers:\n" + peers.String())
	b.WriteString("announce: [0.0.0.0/0]\n")
	fmt.Fprintf(&b, "egress:\n  pools:\n  - {name: partner, addresses: [{address: %s, publicAddress: %s}]}\n", EgressPrivate.Addr(), EgressPublic)
	fmt.Fprintf(&b, "  policies:\n  - {name: spokes, sources: [%s, %s, %s, %s], pool: partner}\n", VPC, VNet, Subnet, Office)
	return b.String()
}
