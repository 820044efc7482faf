// Package nftables implements NAT with one nftables table, "inet isthmus". The table is replaced
// in one transaction and only when it differs. When only policies, addresses or clamps differ,
// only the elements of its sets change. When only a few policies differ, only these are compiled.
package nftables

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

const (
	// elementsPerMessage keeps a message below the 64 KiB to which a netlink attribute is limited.
	elementsPerMessage = 200
	// buffer is the size of the socket buffers in bytes. A transaction is one datagram.
	buffer = 64 << 20
)

// Options are what a Driver needs.
type Options struct {
	// Log receives a record of each transaction. Default: transactions are not logged.
	Log *slog.Logger
	// NetNS is a file descriptor of the network namespace. Default: that of the calling thread.
	NetNS int
}

// Driver is a nat.Driver, a nat.PortKeeper, a nat.Prover and a nat.Sampler.
type Driver struct {
	options Options
	writes  atomic.Uint64

	mu         sync.Mutex // held for one transaction at a time
	generation *generation
	edits      *nftables.Conn // nil: not open
	last       *applied
	config     *nat.Config     // the one given last
	placed     []nat.Placement // nil: those in the kernel
	overload   nat.Overload
}

// applied is the content of the kernel's table, valid while the ruleset has this generation
// number.
type applied struct {
	number uint32
	config nat.Config
	rules  *ruleset // its counters are outdated
}

var (
	_ nat.Driver     = (*Driver)(nil)
	_ nat.PortKeeper = (*Driver)(nil)
	_ nat.Prover     = (*Driver)(nil)
	_ nat.Sampler    = (*Driver)(nil)
)

// New returns a Driver, and changes nothing yet. The Driver needs CAP_NET_ADMIN.
func New(o Options) *Driver {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Driver{options: o}
}

// Writes returns how many transactions were committed.
func (d *Driver) Writes() uint64 { return d.writes.Load() }

// enlarge makes the buffers of a socket large enough for a transaction.
func enlarge[S interface {
	SetReadBuffer(int) error
	SetWriteBuffer(int) error
}](s S) error {
	return errors.Join(s.SetReadBuffer(buffer), s.SetWriteBuffer(buffer))
}

// objects is held while timeouts are encoded or decoded, because the library uses global maps for
// that.
var objects sync.Mutex

// open returns a connection. Each operation has its own, so that unread messages of an interrupted
// one do not disturb another.
func (d *Driver) open() (*nftables.Conn, error) {
	options := []nftables.ConnOption{nftables.AsLasting(), nftables.WithSockOptions(enlarge)}
	if d.options.NetNS != 0 {
		options = append(options, nftables.WithNetNSFd(d.options.NetNS))
	}
	c, err := nftables.New(options...)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	return c, nil
}

func table() *nftables.Table {
	return &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
}

// Apply makes the kernel's rules match the configuration. See nat.Driver. c must not be changed
// afterwards.
func (d *Driver) Apply(ctx context.Context, c nat.Config) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	number, err := d.number()
	if err != nil {
		return fmt.Errorf("reading the generation of the rules: %w", err)
	}
	known := d.last
	if known != nil && known.number != number {
		known = nil // another process has changed the ruleset
	}
	if known != nil {
		if done, err := d.amend(number, known, c); done || err != nil {
			return err
		}
	}
	want, err := compile(c)
	if err != nil {
		return fmt.Errorf("compiling rules: %w", err)
	}
	d.config = &c
	return d.commit(number, c, want, func() error { return d.write(known, c, want) })
}

// Remove removes the table. See nat.Driver.
func (d *Driver) Remove(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	conn, err := d.open()
	if err != nil {
		return err
	}
	defer conn.CloseLasting()
	conn.AddTable(table()) // so that there is one to delete
	conn.DelTable(table())
	d.last, d.config, d.placed, d.overload = nil, nil, nil, nat.Overload{}
	return d.flush(conn, "remove", 0)
}

// commit calls write, and stores want as the kernel's content if nothing else changed the ruleset
// meanwhile.
func (d *Driver) commit(number uint32, c nat.Config, want *ruleset, write func() error) error {
	d.last = nil
	writes := d.writes.Load()
	if err := write(); err != nil {
		return err
	}
	// If another process made a transaction since number was read, the numbers differ, and the
	// next operation reads the rules.
	expected := number + uint32(d.writes.Load()-writes)
	if number, err := d.number(); err == nil && number == expected {
		d.last = &applied{number, c, want}
	}
	return nil
}

func (d *Driver) number() (uint32, error) {
	if d.generation == nil {
		g, err := openGeneration(d.options.NetNS)
		if err != nil {
			return 0, err
		}
		d.generation = g
	}
	return d.generation.read()
}

