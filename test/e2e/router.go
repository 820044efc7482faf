package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
	"github.com/isthmus-net/isthmus/test/vm"
)

// Router is isthmusd with its charon on the node of Clouds, used in the same way as by a user:
// through the command line.
type Router struct {
	Clouds *Clouds // nil elsewhere
	Node   *lab.Node
	Charon *peer.Charon
	Daemon *lab.Process
	// Dir has the daemon's state, its runtime directory and its log.
	Dir string
	bin string // directory of isthmusd and isthmus
	api netip.AddrPort
}

// StartRouter starts charon and isthmusd on the node, from the programs in bin.
func (c *Clouds) StartRouter(ctx context.Context, bin string) (*Router, error) {
	r, err := StartRouter(ctx, c.Node, netip.AddrPortFrom(NodePrivate.Addr(), 7443), bin)
	if r != nil {
		r.Clouds = c
	}
	return r, err
}

// StartRouter starts charon and isthmusd on a node. isthmusd listens on api too.
func StartRouter(ctx context.Context, n *lab.Node, api netip.AddrPort, bin string) (*Router, error) {
	dir, err := n.Dir()
	if err != nil {
		return nil, fmt.Errorf("starting the router: %w", err)
	}
	r := &Router{Node: n, Dir: dir, bin: bin, api: api}
	if err := r.StartCharon(ctx); err != nil {
		return nil, err
	}
	return r, r.StartDaemon(ctx)
}

// StartCharon starts charon, also again after it was killed, with the image's settings if they are
// in the directory of the programs.
func (r *Router) StartCharon(ctx context.Context) (err error) {
	var o peer.CharonOptions
	if conf := filepath.Join(r.bin, CharonConf); exists(conf) {
		o.Include = conf
	}
	r.Charon, err = peer.StartCharon(ctx, r.Node, o)
	return err
}

// CharonConf is the name of the image's settings for charon, which Build copies to the directory of
// the programs.
const CharonConf = "isthmus.conf"

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

// Socket is the path of the unix socket of the API.
func (r *Router) Socket() string { return filepath.Join(r.Dir, "run", "api.sock") }

// StartDaemon starts isthmusd and waits until its API answers.
func (r *Router) StartDaemon(ctx context.Context) (err error) {
	os.Remove(r.Socket())
	r.Daemon, err = r.Node.Start("isthmusd", filepath.Join(r.bin, "isthmusd"),
		"-state", filepath.Join(r.Dir, "state"), "-runtime", filepath.Join(r.Dir, "run"), "-vici", r.Charon.Socket, "-listen", r.api.String(), "-input", "drop")
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

// Kill kills isthmusd as a loss of power would: without a chance to clean up.
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
	return r.Node.ExecInput(ctx, input, argv...)
}

// Apply sets the secrets of the topology and applies a document.
func (r *Router) Apply(ctx context.Context, document string) error {
	_, err := r.CLIInput(ctx, document, "apply", "-f", "-")
	return err
}

// SetSecret stores one secret.
func (r *Router) SetSecret(ctx context.Context, name, value string) error {
	_, err := r.CLIInput(ctx, value, "secret", "set", name)
	return err
}

// SetSecrets stores the keys of the topology under the names that Document uses.
func (r *Router) SetSecrets(ctx context.Context) error {
	var errs []error
	set := func(name, value string) { errs = append(errs, r.SetSecret(ctx, name, value)) }
	for _, g := range r.Clouds.Gateways() {
		for i, p := range g.Config.Peerings {
			set(fmt.Sprintf("%s-%d", g.Name, i), p.PSK)
		}
	}
	set("site", r.Clouds.NodeKey.Private)
	return errors.Join(errs...)
}

