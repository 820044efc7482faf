// Package peer runs the peers of isthmus in tests: strongSwan, BIRD, FRR and WireGuard in the nodes
// of a lab, and with these the VPN gateways of AWS, Azure and Google, as far as a router on the
// other side can distinguish.
package peer

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
)

// Tunnel is one IKEv2 connection with one CHILD_SA for everything, bound to an
// xfrm interface by its if_id.
type Tunnel struct {
	// Name of the connection and its child.
	Name string
	// Local and Remote are the outside addresses.
	Local, Remote netip.Addr
	// LocalID and RemoteID are the IKE identities; the addresses if "".
	LocalID, RemoteID string
	PSK               string
	IfID              uint32
	// IKE and ESP are proposals as swanctl.conf writes them.
	IKE, ESP string
	// Selectors of both sides, "0.0.0.0/0" if "".
	Selectors string
	// Start is swanctl's start_action: "none" waits for the other side, "trap"
	// initiates on traffic, "start" at once and again after each loss.
	Start string
	// Life holds the lifetimes; the zero value is strongSwan's defaults.
	Life Life
	// DPD is the interval of liveness checks, none if 0.
	DPD time.Duration
	// MTU of the xfrm interface, 1400 if 0.
	MTU int
}

// Life has the times at which this side rekeys and at which an SA expires. IKEv2 does not negotiate
// them.
type Life struct {
	// IKERekey and ChildRekey are when rekeying starts at the latest, Fuzz how much earlier
	// it may start, IKEExpire and ChildExpire when the SA ends if rekeying did not succeed.
	IKERekey, IKEExpire, ChildRekey, ChildExpire, Fuzz time.Duration
	// ChildRekeyBytes and ChildExpireBytes do the same by volume, if not 0.
	ChildRekeyBytes, ChildExpireBytes uint64
	// ReplayWindow in packets, strongSwan's default if 0.
	ReplayWindow int
}

// Device is the name of the tunnel's xfrm interface, which libreswan insists on.
func (t Tunnel) Device() string { return fmt.Sprintf("ipsec%d", t.IfID) }

// Interface queues the tunnel's xfrm interface for the node's next Up.
func (t Tunnel) Interface(n *lab.Node, addrs ...netip.Prefix) {
	mtu := t.MTU
	if mtu == 0 {
		mtu = 1400
	}
	n.IP("link add %s type xfrm dev lo if_id %d", t.Device(), t.IfID)
	for _, a := range addrs {
		n.IP("addr add %s dev %s", a, t.Device())
	}
	n.IP("link set %s mtu %d up", t.Device(), mtu)
}

// Charon is a running strongSwan daemon.
type Charon struct {
	Node *lab.Node
	// Socket is the path of its vici socket, Log that of its log.
	Socket, Log string
	Process     *lab.Process

	dir string
}

// CharonOptions of StartCharon. The zero value is usable.
type CharonOptions struct {
	// Lines are further settings of strongswan.conf's charon section, "key = value" each.
	Lines []string
	// Include is a file with more settings, none if "". StartCharon's own settings win.
	Include string
	// Userland has charon do ESP itself, in UDP, over the TUN device UserlandDevice: for a kernel
	// that has no ESP.
	Userland bool
}

// UserlandDevice is the TUN device of a charon that does ESP itself. Packets that the node routes
// there enter the tunnels, by their selectors.
const UserlandDevice = "ipsec0"

