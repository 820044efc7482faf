package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/router/fault"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
	"github.com/isthmus-net/isthmus/test/root"
	"github.com/isthmus-net/isthmus/tunnel"
)

// machine is the state that outlives the daemon: tunnels, rules, addresses. It logs each change by
// a driver, and reports forbidden ones as errors.
type machine struct {
	t          *testing.T
	mu         sync.Mutex
	log        []string
	tunnels    map[place]tunnel.Config
	failing    map[string]error // by name of a tunnel
	staying    error            // no IPsec tunnel can be removed
	muted      error            // BGP accepts nothing
	unread     error            // error of Observe
	meanwhile  func()           // runs after Observe has read
	charon     error            // why charon does not answer
	hangs      time.Duration    // delay of charon's answer
	nat        nat.Config
	rules      bool                    // nat is in the kernel
	unruly     error                   // nat cannot be applied
	pool       []netip.Addr            // of all interfaces
	by         map[string][]netip.Addr // the same of each
	bgp        bgp.Config
	static     []fib.Route
	synced     int
	alive      map[string]bool
	report     map[tunnel.Kind]func(tunnel.State)
	sick       map[string]bool // targets of probes, after the source address
	flows      Flows           // they are not placed
	drop       bool            // the daemon's option
	forward    bool            // packets are forwarded
	mtu        atomic.Int32    // of the underlay; 0: unknown
	faulty     bool            // earlier stages may have failed when a later one runs
	apiFrom    []netip.Prefix
	events     *event.Log // nil: nothing is recorded
	allowances func(string) (map[string]uint64, error)
}

// place is where a driver keeps a tunnel.
type place struct {
	kind tunnel.Kind
	name string
}

func newMachine(t *testing.T) *machine {
	return &machine{t: t, tunnels: map[place]tunnel.Config{}, by: map[string][]netip.Addr{}, failing: map[string]error{}, alive: map[string]bool{}, report: map[tunnel.Kind]func(tunnel.State){}, sick: map[string]bool{}}
}

func (m *machine) note(format string, args ...any) {
	m.log = append(m.log, fmt.Sprintf(format, args...))
}

// taken returns the writes since the last call. Tunnels are worked on in parallel; here they are in
// the order of names.
func (m *machine) taken() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	log := m.log
	m.log = nil
	slices.SortStableFunc(log, func(a, b string) int {
		if strings.HasPrefix(a, "tunnel ") && strings.HasPrefix(b, "tunnel ") {
			return strings.Compare(a, b)
		}
		return 0
	})
	return log
}

type tunnels struct {
	*machine
	kind tunnel.Kind
}

func (d tunnels) Observe(context.Context) ([]tunnel.State, error) {
	d.mu.Lock()
	defer func() {
		meanwhile := d.meanwhile
		d.mu.Unlock()
		if meanwhile != nil && d.kind == tunnel.KindIPsec {
			meanwhile()
		}
	}()
	var out []tunnel.State
	for at, c := range d.tunnels {
		if at.kind == d.kind {
			out = append(out, tunnel.State{Name: c.Name, Kind: d.kind, Interface: c.Interface, Status: tunnel.Up})
		}
	}
	return out, d.unread
}

func (d tunnels) Apply(_ context.Context, c tunnel.Config) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if c.Kind() != d.kind {
		d.t.Errorf("%s driver receives %s", d.kind, c.Name)
	}
	if err := d.failing[c.Name]; err != nil {
		return err
	}
	if was, ok := d.tunnels[place{d.kind, c.Name}]; !ok || len(tunnel.Diff(was, c)) > 0 {
		d.note("tunnel %s", c.Name)
	}
	d.tunnels[place{d.kind, c.Name}] = c
	return nil
}

func (d tunnels) Remove(_ context.Context, name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.kind == tunnel.KindIPsec && d.staying != nil {
		return d.staying
	}
	for _, p := range d.bgp.Peers {
		if p.Tunnel == name && !p.Disabled && !d.faulty {
			d.t.Errorf("tunnel %s is removed while peer %s is in it", name, p.Name)
		}
	}
	if _, ok := d.tunnels[place{d.kind, name}]; ok {
		d.note("remove tunnel %s", name)
		delete(d.tunnels, place{d.kind, name})
	}
	return nil
}

func (d tunnels) Run(ctx context.Context, report func(tunnel.State)) error {
	d.mu.Lock()
	d.report[d.kind] = report
	d.mu.Unlock()
	<-ctx.Done()
	return nil
}

func (d tunnels) Reset(_ context.Context, name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.note("reset %s %s", d.kind, name)
	return nil
}

func (d tunnels) Writes() uint64 { return 0 }

type speaker struct{ *machine }

