package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/isthmus-net/isthmus/bgp/gobgp"
	"github.com/isthmus-net/isthmus/nat/nftables"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/fib/kernel"
	"github.com/isthmus-net/isthmus/router/host"
	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/router/store"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/ipsec"
)

// contenders are those that this program itself implements, started again in a node.
var contenders = map[string]func(context.Context, []string) error{
	"contender-isthmus": runRouter,
	"contender-netlink": runNetlink,
}

// runRouter is isthmusd, wired as cmd/isthmusd does it, except for features that this kernel may
// lack: a WireGuard tunnel is an interface that already exists, and IPsec tunnels are loaded into
// charon but get no xfrm interface.
func runRouter(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("contender-isthmus", flag.ContinueOnError)
	dir := flags.String("dir", "", "state and socket")
	vici := flags.String("vici", "", "charon's socket")
	if err := flags.Parse(args); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	st, err := store.Open(filepath.Join(*dir, "state"))
	if err != nil {
		return err
	}
	defer st.Close()
	audit, err := auth.OpenAudit(filepath.Join(*dir, "audit.log"), time.Now)
	if err != nil {
		return err
	}
	defer audit.Close()
	authority, err := auth.New(auth.Options{Store: st, Bundle: filepath.Join(*dir, "admin.yaml"), Notice: os.Stderr, Audit: audit, Now: time.Now})
	if err != nil {
		return err
	}
	machine, err := host.Open("")
	if err != nil {
		return err
	}
	links, err := link.Open()
	if err != nil {
		return err
	}
	defer links.Close()
	routes, err := kernel.New()
	if err != nil {
		return err
	}
	vpn := ipsec.New(ipsec.Options{Socket: *vici, Secrets: st.Lookup, Links: newNoLinks(), Log: log, RuntimeDir: *dir})
	r, err := router.New(router.Options{
		Store: st, Host: able{machine}, Addresses: links, Version: "bench", Log: log,
		Drivers: map[tunnel.Kind]tunnel.Driver{tunnel.KindIPsec: vpn, tunnel.KindWireGuard: newGiven()}, Charon: vpn.Conditions,
		BGP:      gobgp.New(gobgp.Options{Secrets: st.Lookup, Log: log}),
		FIB:      fib.New(routes, log),
		NAT:      nftables.New(nftables.Options{Log: log}),
		Counters: func() router.Counters { return router.Counters{} },
	})
	if err != nil {
		return err
	}
	server, err := api.Listen(api.Options{Router: r, Authority: authority, Socket: filepath.Join(*dir, "api.sock")})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx); cancel() }()
	err = r.Run(ctx)
	cancel()
	return errors.Join(err, <-served)
}

// able has every capability.
type able struct{ *host.Machine }

func (able) Has(string) bool { return true }

// given is a tunnel.Driver for interfaces that exist and are always up.
type given struct {
	mu      sync.Mutex
	tunnels map[string]tunnel.State
	report  func(tunnel.State)
}

func newGiven() *given {
	return &given{tunnels: map[string]tunnel.State{}, report: func(tunnel.State) {}}
}

func (g *given) Apply(_ context.Context, c tunnel.Config) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := tunnel.State{Name: c.Name, Kind: c.Kind(), Interface: c.Interface, Status: tunnel.Up, Since: time.Now()}
	g.tunnels[c.Name] = s
	g.report(s)
	return nil
}

func (g *given) Reset(context.Context, string) error { return nil }
func (g *given) Remove(_ context.Context, name string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.tunnels, name)
	return nil
}

func (g *given) Observe(context.Context) (out []tunnel.State, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, s := range g.tunnels {
		out = append(out, s)
	}
	return out, nil
}

func (g *given) Run(ctx context.Context, report func(tunnel.State)) error {
	g.mu.Lock()
	g.report = report
	for _, s := range g.tunnels {
		report(s)
	}
	g.mu.Unlock()
	<-ctx.Done()
	return nil
}

func (g *given) Writes() uint64 { return 0 }

// noLinks is ipsec.Links on a kernel without xfrm interfaces: it only records the desired ones.
type noLinks struct {
	mu    sync.Mutex
	links map[string]link.Link
}

func newNoLinks() *noLinks { return &noLinks{links: map[string]link.Link{}} }

func (l *noLinks) Get(name string) (link.Link, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k, ok := l.links[name]; ok {
		return k, nil
	}
	return link.Link{}, fmt.Errorf("%s: %w", name, link.ErrNotFound)
}

func (l *noLinks) List(string) (out []link.Link, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range l.links {
		out = append(out, k)
	}
	return out, nil
}

func (l *noLinks) Ensure(w link.Wanted) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.links[w.Name] = link.Link{Name: w.Name, Kind: w.Kind, Alias: w.Alias, IfID: w.IfID, MTU: w.MTU, Up: true}
	return nil
}

