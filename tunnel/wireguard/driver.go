// Package wireguard sets up WireGuard tunnels, each with one interface, one UDP port and one peer.
// The device is the kernel's, or where the kernel has none, an embedded one on a TUN interface of
// the same name.
//
// A kernel device outlives this process, and the next process takes it over. An embedded device
// ends with the process, and its sessions begin again.
package wireguard

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/tunnel"
)

// poll is how often handshakes are read, because WireGuard does not report them.
const poll = 2 * time.Second

// Options are the parameters of a Driver.
type Options struct {
	Links     *link.Links
	Secrets   secret.Lookup
	Log       *slog.Logger // nil: none
	Userspace bool         // use the embedded device even where the kernel has one
}

// Driver manages the WireGuard tunnels of the network namespace in which it is used.
type Driver struct {
	o      Options
	writes atomic.Uint64

	mu       sync.Mutex
	wanted   map[string]tunnel.Config
	embedded map[string]*userspace // by interface
	states   map[string]tunnel.State
}

var _ tunnel.Driver = (*Driver)(nil)

// New returns a driver. It opens nothing.
func New(o Options) *Driver {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Driver{
		o:      o,
		wanted: map[string]tunnel.Config{}, embedded: map[string]*userspace{}, states: map[string]tunnel.State{},
	}
}

// Close ends the embedded devices. Kernel devices stay.
func (d *Driver) Close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, u := range d.embedded {
		u.close()
	}
	clear(d.embedded)
}

// Writes counts the changes of device configurations. Changes of interfaces count in link.Links.
func (d *Driver) Writes() uint64 { return d.writes.Load() }

// Apply implements tunnel.Driver.
func (d *Driver) Apply(_ context.Context, c tunnel.Config) error {
	if c.WireGuard == nil {
		return fmt.Errorf("applying tunnel %s: not a WireGuard tunnel", c.Name)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.applyLocked(c); err != nil {
		return fmt.Errorf("applying tunnel %s: %w", c.Name, err)
	}
	d.wanted[c.Name] = c
	return nil
}

// Reset implements tunnel.Driver. It removes the peer from the device, which forgets the keys, and
// adds it again. A peer without an endpoint in the document keeps the one that it was last seen at,
// so that this side can begin the handshake.
func (d *Driver) Reset(_ context.Context, name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, ok := d.wanted[name]
	if !ok {
		return fmt.Errorf("resetting tunnel %s: %w", name, tunnel.ErrNotFound)
	}
	if err := d.resetLocked(c); err != nil {
		return fmt.Errorf("resetting tunnel %s: %w", name, err)
	}
	return nil
}

func (d *Driver) resetLocked(c tunnel.Config) error {
	dev, write, done, err := d.open(c.Interface)
	if err != nil {
		return err
	}
	defer done()
	key := wgtypes.Key(c.WireGuard.PeerPublicKey)
	i := slices.IndexFunc(dev.Peers, func(p wgtypes.Peer) bool { return p.PublicKey == key })
	if i < 0 {
		return d.applyLocked(c)
	}
	if err := write(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: key, Remove: true}}}); err != nil {
		return fmt.Errorf("removing the peer from device %s: %w", c.Interface, err)
	}
	d.writes.Add(1)
	if err := d.applyLocked(c); err != nil {
		return err
	}
	if last := dev.Peers[i].Endpoint; !c.WireGuard.Endpoint.IsValid() && last != nil {
		if err := write(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: key, UpdateOnly: true, Endpoint: last}}}); err != nil {
			return fmt.Errorf("setting the endpoint of device %s: %w", c.Interface, err)
		}
	}
	return nil
}

func (d *Driver) applyLocked(c tunnel.Config) error {
	k, err := d.keys(c.WireGuard)
	if err != nil {
		return err
	}
	former := d.wanted[c.Name]
	if former.Interface != "" && former.Interface != c.Interface {
		if err := d.removeLocked(c.Name); err != nil {
			return err
		}
		former = tunnel.Config{}
	}
	if err := d.ensureLinkLocked(c); err != nil {
		return err
	}
	var endpoint netip.AddrPort
	if former.WireGuard != nil {
		endpoint = former.WireGuard.Endpoint
	}
	return d.configure(c, k, endpoint)
}

