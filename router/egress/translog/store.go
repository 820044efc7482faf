package translog

import (
	"cmp"
	"compress/flate"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/isthmus-net/isthmus/router/egress"
)

// longFlow is the duration from which a record is kept separately. Records are in order of their
// ends, so a search for a moment must read all flows that ended later, up to the longest duration
// after it. Among short flows that is a short stretch, and long flows are few.
const longFlow = 10 * time.Minute

// Store keeps records on disk, bounded by age and size. Its methods are safe for concurrent use,
// but only one goroutine may call Sync.
type Store struct {
	mu     sync.Mutex
	config egress.Log
	shelf  [2]*shelf // short and long flows
	notes  []error
	lost   atomic.Uint64
}

// OpenStore opens the store in a directory, and creates it if it is missing. After a crash, rows
// that were synced are there; an incomplete write is dropped and listed by Notes.
func OpenStore(dir string, c egress.Log) (*Store, error) {
	s := &Store{config: c}
	runs, journals := newEncoder(flate.HuffmanOnly), newEncoder(flate.NoCompression)
	for i, name := range []string{"short", "long"} {
		shelf, notes, err := openShelf(filepath.Join(dir, name), runs, journals)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("opening the log of translations: %w", err), s.Close())
		}
		s.shelf[i] = shelf
		s.notes = append(s.notes, notes...)
	}
	return s, nil
}

// Close closes the store without syncing it.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, shelf := range s.shelf {
		if shelf != nil {
			shelf.close()
		}
	}
	return nil
}

// Notes returns the damage that was found when the store was opened.
func (s *Store) Notes() []error { return s.notes }

// Lost counts the records that were dropped because the disk was slow or failed.
func (s *Store) Lost() uint64 { return s.lost.Load() }

// Limit changes the bounds.
func (s *Store) Limit(c egress.Log) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.config = c
}

