package translog

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/router/disk"
)

const (
	// runRows is how many rows collect in memory and in a journal before their run: 52 seconds of
	// 5,000 flows a second, some 20 MB.
	runRows = 1 << 18
	// runAge is the age at which fewer rows become a run.
	runAge = time.Hour
	// waitingRows bounds the rows in memory when the disk is slow. Further rows are dropped and
	// counted.
	waitingRows = maxRunRows
	// A file that reaches fileBytes or fileAge is followed by a new one. A file is the unit of
	// deletion.
	fileBytes = 64 << 20
	fileAge   = 24 * time.Hour
)

// shelf keeps records of one kind: runs in files that end in ".flows", the oldest first, and rows
// without a run in journals. A journal consists of runs too, of one second each; it is deleted when
// its rows have a run.
//
// Store.mu guards the fields below it. The others belong to the goroutine that calls sync.
type shelf struct {
	dir      string
	encoder  *encoder // of runs
	journals *encoder // of journals, which are short-lived and not worth compressing
	number   uint32   // of the journal of waiting
	journal  *os.File
	sealed   uint32 // number of the journal of sealing
	written  int64  // bytes in the journal
	synced   int    // rows of waiting that are in a journal

	// Guarded by Store.mu.
	files   []*file
	waiting *batch
	began   time.Time // when the first row of waiting came
	sealing *batch    // its run is being written
}

// file is one file of runs.
type file struct {
	*os.File
	size  int64
	began time.Time
	to    int64 // the newest end in it, ms since 1970
	runs  []runAt
}

// runAt is where a run is.
type runAt struct {
	header
	offset int64
}

// openShelf reads a directory. It returns notes about damaged parts, which it leaves alone. A file
// of an earlier process is never appended to.
func openShelf(dir string, runs, seconds *encoder) (s *shelf, notes []error, err error) {
	s = &shelf{dir: dir, encoder: runs, journals: seconds, waiting: &batch{}}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return s, nil, err
	}
	entries, err := os.ReadDir(dir) // in order of names, which is that of time
	if err != nil {
		return s, nil, err
	}
	var journals []string
	var covered uint32
	for _, entry := range entries {
		name := filepath.Join(dir, entry.Name())
		switch filepath.Ext(name) {
		case ".flows":
			f, note, err := openFile(name)
			if err != nil {
				return s, nil, err
			}
			s.files = append(s.files, f)
			notes = append(notes, note)
			for _, r := range f.runs {
				covered = max(covered, r.journal)
			}
		case ".journal":
			journals = append(journals, name)
		}
	}
	s.number = covered
	for _, name := range journals {
		var n uint32
		if _, err := fmt.Sscanf(filepath.Base(name), "%d.journal", &n); err != nil {
			continue
		}
		s.number = max(s.number, n)
		if n <= covered {
			if err := os.Remove(name); err != nil {
				return s, nil, err
			}
			continue
		}
		note, err := s.replay(name)
		if err != nil {
			return s, nil, err
		}
		notes = append(notes, note)
	}
	s.number++
	s.synced = len(s.waiting.rows)
	return s, slices.DeleteFunc(notes, func(err error) bool { return err == nil }), nil
}

// openFile finds the runs of a file. At the first invalid run it stops, and returns a note.
func openFile(name string) (f *file, note, err error) {
	k, err := os.Open(name)
	if err != nil {
		return nil, nil, err
	}
	info, err := k.Stat()
	if err != nil {
		k.Close()
		return nil, nil, err
	}
	f = &file{File: k, size: info.Size(), to: math.MinInt64}
	head := make([]byte, headerSize)
	for at := int64(0); at < f.size; {
		_, err := k.ReadAt(head, at)
		h, bad := decodeHeader(head)
		if err != nil || bad != nil || at+int64(h.size) > f.size {
			note = fmt.Errorf("%s: the last %d bytes are incomplete and are not read", name, f.size-at)
			break
		}
		f.runs = append(f.runs, runAt{h, at})
		f.to = max(f.to, h.to)
		at += int64(h.size)
	}
	if len(f.runs) == 0 {
		f.to = info.ModTime().UnixMilli()
	}
	return f, note, nil
}