func (d *Driver) ensureLinkLocked(c tunnel.Config) error {
	if d.embedded[c.Interface] == nil && !d.o.Userspace {
		err := d.o.Links.Ensure(compileLink(c, link.WireGuard))
		if !errors.Is(err, link.ErrNoKind) {
			return err
		}
	}
	u := d.embedded[c.Interface]
	if u != nil {
		// A device whose interface was deleted ends a little later.
		_, err := d.o.Links.Get(c.Interface)
		if err != nil && !errors.Is(err, link.ErrNotFound) {
			return err
		}
		if err != nil || !u.alive() {
			u.close()
			delete(d.embedded, c.Interface)
			u = nil
		}
	}
	if u == nil {
		if len(d.embedded) >= tunnel.MaxEmbedded {
			return fmt.Errorf("making interface %s: this kernel has no WireGuard, and at most %d embedded devices are supported", c.Interface, tunnel.MaxEmbedded)
		}
		u, err := newUserspace(c.Interface, c.MTU, d.o.Log)
		if err != nil {
			return fmt.Errorf("making interface %s: %w", c.Interface, err)
		}
		u.tunnel = c.Name
		d.embedded[c.Interface] = u
		d.writes.Add(1)
	}
	return d.o.Links.Ensure(compileLink(c, link.TUN))
}

// control opens access to the kernel's devices. It must only be used for those: it would also find
// an embedded device of another process with the same name in another network namespace.
func control() (*wgctrl.Client, error) {
	ctl, err := wgctrl.New()
	if err != nil {
		return nil, fmt.Errorf("opening WireGuard control: %w", err)
	}
	return ctl, nil
}

// configure reads the device and writes the differences.
func (d *Driver) configure(c tunnel.Config, k keys, former netip.AddrPort) error {
	dev, write, done, err := d.open(c.Interface)
	if err != nil {
		return err
	}
	defer done()
	if change, differs := compile(dev, *c.WireGuard, k, former, time.Now()); differs {
		if err := write(change); err != nil {
			return fmt.Errorf("configuring device %s: %w", c.Interface, err)
		}
		d.writes.Add(1)
	}
	if u := d.embedded[c.Interface]; u != nil {
		if err := u.up(int(c.WireGuard.ListenPort)); err != nil {
			return fmt.Errorf("listening on port %d for device %s: %w", c.WireGuard.ListenPort, c.Interface, err)
		}
	}
	return nil
}

// open reads a device, and returns what writes to it and what ends that.
func (d *Driver) open(name string) (dev *wgtypes.Device, write func(wgtypes.Config) error, done func(), err error) {
	done = func() {}
	if u := d.embedded[name]; u != nil {
		dev, err = u.read()
		write = u.configure
	} else {
		ctl, failed := control()
		if failed != nil {
			return nil, nil, nil, failed
		}
		done = func() { ctl.Close() }
		dev, err = ctl.Device(name)
		write = func(change wgtypes.Config) error { return ctl.ConfigureDevice(name, change) }
	}
	if err != nil {
		done()
		return nil, nil, nil, fmt.Errorf("reading device %s: %w", name, err)
	}
	return dev, write, done, nil
}

func (d *Driver) keys(w *tunnel.WireGuard) (keys, error) {
	var k keys
	for _, s := range []struct {
		ref secret.Ref
		key *wgtypes.Key
	}{{w.PrivateKey, &k.private}, {w.PresharedKey, &k.preshared}} {
		if s.ref == (secret.Ref{}) && s.key == &k.preshared {
			continue
		}
		value, err := d.o.Secrets(s.ref)
		if err == nil {
			*s.key, err = parseKey(value)
		}
		if err != nil {
			return keys{}, fmt.Errorf("reading secret %s: %w", s.ref.Name, err)
		}
	}
	// A device silently drops such a peer.
	if k.private.PublicKey() == wgtypes.Key(w.PeerPublicKey) {
		return keys{}, fmt.Errorf("peerPublicKey is the public key of this side, which belongs to secret %s: give that of the other side", w.PrivateKey.Name)
	}
	return k, nil
}

