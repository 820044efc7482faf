// Package gobgp implements bgp.Driver with GoBGP v3, in a child process of the daemon.
//
// GoBGP v3 panics on some UPDATEs (CVE-2026-7734). It therefore runs in a separate process, where
// a panic affects nothing else: the same program, started again as an unprivileged user and
// recognized by its argument 0. A main function that uses New calls RunIfChild first. When the
// child ends, the kernel keeps forwarding, the child is started again at once, and its sessions
// come back by graceful restart (RFC 4724). The label of the goroutine that panicked names the
// peer whose message ended the child. This peer is quarantined: for a minute at first, and twice
// as long each further time.
//
// The child has no network. Package relay holds the connections to the peers, and GoBGP receives
// their messages as rewritten by package filter.
//
// A session carries the address family of its addresses, and a session of IPv4 can also carry IPv6.
// GoBGP announces IPv6 prefixes there with its IPv4 address, mapped to IPv6, as next hop; package
// relay replaces that by this node's IPv6 address inside the tunnel.
package gobgp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/bgp/filter"
	"github.com/isthmus-net/isthmus/bgp/relay"
	"github.com/isthmus-net/isthmus/router/secret"
)

// Options are the parameters of New. Zero values stand for the defaults.
type Options struct {
	// UID and GID are the user and group of the BGP process; default User. No other process should
	// run as them.
	UID, GID int
	// ListenPort is the TCP port for sessions that peers open, on the local address and interface
	// of each peer; default 179, negative: none.
	ListenPort int
	// Secrets returns the TCP-MD5 keys.
	Secrets secret.Lookup
	Log     *slog.Logger
	// Adopting reports, when BGP is started for the first time, whether the FIB already holds
	// routes of ours. If so, the OPEN messages say that forwarding was preserved (RFC 4724).
	// Default: it holds none.
	Adopting func() bool
	// GOGC is the garbage collection percentage of the BGP process, default 150. MemoryLimit is
	// its GOMEMLIMIT in bytes, default 1 GiB, above which it collects more often.
	GOGC        int
	MemoryLimit int64
}

const (
	// replyTimeout is how long the child may take to apply a configuration. It may be busy with a
	// table.
	replyTimeout = 60 * time.Second

	// readTimeout is how long the child may take to read a message. A child that reads nothing for
	// so long hangs.
	readTimeout = 3 * replyTimeout

	// Peers that are expected back after a restart have their restart time to connect, or
	// restartTime if they have none. Then they have endTime to send an End-of-RIB, or settleTime
	// to send their paths if they cannot send one.
	restartTime = 30 * time.Second
	settleTime  = 5 * time.Second
	endTime     = time.Minute
)

// Driver is a bgp.Driver.
type Driver struct {
	o     Options
	start func() (*process, error)

	ready chan struct{} // closed by the first Apply
	wake  chan struct{} // capacity 1: Run checks its timers again

	pushing sync.Mutex // held while a configuration is sent and answered

	asking chan struct{} // full while a listing is under way

	mu     sync.Mutex
	once   sync.Once  // closes ready
	want   bgp.Config // peers by name, all of them checked
	keys   map[string]password
	keyNo  map[string]uint64 // counts the keys that a peer has had
	ids    map[string]uint32
	names  map[uint32]string
	lastID uint32
	peers  map[string]*bgp.PeerState
	sup    *supervisor
	rib    *rib
	// admitted are the prefixes that limited peers get, in order.
	admitted map[string][]netip.Prefix
	expect   map[string]time.Time // peers whose End-of-RIB is awaited, with the deadline
	disabled map[string]time.Time // since when peers are shut down
	synced   bool
	freed    bool // the child has been released from deferring announcements

	proc    *process // nil: none
	replace bool     // proc was killed so that a new one takes its place
	sent    []byte   // the configuration that proc has applied
	restart bool     // proc started with routes in the FIB
	replies map[uint64]chan replyMessage
	message uint64

	question question // zero: none

	relay    *relay.Relay                // of proc; nil: none
	counters map[string]*filter.Counters // by peer

	writes, starts uint64
}

var _ bgp.Driver = (*Driver)(nil)