func (l *noLinks) Remove(alias string, _ ...string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name, k := range l.links {
		if k.Alias == alias {
			delete(l.links, name)
		}
	}
	return nil
}

func (l *noLinks) Watch(ctx context.Context, notify func(link.Change)) error {
	notify(link.Change{})
	<-ctx.Done()
	return nil
}

func (l *noLinks) SAs() ([]link.SA, error)  { return nil, nil }
func (l *noLinks) DeleteSA(_ link.SA) error { return nil }

func (l *noLinks) Inbound(netip.Addr, uint32) (link.Inbound, error) {
	return link.Inbound{}, link.ErrNoSA
}

// runNetlink is the upper bound for a router: on SIGUSR1 it writes N routes into one nexthop group,
// on SIGUSR2 it removes them. It has the batches of router/fib/kernel, and nothing else.
func runNetlink(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("contender-netlink", flag.ContinueOnError)
	n := flags.Int("routes", 0, "how many")
	if err := flags.Parse(args); err != nil {
		return err
	}
	orders := make(chan os.Signal, 2)
	signal.Notify(orders, syscall.SIGUSR1, syscall.SIGUSR2)
	d, err := kernel.New()
	if err != nil {
		return err
	}
	links, err := d.Links(ctx)
	if err != nil {
		return err
	}
	const object, group = 0x49f00001, 0x49f00002
	var add, remove []fib.Op
	for _, l := range links {
		if l.Name == "t-a" {
			add = append(add, fib.Op{Kind: fib.SetNextHop, ID: object, Object: fib.Object{Link: l.Index, Gateway: sides[0].feeder}})
		}
	}
	add = append(add, fib.Op{Kind: fib.SetGroup, ID: group, Members: []uint32{object}})
	for i := range *n {
		add = append(add, fib.Op{Kind: fib.AddRoute, ID: group, Key: fib.Main(prefixOf(i))})
		// not in ascending order
		remove = append(remove, fib.Op{Kind: fib.DeleteRoute, Key: fib.Main(prefixOf(i * 48271 % *n))})
	}
	fmt.Println("ready")
	for {
		select {
		case <-ctx.Done():
			return nil
		case s := <-orders:
			ops := add
			if s == syscall.SIGUSR2 {
				ops = remove
			}
			if err := errors.Join(d.Execute(ctx, ops)...); err != nil {
				return err
			}
		}
	}
}

// client is a connection to the API of a router in a node.
type client struct {
	*grpc.ClientConn
	spec    isthmusv1.SpecServiceClient
	secrets isthmusv1.SecretServiceClient
	system  isthmusv1.SystemServiceClient
	tunnels isthmusv1.TunnelServiceClient
}

func connect(socket string) (*client, error) {
	c, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", socket, err)
	}
	return &client{c, isthmusv1.NewSpecServiceClient(c), isthmusv1.NewSecretServiceClient(c), isthmusv1.NewSystemServiceClient(c), isthmusv1.NewTunnelServiceClient(c)}, nil
}

// startRouter starts the contender and waits until its API answers.
func (b *bench) startRouter(ctx context.Context, n *lab.Node, args ...string) (*lab.Process, *client, error) {
	dir, err := n.Dir()
	if err != nil {
		return nil, nil, err
	}
	p, err := n.Start("isthmus", append([]string{b.self, "contender-isthmus", "-dir", dir}, args...)...)
	if err != nil {
		return nil, nil, err
	}
	socket := filepath.Join(dir, "api.sock")
	err = lab.Until(ctx, 20*time.Second, func() error { _, err := os.Stat(socket); return err })
	if err != nil {
		text, _ := os.ReadFile(p.Log)
		return nil, nil, fmt.Errorf("starting isthmus: %w: %s", err, text)
	}
	c, err := connect(socket)
	return p, c, err
}

// apply applies a document and waits until everything in it has been done.
func (c *client) apply(ctx context.Context, document string) (accepted, done time.Duration, err error) {
	start := time.Now()
	r, err := c.spec.Apply(ctx, &isthmusv1.ApplyRequest{Source: &isthmusv1.Source{Source: &isthmusv1.Source_Text{Text: document}}})
	if err != nil {
		return 0, 0, err
	}
	accepted = time.Since(start)
	for {
		s, err := c.system.GetStatus(ctx, &isthmusv1.GetStatusRequest{})
		if err != nil {
			return 0, 0, err
		}
		if s.AppliedGeneration == r.Generation {
			return accepted, time.Since(start), nil
		}
		if time.Since(start) > 60*time.Second {
			return 0, 0, fmt.Errorf("generation %d is not applied after a minute: %v", r.Generation, s.Conditions)
		}
		time.Sleep(15 * time.Millisecond) // the API takes 100 calls a second
	}
}
