package nftables

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

var errNotApplied = errors.New("the rules are not applied yet")

// Place replaces the placements. See nat.PortKeeper.
func (d *Driver) Place(ctx context.Context, placed []nat.Placement) error {
	return d.run(ctx, func() {
		d.placed = append([]nat.Placement{}, placed...) // never nil
	})
}

// Refuse replaces the overload. See nat.PortKeeper.
func (d *Driver) Refuse(ctx context.Context, o nat.Overload) error {
	o.Exhausted = slices.Clone(o.Exhausted)
	return d.run(ctx, func() { d.overload = o })
}

// run changes placements or overload by set, and writes the sets that hold them.
func (d *Driver) run(ctx context.Context, set func()) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if d.config == nil {
		return errNotApplied
	}
	set()
	number, err := d.number()
	if err != nil {
		return fmt.Errorf("reading the generation of the rules: %w", err)
	}
	known := d.last
	if known != nil && known.number == number {
		want := known.rules.withOwnSets()
		return d.commit(number, known.config, want, func() error { return d.write(known, known.config, want) })
	}
	want, err := compile(*d.config)
	if err != nil {
		return fmt.Errorf("compiling rules: %w", err)
	}
	return d.commit(number, *d.config, want, func() error { return d.write(nil, *d.config, want) })
}

// Begun returns how many flows began with a pool's address, and how many packets tried to begin a
// flow without ports. See nat.PortKeeper.
func (d *Driver) Begun(ctx context.Context) (flows, portless uint64, err error) {
	conn, err := d.open()
	if err != nil {
		return 0, 0, err
	}
	defer conn.CloseLasting()
	read := func(name string) (uint64, error) {
		o, err := conn.GetObject(&nftables.NamedObj{Table: table(), Name: name, Type: unix.NFT_OBJECT_COUNTER})
		if err != nil {
			return 0, fmt.Errorf("reading the counter of new flows: %w", err)
		}
		if named, ok := o.(*nftables.NamedObj); ok {
			if c, ok := named.Obj.(*expr.Counter); ok {
				return c.Packets, nil
			}
		}
		return 0, errors.New("reading the counter of new flows: the object is not a counter")
	}
	flows, err = read(begunCounter)
	portless, err2 := read(portlessCounter)
	return flows, portless, errors.Join(err, err2)
}

// Meter returns the numbers of flows that began and of flows that were refused, by use. See
// nat.PortKeeper.
func (d *Driver) Meter(ctx context.Context) (nat.Meter, error) {
	m := nat.Meter{Begun: map[nat.Use]uint64{}, Refused: map[nat.Use]uint64{}}
	conn, err := d.open()
	if err != nil {
		return m, err
	}
	defer conn.CloseLasting()
	read := func(name string, each func(key []byte, packets uint64)) error {
		list, err := conn.GetSetElements(&nftables.Set{Table: table(), Name: name})
		if err != nil {
			return fmt.Errorf("reading set %s: %w", name, err)
		}
		for _, e := range list {
			if e.Counter != nil {
				each(e.Key, e.Counter.Packets)
			}
		}
		return nil
	}
	d.mu.Lock()
	var pools []nat.Pool
	if d.config != nil {
		pools = d.config.Pools
	}
	d.mu.Unlock()
	for _, f := range families {
		for _, p := range pools {
			if len(p.Family(f.ipv6)) == 0 {
				continue
			}
			err = errors.Join(err, read(meterSet(p.Name, f), func(key []byte, n uint64) {
				if u, ok := decodeUse(key, f); ok {
					u.Pool = p.Name
					m.Begun[u] = n
				}
			}))
			if !p.Silent {
				continue // each client is counted in refusedSet
			}
			err = errors.Join(err, read(exhaustedSet(p.Name, f), func(key []byte, n uint64) {
				if len(key) == int(f.size)+8 {
					m.Refused[nat.Use{Pool: p.Name, Service: decodeService(key)}] = n
				}
			}))
		}
		err = errors.Join(err, read(refusedSet(f), func(key []byte, n uint64) {
			if u, ok := decodeUse(key, f); ok {
				m.Refused[u] = n
			}
		}))
	}
	return m, errors.Join(err, read(fullSet, func(_ []byte, n uint64) { m.TableFull += n }))
}
