package ipsec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/strongswan/govici/vici"

	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/tunnel"
)

// create makes the interface of a tunnel, unless Remove has removed the tunnel meanwhile, and loads
// the tunnel.
func (d *Driver) create(ctx context.Context, c tunnel.Config, conn *vici.Message, want loaded) error {
	err := func() error {
		d.load.RLock() // so that Remove does not run meanwhile
		defer d.load.RUnlock()
		if _, err := d.wanted(c, want); err != nil {
			return err
		}
		return d.o.Links.Ensure(compileLink(c))
	}()
	if err != nil {
		return err
	}
	return d.loadOne(ctx, c, conn, want)
}

// wanted returns the record of a tunnel, or an error if another call has removed or changed the
// tunnel meanwhile.
func (d *Driver) wanted(c tunnel.Config, want loaded) (*record, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r := d.records[c.Name]; r != nil && r.want == want {
		return r, nil
	}
	return nil, errOutdated
}

// loadOne loads a tunnel, in parallel with others if the ledger is that of the running charon.
func (d *Driver) loadOne(ctx context.Context, c tunnel.Config, conn *vici.Message, want loaded) error {
	d.load.RLock()
	same, err := d.connected()
	r, outdated := d.wanted(c, want)
	if outdated != nil {
		d.load.RUnlock()
		return outdated
	}
	if err == nil && same {
		defer d.load.RUnlock()
		r.loading.Lock()
		defer r.loading.Unlock()
		if _, err := d.wanted(c, want); err != nil {
			return err // a later Apply was faster
		}
		return d.put(ctx, &d.loaders[d.turn.Add(1)%uint32(len(d.loaders))], c, conn, want)
	}
	d.load.RUnlock()
	d.load.Lock()
	defer d.load.Unlock()
	if _, err := d.wanted(c, want); err != nil {
		return err
	}
	return d.loadLocked(ctx, c, conn, want)
}

// samePSK reports whether two secrets have the same value.
func (d *Driver) samePSK(a, b secret.Ref) bool {
	if a == b || a.Name == b.Name {
		return a == b
	}
	x, err := d.o.Secrets(a)
	if err != nil {
		return false
	}
	y, err := d.o.Secrets(b)
	return err == nil && bytes.Equal(x, y)
}

func (d *Driver) unpairLocked(r *record) {
	pair := identities(r.cfg)
	rest := slices.DeleteFunc(d.pairs[pair], func(x *record) bool { return x == r })
	if d.pairs[pair] = rest; len(rest) == 0 {
		delete(d.pairs, pair)
	}
}

// loadLocked loads the key and the connection of a tunnel if they differ from those loaded before.
// d.load is held.
func (d *Driver) loadLocked(ctx context.Context, c tunnel.Config, conn *vici.Message, want loaded) error {
	if err := d.connectLocked(ctx); err != nil {
		return err
	}
	return d.put(ctx, &d.client, c, conn, want)
}