func (d speaker) Apply(_ context.Context, c bgp.Config) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.muted != nil {
		return d.muted
	}
	if fmt.Sprint(c) != fmt.Sprint(d.bgp) {
		d.note("bgp")
	}
	d.bgp = c
	return nil
}
func (d speaker) Peers() (all []bgp.PeerState) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range d.bgp.Peers {
		all = append(all, bgp.PeerState{Name: p.Name, State: bgp.Established})
	}
	return all
}
func (d speaker) Reset(context.Context, string, bool) error { return nil }
func (d speaker) Run(ctx context.Context, _ bgp.Reporter) error {
	<-ctx.Done()
	return nil
}
func (d speaker) Writes() uint64 { return 0 }
func (d speaker) Starts() uint64 { return 0 }

type filter struct{ *machine }

func (d filter) Apply(_ context.Context, c nat.Config) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range c.Pools {
		for _, a := range p.Addresses {
			if !slices.Contains(d.pool, a.Address) {
				d.t.Errorf("a rule uses %v, which the interface does not have", a.Address)
			}
		}
	}
	if d.unruly != nil {
		return d.unruly
	}
	switch {
	case c.Equal(d.nat) && d.rules:
	case c.Underlay == "":
		d.note("closed")
	default:
		d.note("nat")
	}
	d.nat, d.rules = c, true
	return nil
}
func (d filter) Remove(context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.rules {
		d.note("rules removed")
	}
	d.nat, d.rules = nat.Config{}, false
	return nil
}
func (d filter) Observe(context.Context) (nat.State, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return nat.State{Present: d.rules, Guarded: d.rules && d.nat.Underlay != ""}, nil
}
func (d filter) Sample(ctx context.Context, _ func(nat.Reason, nat.Flow)) error {
	<-ctx.Done()
	return nil
}
func (d filter) Place(context.Context, []nat.Placement) error              { return nil }
func (d filter) Refuse(context.Context, nat.Overload) error                { return nil }
func (d filter) Begun(context.Context) (uint64, uint64, error)             { return 0, 0, nil }
func (d filter) Meter(context.Context) (nat.Meter, error)                  { return nat.Meter{}, nil }
func (d filter) Differences(context.Context, nat.Config) ([]string, error) { return nil, nil }
func (d filter) Departures(context.Context, string, []netip.Prefix, []netip.Prefix) ([]nat.Departure, error) {
	return nil, nil
}
func (d filter) Predict(nat.Config, []netip.Prefix, []netip.Prefix) ([]nat.Departure, error) {
	return nil, nil
}
func (d filter) Foreign(context.Context) ([]string, error)     { return nil, nil }
func (d filter) Writes() uint64                                { return 0 }
func (d filter) Watch(ctx context.Context, _ func(bool)) error { <-ctx.Done(); return nil }

func (m *machine) AddPool(wanted map[string][]netip.Addr) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := slices.Concat(slices.Collect(maps.Values(wanted))...)
	for iface, list := range wanted {
		for _, a := range list {
			if !slices.Contains(m.by[iface], a) {
				m.by[iface] = append(m.by[iface], a)
			}
		}
	}
	for _, a := range m.pool {
		if !slices.Contains(all, a) {
			all = append(all, a)
		}
	}
	m.setPool(all)
	return nil
}

func (m *machine) PrunePool(wanted map[string][]netip.Addr) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := slices.Concat(slices.Collect(maps.Values(wanted))...)
	for _, p := range m.nat.Pools {
		for _, a := range p.Addresses {
			if !slices.Contains(all, a.Address) {
				m.t.Errorf("%v is removed while a rule uses it", a.Address)
			}
		}
	}
	for iface, list := range m.by {
		m.by[iface] = slices.DeleteFunc(list, func(a netip.Addr) bool { return !slices.Contains(wanted[iface], a) })
	}
	m.setPool(slices.DeleteFunc(slices.Clone(m.pool), func(a netip.Addr) bool { return !slices.Contains(all, a) }))
	return nil
}

func (m *machine) setPool(all []netip.Addr) {
	if len(all) != len(m.pool) || slices.ContainsFunc(all, func(a netip.Addr) bool { return !slices.Contains(m.pool, a) }) {
		m.note("addresses %v", all)
	}
	m.pool = all
}

func (m *machine) Has(string) bool                               { return true }
func (m *machine) Capabilities() []string                        { return []string{"everything"} }
func (m *machine) Prepare(string, []string, time.Duration) error { return nil }
func (m *machine) Update([]fib.Route)                            {}
func (m *machine) SetReserved([]fib.Reserved)                    {}
func (m *machine) MTU(string) int                                { return int(m.mtu.Load()) }
func (m *machine) Listening(netip.Addr) []string                 { return []string{"tcp/22"} }
func (m *machine) Forward(on bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forward = on
	return nil
}
func (m *machine) Surroundings() (fib.Surroundings, error)    { return fib.Surroundings{}, nil }
func (m *machine) Around(ctx context.Context, _ func()) error { <-ctx.Done(); return nil }
func (m *machine) Restarted()                                 {}
func (m *machine) SetTransit(bool)                            {}
func (m *machine) RouteTransit(bool) error                    { return nil }
func (m *machine) RemoveCanary() error                        { return nil }
func (m *machine) Canary(_, _ netip.Addr, _ int) (func(context.Context, uint16) (net.Conn, error), func() error, error) {
	return nil, nil, errors.New("this machine has no room for a canary")
}
func (m *machine) Synced() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.synced++
}
func (m *machine) Best(netip.Addr) int { return -1 }
func (m *machine) Routes() []fib.RouteState {
	return nil
}
func (m *machine) SetStatic(routes []fib.Route) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if fmt.Sprint(routes) != fmt.Sprint(m.static) {
		m.note("routes")
	}
	m.static = routes
}
func (m *machine) SetAlive(h fib.NextHop, alive bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.alive[h.Interface] = alive
}
func (m *machine) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// boot starts a daemon on the machine and returns it with a function that stops it.
func (m *machine) boot(dir string) (*Router, func()) {
	m.t.Helper()
	r := m.begin(dir, false)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	return r, func() {
		cancel()
		if err := <-done; err != nil {
			m.t.Error(err)
		}
		r.o.Store.Close()
	}
}