// New returns a Driver. BGP starts with Run.
func New(o Options) *Driver {
	if o.UID == 0 {
		o.UID = User
	}
	if o.GID == 0 {
		o.GID = User
	}
	if o.ListenPort == 0 {
		o.ListenPort = 179
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Adopting == nil {
		o.Adopting = func() bool { return false }
	}
	if o.GOGC == 0 {
		o.GOGC = 150
	}
	if o.MemoryLimit == 0 {
		o.MemoryLimit = 1 << 30
	}
	return &Driver{
		o:       o,
		start:   func() (*process, error) { return spawn(o) },
		ready:   make(chan struct{}),
		wake:    make(chan struct{}, 1),
		asking:  make(chan struct{}, 1),
		keys:    make(map[string]password),
		keyNo:   make(map[string]uint64),
		ids:     make(map[string]uint32),
		names:   make(map[uint32]string),
		peers:   make(map[string]*bgp.PeerState),
		sup:     newSupervisor(),
		rib:     newRIB(),
		expect:  make(map[string]time.Time),
		replies: make(map[uint64]chan replyMessage),

		counters: make(map[string]*filter.Counters),
	}
}

// Apply implements bgp.Driver. Before Run it only stores the configuration. A peer with an
// unusable configuration, or whose secret cannot be read, stays as it was. A change of ASN or
// router ID restarts the BGP process.
func (d *Driver) Apply(ctx context.Context, c bgp.Config) error {
	if c.ASN == 0 && len(c.Peers) == 0 && len(c.Announce) == 0 {
		d.mu.Lock()
		// the process stays, without peers and prefixes
		c = bgp.Config{ASN: d.want.ASN, RouterID: d.want.RouterID}
		d.mu.Unlock()
		if c.ASN == 0 {
			return nil
		}
	}
	if c.ASN == 0 || !c.RouterID.Is4() || c.RouterID.IsUnspecified() {
		return fmt.Errorf("applying BGP: ASN %d and router ID %v cannot be used", c.ASN, c.RouterID)
	}
	var errs []error
	for _, p := range c.Announce {
		if !p.IsValid() || p != p.Masked() {
			return fmt.Errorf("applying BGP: announcing %v: not a prefix", p)
		}
	}

	// Read the secrets without the lock: the store may wait for a slow disk, and the child's
	// reports must not wait for it.
	keys, refused := make([]password, len(c.Peers)), make([]error, len(c.Peers))
	for i, p := range c.Peers {
		// Because of an error the former configuration would stay, and with it the session.
		if !p.Disabled {
			keys[i], refused[i] = d.check(c.ASN, p)
		}
	}
	d.mu.Lock()
	old := make(map[string]bgp.Peer, len(d.want.Peers))
	for _, p := range d.want.Peers {
		old[p.Name] = p
	}
	peers := make(map[string]bgp.Peer, len(c.Peers))
	addresses := make(map[string]string, len(c.Peers))
	for i, p := range c.Peers {
		err := refused[i]
		if _, ok := peers[p.Name]; ok && err == nil {
			err = errors.New("another peer has this name")
		}
		if other := addresses[p.Address.String()]; other != "" && err == nil {
			err = fmt.Errorf("peer %s has address %v too", other, p.Address)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("applying BGP peer %s: %w", p.Name, err))
			var ok bool
			if p, ok = old[p.Name]; !ok || addresses[p.Address.String()] != "" {
				continue
			}
		} else {
			if string(d.keys[p.Name]) != string(keys[i]) {
				d.keyNo[p.Name]++
			}
			d.keys[p.Name] = keys[i]
		}
		peers[p.Name], addresses[p.Address.String()] = p, p.Name
	}
	if d.want.ASN != 0 && (d.want.ASN != c.ASN || d.want.RouterID != c.RouterID) && d.proc != nil {
		d.replace = true
		d.proc.kill()
	}
	c.Peers = slices.SortedFunc(maps.Values(peers), func(a, b bgp.Peer) int { return strings.Compare(a.Name, b.Name) })
	if !reflect.DeepEqual(d.want, c) {
		d.want = c
		d.rib.configure(c)
	}
	now := time.Now()
	names := d.nameListLocked()
	d.sup.keep(names)
	d.disableLocked(now)
	for name := range d.peers {
		if _, ok := peers[name]; !ok {
			delete(d.peers, name)
			delete(d.keys, name)
			delete(d.expect, name)
			delete(d.counters, name)
		}
	}
	for _, p := range d.want.Peers { // in order, so that a document gives the same numbers
		name := p.Name
		if d.peers[name] == nil {
			d.peers[name] = &bgp.PeerState{Name: name, State: bgp.Unknown, Since: now}
		}
		if d.ids[name] == 0 {
			d.lastID++
			d.ids[name], d.names[d.lastID] = d.lastID, name
		}
	}
	running := d.proc != nil && !d.replace
	d.mu.Unlock()

	d.once.Do(func() { close(d.ready) })
	d.nudge()
	if running {
		errs = append(errs, d.push(ctx))
	}
	return errors.Join(errs...)
}

