// Package nftables carries out NAT with one nftables table, "inet isthmus". The table is replaced in one transaction and only when it
// differs; when only policies, addresses or clamps differ, only the elements of its sets change, and when only a few policies do,
// only they are looked at.
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
	// Log hears of transactions. Default: they are not logged.
	Log *slog.Logger
	// NetNS is a file descriptor of the network namespace. Default: that of the calling thread.
	NetNS int
}

// Driver is a nat.Driver, a nat.PortKeeper, a nat.Prover and a nat.Sampler.
type Driver struct {
	options Options
	writes  atomic.Uint64

	mu         sync.Mutex // one transaction at a time
	generation *generation
	edits      *nftables.Conn // nil: not open
	last       *applied
	config     *nat.Config     // that was given last
	placed     []nat.Placement // nil: what the kernel has
	overload   nat.Overload
}

// applied is what is known to be in the kernel while the ruleset has a number.
type applied struct {
	number uint32
	config nat.Config
	rules  *ruleset // the counters in it are old
}

var (
	_ nat.Driver     = (*Driver)(nil)
	_ nat.PortKeeper = (*Driver)(nil)
	_ nat.Prover     = (*Driver)(nil)
	_ nat.Sampler    = (*Driver)(nil)
)

// New returns a Driver. It touches nothing yet. It needs CAP_NET_ADMIN.
func New(o Options) *Driver {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Driver{options: o}
}

// Writes returns how many transactions were made.
func (d *Driver) Writes() uint64 { return d.writes.Load() }

// enlarge makes the buffers of a socket large enough for a transaction.
func enlarge[S interface {
	SetReadBuffer(int) error
	SetWriteBuffer(int) error
}](s S) error {
	return errors.Join(s.SetReadBuffer(buffer), s.SetWriteBuffer(buffer))
}

// objects is held while timeouts are encoded or decoded: the library does that in maps of its own.
var objects sync.Mutex

// open returns a connection. Each operation has its own, so that what an interrupted one left unread disturbs no other.
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

// Apply makes the kernel's rules be as configured. See nat.Driver. c must not be changed afterwards.
func (d *Driver) Apply(ctx context.Context, c nat.Config) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	number, err := d.number()
	if err != nil {
		return fmt.Errorf("asking whether rules changed: %w", err)
	}
	known := d.last
	if known != nil && known.number != number {
		known = nil // someone else was there
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

// commit has write make the rules be as wanted, and notes it.
func (d *Driver) commit(number uint32, c nat.Config, want *ruleset, write func() error) error {
	d.last = nil
	writes := d.writes.Load()
	if err := write(); err != nil {
		return err
	}
	// Whoever came between the first number and ours is found out next time by reading.
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

// write makes the rules be as wanted, in at most one transaction that succeeds.
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
	// Someone has put something into the table that holds on to what is replaced.
	d.options.Log.Warn("replacing the whole table", "error", err)
	fresh, err := d.open()
	if err != nil {
		return err
	}
	defer fresh.CloseLasting()
	return d.replace(fresh, have, want, true)
}

// read returns the content of our table and the counters of drops; nil without a table.
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
			continue // part of a rule, and not one of ours
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

// read returns what is in our table now.
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

// Observe reads back what is there.
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