// begin returns a daemon that does not run yet. Left like that, it has died at its start.
func (m *machine) begin(dir string, safe bool) *Router {
	m.t.Helper()
	st, err := store.Open(dir)
	if err != nil {
		m.t.Fatal(err)
	}
	if len(st.Secrets()) == 0 {
		if _, err := st.SetSecret("k", []byte("a2V5IG9mIHRoaXJ0eS10d28gYnl0ZXMgZm9yIHRlc3Q="), time.Now()); err != nil {
			m.t.Fatal(err)
		}
	}
	r, err := New(Options{
		Store: st, Drivers: map[tunnel.Kind]tunnel.Driver{tunnel.KindIPsec: tunnels{m, tunnel.KindIPsec}, tunnel.KindWireGuard: tunnels{m, tunnel.KindWireGuard}}, BGP: speaker{m}, FIB: m, NAT: filter{m},
		Addresses: m, Flows: m.flows, Host: m, Safe: safe, Drop: m.drop, APIFrom: m.apiFrom, APIPort: 7443, Version: "test", Events: m.events, Log: slog.New(slog.DiscardHandler), Counters: func() Counters { return Counters{} }, Probe: m.probe, Allowances: m.allowances, NamesFile: filepath.Join(dir, "names.json"),
		Charon: func(context.Context) ([]string, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			hangs := m.hangs
			m.mu.Unlock()
			time.Sleep(hangs)
			m.mu.Lock()
			return nil, m.charon
		},
	})
	if err != nil {
		m.t.Fatal(err)
	}
	return r
}

const base = `
node: {name: n, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4}
tunnels:
- {name: a, ipsec: {remoteAddress: 198.51.100.1, psk: k}}
- {name: b, ipsec: {remoteAddress: 198.51.100.2, psk: k}}
peers:
- {name: a, tunnel: a, asn: 65001}
- {name: b, tunnel: b, asn: 65002}
staticRoutes: [{prefix: 10.7.0.0/16, tunnels: [a]}]
egress: {pools: [{name: p, addresses: [{address: 10.9.0.5}]}], policies: [{name: x, sources: [10.0.0.0/8], pool: p}]}
`

func text(s string) *isthmusv1.Source {
	return &isthmusv1.Source{Source: &isthmusv1.Source_Text{Text: s}}
}

// Pauses of package observe and of retries, which tests of the whole router wait for.
const (
	lastRetry   = time.Minute
	charonCheck = 10 * time.Second
)

func tunnelsOf(r *Router) []*isthmusv1.TunnelStatus {
	all, _ := r.Tunnels()
	return all
}

// listed returns the answer to a List call.
func listed[R proto.Message](t *testing.T, r *Router, request proto.Message) R {
	t.Helper()
	for _, n := range r.Nouns() {
		if n.Lists(request) {
			response, err := n.List(t.Context(), request)
			if err != nil {
				t.Fatal(err)
			}
			return response.(R)
		}
	}
	t.Fatalf("no noun answers %T", request)
	panic("unreachable")
}

func status(r *Router) *isthmusv1.SystemStatus {
	s, _ := r.Status()
	return s
}

func target(r *Router) plan.Target { return r.documents.Status().Target }

func accept(t *testing.T, r *Router, doc string) uint64 {
	t.Helper()
	g, _, err := r.documents.Apply(context.Background(), document.Change{Author: "tester"}, text(doc))
	if err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	return g
}

func expect(t *testing.T, m *machine, want ...string) {
	t.Helper()
	if got := m.taken(); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestApply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		g := accept(t, r, base)
		expect(t, m, "closed", "addresses [10.9.0.5]", "nat", "tunnel a", "tunnel b", "routes", "bgp")
		if s := status(r); s.GetAppliedGeneration() != g || len(s.GetConditions()) > 0 {
			t.Errorf("status %v", s)
		}
		if again := accept(t, r, base); again != g {
			t.Errorf("the same document is generation %d after %d", again, g)
		}
		expect(t, m)
		accept(t, r, strings.Replace(base, "{name: b, ipsec", "{name: b, mtu: 1400, ipsec", 1))
		expect(t, m, "nat", "tunnel b") // the MSS clamp follows the MTU
		time.Sleep(2 * resyncPace)
		expect(t, m)
		accept(t, r, strings.NewReplacer("- {name: b, ipsec: {remoteAddress: 198.51.100.2, psk: k}}\n", "", "- {name: b, tunnel: b, asn: 65002}\n", "", "10.9.0.5", "10.9.0.6").Replace(base))
		expect(t, m, "addresses [10.9.0.6 10.9.0.5]", "nat", "addresses [10.9.0.6]", "bgp", "remove tunnel b")
	})
}