// write makes the rules match want, in at most one successful transaction.
func (d *Driver) write(known *applied, c nat.Config, want *ruleset) error {
	conn, err := d.open()
	if err != nil {
		return err
	}
	defer conn.CloseLasting()
	want.place(c, d.placed)
	want.refuse(c, d.overload)
	if known != nil && sameFrame(known.rules, want) {
		if todo, moved := changes(known.rules, want); !moved {
			return d.edit(conn, want, todo, nil)
		}
	}
	have, _, err := read(conn)
	if err != nil {
		return fmt.Errorf("reading rules: %w", err)
	}
	if d.placed == nil && have != nil {
		d.placed = have.placements()
		want.place(c, d.placed)
	}
	if have != nil && sameFrame(have, want) {
		todo, _ := changes(have, want)
		return d.edit(conn, want, todo, nil)
	}
	if err = d.replace(conn, have, want, false); err == nil || have == nil {
		return err
	}
	// Another program has added something to the table that refers to an object that is to be
	// replaced.
	d.options.Log.Warn("replacing the whole table", "error", err)
	fresh, err := d.open()
	if err != nil {
		return err
	}
	defer fresh.CloseLasting()
	return d.replace(fresh, have, want, true)
}

// read returns the content of our table, nil without a table, and the counters of drops.
func read(conn *nftables.Conn) (*ruleset, map[nat.Reason]nat.Counter, error) {
	drops := map[nat.Reason]nat.Counter{}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, drops, err
	}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == tableName && t.Flags == 0 }) {
		return nil, drops, nil
	}
	t := table()
	r := &ruleset{chains: map[string]*chain{}, sets: map[string]*set{}, timeouts: map[string]*expr.CtTimeout{}}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, drops, err
	}
	for _, k := range chains {
		if k.Table.Name != tableName {
			continue
		}
		c := &chain{kind: k.Type}
		if k.Hooknum != nil {
			c.hook, c.priority = *k.Hooknum, *k.Priority
			if k.Policy != nil && *k.Policy != nftables.ChainPolicyAccept {
				c.kind += " with another policy"
			}
		}
		rules, err := conn.GetRules(t, k)
		if err != nil {
			return nil, drops, err
		}
		for _, rule := range rules {
			c.rules = append(c.rules, normal(rule.Exprs))
		}
		for _, name := range c.timeouts() {
			r.timeouts[name] = &expr.CtTimeout{}
		}
		r.chains[k.Name] = c
	}
	sets, err := conn.GetSets(t)
	if err != nil {
		return nil, drops, err
	}
	for _, k := range sets {
		if k.Anonymous {
			continue // part of a rule that is not ours
		}
		s := &set{shape: shape{k.IsMap, k.IsMap && k.DataType.Name == "", k.Interval, k.Concatenation, k.Dynamic, k.Size}, elements: map[string]element{}}
		r.sets[k.Name] = s
		if k.Dynamic {
			s.shape.size = 0 // the same for all of them
			continue
		}
		list, err := conn.GetSetElements(k)
		if err != nil {
			return nil, drops, err
		}
		for _, e := range list {
			key, el, err := decodeElement(s.shape, e)
			if err != nil {
				return nil, drops, fmt.Errorf("set %s: %w", k.Name, err)
			}
			s.elements[key] = el
		}
	}
	objects.Lock()
	named, err := conn.GetNamedObjects(t)
	objects.Unlock()
	if err != nil {
		return nil, drops, err
	}
	for _, o := range named {
		o, ok := o.(*nftables.NamedObj)
		if !ok || o.Type != unix.NFT_OBJECT_COUNTER || !slices.Contains(nat.Reasons, nat.Reason(o.Name)) {
			continue
		}
		if c, ok := o.Obj.(*expr.Counter); ok {
			drops[nat.Reason(o.Name)] = nat.Counter{Packets: c.Packets, Bytes: c.Bytes}
		}
	}
	return r, drops, nil
}

// read returns the current content of our table.
func (d *Driver) read(ctx context.Context) (*ruleset, map[nat.Reason]nat.Counter, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	conn, err := d.open()
	if err != nil {
		return nil, nil, err
	}
	defer conn.CloseLasting()
	have, drops, err := read(conn)
	if err != nil {
		return nil, drops, fmt.Errorf("reading rules: %w", err)
	}
	return have, drops, nil
}

// Observe returns the state of the table in the kernel.
func (d *Driver) Observe(ctx context.Context) (nat.State, error) {
	have, drops, err := d.read(ctx)
	if err != nil || have == nil {
		return nat.State{}, err
	}
	s := nat.State{Present: true, Guarded: have.chains["guard"] != nil, Guard: drops[nat.DropGuard], Drops: drops, Placements: have.placements()}
	counters := have.counters()
	for _, name := range slices.Sorted(maps.Keys(counters)) {
		s.Policies = append(s.Policies, nat.PolicyState{Name: name, Flows: counters[name]})
	}
	return s, nil
}