// Document makes the node a router between the three clouds and the site, with one address toward
// the partner.
func (c *Clouds) Document() string {
	var b, peers strings.Builder
	fmt.Fprintf(&b, "node: {name: hub-1, asn: %d}\n", NodeASN)
	fmt.Fprintf(&b, "underlay: {interface: %s, address: %s, publicAddress: %s}\n", Uplink, NodePrivate.Addr(), NodePublic)
	fmt.Fprintf(&b, "access: {api: [%s/32]}\n", Operator)
	b.WriteString("tunnels:\n")
	export := fmt.Sprintf("{allow: [{prefix: %s, le: 24}, {prefix: %s, le: 24}, {prefix: %s, le: 24}, {prefix: %s, le: 24}, {prefix: 0.0.0.0/0}]}", VPC, VNet, Subnet, Office)
	for _, g := range c.Gateways() {
		for i, p := range g.Config.Peerings {
			name := fmt.Sprintf("%s-%d", g.Name, i)
			inside := fmt.Sprintf("{local: %s/30}", p.PeerInside)
			if g == c.Azure {
				inside = fmt.Sprintf("{local: %s/32, remote: %s}", p.PeerInside, p.Inside)
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

// call runs f with a connection to the API.
func (r *Router) call(f func(*grpc.ClientConn) error) error {
	conn, err := grpc.NewClient("unix:"+r.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	return f(conn)
}

// Tunnels reads the tunnels from the API, by name.
func (r *Router) Tunnels(ctx context.Context) (map[string]*isthmusv1.TunnelStatus, error) {
	out := map[string]*isthmusv1.TunnelStatus{}
	return out, r.call(func(conn *grpc.ClientConn) error {
		list, err := isthmusv1.NewTunnelServiceClient(conn).ListTunnels(ctx, &isthmusv1.ListTunnelsRequest{})
		for _, t := range list.GetTunnels() {
			out[t.GetName()] = t
		}
		return err
	})
}

// Peers reads the BGP sessions from the API, by name.
func (r *Router) Peers(ctx context.Context) (map[string]*isthmusv1.PeerStatus, error) {
	out := map[string]*isthmusv1.PeerStatus{}
	return out, r.call(func(conn *grpc.ClientConn) error {
		list, err := isthmusv1.NewBGPServiceClient(conn).ListPeers(ctx, &isthmusv1.ListPeersRequest{})
		for _, p := range list.GetPeers() {
			out[p.GetName()] = p
		}
		return err
	})
}

// Ways returns the tunnels that a route of the kernel uses.
func (r *Router) Ways(ctx context.Context, p netip.Prefix) (tunnels []string, err error) {
	return tunnels, r.call(func(conn *grpc.ClientConn) error {
		list, err := isthmusv1.NewRouteServiceClient(conn).ListRoutes(ctx, &isthmusv1.ListRoutesRequest{Within: p.String()})
		for _, route := range list.GetRoutes() {
			for _, h := range route.GetNextHops() {
				if route.GetPrefix() == p.String() && route.GetInstalled() {
					tunnels = append(tunnels, h.GetTunnel())
				}
			}
		}
		return err
	})
}

// Up returns nil when every tunnel is up and every session established, else an error that names
// the missing ones.
func (r *Router) Up(ctx context.Context) error {
	tunnels, err := r.Tunnels(ctx)
	if err != nil {
		return err
	}
	peers, err := r.Peers(ctx)
	if err != nil {
		return err
	}
	var missing []string
	for name, t := range tunnels {
		if t.GetState() != "up" {
			missing = append(missing, fmt.Sprintf("tunnel %s is %s (%s)", name, t.GetState(), t.GetLastError()))
		}
	}
	for name, p := range peers {
		if p.GetState() != "established" {
			missing = append(missing, fmt.Sprintf("peer %s is %s (%s)", name, p.GetState(), p.GetLastError()))
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		return errors.New(strings.Join(missing, "; "))
	}
	return nil
}

// Build builds the programs that tests run, for the guest as well, in the directory bin/e2e of the
// project at root. They have a directory of their own because other tests build bin at that time.
func Build(root string) error {
	dir := filepath.Join(root, "bin/e2e")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("building: %w", err)
	}
	// The tests of another package may build them at the same time.
	unlock, err := vm.Lock(context.Background(), filepath.Join(dir, "lock"))
	if err != nil {
		return fmt.Errorf("building: %w", err)
	}
	defer unlock()
	for _, name := range []string{"isthmusd", "isthmus"} {
		cmd := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(root, "bin/e2e", name), filepath.Join(root, "cmd", name))
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %w\n%s", name, err, out)
		}
	}
	conf, err := os.ReadFile(filepath.Join(root, "image/debian/strongswan.d", CharonConf))
	if err != nil {
		return fmt.Errorf("building: %w", err)
	}
	return os.WriteFile(filepath.Join(root, "bin/e2e", CharonConf), conf, 0o644)
}