// TestCommentIsApplied checks that a document without effective changes counts as applied at once.
func TestCommentIsApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, base)
		g := accept(t, r, base+"# a comment\n")
		if s := status(r); s.GetAppliedGeneration() != g {
			t.Errorf("generation %d is applied, want %d", s.GetAppliedGeneration(), g)
		}
	})
}

// TestNoTunnelWithoutGuard boots while the rules cannot be written.
func TestNoTunnelWithoutGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		m.unruly = errors.New("no")
		dir := t.TempDir()
		r, stop := m.boot(dir)
		accept(t, r, base)
		time.Sleep(10 * time.Minute)
		expect(t, m, "addresses [10.9.0.5]", "routes", "bgp")
		if c := r.applier.Failures()[2]; c.Key != "tunnel/a" || !strings.Contains(c.Err.Error(), "waiting for the guard") {
			t.Errorf("tunnel a: %v", c)
		}
		m.mu.Lock()
		m.unruly = nil
		m.mu.Unlock()
		r.applier.Again("nat")
		synctest.Wait()
		expect(t, m, "nat", "tunnel a", "tunnel b")
		stop()

		// The rules of a former run are enough.
		m.mu.Lock()
		m.unruly = errors.New("no")
		m.tunnels = map[place]tunnel.Config{}
		m.mu.Unlock()
		_, stop = m.boot(dir)
		defer stop()
		synctest.Wait()
		expect(t, m, "tunnel a", "tunnel b")
	})
}

// TestMappedPrefixIsAnnouncedWhileItsTunnelsLive has a spoke with two tunnels.
func TestMappedPrefixIsAnnouncedWhileItsTunnelsLive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, strings.Replace(base, "egress: {", "egress: {maps: [{tunnels: [a, b], inside: 10.1.0.0/16, mapped: 100.64.0.0/16}], ", 1))
		say := func(name string, status tunnel.Status, want string) {
			t.Helper()
			m.report[tunnel.KindIPsec](tunnel.State{Name: name, Kind: tunnel.KindIPsec, Status: status})
			synctest.Wait()
			m.mu.Lock()
			defer m.mu.Unlock()
			if got := fmt.Sprint(m.bgp.Announce); got != want {
				t.Errorf("with %s %s: announced %s, want %s", name, status, got, want)
			}
		}
		say("a", tunnel.Up, "[100.64.0.0/16]")
		say("a", tunnel.Down, "[100.64.0.0/16]")
		say("b", tunnel.Down, "[]")
		say("b", tunnel.Unknown, "[]")
		say("a", tunnel.Up, "[100.64.0.0/16]")
	})
}

func TestWithoutBGP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		none := "node: {name: n}\nunderlay: {interface: eth0, address: 10.9.0.4}\n"
		g := accept(t, r, none)
		if s := status(r); s.GetAppliedGeneration() != g || m.synced != 1 {
			t.Errorf("status %v, synced %d times", s, m.synced)
		}
		accept(t, r, base)
		g = accept(t, r, none)
		if s := status(r); s.GetAppliedGeneration() != g || len(m.bgp.Peers) > 0 || m.bgp.ASN != 0 || m.synced != 2 {
			t.Errorf("status %v, BGP %v, synced %d times", s, m.bgp, m.synced)
		}
	})
}

// TestBGPGoesThoughDocumentsCome applies another document without BGP before BGP could be removed.
func TestBGPGoesThoughDocumentsCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, base)
		m.mu.Lock()
		m.muted = errors.New("starting")
		m.mu.Unlock()
		none := strings.NewReplacer(", asn: 64620", "", "peers:\n- {name: a, tunnel: a, asn: 65001}\n- {name: b, tunnel: b, asn: 65002}\n", "").Replace(base)
		accept(t, r, none)
		accept(t, r, strings.Replace(none, "10.9.0.5}]", "10.9.0.5}], probes: {targets: ['tcp://198.51.100.9:443']}", 1))
		m.mu.Lock()
		m.muted = nil
		m.mu.Unlock()
		time.Sleep(2 * lastRetry)
		m.mu.Lock()
		defer m.mu.Unlock()
		if len(m.bgp.Peers) > 0 {
			t.Errorf("BGP still runs: %v", m.bgp)
		}
	})
}

func TestCharonThatDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, base)
		conditions := func() (types []string) {
			time.Sleep(2 * charonCheck)
			for _, c := range status(r).GetConditions() {
				types = append(types, c.GetType())
			}
			return types
		}
		set := func(err error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.charon = err
		}
		set(errors.New("gone"))
		if c := conditions(); !slices.Equal(c, []string{"CharonUnreachable"}) {
			t.Errorf("conditions %q", c)
		}
		set(nil)
		if c := conditions(); len(c) > 0 {
			t.Errorf("conditions %q", c)
		}
	})
}

// TestGoesBackWhileCharonHangs checks that the rollback of an unconfirmed document does not wait
// for charon.
func TestGoesBackWhileCharonHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, base)
		m.mu.Lock()
		m.hangs = 10 * time.Minute
		m.mu.Unlock()
		if _, _, err := r.documents.Apply(context.Background(), document.Change{Author: "tester", Confirm: time.Minute}, text(strings.Replace(base, "10.7.0.0", "10.8.0.0", 1))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(70 * time.Second)
		if _, _, doc, err := r.documents.Document(0); err != nil || doc != base {
			t.Errorf("%v, %s", err, doc)
		}
	})
}

// TestMessageTooLarge checks that a document that could not be read again is not stored.
func TestMessageTooLarge(t *testing.T) {
	root.NeedTime(t)
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		large := &isthmusv1.Spec{Announce: slices.Repeat([]string{"10.0.0.0/8"}, 1<<19)}
		_, _, err := r.documents.Apply(context.Background(), document.Change{Author: "tester"}, &isthmusv1.Source{Source: &isthmusv1.Source_Spec{Spec: large}})
		if err == nil || !strings.Contains(err.Error(), "lines and commas") {
			t.Errorf("%.200v", err)
		}
	})
}

func TestBadDocumentChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		g := accept(t, r, base)
		m.taken()
		var problems spec.Problems
		if _, _, err := r.documents.Apply(context.Background(), document.Change{Author: "tester"}, text(strings.ReplaceAll(base, "psk: k", "psk: gone"))); !errors.As(err, &problems) || len(problems) != 2 {
			t.Errorf("got %v", err)
		}
		stale := g - 1
		if _, _, err := r.documents.Apply(context.Background(), document.Change{Author: "tester", Expected: &stale}, text(base+"announce: [10.0.0.0/24]")); !errors.Is(err, store.ErrStale) {
			t.Errorf("got %v", err)
		}
		time.Sleep(time.Hour)
		expect(t, m)
		if s := status(r); s.GetGeneration() != g {
			t.Errorf("generation %d", s.GetGeneration())
		}
	})
}

func TestOneFailureStopsNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		m.failing["a"] = errors.New("no such luck")
		r, stop := m.boot(t.TempDir())
		defer stop()
		g := accept(t, r, base)
		expect(t, m, "closed", "addresses [10.9.0.5]", "nat", "tunnel b", "routes", "bgp")
		s := status(r)
		if s.GetAppliedGeneration() == g || len(s.GetConditions()) != 1 || !strings.Contains(s.GetConditions()[0].GetMessage(), "tunnel/a: no such luck") {
			t.Errorf("status %v", s)
		}
		if c := tunnelsOf(r)[0].GetConditions(); len(c) != 1 {
			t.Errorf("conditions of a: %v", c)
		}
		m.mu.Lock()
		delete(m.failing, "a")
		m.mu.Unlock()
		time.Sleep(2 * lastRetry)
		synctest.Wait()
		expect(t, m, "tunnel a")
		if s := status(r); s.GetAppliedGeneration() != g || len(s.GetConditions()) > 0 {
			t.Errorf("status %v", s)
		}
	})
}

func TestRestartAdoptsAndPrunes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		r, stop := m.boot(dir)
		accept(t, r, base)
		stop()
		m.taken()
		m.tunnels[place{tunnel.KindIPsec, "left"}] = tunnel.Config{Name: "left", IPsec: &tunnel.IPsec{}}
		m.unread = errors.New("charon is away")
		r, stop = m.boot(dir)
		synctest.Wait()
		expect(t, m) // nothing was read, so nothing is removed
		m.mu.Lock()
		m.unread = nil
		m.mu.Unlock()
		time.Sleep(2 * lastRetry)
		expect(t, m, "remove tunnel left")
		if s := status(r); s.GetAppliedGeneration() != s.GetGeneration() {
			t.Errorf("status %v", s)
		}
		stop()
	})
}

func TestUnusableStoredDocumentTouchesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		r, stop := m.boot(dir)
		accept(t, r, base)
		if err := r.o.Store.DeleteSecret("k"); err != nil {
			t.Fatal(err)
		}
		if _, err := r.o.Store.SetSecret("other", []byte("x"), time.Now()); err != nil {
			t.Fatal(err)
		}
		stop()
		m.taken()
		r, stop = m.boot(dir)
		defer stop()
		time.Sleep(time.Hour)
		expect(t, m)
		if c := status(r).GetConditions(); len(c) != 1 || c[0].GetType() != "DocumentUnusable" {
			t.Errorf("conditions %v", c)
		}
		// Applying a good document is the remedy.
		accept(t, r, strings.ReplaceAll(base, "psk: k", "psk: other"))
		if got := m.taken(); !slices.Contains(got, "tunnel a") || len(status(r).GetConditions()) > 0 {
			t.Errorf("%q, %v", got, status(r).GetConditions())
		}
	})
}