// check returns the key of a peer, or an error if the peer cannot be used.
func (d *Driver) check(asn uint32, p bgp.Peer) (password, error) {
	if err := check(asn, p); err != nil || p.Password.Name == "" {
		return nil, err
	}
	if d.o.Secrets == nil {
		return nil, fmt.Errorf("reading secret %s: %w", p.Password.Name, secret.ErrNotFound)
	}
	key, err := d.o.Secrets(p.Password)
	if err != nil {
		return nil, fmt.Errorf("reading secret %s: %w", p.Password.Name, err)
	}
	if len(key) == 0 || len(key) > 80 {
		return nil, fmt.Errorf("secret %s does not have 1 to 80 bytes (RFC 2385)", p.Password.Name)
	}
	return key, nil
}

// nameListLocked returns the peers that may have sessions.
func (d *Driver) nameListLocked() []string {
	names := make([]string, 0, len(d.want.Peers))
	for _, p := range d.want.Peers {
		if !p.Disabled {
			names = append(names, p.Name)
		}
	}
	return names
}

// disableLocked records since when peers are disabled. A peer begins again as a new one afterwards.
func (d *Driver) disableLocked(now time.Time) {
	former := d.disabled
	d.disabled = map[string]time.Time{}
	for _, p := range d.want.Peers {
		since, was := former[p.Name]
		switch {
		case p.Disabled && was:
			d.disabled[p.Name] = since
		case p.Disabled:
			d.disabled[p.Name] = now
			delete(d.expect, p.Name)
		case was:
			d.peers[p.Name] = &bgp.PeerState{Name: p.Name, State: bgp.Idle, Since: now, TimesUp: d.peers[p.Name].TimesUp}
		}
	}
}

func (d *Driver) nudge() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// Peers implements bgp.Driver.
func (d *Driver) Peers() []bgp.PeerState {
	d.mu.Lock()
	defer d.mu.Unlock()
	ps := make([]bgp.PeerState, 0, len(d.want.Peers))
	for _, p := range d.want.Peers {
		s := d.stateLocked(p.Name)
		if d.relay != nil {
			s.Filtered.Note = clip(d.relay.Note(p.Name))
		}
		ps = append(ps, s)
	}
	return ps
}

// stateLocked returns the state of a configured peer, with its counts.
func (d *Driver) stateLocked(name string) bgp.PeerState {
	s := *d.peers[name]
	if since, ok := d.disabled[name]; ok {
		return bgp.PeerState{Name: name, State: bgp.Disabled, Since: since, TimesUp: s.TimesUp, Filtered: d.filteredLocked(name)}
	}
	if h := d.sup.held(name); h != nil {
		s.State, s.NextTry, s.QuarantineReason = h.state, h.until, h.reason
	}
	s.Accepted = d.rib.used[name]
	s.Filtered = d.filteredLocked(name)
	if s.State == bgp.Established {
		s.Announced = d.rib.announced[name]
		if i := slices.IndexFunc(d.want.Peers, func(p bgp.Peer) bool { return p.Name == name }); i >= 0 {
			if most := d.want.Peers[i].Export.MaxPrefixes; most > 0 && s.Announced > most {
				s.Announced, s.HeldBack = most, s.Announced-most
			}
		}
	}
	return s
}

// Reset implements bgp.Driver.
func (d *Driver) Reset(ctx context.Context, name string, soft bool) error {
	d.mu.Lock()
	if d.peers[name] == nil {
		d.mu.Unlock()
		return fmt.Errorf("resetting BGP peer %s: %w", name, bgp.ErrNotFound)
	}
	held, p := d.sup.reset(name), d.proc
	if held || p == nil {
		d.mu.Unlock()
		d.nudge()
		return d.push(ctx)
	}
	m := resetMessage{ID: d.expectReplyLocked(), Peer: d.ids[name], Soft: soft}
	d.mu.Unlock()
	reply, err := d.call(ctx, p, frameReset, m.ID, m)
	if err == nil && len(reply.Errors) > 0 {
		err = errors.New(strings.Join(reply.Errors, "; "))
	}
	if err != nil {
		return fmt.Errorf("resetting BGP peer %s: %w", name, err)
	}
	d.mu.Lock()
	d.writes += reply.Changes
	d.mu.Unlock()
	return nil
}

// Writes implements bgp.Driver.
func (d *Driver) Writes() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.writes
}

// Starts implements bgp.Driver.
func (d *Driver) Starts() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.starts
}
