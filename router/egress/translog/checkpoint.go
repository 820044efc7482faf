package translog

import (
	"compress/flate"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/disk"
)

// checkpoint has the translated flows of one moment, less those that have ended since.
type checkpoint struct {
	batch
	at map[key]int // places in batch.rows
}

// key identifies a flow: at any time, a flow is the only one with its outside tuple.
type key struct {
	protocol             uint8
	outside, destination netip.AddrPort
	start                int64 // ms since 1970
}

func keyOf(r Record) key { return key{r.Protocol, r.Outside, r.Destination, r.Start.UnixMilli()} }

func (c *checkpoint) take(r Record) {
	c.at[keyOf(r)] = len(c.rows)
	c.add(r)
}

// checkpoint dumps all flows and writes the translated ones to disk, so that a power loss or an end
// of the daemon loses little. When ends may have been missed, it logs the flows of the previous
// checkpoint that are gone, as ended by now.
func (r *Recorder) checkpoint(ctx context.Context, now time.Time) error {
	lossy := r.lossy.Swap(false)
	r.mu.Lock()
	r.ended = map[key]bool{}
	r.mu.Unlock()
	fresh, whole := &checkpoint{at: map[key]int{}}, true
	err := r.conn.Dump(ctx, unix.AF_UNSPEC, func(f *conntrack.Flow) bool {
		if f.Status&conntrack.SourceNAT != 0 && f.Status&conntrack.Dying == 0 {
			r.mu.Lock()
			rec := r.recordLocked(f)
			r.mu.Unlock()
			rec.End = now
			fresh.take(rec)
		}
		whole = len(fresh.rows) < maxRunRows
		return whole
	})
	// The kernel sends the event before it removes the flow from the table, so all ends that the
	// dump missed are readable now.
	if err == nil {
		err = r.look(ctx)
	}
	r.mu.Lock()
	ended := r.ended
	r.ended = nil
	if err != nil {
		r.mu.Unlock()
		r.lossy.Store(lossy || r.lossy.Load())
		return fmt.Errorf("making a checkpoint of flows: %w", err)
	}
	for k := range ended {
		delete(fresh.at, k)
	}
	n := r.live.names()
	if lossy && whole {
		for k, i := range r.live.at {
			if _, lives := fresh.at[k]; !lives {
				rec := n.record(r.live.rows[i])
				rec.End, rec.Vanished = now, true
				r.store.Append(rec, now)
				r.unheard.Add(1)
			}
		}
	}
	r.live = fresh
	r.mu.Unlock()
	return r.save(fresh)
}

func (r *Recorder) liveName() string { return filepath.Join(r.dir, "live") }

// save replaces the checkpoint on disk.
func (r *Recorder) save(c *checkpoint) error {
	if len(c.rows) == 0 {
		if err := os.Remove(r.liveName()); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	if err := disk.Replace(r.liveName(), newEncoder(flate.NoCompression).encode(c.names(), c.rows, 0), 0o600); err != nil {
		return fmt.Errorf("writing the checkpoint of flows: %w", err)
	}
	return nil
}

// load reads the last checkpoint of an earlier process. Its flows that are gone ended while the
// recorder did not listen.
func (r *Recorder) load() error {
	b, err := os.ReadFile(r.liveName())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	n, rows, err := decodeRun(b)
	if err == nil && len(rows) == 0 {
		err = errDamaged // a checkpoint without rows is never written
	}
	if err != nil {
		r.log.Warn("the checkpoint of flows cannot be used", "err", err)
		return nil
	}
	for _, w := range rows {
		r.live.take(n.record(w))
	}
	// After the checkpoint, the process went on for up to a minute and recorded ends.
	if err := r.store.since(time.UnixMilli(rows[0].end), func(rec Record) { delete(r.live.at, keyOf(rec)) }); err != nil {
		r.log.Warn("flows that ended before the start may be recorded twice", "err", err)
	}
	r.lossy.Store(true)
	return nil
}