// replay takes the rows of a journal back into memory.
func (s *shelf) replay(name string) (note, err error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	for len(b) > 0 {
		h, err := decodeHeader(b)
		if err != nil || int64(h.size) > int64(len(b)) {
			return fmt.Errorf("%s: the last %d bytes are incomplete and are dropped", name, len(b)), nil
		}
		n, rows, err := decodeRun(b[:h.size])
		if err != nil {
			note = fmt.Errorf("%s: %d rows are damaged and are dropped", name, h.rows)
		}
		for _, w := range rows {
			if !s.add(n.record(w), time.UnixMilli(w.end)) {
				return fmt.Errorf("%s: more than %d rows wait, the rest is dropped", name, waitingRows), nil
			}
		}
		b = b[h.size:]
	}
	return note, nil
}

// add takes a record into memory, and reports whether there was room.
func (s *shelf) add(r Record, now time.Time) bool {
	if len(s.waiting.rows) >= waitingRows {
		return false
	}
	if len(s.waiting.rows) == 0 {
		s.began = now
	}
	s.waiting.add(r)
	return true
}

func (s *shelf) journalName(n uint32) string {
	return filepath.Join(s.dir, fmt.Sprintf("%010d.journal", n))
}

// note writes rows into the journal and returns once they are on disk.
func (s *shelf) note(n names, rows []row) error {
	if s.journal == nil {
		f, err := os.OpenFile(s.journalName(s.number), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return err
		}
		if err := disk.SyncDir(s.dir); err != nil {
			f.Close()
			return err
		}
		s.journal, s.written = f, 0
	}
	end := s.written
	for part := range slices.Chunk(rows, runRows) {
		run := s.journals.encode(n, part, s.number)
		if _, err := s.journal.WriteAt(run, end); err != nil {
			return err
		}
		end += int64(len(run))
	}
	if err := s.journal.Sync(); err != nil {
		return err
	}
	s.written = end
	s.synced += len(rows)
	return nil
}

// write makes a run on disk of a batch. It returns the file with the run, which is a new one when
// the last one is full.
func (s *shelf) write(b *batch, now time.Time) (*file, runAt, error) {
	run := s.encoder.encode(b.names(), b.rows, s.sealed)
	var f *file
	if n := len(s.files); n > 0 {
		f = s.files[n-1]
	}
	if f == nil || f.began.IsZero() || f.size >= fileBytes || now.Sub(f.began) >= fileAge {
		number := 1
		if f != nil {
			if _, err := fmt.Sscanf(filepath.Base(f.Name()), "%d.flows", &number); err != nil {
				return nil, runAt{}, err
			}
			number++
		}
		k, err := os.OpenFile(filepath.Join(s.dir, fmt.Sprintf("%010d.flows", number)), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return nil, runAt{}, err
		}
		f = &file{File: k, began: now, to: math.MinInt64}
	}
	h, _ := decodeHeader(run)
	_, err := f.WriteAt(run, f.size)
	err = cmp.Or(err, f.Sync(), disk.SyncDir(s.dir))
	if err != nil && f.size == 0 {
		err = errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	return f, runAt{h, f.size}, err
}

// close closes the files. Everything that was synced is on disk.
func (s *shelf) close() {
	for _, f := range s.files {
		f.Close()
	}
	if s.journal != nil {
		s.journal.Close()
	}
}

// removeJournals removes journals up to a number.
func (s *shelf) removeJournals(upTo uint32) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		var n uint32
		if !strings.HasSuffix(e.Name(), ".journal") {
			continue
		}
		if _, err := fmt.Sscanf(e.Name(), "%d.journal", &n); err == nil && n <= upTo {
			if err := os.Remove(filepath.Join(s.dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}
