package ipsec

import (
	"context"
	"fmt"
	"time"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/tunnel"
)

// reload loads the wanted connections and keys that the running charon lacks.
func (r *runner) reload(ctx context.Context) {
	d := r.d
	d.load.Lock()
	err := d.connectLocked(ctx) // the ledger may belong to a former charon
	d.load.Unlock()
	if err != nil {
		d.o.Log.Warn("reading what charon has failed", "error", err)
		return
	}
	d.mu.Lock()
	var missing []string
	for name, rec := range d.records {
		if d.ledger == nil || d.ledger.entries[name] != rec.want {
			missing = append(missing, name)
		}
	}
	d.mu.Unlock()
	for _, name := range missing {
		d.load.Lock()
		d.mu.Lock()
		rec := d.records[name]
		var c tunnel.Config
		var want loaded
		if rec != nil {
			c, want = rec.cfg, rec.want // Apply may have changed it meanwhile
		}
		d.mu.Unlock()
		if rec != nil {
			conn, err := compile(c)
			if err == nil {
				err = d.loadLocked(ctx, c, conn, want)
			}
			if err != nil {
				d.o.Log.Warn("loading a connection failed", "tunnel", c.Name, "error", err)
				d.mu.Lock()
				rec.because(tunnel.Local, "loading the connection failed: "+err.Error(), time.Now())
				d.mu.Unlock()
			}
		}
		d.load.Unlock()
	}
}

// hold finds the tunnels for which the kernel has SAs. These carry traffic whether or not charon
// has them.
func (r *runner) hold() {
	d := r.d
	sas, err := d.o.Links.SAs()
	if err != nil {
		d.o.Log.Warn("reading the kernel's IPsec states failed", "error", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.carried, d.carriedUntil = map[uint32]bool{}, time.Now().Add(hold)
	for _, sa := range sas {
		d.carried[sa.IfID] = true
	}
	for _, rec := range d.records {
		if d.carried[rec.cfg.ID] {
			rec.held = d.carriedUntil
		}
	}
}

// heal restores the configuration of interfaces; an empty alias stands for all.
func (r *runner) heal(aliases map[string]bool) {
	d := r.d
	d.load.Lock() // so that no interface is created again that Remove deletes
	defer d.load.Unlock()
	d.mu.Lock()
	var wanted []tunnel.Config
	for name, rec := range d.records {
		if aliases[""] || aliases[tunnel.Mark+name] {
			wanted = append(wanted, rec.cfg)
		}
	}
	d.mu.Unlock()
	for _, c := range wanted {
		if err := d.o.Links.Ensure(compileLink(c)); err != nil {
			d.o.Log.Warn("healing an interface failed", "tunnel", c.Name, "error", err)
		}
	}
}

// everything loads what was unloaded manually, schedules a read of all tunnels, deletes SAs that
// charon does not have, and ends those that the kernel has lost.
func (r *runner) everything(ctx context.Context) error {
	d := r.d
	d.load.Lock()
	err := d.connectLocked(ctx)
	d.mu.Lock()
	l := d.ledger
	d.mu.Unlock()
	if err == nil && l != nil {
		err = d.verify(ctx, l)
	}
	d.load.Unlock()
	if err != nil {
		return err
	}
	r.reload(ctx)
	// Read the kernel first, then charon: an SA that charon adds in between must not be taken for
	// an orphan.
	kernel, unread := d.o.Links.SAs()
	if unread != nil {
		d.o.Log.Warn("reading the kernel's IPsec states failed", "error", unread)
	}
	sas, err := d.client.listSAs(ctx, "")
	if err != nil {
		return err
	}
	now := time.Now()
	known := map[uint32]bool{}
	for _, conn := range sas {
		for _, ike := range conn {
			for _, c := range ike.Children {
				known[c.In], known[c.Out] = true, true
			}
		}
	}
	d.mu.Lock()
	ours := map[uint32]bool{}
	for name, rec := range d.records {
		rec.known, rec.sas = true, sas[connection(name)]
		// If a tunnel is not up, or has just come up, the old SAs may be all there is, or packets
		// on them may be in transit.
		ours[rec.cfg.ID] = now.After(rec.held) && (rec.upSince.IsZero() || now.Sub(rec.upSince) > stableAfter)
	}
	present := map[uint32]bool{}
	var gone []link.SA
	for _, sa := range kernel {
		if !ours[sa.IfID] || known[sa.SPI] {
			continue
		}
		present[sa.SPI] = true
		if since, seen := d.orphans[sa.SPI]; !seen {
			d.orphans[sa.SPI] = now
		} else if now.Sub(since) > overlap {
			gone = append(gone, sa)
		}
	}
	for spi := range d.orphans {
		if !present[spi] {
			delete(d.orphans, spi)
		}
	}
	var lost []childSA
	if unread == nil {
		lost = d.lostLocked(kernel, sas, now)
	}
	d.all, r.sas = true, sas
	d.mu.Unlock()
	for _, c := range lost {
		d.o.Log.Warn("ending an SA that the kernel has lost, so that it is negotiated again", "spi", fmt.Sprintf("%08x", c.In))
		if err := d.terminate(ctx, action{terminateChild: c.ID}); err != nil {
			return err
		}
	}
	for _, sa := range gone {
		if err := d.o.Links.DeleteSA(sa); err != nil {
			d.o.Log.Warn("removing an SA that charon lost failed", "error", err)
			continue
		}
		d.writes.Add(1)
		d.o.Log.Info("removed an SA that charon lost", "if_id", sa.IfID, "spi", fmt.Sprintf("%08x", sa.SPI), "dst", sa.Dst)
	}
	return nil
}

// lostLocked returns the live CHILD SAs that the kernel no longer has, for example after a manual
// flush of its states. charon does not notice that, and keeps them forever. A kernel that has
// never shown an SA proves nothing. d.mu is held.
func (d *Driver) lostLocked(kernel []link.SA, sas map[string][]ikeSA, now time.Time) (lost []childSA) {
	has := map[uint32]bool{}
	for _, sa := range kernel {
		has[sa.SPI] = true
	}
	former := d.missing
	d.missing = map[uint32]time.Time{}
	for name := range d.records {
		for _, ike := range sas[connection(name)] {
			for _, c := range ike.Children {
				switch since, missed := former[c.In]; {
				case !c.live():
				case has[c.In] && has[c.Out]:
					d.shown = true
				case !missed:
					d.missing[c.In] = now
				default:
					d.missing[c.In] = since
					if d.shown && now.Sub(since) > overlap {
						lost = append(lost, c)
					}
				}
			}
		}
	}
	return lost
}