// TestDamagedDocumentIsTold checks that a condition reports that an older document than the
// accepted one runs.
func TestDamagedDocumentIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		r, stop := m.boot(dir)
		accept(t, r, base)
		changed := strings.Replace(base, "10.7.0.0", "10.8.0.0", 1)
		g := accept(t, r, changed)
		stop()
		files, err := filepath.Glob(filepath.Join(dir, "revisions", "*.json"))
		if err != nil || len(files) != int(g) {
			t.Fatal(files, err)
		}
		if err := os.Truncate(files[g-1], 100); err != nil {
			t.Fatal(err)
		}
		r, stop = m.boot(dir)
		defer stop()
		if c := status(r).GetConditions(); len(c) != 2 || c[0].GetType() != "DocumentDamaged" || c[0].GetMessage() != "generation 2 cannot be read, and the node has generation 1 instead: apply the document again" {
			t.Errorf("conditions %v", c)
		}
		accept(t, r, changed)
		if c := status(r).GetConditions(); len(c) != 1 || c[0].GetType() != "StoreDamaged" {
			t.Errorf("after applying it again: %v", c)
		}
	})
}

// TestNewerDocument checks that a document that a newer version has stored in its own format does
// not count as damaged.
func TestNewerDocument(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		r, stop := m.boot(dir)
		accept(t, r, base)
		g := accept(t, r, strings.Replace(base, "10.7.0.0", "10.8.0.0", 1))
		stop()
		files, err := filepath.Glob(filepath.Join(dir, "revisions", "*.json"))
		if err != nil || len(files) != int(g) {
			t.Fatal(files, err)
		}
		data, err := os.ReadFile(files[g-1])
		if err == nil {
			err = os.WriteFile(files[g-1], append([]byte("isthmus-store 2 x"), data[len("isthmus-store 1"):]...), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		r, stop = m.boot(dir)
		defer stop()
		c := status(r).GetConditions()
		if len(c) != 2 || c[0].GetType() != "DocumentNewer" || c[1].GetType() != "StoreNewer" ||
			c[0].GetMessage() != "generation 2 was written by a newer version of isthmusd: start that version, or put back the state directory of before; the node has generation 1 instead" {
			t.Errorf("conditions %v", c)
		}
	})
}

func TestUnconfirmedDocumentGoesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		r, stop := m.boot(dir)
		first := accept(t, r, base)
		changed := strings.Replace(base, "10.7.0.0", "10.8.0.0", 1)
		if _, _, err := r.documents.Apply(context.Background(), document.Change{Author: "tester", Confirm: time.Minute}, text(changed)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		m.taken()
		stop() // the deadline holds through a restart
		r, stop = m.boot(dir)
		time.Sleep(50 * time.Second)
		expect(t, m)
		time.Sleep(20 * time.Second)
		expect(t, m, "nat", "routes")
		_, _, doc, err := r.documents.Document(0)
		if err != nil || doc != base {
			t.Errorf("%v, %s", err, doc)
		}
		if h := r.o.Store.History()[0]; h.Author != document.Daemon || h.Reason != fmt.Sprintf("not confirmed, back to %d", first) {
			t.Errorf("history %+v", h)
		}
		g, _, err := r.documents.Apply(context.Background(), document.Change{Author: "tester", Confirm: time.Minute}, text(changed))
		if err != nil {
			t.Fatal(err)
		}
		if err := r.documents.Confirm(g); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if _, _, doc, _ := r.documents.Document(0); doc != changed {
			t.Errorf("a confirmed document was rolled back: %s", doc)
		}
		if back, _, err := r.documents.Rollback(context.Background(), document.Change{Author: "tester"}, 0); err != nil || back != g+1 {
			t.Errorf("rollback: %d, %v", back, err)
		}
		// Of these generations only the second was not confirmed. A chain of trials reverts as a
		// whole.
		trial := func(prefix string) uint64 {
			g, _, err := r.documents.Apply(context.Background(), document.Change{Author: "tester", Confirm: time.Minute}, text(strings.Replace(base, "10.7.0.0", prefix, 1)))
			if err != nil {
				t.Fatal(err)
			}
			return g
		}
		progress(t, r, 0, nil)
		progress(t, r, first, nil)
		progress(t, r, first+1, fault.ErrNotConfirmed)
		progress(t, r, g, nil)
		progress(t, r, g+2, fault.ErrNoGeneration)
		third, fourth := trial("10.9.0.0"), trial("10.10.0.0")
		time.Sleep(2 * time.Minute)
		for _, reverted := range []uint64{third, fourth} {
			progress(t, r, reverted, fault.ErrNotConfirmed)
		}
		progress(t, r, third-1, nil)
		progress(t, r, fourth+1, nil)
		if _, _, doc, _ := r.documents.Document(0); doc != base {
			t.Errorf("rolled back to %s", doc)
		}
		stop()
	})
}

