// Package ipsec sets up IKEv2 tunnels: charon (strongSwan 5.9 or later) negotiates, controlled
// through its vici socket, and each tunnel has its own xfrm interface, bound to its SAs by if_id.
//
// Each object is loaded separately, and the configuration is never reloaded as a whole. charon
// initiates nothing by itself: only Run decides what is initiated and terminated, based on what it
// has read back. Events only trigger reading.
package ipsec

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/strongswan/govici/vici"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/tunnel"
)

// DefaultSocket is charon-systemd's socket in Debian.
const DefaultSocket = "/var/run/charon.vici"

// Links is the part of link.Links that a Driver uses.
type Links interface {
	Get(name string) (link.Link, error)
	List(mark string) ([]link.Link, error)
	Ensure(link.Wanted) error
	Remove(alias string, kinds ...string) error
	Watch(ctx context.Context, notify func(link.Change)) error
	SAs() ([]link.SA, error)
	DeleteSA(link.SA) error
	Inbound(dst netip.Addr, spi uint32) (link.Inbound, error)
}

// Options are the parameters of a Driver.
type Options struct {
	Socket  string // charon's vici socket; empty: DefaultSocket
	Secrets secret.Lookup
	Links   Links
	Log     *slog.Logger // nil: none
	// Divert redirects the ESP packets that arrive in UDP to another port of this node; 0 ends
	// that. If nil, these packets are lost while charon is away.
	Divert func(port uint16) error
	// RuntimeDir keeps a record of what was loaded until the next boot. If empty, everything is
	// loaded once at each start.
	RuntimeDir string
}

// Driver manages the IPsec tunnels of one charon.
type Driver struct {
	o      Options
	client client
	// loaders are additional sessions, so that two tunnels can be loaded at a time.
	loaders [2]client
	turn    atomic.Uint32
	writes  atomic.Uint64
	kick    chan struct{}

	fullRead time.Duration // shorter in tests

	// load is read-locked by loads of single tunnels, and locked by operations that affect others.
	// It is locked before mu and before a record's lock.
	load sync.RWMutex

	mu      sync.Mutex
	records map[string]*record
	pairs   map[[2]string][]*record // by the identities of both ends
	dirty   map[string]bool         // to be read again
	all     bool                    // everything is to be read again
	ledger  *ledger                 // nil: not connected to charon yet
	// conns are the connections that charon last had, including those of others and unwanted ones.
	conns    []string
	instance string
	running  bool                 // Run keeps the records up to date
	orphans  map[uint32]time.Time // when an SA that charon does not have was first seen, by SPI

	shown bool // the kernel has shown an SA of a tunnel
	// missing holds when the kernel was first seen without a live SA, by the SPI of the inbound
	// one.
	missing map[uint32]time.Time

	peerLog   logWatcher
	listening time.Time // since when the events of charon arrive without a gap

	carried      map[uint32]bool // if_ids for which the kernel had SAs when Run connected to charon
	carriedUntil time.Time       // until when carried is valid
}

var _ tunnel.Driver = (*Driver)(nil)