// put is loadLocked without the check of the ledger, through the given session.
func (d *Driver) put(ctx context.Context, session *client, c tunnel.Config, conn *vici.Message, want loaded) error {
	d.mu.Lock()
	if d.ledger == nil {
		d.mu.Unlock()
		return errClosed
	}
	have := d.ledger.entries[c.Name]
	d.mu.Unlock()
	if have == want {
		return nil
	}
	if have.Key != want.Key {
		value, err := d.o.Secrets(c.IPsec.PSK)
		if err != nil {
			return fmt.Errorf("reading secret %s: %w", c.IPsec.PSK.Name, err)
		}
		key, err := compileKey(c, value)
		if err != nil {
			return errors.New("encoding the PSK") // the cause may contain the PSK
		}
		if err := d.writeTo(ctx, session, "load-shared", key); err != nil {
			return err
		}
	}
	if have.Conn != want.Conn {
		if have.Ends != "" && have.Ends != want.Ends {
			if err := d.retire(ctx, c.Name); err != nil {
				return err
			}
		}
		if err := d.writeTo(ctx, session, "load-conn", conn); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ledger == nil {
		return errClosed
	}
	return d.ledger.put(want)
}

var (
	errClosed   = errors.New("the driver is closed")
	errOutdated = errors.New("another call has changed or removed the tunnel meanwhile")
)

// retire marks the current SAs of a tunnel for replacement.
func (d *Driver) retire(ctx context.Context, name string) error {
	sas, err := d.client.listSAs(ctx, connection(name))
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, ike := range sas[connection(name)] {
		d.records[name].stale[ike.ID] = time.Now()
	}
	return nil
}

// connected reports whether the ledger is that of the running charon.
func (d *Driver) connected() (bool, error) {
	instance, err := d.client.current()
	if err != nil {
		return false, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ledger != nil && d.instance == instance && instance != "", nil
}

// connectLocked makes sure that the ledger is that of the running charon. d.load is held.
func (d *Driver) connectLocked(ctx context.Context) error {
	same, err := d.connected()
	if err != nil || same {
		return err
	}
	instance, err := d.client.current()
	if err != nil {
		return err
	}
	for i := range d.loaders {
		d.loaders[i].close() // sessions with the former charon
	}
	l, err := openLedger(d.o.RuntimeDir, instance)
	if err != nil {
		return err
	}
	if err := d.verify(ctx, l); err != nil {
		l.close()
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ledger != nil {
		d.ledger.close()
		d.o.Log.Warn("charon was restarted; its connections are loaded again", "instance", instance)
	}
	d.ledger, d.instance = l, instance
	for _, r := range d.records {
		r.known = false
		clear(r.stale)
	}
	d.all = true
	return nil
}

// verify removes from the ledger what charon does not have, for example after a manual unload.
func (d *Driver) verify(ctx context.Context, l *ledger) error {
	conns, err := d.client.call(ctx, "get-conns", nil)
	if err != nil {
		return err
	}
	keys, err := d.client.call(ctx, "get-shared", nil)
	if err != nil {
		return err
	}
	hasConn, hasKey := set(texts(conns, "conns")), set(texts(keys, "keys"))
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns = texts(conns, "conns")
	for name, e := range l.entries {
		if !hasConn[connection(name)] {
			e.Conn = ""
		}
		if !hasKey[connection(name)] {
			e.Key = ""
		}
		l.entries[name] = e
	}
	return nil
}

func set(s []string) map[string]bool {
	m := make(map[string]bool, len(s))
	for _, x := range s {
		m[x] = true
	}
	return m
}

func (d *Driver) unloadLocked(ctx context.Context, name string) error {
	if err := d.connectLocked(ctx); err != nil {
		return err
	}
	conns, err := d.client.call(ctx, "get-conns", nil)
	if err != nil {
		return err
	}
	if slices.Contains(texts(conns, "conns"), connection(name)) {
		if err := d.write(ctx, "unload-conn", build("name", connection(name))); err != nil {
			return err
		}
	}
	keys, err := d.client.call(ctx, "get-shared", nil)
	if err != nil {
		return err
	}
	if slices.Contains(texts(keys, "keys"), connection(name)) {
		if err := d.write(ctx, "unload-shared", build("id", connection(name))); err != nil {
			return err
		}
	}
	sas, err := d.client.listSAs(ctx, connection(name))
	if err != nil {
		return err
	}
	for _, ike := range sas[connection(name)] {
		if ike.State != "DELETING" {
			if err := d.terminate(ctx, action{terminateIKE: ike.ID}); err != nil {
				return err
			}
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns = slices.DeleteFunc(slices.Clone(d.conns), func(c string) bool { return c == connection(name) })
	if _, ok := d.ledger.entries[name]; ok {
		return d.ledger.put(loaded{Name: name})
	}
	return nil
}