func progress(t *testing.T, r *Router, generation uint64, want error) {
	t.Helper()
	if _, _, err := r.Progress(generation); !errors.Is(err, want) {
		t.Errorf("progress of generation %d: %v, want %v", generation, err, want)
	}
}

// TestGoesBackWithoutDisk checks that a rollback that cannot be stored is applied all the same,
// because a user may be locked out, and stored later.
func TestGoesBackWithoutDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		r, stop := m.boot(dir)
		defer func() { stop() }()
		first := accept(t, r, base)
		changed := strings.Replace(base, "10.7.0.0", "10.8.0.0", 1)
		g, changes, err := r.documents.Apply(context.Background(), document.Change{Author: "tester", Confirm: time.Minute}, text(changed))
		if err != nil {
			t.Fatal(err)
		}
		// Block the file of the next document.
		next := filepath.Join(dir, fmt.Sprintf("revisions/%020d.json.tmp", g+1))
		if err := os.MkdirAll(filepath.Join(next, "full"), 0o700); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Second)
		m.taken()
		time.Sleep(20 * time.Second)
		expect(t, m, "nat", "routes")
		s := status(r)
		if c := s.GetConditions(); len(c) != 1 || c[0].GetSeverity() != "error" || !strings.Contains(c[0].GetMessage(), "1 is carried out again, but cannot be stored: ") {
			t.Errorf("conditions %v", c)
		}
		if s.GetGeneration() != g || s.GetAppliedGeneration() != first {
			t.Errorf("generation %d, %d is applied; want %d and %d", s.GetGeneration(), s.GetAppliedGeneration(), g, first)
		}
		if now, _, doc, err := r.documents.Document(0); err != nil || now != first || doc != base {
			t.Errorf("generation %d, %v, %s", now, err, doc)
		}
		if err := r.documents.Confirm(g); !errors.Is(err, api.ErrPrecondition) {
			t.Errorf("confirmed too late: %v", err)
		}
		if _, _, err := r.Progress(g); !errors.Is(err, fault.ErrNotConfirmed) {
			t.Errorf("progress of the document that was not confirmed: %v", err)
		}
		if present, applied, err := r.Progress(first); err != nil || present != g || applied != first {
			t.Errorf("progress of the former document: %d, %d, %v", present, applied, err)
		}
		if _, err := r.o.Store.SetSecret("k", []byte("another secret"), time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := r.documents.SecretsOpened(context.Background()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		expect(t, m, "tunnel a", "tunnel b")
		if err := os.RemoveAll(next); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		expect(t, m)
		if s := status(r); len(s.GetConditions()) != 0 || s.GetGeneration() != g+1 || s.GetAppliedGeneration() != g+1 {
			t.Errorf("with a disk again: %v", s)
		}
		if h := r.o.Store.History()[0]; h.Author != document.Daemon || h.Reason != fmt.Sprintf("not confirmed, back to %d", first) || int(h.Changes) != len(changes) {
			t.Errorf("history %+v", h)
		}
		if _, _, doc, err := r.documents.Document(0); err != nil || doc != base {
			t.Errorf("%v, %s", err, doc)
		}
	})
}

// TestGoesBackAtStart checks that a document whose confirmation expired while the daemon was away
// is not applied again.
func TestGoesBackAtStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		r, stop := m.boot(dir)
		first := accept(t, r, base)
		g, changes, err := r.documents.Apply(context.Background(), document.Change{Author: "tester", Confirm: time.Minute}, text(strings.Replace(base, "10.7.0.0", "10.8.0.0", 1)))
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		stop()
		m.taken()
		time.Sleep(time.Minute)
		r, stop = m.boot(dir)
		defer stop()
		synctest.Wait()
		expect(t, m, "nat", "routes")
		if s := status(r); len(s.GetConditions()) != 0 || s.GetGeneration() != g+1 || s.GetAppliedGeneration() != g+1 {
			t.Errorf("status %v", s)
		}
		if h := r.o.Store.History()[0]; h.Reason != fmt.Sprintf("not confirmed, back to %d", first) || int(h.Changes) != len(changes) {
			t.Errorf("history %+v", h)
		}
	})
}