// Remove implements tunnel.Driver.
func (d *Driver) Remove(_ context.Context, name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.removeLocked(name); err != nil {
		return fmt.Errorf("removing tunnel %s: %w", name, err)
	}
	return nil
}

func (d *Driver) removeLocked(name string) error {
	for iface, u := range d.embedded { // also one whose configuration never succeeded
		if u.tunnel == name {
			u.close()
			delete(d.embedded, iface)
			d.writes.Add(1)
		}
	}
	delete(d.wanted, name)
	delete(d.states, name)
	return d.o.Links.Remove(tunnel.Mark+name, link.WireGuard, link.TUN)
}

// Observe implements tunnel.Driver. An applied tunnel without an interface is down.
func (d *Driver) Observe(context.Context) ([]tunnel.State, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.observeLocked(time.Now())
}

func (d *Driver) observeLocked(now time.Time) ([]tunnel.State, error) {
	links, err := d.o.Links.List(tunnel.Mark)
	if err != nil {
		return nil, fmt.Errorf("observing WireGuard tunnels: %w", err)
	}
	ctl, err := control()
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	var all []tunnel.State
	add := func(s tunnel.State) {
		s, _ = history(d.states[s.Name], s, now)
		d.states[s.Name] = s
		all = append(all, s)
	}
	seen := map[string]bool{}
	for _, l := range links {
		if l.Kind != link.WireGuard && l.Kind != link.TUN {
			continue
		}
		var dev *wgtypes.Device
		if u := d.embedded[l.Name]; l.Kind == link.WireGuard {
			dev, err = ctl.Device(l.Name)
		} else if u != nil && u.alive() {
			dev, err = u.read()
		} else {
			err = errors.New("the interface has no device of this process")
		}
		if err != nil {
			d.o.Log.Warn("reading a WireGuard device failed", "interface", l.Name, "error", err)
			dev = nil
		}
		s := decode(l, dev, now)
		if u := d.embedded[l.Name]; u != nil {
			// The peer may be gone although its keys are valid for a while. To the minute, because
			// strangers decide how often they call, and each change is reported.
			if x := u.stranger.Load(); x != nil && x.at.After(s.Keyed) {
				s.Device.Stranger, s.Device.StrangerAt, s.Device.OtherKey = x.address, x.at.Truncate(time.Minute), x.otherKey
			}
		}
		seen[s.Name] = true
		add(s)
	}
	for name, c := range d.wanted {
		if !seen[name] {
			add(tunnel.State{
				Name: name, Kind: tunnel.KindWireGuard, Interface: c.Interface,
				Status: tunnel.Down, LastError: "the interface is missing",
			})
		}
	}
	return all, nil
}

// Run implements tunnel.Driver. A deleted interface is created again at once. A peer that is
// silent at the endpoint it roamed to is tried again at its configured endpoint.
func (d *Driver) Run(ctx context.Context, report func(tunnel.State)) error {
	nudge := make(chan struct{}, 1)
	watched := make(chan error, 1)
	go func() {
		watched <- d.o.Links.Watch(ctx, func(c link.Change) {
			if c.Name == "" || strings.HasPrefix(c.Alias, tunnel.Mark) {
				select {
				case nudge <- struct{}{}:
				default:
				}
			}
		})
	}()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	reported := map[string]tunnel.State{}
	for {
		select {
		case <-ctx.Done():
			<-watched
			return nil
		case err := <-watched:
			return err
		case <-nudge:
			d.heal(true)
		case <-tick.C:
			d.heal(false)
		}
		states, err := d.Observe(ctx)
		if err != nil {
			d.o.Log.Warn("observing WireGuard tunnels failed", "error", err)
			continue
		}
		for _, s := range states {
			if _, differs := history(reported[s.Name], s, s.Since); differs {
				report(s)
			}
			reported[s.Name] = s
		}
	}
}

// heal reapplies the tunnels that are not up, or all of them.
func (d *Driver) heal(everything bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, c := range d.wanted {
		if status := d.states[name].Status; !everything && (status == tunnel.Up || status == tunnel.Connecting) {
			continue
		}
		if err := d.applyLocked(c); err != nil {
			d.o.Log.Warn("healing a tunnel failed", "tunnel", name, "error", err)
		}
	}
}