// StartCharon starts charon in the node and waits until it answers.
func StartCharon(ctx context.Context, n *lab.Node, o CharonOptions) (*Charon, error) {
	dir, err := n.Dir()
	if err != nil {
		return nil, fmt.Errorf("starting charon: %w", err)
	}
	c := &Charon{Node: n, Socket: filepath.Join(dir, "charon.vici"), Log: filepath.Join(dir, "ike.log"), dir: dir}
	// Routes belong to the node's own configuration, and 16 half-open IKE_SAs from one
	// address are normal here, hence no dos_protection.
	kernel := "kernel-netlink"
	if o.Userland {
		kernel = "kernel-libipsec kernel-netlink" // the first one that can do ESP does it
		// It adds a route into the tunnel regardless of install_routes: the node's own routes have
		// precedence.
		o.Lines = append(slices.Clip(o.Lines), "routing_table_prio = 40000")
	}
	conf := fmt.Sprintf(`charon-systemd {
	load = random nonce openssl hmac kdf pem x509 pubkey pkcs1 %s socket-default vici updown
	install_routes = no
	install_virtual_ip = no
	dos_protection = no
	journal { default = -1 }
	filelog { file {
		path = %s
		flush_line = yes
		time_format = %%T
		time_add_ms = yes
		default = 1
	} }
	plugins { vici { socket = unix://%s } }
	%s
}
swanctl { load = random nonce }
`, kernel, c.Log, c.Socket, strings.Join(o.Lines, "\n\t"))
	if o.Include != "" {
		conf = "include " + o.Include + "\n" + conf
	}
	if err := os.WriteFile(c.path("strongswan.conf"), []byte(conf), 0o600); err != nil {
		return nil, fmt.Errorf("starting charon: %w", err)
	}
	os.Remove(c.Socket) // of one that was killed
	c.Process, err = n.StartPeer("charon", []string{"STRONGSWAN_CONF=" + c.path("strongswan.conf")}, "/usr/sbin/charon-systemd")
	if err != nil {
		return nil, err
	}
	err = lab.Until(ctx, 30*time.Second, func() error { _, err := os.Stat(c.Socket); return err })
	if err != nil {
		return nil, fmt.Errorf("waiting for charon in %s, see %s: %w", n.Name, c.Log, err)
	}
	return c, nil
}

func (c *Charon) path(name string) string { return filepath.Join(c.dir, name) }

// Load sets charon's tunnels to exactly these.
func (c *Charon) Load(ctx context.Context, tunnels ...Tunnel) error {
	var b strings.Builder
	for _, t := range tunnels {
		t.render(&b)
	}
	if err := os.WriteFile(c.path("swanctl.conf"), []byte(b.String()), 0o600); err != nil {
		return fmt.Errorf("loading tunnels: %w", err)
	}
	if _, err := c.Swanctl(ctx, "--load-all", "--noprompt", "--file", c.path("swanctl.conf")); err != nil {
		return fmt.Errorf("loading tunnels: %w", err)
	}
	return nil
}

// Swanctl runs swanctl(8) against this charon.
func (c *Charon) Swanctl(ctx context.Context, args ...string) (string, error) {
	args = append([]string{"env", "STRONGSWAN_CONF=" + c.path("strongswan.conf"), "swanctl"}, args...)
	return c.Node.ExecPeer(ctx, append(args, "--uri", "unix://"+c.Socket)...)
}

// Kill implements IKE.
func (c *Charon) Kill(ctx context.Context) error { return crash(ctx, c.Node, c.Process) }

// Children implements IKE.
func (c *Charon) Children(ctx context.Context) (map[string]int, error) {
	out, err := c.Swanctl(ctx, "--list-sas")
	if err != nil {
		return nil, err
	}
	n := map[string]int{}
	for line := range strings.Lines(out) {
		// "  NAME: #1, reqid 1, INSTALLED, TUNNEL, ESP:…"
		if name, rest, ok := strings.Cut(strings.TrimSpace(line), ": #"); ok && strings.HasPrefix(line, " ") && strings.Contains(rest, "INSTALLED") {
			n[name]++
		}
	}
	return n, nil
}

// Resting returns nil when no tunnel has more than one IKE_SA, and all are established. Otherwise
// the error names the exchange under way: a second IKE_SA after both ends initiated, or a request
// without an answer yet.
func (c *Charon) Resting(ctx context.Context) error {
	out, err := c.Swanctl(ctx, "--list-sas")
	if err != nil {
		return err
	}
	return resting(out)
}