// New returns a driver. It opens nothing.
func New(o Options) *Driver {
	if o.Socket == "" {
		o.Socket = DefaultSocket
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Driver{
		o: o, client: client{socket: o.Socket}, loaders: [2]client{{socket: o.Socket, noLists: true}, {socket: o.Socket, noLists: true}},
		kick: make(chan struct{}, 1), fullRead: fullRead,
		records: map[string]*record{}, pairs: map[[2]string][]*record{}, dirty: map[string]bool{}, orphans: map[uint32]time.Time{},
		peerLog: newLogWatcher(),
	}
}

// Close closes the connection to charon. Tunnels stay as they are.
func (d *Driver) Close() {
	d.client.close()
	for i := range d.loaders {
		d.loaders[i].close()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ledger != nil {
		d.ledger.close()
		d.ledger = nil
	}
}

// Writes counts loads, unloads, initiations and terminations in charon, and deletions of SAs that
// charon has lost. Changes of interfaces count in link.Links.
func (d *Driver) Writes() uint64 { return d.writes.Load() }

// Apply implements tunnel.Driver. A new PSK, proposal or lifetime does not affect an IKE SA that
// is up, but applies from the next negotiation on. With new addresses or identities, new SAs are
// negotiated next to the old ones, which end when the new ones are up.
func (d *Driver) Apply(ctx context.Context, c tunnel.Config) error {
	if c.IPsec == nil || c.ID == 0 {
		return fmt.Errorf("applying tunnel %s: not an IPsec tunnel with an id", c.Name)
	}
	conn, err := compile(c)
	if err != nil {
		return fmt.Errorf("applying tunnel %s: %w", c.Name, err)
	}
	want := digests(c, conn)
	if err := d.want(c, want); err != nil {
		return fmt.Errorf("applying tunnel %s: %w", c.Name, err)
	}
	defer d.nudge(connection(c.Name))
	if err := d.create(ctx, c, conn, want); err != nil {
		return fmt.Errorf("applying tunnel %s: %w", c.Name, err)
	}
	return nil
}

// want stores the configuration in the records. charon selects a PSK only by the identities of
// both ends, so two tunnels between the same identities cannot have different PSKs.
func (d *Driver) want(c tunnel.Config, want loaded) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.records[c.Name]
	for _, other := range d.pairs[identities(c)] {
		if other != r && !d.samePSK(other.cfg.IPsec.PSK, c.IPsec.PSK) {
			if r != nil {
				// otherwise tunnels that exchange their peers would wait for each other forever
				d.unpairLocked(r)
			}
			return fmt.Errorf("tunnel %s has the same identities and another PSK, but charon selects a PSK by identities alone", other.cfg.Name)
		}
	}
	if r == nil {
		r = &record{loading: &sync.Mutex{}, stale: map[uint32]time.Time{}}
		r.state = tunnel.State{Name: c.Name, Kind: tunnel.KindIPsec, Status: tunnel.Unknown}
		if d.carried[c.ID] {
			r.held = d.carriedUntil
		}
		d.records[c.Name] = r
	} else {
		d.unpairLocked(r)
	}
	if r.want != want { // the cause of the failure may have been fixed
		r.evidence, r.reason, r.failure = tunnel.Evidence{}, "", tunnel.Failure{}
		r.state.Evidence, r.state.Failure = tunnel.Evidence{}, tunnel.Failure{}
	}
	own := *c.IPsec // the caller may change its copy
	r.cfg, r.want = c, want
	r.cfg.IPsec = &own
	d.pairs[identities(c)] = append(d.pairs[identities(c)], r)
	r.state.Interface = c.Interface
	return nil
}

// identities returns the identities of both ends.
func identities(c tunnel.Config) [2]string {
	return [2]string{c.IPsec.LocalIdentity, c.IPsec.RemoteIdentity}
}

// Remove implements tunnel.Driver.
func (d *Driver) Remove(ctx context.Context, name string) error {
	d.load.Lock()
	defer d.load.Unlock()
	d.mu.Lock()
	if r := d.records[name]; r != nil {
		d.unpairLocked(r)
		delete(d.records, name)
	}
	d.mu.Unlock()
	if err := d.unloadLocked(ctx, name); err != nil {
		return fmt.Errorf("removing tunnel %s: %w", name, err)
	}
	if err := d.o.Links.Remove(tunnel.Mark+name, link.Xfrm); err != nil {
		return fmt.Errorf("removing tunnel %s: %w", name, err)
	}
	return nil
}

// write executes a command that changes something in charon.
func (d *Driver) write(ctx context.Context, command string, in *vici.Message) error {
	return d.writeTo(ctx, &d.client, command, in)
}

func (d *Driver) writeTo(ctx context.Context, session *client, command string, in *vici.Message) error {
	_, err := session.call(ctx, command, in)
	if err == nil || errors.Is(err, errRefused) {
		d.writes.Add(1)
	}
	return err
}

// terminate requests the end of an SA without waiting for it. It is not an error if the SA has
// already ended.
func (d *Driver) terminate(ctx context.Context, a action) error {
	key, id := "ike-id", a.terminateIKE
	if a.terminateChild != 0 {
		key, id = "child-id", a.terminateChild
	}
	err := d.write(ctx, "terminate", build(key, fmt.Sprint(id), "timeout", "-1"))
	if errors.Is(err, errRefused) {
		return nil
	}
	return err
}

// Observe implements tunnel.Driver. While Run is active, the SAs are those that it read last, at
// most a few seconds ago and again after each event. While charon is away, they are Unknown. The
// counters are always read.
func (d *Driver) Observe(ctx context.Context) ([]tunnel.State, error) {
	links, err := d.o.Links.List(tunnel.Mark)
	if err != nil {
		return nil, fmt.Errorf("observing IPsec tunnels: %w", err)
	}
	d.mu.Lock()
	running, conns := d.running, d.conns
	d.mu.Unlock()
	if !running {
		if conns, err = d.read(ctx); err != nil {
			return nil, fmt.Errorf("observing IPsec tunnels: %w", err)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	states := map[string]tunnel.State{}
	for _, name := range conns {
		if name, ours := strings.CutPrefix(name, tunnel.Mark); ours {
			states[name] = tunnel.State{Name: name, Kind: tunnel.KindIPsec, Status: tunnel.Unknown}
		}
	}
	for name, r := range d.records {
		states[name] = r.state
	}
	for _, l := range links {
		if l.Kind != link.Xfrm {
			continue
		}
		name := strings.TrimPrefix(l.Alias, tunnel.Mark)
		s, ok := states[name]
		if !ok {
			s = tunnel.State{Name: name, Kind: tunnel.KindIPsec, Status: tunnel.Unknown}
		}
		s.Interface = l.Name
		s.RxBytes, s.TxBytes, s.RxPackets, s.TxPackets = l.RxBytes, l.TxBytes, l.RxPackets, l.TxPackets
		states[name] = s
	}
	out := make([]tunnel.State, 0, len(states))
	for _, s := range states {
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b tunnel.State) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Conditions returns texts on what is wrong with the running charon: an unsuitable version or set
// of plugins. Settings cannot be read through vici; image/debian/strongswan.d/isthmus.conf has the
// required ones.
func (d *Driver) Conditions(ctx context.Context) ([]string, error) {
	version, err := d.client.call(ctx, "version", nil)
	if err != nil {
		return nil, fmt.Errorf("reading charon's version: %w", err)
	}
	stats, err := d.client.call(ctx, "stats", nil)
	if err != nil {
		return nil, fmt.Errorf("reading charon's plugins: %w", err)
	}
	return conditions(text(version, "version"), texts(stats, "plugins")), nil
}

// read stores all SAs in the records without acting on them, and returns the names of all
// connections.
func (d *Driver) read(ctx context.Context) ([]string, error) {
	conns, err := d.client.call(ctx, "get-conns", nil)
	if err != nil {
		return nil, err
	}
	sas, err := d.client.listSAs(ctx, "")
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, r := range d.records {
		look := *r
		look.known, look.sas = true, sas[connection(name)]
		look.decide(time.Now(), rand.New(rand.NewPCG(1, 1)))
		r.state = look.state
	}
	return texts(conns, "conns"), nil
}

// Reset implements tunnel.Driver. It ends every IKE SA of the tunnel, and Run then initiates one at
// once: the loss is not a failed attempt, after which Run would pause.
func (d *Driver) Reset(ctx context.Context, name string) error {
	d.mu.Lock()
	rec := d.records[name]
	if rec == nil {
		d.mu.Unlock()
		return fmt.Errorf("resetting tunnel %s: %w", name, tunnel.ErrNotFound)
	}
	sas := slices.Clone(rec.sas)
	rec.tries, rec.next, rec.initiated, rec.adopted = 0, time.Time{}, time.Time{}, true
	d.mu.Unlock()
	var errs []error
	for _, ike := range sas {
		errs = append(errs, d.terminate(ctx, action{terminateIKE: ike.ID}))
	}
	d.nudge(connection(name))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("resetting tunnel %s: %w", name, err)
	}
	return nil
}

// nudge makes Run read a connection again soon.
func (d *Driver) nudge(conn string) {
	d.mu.Lock()
	d.dirty[conn] = true
	d.mu.Unlock()
	select {
	case d.kick <- struct{}{}:
	default:
	}
}