// Append adds a record. It does not wait for the disk: records that were not synced are lost with
// the process.
func (s *Store) Append(r Record, now time.Time) {
	long := 0
	if r.Start.IsZero() || r.End.Sub(r.Start) > longFlow {
		long = 1
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.shelf[long].add(r, now) {
		s.lost.Add(1)
	}
}

// Sync writes everything that was appended to disk, makes runs of rows that are old or numerous
// enough, and deletes what is out of bounds. It continues after an error; the next call retries
// what could not be written.
func (s *Store) Sync(now time.Time) error {
	var errs []error
	for _, shelf := range s.shelf {
		errs = append(errs, s.sync(shelf, now))
	}
	if err := errors.Join(append(errs, s.trim(now))...); err != nil {
		return fmt.Errorf("writing the log of translations: %w", err)
	}
	return nil
}

func (s *Store) sync(h *shelf, now time.Time) error {
	s.mu.Lock()
	waiting, n, rows, began := h.waiting, h.waiting.names(), h.waiting.rows, h.began
	s.mu.Unlock()
	// Rows that become a run now need no journal.
	seal := h.sealing == nil && len(rows) > 0 && (len(rows) >= runRows || now.Sub(began) >= runAge)
	if !seal && len(rows) > h.synced {
		if err := h.note(n, rows[h.synced:]); err != nil {
			return err
		}
	}
	if seal {
		s.mu.Lock()
		h.sealing, h.waiting = waiting, &batch{}
		s.mu.Unlock()
		h.sealed = h.number
		h.number++
		if h.journal != nil {
			h.journal.Close()
			h.journal = nil
		}
		h.synced = 0
	}
	if h.sealing == nil {
		return nil
	}
	f, at, err := h.write(h.sealing, now)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if n := len(h.files); n == 0 || h.files[n-1] != f {
		h.files = append(h.files, f)
	}
	f.runs = append(f.runs, at)
	f.size += int64(at.size)
	f.to = max(f.to, at.to)
	h.sealing = nil
	s.mu.Unlock()
	return h.removeJournals(at.journal)
}

// trim deletes the oldest files while the store is too large, and files that are too old.
func (s *Store) trim(now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var total int64
	for _, h := range s.shelf {
		for _, f := range h.files {
			total += f.size
		}
	}
	for {
		var oldest *shelf
		for _, h := range s.shelf {
			if len(h.files) > 0 && (oldest == nil || h.files[0].to < oldest.files[0].to) {
				oldest = h
			}
		}
		if oldest == nil {
			return nil
		}
		f := oldest.files[0]
		if total <= s.config.MaxBytes && now.UnixMilli()-f.to <= s.config.MaxAge.Milliseconds() {
			return nil
		}
		if err := os.Remove(f.Name()); err != nil {
			return err
		}
		total -= f.size
		oldest.files = oldest.files[1:]
		f.Close()
	}
}

// Size returns how many records are on disk as runs, and their size in bytes.
func (s *Store) Size() (records uint64, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.shelf {
		for _, f := range h.files {
			size += f.size
			for _, r := range f.runs {
				records += uint64(r.rows)
			}
		}
	}
	return records, size
}

// Find returns the records that answer a query, in order of time. It skips unreadable runs and
// reports them in the error.
func (s *Store) Find(ctx context.Context, q Query) ([]Record, error) {
	type place struct {
		f *file
		runAt
	}
	var found []Record
	var places []place
	from, to := q.From.UnixMilli(), q.To.UnixMilli()
	s.mu.Lock()
	for _, h := range s.shelf {
		for _, b := range []*batch{h.sealing, h.waiting} {
			if b != nil {
				n := b.names()
				found = n.find(b.rows, q, found)
			}
		}
		for _, f := range h.files {
			for _, r := range f.runs {
				if r.from <= to && r.to >= from {
					places = append(places, place{f, r})
				}
			}
		}
	}
	s.mu.Unlock()
	var errs []error
	for _, p := range places {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if q.full(len(found)) {
			break
		}
		rest := q
		if q.Limit > 0 {
			rest.Limit -= len(found)
		}
		rows, err := p.f.find(p.runAt, rest)
		// a file that was closed meanwhile was too old
		if err != nil && !errors.Is(err, os.ErrClosed) {
			errs = append(errs, fmt.Errorf("reading %s at byte %d: %w", p.f.Name(), p.offset, err))
		}
		found = append(found, rows...)
	}
	slices.SortStableFunc(found, byTime)
	return found, errors.Join(errs...)
}

// since calls f with every record whose flow ended at a time or later. It skips unreadable runs and
// reports them in the error.
func (s *Store) since(t time.Time, f func(Record)) error {
	at := t.UnixMilli()
	take := func(n names, rows []row) {
		for _, w := range rows {
			if w.end >= at {
				f(n.record(w))
			}
		}
	}
	var errs []error
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.shelf {
		for _, b := range []*batch{h.sealing, h.waiting} {
			if b != nil {
				take(b.names(), b.rows)
			}
		}
		for _, k := range h.files {
			for _, r := range k.runs {
				if r.to < at {
					continue
				}
				b := make([]byte, r.size)
				_, err := k.ReadAt(b, r.offset)
				if err == nil {
					var n names
					var rows []row
					n, rows, err = decodeRun(b)
					take(n, rows)
				}
				if err != nil {
					errs = append(errs, fmt.Errorf("reading %s at byte %d: %w", k.Name(), r.offset, err))
				}
			}
		}
	}
	return errors.Join(errs...)
}

// byTime orders records by their start, and then by their end.
func byTime(a, b Record) int { return cmp.Or(a.Start.Compare(b.Start), a.End.Compare(b.End)) }

// find searches one run.
func (f *file) find(r runAt, q Query) ([]Record, error) {
	read := func(offset, size int64) ([]byte, error) {
		b := make([]byte, size)
		_, err := f.ReadAt(b, r.offset+offset)
		return b, err
	}
	b, err := read(headerSize, int64(r.index))
	if err != nil {
		return nil, err
	}
	x, err := decodeIndex(r.header, b)
	if err != nil {
		return nil, err
	}
	var found []Record
	var matching []row
	named := false
	for _, p := range x.pagesOf(q) {
		b, err := read(p.offset, p.size)
		if err != nil {
			return nil, err
		}
		rows, err := x.decodePage(p, b)
		if err != nil {
			return nil, err
		}
		for _, w := range rows {
			if w.matches(q) {
				matching = append(matching, w)
			}
		}
		if len(matching) == 0 {
			continue
		}
		if !named {
			if b, err = read(headerSize+int64(r.index), int64(r.names)); err != nil {
				return nil, err
			}
			if err := x.decodeNames(b); err != nil {
				return nil, err
			}
			named = true
		}
		if found, matching = x.find(matching, q, found), matching[:0]; q.full(len(found)) {
			break
		}
	}
	return found, nil
}