// resting reads lines such as "tunnel: #2, ESTABLISHED, IKEv2, ...". Those of CHILD_SAs begin with
// spaces.
func resting(out string) error {
	had := map[string]bool{}
	for line := range strings.Lines(out) {
		name, rest, ok := strings.Cut(line, ": #")
		if !ok || strings.HasPrefix(line, " ") {
			continue
		}
		if had[name] {
			return fmt.Errorf("%s has more than one IKE_SA", name)
		}
		had[name] = true
		if !strings.Contains(rest, ", ESTABLISHED, ") {
			return fmt.Errorf("%s is not established: %s", name, strings.TrimSpace(rest))
		}
	}
	return nil
}

// RekeyIKE implements IKE.
func (c *Charon) RekeyIKE(ctx context.Context, tunnel string) error {
	_, err := c.Swanctl(ctx, "--rekey", "--ike", tunnel)
	return err
}

// RekeyChild implements IKE.
func (c *Charon) RekeyChild(ctx context.Context, tunnel string) error {
	_, err := c.Swanctl(ctx, "--rekey", "--child", tunnel)
	return err
}

// Terminate implements IKE.
func (c *Charon) Terminate(ctx context.Context, tunnel string) error {
	_, err := c.Swanctl(ctx, "--terminate", "--ike", tunnel)
	return err
}

func (t Tunnel) render(b *strings.Builder) {
	local, remote := orAddress(t.LocalID, t.Local), orAddress(t.RemoteID, t.Remote)
	start, selectors := t.Start, t.Selectors
	orElse(&start, "none")
	orElse(&selectors, "0.0.0.0/0")
	set := func(indent, key string, value any, is bool) {
		if is {
			fmt.Fprintf(b, "%s%s = %v\n", indent, key, value)
		}
	}
	seconds := func(d time.Duration) string { return fmt.Sprintf("%ds", int(d.Seconds())) }
	closing := start
	if start == "start" {
		// With "start" strongSwan opens another SA for each that is closed, although one of the
		// same tunnel is live.
		closing = "trap"
	}
	l := t.Life
	fmt.Fprintf(b, "connections { %s {\n", t.Name)
	fmt.Fprintf(b, "  version = 2\n  local_addrs = %s\n  remote_addrs = %s\n  proposals = %s\n", t.Local, t.Remote, t.IKE)
	fmt.Fprintf(b, "  unique = never\n  mobike = no\n  keyingtries = 0\n")
	set("  ", "dpd_delay", seconds(t.DPD), t.DPD > 0)
	set("  ", "rekey_time", seconds(l.IKERekey), l.IKERekey > 0)
	set("  ", "over_time", seconds(l.IKEExpire-l.IKERekey), l.IKEExpire > 0)
	set("  ", "rand_time", seconds(l.Fuzz), l.IKERekey > 0)
	fmt.Fprintf(b, "  local { auth = psk\n    id = %s\n  }\n  remote { auth = psk\n    id = %s\n  }\n", local, remote)
	fmt.Fprintf(b, "  children { %s {\n", t.Name)
	fmt.Fprintf(b, "    local_ts = %s\n    remote_ts = %s\n    if_id_in = %d\n    if_id_out = %d\n", selectors, selectors, t.IfID, t.IfID)
	fmt.Fprintf(b, "    mode = tunnel\n    esp_proposals = %s\n    start_action = %s\n    close_action = %s\n", t.ESP, start, closing)
	fmt.Fprintf(b, "    dpd_action = %s\n", map[string]string{"none": "clear", "trap": "trap", "start": "restart"}[start])
	set("    ", "rekey_time", seconds(l.ChildRekey), l.ChildRekey > 0)
	set("    ", "life_time", seconds(l.ChildExpire), l.ChildExpire > 0)
	set("    ", "rand_time", seconds(l.Fuzz), l.ChildRekey > 0)
	set("    ", "rekey_bytes", l.ChildRekeyBytes, l.ChildRekeyBytes > 0)
	set("    ", "life_bytes", l.ChildExpireBytes, l.ChildExpireBytes > 0)
	set("    ", "replay_window", l.ReplayWindow, l.ReplayWindow > 0)
	fmt.Fprintf(b, "  } }\n} }\nsecrets { ike-%s {\n  id1 = %s\n  id2 = %s\n  secret = \"%s\"\n} }\n", t.Name, local, remote, t.PSK)
}

var errNotYet = errors.New("not yet")