// TestGoingBackKeepsItsSecrets checks that a secret stays while the document that uses it may come
// back, and that the node reports a document that cannot come back.
func TestGoingBackKeepsItsSecrets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, base)
		if _, err := r.o.Store.SetSecret("other", []byte("another of some length"), time.Now()); err != nil {
			t.Fatal(err)
		}
		changed := text(strings.ReplaceAll(base, "psk: k", "psk: other"))
		if _, _, err := r.documents.Apply(context.Background(), document.Change{Author: "tester", Confirm: time.Minute}, changed); err != nil {
			t.Fatal(err)
		}
		if err := r.DeleteSecret(t.Context(), "tester", "k"); !errors.Is(err, api.ErrPrecondition) || !strings.HasSuffix(err.Error(), "tunnels[0].ipsec.psk of generation 1") {
			t.Errorf("deleting a secret that the former document uses: %v", err)
		}
		// Applying the same document again does not confirm it and does not change the deadline;
		// the answer has the deadline in force.
		time.Sleep(20 * time.Second)
		again, err := r.Apply(t.Context(), "tester", &isthmusv1.ApplyRequest{Source: changed, ConfirmWithin: durationpb.New(time.Hour)})
		if err != nil || again.GetGoesBackIn().AsDuration() != 40*time.Second {
			t.Errorf("applying the same again: %v, %v", again, err)
		}
		if err := r.o.Store.DeleteSecret("k"); err != nil { // as when its file is lost
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if c := status(r).GetConditions(); len(c) != 1 || c[0].GetSeverity() != "error" || !strings.Contains(c[0].GetMessage(), `going back to 1 fails`) {
			t.Errorf("conditions %v", c)
		}
		if _, err := r.o.Store.SetSecret("k", []byte("a secret of some length"), time.Now()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if c, uses := status(r).GetConditions(), r.Secrets()[0].GetUsedBy(); len(c) > 0 || !slices.Equal(uses, []string{"tunnels[0].ipsec.psk", "tunnels[1].ipsec.psk"}) {
			t.Errorf("after the rollback: conditions %v, k is used by %q", c, uses)
		}
		if again, err := r.Apply(t.Context(), "tester", &isthmusv1.ApplyRequest{Source: text(base), ConfirmWithin: durationpb.New(time.Hour)}); err != nil || again.GoesBackIn != nil {
			t.Errorf("applying the present document with a time: %v, %v", again, err)
		}
		if err := r.DeleteSecret(t.Context(), "tester", "other"); err != nil {
			t.Error(err)
		}
	})
}

func TestSecretChangeReachesItsTunnels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, base)
		m.taken()
		if _, err := r.o.Store.SetSecret("k", []byte("another secret"), time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := r.documents.SecretsOpened(context.Background()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		expect(t, m, "tunnel a", "tunnel b")
	})
}

func TestOnlyAKnownFailureTakesATunnelOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, base)
		for _, step := range []struct {
			status tunnel.Status
			alive  bool
		}{{tunnel.Up, true}, {tunnel.Unknown, true}, {tunnel.Down, false}, {tunnel.Unknown, false}, {tunnel.Connecting, true}} {
			m.report[tunnel.KindIPsec](tunnel.State{Name: "a", Kind: tunnel.KindIPsec, Status: step.status})
			if m.alive["t-a"] != step.alive {
				t.Errorf("after %s alive is %v", step.status, m.alive["t-a"])
			}
		}
		if got := tunnelsOf(r)[0].GetState(); got != "connecting" {
			t.Errorf("state %s", got)
		}
	})
}

// TestReadBackIsNotLate has a tunnel die while all are read back.
func TestReadBackIsNotLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, base)
		m.mu.Lock()
		m.meanwhile = func() { r.observer.Changed(tunnel.State{Name: "a", Kind: tunnel.KindIPsec, Status: tunnel.Down}) }
		m.mu.Unlock()
		r.applier.Resync()
		synctest.Wait()
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.alive["t-a"] {
			t.Error("a is alive, although it has died since it was read")
		}
	})
}

// TestFirstDocumentGoesBack checks that the first document is rolled back, too, when it is not
// confirmed: nothing of it stays, also when the daemon restarts meanwhile, and another one can be
// applied.
func TestFirstDocumentGoesBack(t *testing.T) {
	for _, restart := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			m, dir := newMachine(t), t.TempDir()
			r, stop := m.boot(dir)
			if _, _, err := r.documents.Apply(t.Context(), document.Change{Author: "tester", Confirm: time.Minute}, text(base)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			m.taken()
			if restart {
				stop()
				r, stop = m.boot(dir)
			}
			time.Sleep(70 * time.Second)
			synctest.Wait()
			if got := strings.Join(m.taken(), "; "); !strings.Contains(got, "closed") || !strings.Contains(got, "remove tunnel") || !strings.Contains(got, "bgp") {
				t.Errorf("restart %v: done: %s", restart, got)
			}
			if s := status(r); s.GetGeneration() != 2 || s.GetAppliedGeneration() != 2 || len(s.GetConditions()) != 0 {
				t.Errorf("restart %v: status %v", restart, s)
			}
			stop()
			r, stop = m.boot(dir) // which has nothing to apply
			defer stop()
			synctest.Wait()
			m.taken()
			accept(t, r, base)
			synctest.Wait()
			if got := strings.Join(m.taken(), "; "); !strings.Contains(got, "nat") || !strings.Contains(got, "tunnel") {
				t.Errorf("restart %v: the next document: %s", restart, got)
			}
		})
	}
}

func (m *machine) Installed(fib.Key) bool { return false }
func (m *machine) Count() (c fib.Counts)  { return c }
