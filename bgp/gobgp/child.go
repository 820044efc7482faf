package gobgp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	api "github.com/osrg/gobgp/v3/api"
	"github.com/osrg/gobgp/v3/pkg/server"
	"golang.org/x/sys/unix"
)

// childName is argument 0 of the child.
const childName = "isthmusd-bgp"

// Exit codes of the child.
const (
	exitDone  = 0 // the daemon has closed the connection
	exitError = 3 // BGP could not be started
	exitStuck = 4 // the daemon does not read its messages
)

// childPort is the port on which GoBGP listens, in its own network namespace.
const childPort = 1179

// ballast counts as heap but is never touched, so it uses no memory. It keeps the garbage
// collector from running often while the heap is small and grows fast, for example while a table
// is loaded. In exchange, the default of Options.GOGC is lower, so that a large heap grows by
// less.
const ballast = 64 << 20

// RunIfChild must be the first call in the main function of a program that uses New. In the child
// process it runs BGP and does not return; in any other process it returns at once.
func RunIfChild() {
	if len(os.Args) == 0 || os.Args[0] != childName {
		return
	}
	if err := runChild(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(exitError)
	}
	os.Exit(exitDone)
}

func runChild() error {
	if len(os.Args) != 3 {
		return errors.New("only isthmusd starts the BGP process")
	}
	uid, err := strconv.Atoi(os.Args[1])
	if err != nil {
		return fmt.Errorf("reading the user ID: %w", err)
	}
	gid, err := strconv.Atoi(os.Args[2])
	if err != nil {
		return fmt.Errorf("reading the group ID: %w", err)
	}
	if err := confine(3, uid, gid); err != nil {
		return fmt.Errorf("confining the BGP process: %w", err)
	}
	f := os.NewFile(3, "daemon")
	conn, err := net.FileConn(f)
	if err != nil {
		return fmt.Errorf("opening the connection to the daemon: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("opening the connection to the daemon: %w", err)
	}
	defer runtime.KeepAlive(make([]byte, ballast))
	c := newChild()
	go func() {
		for ; ; time.Sleep(aliveInterval) {
			c.out.putRaw(frameAlive, nil)
		}
	}()
	go func() {
		// The daemon has ended or killed the connection: exit without closing a session.
		c.out.run(conn)
		os.Exit(exitDone)
	}()
	err = c.serve(conn)
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
		return nil
	}
	return err
}

// child runs one GoBGP server. After the start, only the goroutines of serve, counters and
// tables call GoBGP.
type child struct {
	out    *outbox
	log    *logger
	server *server.BgpServer

	// tasks are run by serve between two messages.
	tasks chan func()
	poll  chan struct{} // capacity 1: read the counters at once

	config  configMessage // as applied
	applied map[string]peerConfig
	tables  *tables
	barrier *barrier // until all peers that are expected back have come
	// released receives a value when GoBGP begins to process the barrier's End-of-RIB.
	released chan struct{}

	mu sync.Mutex
	// ids are by address. Those of deleted peers stay, because GoBGP reports the end of their
	// sessions later. There is one for each name that a document had since the process started.
	ids map[string]uint32
	max map[uint32]uint32 // prefix limits that GoBGP does not enforce, or only for each family
}

func newChild() *child {
	c := &child{
		out:      newOutbox(),
		tasks:    make(chan func(), 256),
		poll:     make(chan struct{}, 1),
		applied:  make(map[string]peerConfig),
		released: make(chan struct{}, 1),
		ids:      make(map[string]uint32),
		max:      make(map[uint32]uint32),
	}
	c.tables = newTables(c)
	c.log = &logger{
		out:         c.out,
		id:          c.id,
		held:        c.heldDown,
		established: c.established,
		released:    c.released,
		expired:     make(map[string]bool),
		labels:      make(map[string]context.Context),
	}
	return c
}

func (c *child) id(address string) (uint32, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id, ok := c.ids[address]
	return id, ok
}

func (c *child) serve(conn io.Reader) error {
	frames := make(chan func() error)
	go func() {
		for {
			t, body, err := readFrame(conn, maxToChild)
			if err != nil {
				frames <- func() error { return err }
				return
			}
			frames <- func() error { return c.handle(t, body) }
		}
	}()
	for {
		select {
		case f := <-frames:
			if err := f(); err != nil {
				return err
			}
		case f := <-c.tasks:
			f()
		}
	}
}

func (c *child) handle(t frameType, body []byte) error {
	switch t {
	case frameConfig:
		var m configMessage
		if err := json.Unmarshal(body, &m); err != nil {
			return fmt.Errorf("reading a configuration: %w", err)
		}
		if c.server == nil {
			if err := c.start(m); err != nil {
				return err
			}
		}
		n, errs := c.apply(m)
		c.reply(m.ID, n, errs)
	case frameReset:
		var m resetMessage
		if err := json.Unmarshal(body, &m); err != nil {
			return fmt.Errorf("reading a reset: %w", err)
		}
		c.reply(m.ID, 1, []error{c.reset(m)})
	case frameRelease:
		c.release()
	case frameAsk:
		var m askMessage
		if err := json.Unmarshal(body, &m); err != nil {
			return fmt.Errorf("reading a question: %w", err)
		}
		c.tables.ask(m)
	default:
		return fmt.Errorf("unknown frame %d", t)
	}
	return nil
}

func (c *child) reply(id, changes uint64, errs []error) {
	m := replyMessage{ID: id, Changes: changes}
	for _, err := range errs {
		if err != nil {
			m.Errors = append(m.Errors, err.Error())
		}
	}
	c.out.put(frameReply, m)
}

// start starts GoBGP with policies that reject everything until peers are added.
func (c *child) start(m configMessage) error {
	ctx := context.Background()
	s := server.NewBgpServer(server.LoggerOption(c.log), server.TimingHookOption(hook{}))
	go s.Serve()
	g := &api.Global{
		Asn:              m.ASN,
		RouterId:         m.RouterID.String(),
		ListenPort:       childPort,
		ListenAddresses:  []string{"0.0.0.0"},
		UseMultiplePaths: true,
	}
	if fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err == nil {
		unix.Close(fd)
		g.ListenAddresses = append(g.ListenAddresses, "::")
	}
	if err := s.StartBgp(ctx, &api.StartBgpRequest{Global: g}); err != nil {
		return fmt.Errorf("starting BGP: %w", err)
	}
	if err := s.SetPolicies(ctx, compilePolicies(m.ASN, nil, nil)); err != nil {
		return fmt.Errorf("setting policies: %w", err)
	}
	for d, name := range map[api.PolicyDirection]string{
		api.PolicyDirection_IMPORT: importPolicy,
		api.PolicyDirection_EXPORT: exportPolicy,
	} {
		if err := s.SetPolicyAssignment(ctx, &api.SetPolicyAssignmentRequest{Assignment: &api.PolicyAssignment{
			Name:          "global",
			Direction:     d,
			Policies:      []*api.Policy{{Name: name}},
			DefaultAction: api.RouteAction_REJECT,
		}}); err != nil {
			return fmt.Errorf("setting the %s policy: %w", name, err)
		}
	}
	if err := c.watch(ctx, s); err != nil {
		return fmt.Errorf("watching paths: %w", err)
	}
	c.server = s
	c.config = configMessage{ASN: m.ASN, RouterID: m.RouterID, Restarting: m.Restarting}
	if m.Restarting && slices.ContainsFunc(m.Peers, func(p peerConfig) bool { return p.Peer.GracefulRestart > 0 }) {
		b, err := raiseBarrier(ctx, s, m.ASN)
		if err != nil {
			c.out.put(frameLog, logMessage{Level: "WARN", Text: fmt.Sprintf("raising the restart barrier: %v", err)})
		}
		c.barrier = b
	}
	go c.counters(ctx)
	return nil
}

// watch moves events from GoBGP's queue, which is unbounded, to the outbox, which is bounded.
func (c *child) watch(ctx context.Context, s *server.BgpServer) error {
	d := &decoder{id: c.id}
	return s.WatchEvent(ctx, &api.WatchEventRequest{Table: &api.WatchEventRequest_Table{
		Filters: []*api.WatchEventRequest_Table_Filter{
			{Type: api.WatchEventRequest_Table_Filter_BEST},
			{Type: api.WatchEventRequest_Table_Filter_EOR},
		},
	}}, func(r *api.WatchEventResponse) {
		paths := r.GetTable().GetPaths()
		if len(paths) == 1 && paths[0].GetNlri() == nil {
			if id, ok := c.id(paths[0].GetNeighborIp()); ok {
				c.out.putEnd(id)
			}
			return
		}
		c.out.putUpdates(d.updates(paths))
	})
}

// heldDown removes and adds a peer whose hold timer has expired, because GoBGP would keep its
// paths.
func (c *child) heldDown(address string) {
	c.later(func() {
		for name, p := range c.applied {
			if p.Peer.Address.String() != address {
				continue
			}
			ctx := context.Background()
			err := c.server.DeletePeer(ctx, &api.DeletePeerRequest{Address: address})
			if err == nil {
				err = c.server.AddPeer(ctx, &api.AddPeerRequest{Peer: compilePeer(c.config.ASN, p, false)})
			}
			if err != nil {
				c.out.put(frameLog, logMessage{Level: "ERROR", Text: fmt.Sprintf("dropping the paths of peer %s: %v", name, err), Peer: p.ID})
			}
		}
	})
}

func (c *child) established(address string) {
	select {
	case c.poll <- struct{}{}:
	default:
	}
}

// later queues f for serve. It never blocks, because GoBGP calls it with locks held.
func (c *child) later(f func()) {
	select {
	case c.tasks <- f:
	default:
		go func() { c.tasks <- f }()
	}
}

// release ends the restart: deferred announcements are sent, and peers that are added from now on
// do not get the Restart State bit.
func (c *child) release() {
	c.config.Restarting = false
	if c.barrier != nil {
		if err := c.barrier.release(context.Background(), c.server, c.released); err != nil {
			c.out.put(frameLog, logMessage{Level: "WARN", Text: fmt.Sprintf("releasing the restart barrier: %v", err)})
		}
		c.barrier = nil
	}
}
