package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Revision is an accepted document with its ledger and the circumstances of its acceptance.
type Revision struct {
	Generation uint64    `json:"generation"`
	Time       time.Time `json:"time"`
	Author     string    `json:"author"`
	Reason     string    `json:"reason"`
	Changes    uint32    `json:"changes"`
	Message    string    `json:"message,omitempty"` // why its author made it

	// ConfirmBy is the time at which the daemon goes back to RevertTo unless Confirm is called
	// before. Zero: it stays.
	ConfirmBy time.Time `json:"confirmBy,omitzero"`
	RevertTo  uint64    `json:"revertTo,omitzero"`

	// Text is the document as written; Ledger is a JSON value of router/plan. History omits both.
	Text   string          `json:"text"`
	Ledger json.RawMessage `json:"ledger,omitempty"`
}

// Bounds of the history. The present document, the one to go back to, and the bases of their deltas
// stay in any case.
const (
	maxRevisions     = 200
	maxRevisionBytes = 64 << 20
)

const (
	revisionDir    = "revisions"
	revisionSuffix = ".json"
)

func revisionName(generation uint64) string {
	return fmt.Sprintf("%s/%020d%s", revisionDir, generation, revisionSuffix)
}

func (s *Store) loadRevisions() error {
	err := s.scanLocked(revisionDir, revisionSuffix, func(key string, payload []byte) error {
		r, err := s.decodeLocked(payload)
		if err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		s.current = r
		s.revisions = append(s.revisions, newEntry(r, len(payload)))
		return nil
	})
	if err != nil {
		return err
	}
	s.newest = s.current.Generation
	// A damaged file keeps its number, so that a new document does not replace it.
	for name := range s.lost {
		var g uint64
		if _, err := fmt.Sscanf(name, revisionDir+"/%d"+revisionSuffix, &g); err == nil {
			s.newest = max(s.newest, g)
		}
	}
	return nil
}

// revision is the form of a Revision on disk: with its whole text, or with a delta from that of
// another one.
type revision struct {
	Revision
	// Base is the generation of the base text. 0: this revision is whole.
	Base    uint64   `json:"base,omitzero"`
	Splices []splice `json:"splices,omitempty"` // in the order of their application
}

// decodeLocked makes a whole revision from its form on disk.
func (s *Store) decodeLocked(payload []byte) (revision, error) {
	var r revision
	if err := json.Unmarshal(payload, &r); err != nil {
		return r, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if r.Base == 0 {
		s.base = whole{r.Generation, r.Text}
		return r, nil
	}
	if s.base.generation != r.Base {
		base, err := revision{}, errors.New("it is not older")
		if r.Base < r.Generation {
			base, err = s.readRevisionLocked(r.Base)
		}
		if err != nil {
			return r, fmt.Errorf("%w: generation %d is written as changes of generation %d: %w", ErrDamaged, r.Generation, r.Base, err)
		}
		s.base = whole{r.Base, base.Text}
	}
	var err error
	r.Text, err = spliced(s.base.text, r.Splices)
	return r, err
}

// entry is a line of the history.
type entry struct {
	Revision        // without text and ledger
	base     uint64 // see revision
	size     int    // of the file in bytes
}

func newEntry(r revision, size int) entry {
	r.Text, r.Ledger = "", nil
	return entry{r.Revision, r.Base, size}
}

// Current returns the present revision; false if no document was accepted yet.
func (s *Store) Current() (Revision, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.current.Revision
	r.Ledger = slices.Clone(r.Ledger)
	return r, r.Generation != 0
}

// Newest returns the highest generation ever accepted, which is above that of Current if its file
// is damaged.
func (s *Store) Newest() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.newest
}

// History returns the kept revisions, newest first, without text and ledger.
func (s *Store) History() []Revision {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Revision, 0, len(s.revisions))
	for _, e := range slices.Backward(s.revisions) {
		out = append(out, e.Revision)
	}
	return out
}

// Revision returns one revision, or an error that wraps ErrNotFound or ErrDamaged.
func (s *Store) Revision(generation uint64) (Revision, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := revisionName(generation)
	if err := s.lost[name]; err != nil {
		return Revision{}, fmt.Errorf("generation %d: %w", generation, err)
	}
	if !slices.ContainsFunc(s.revisions, func(e entry) bool { return e.Generation == generation }) {
		return Revision{}, fmt.Errorf("generation %d: %w", generation, ErrNotFound)
	}
	r, err := s.readRevisionLocked(generation)
	return r.Revision, err
}

func (s *Store) readRevisionLocked(generation uint64) (revision, error) {
	name := revisionName(generation)
	data, err := s.fs.readFile(name)
	if err != nil {
		return revision{}, fmt.Errorf("reading generation %d: %w", generation, err)
	}
	payload, err := decodeRecord(name, data)
	if err != nil {
		return revision{}, err
	}
	return s.decodeLocked(payload)
}

// Accept makes r the present revision and returns its generation, which is higher than any before;
// r.Generation is ignored. base is the generation that r was planned from, 0 for none; if it is not
// the present one, the error wraps ErrStale and nothing is changed. After an error that wraps
// ErrFailed, only a restart shows whether r is the present one.
func (s *Store) Accept(base uint64, r Revision) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if base != s.current.Generation {
		return 0, fmt.Errorf("%w: based on %d, present is %d", ErrStale, base, s.current.Generation)
	}
	r.Generation = s.newest + 1
	next := revision{Revision: r}
	if s.current.Generation != 0 {
		next.Base, next.Splices = s.changedLocked(r.Text)
	}
	size, err := s.writeRevisionLocked(next)
	if err != nil {
		return 0, err
	}
	s.newest = r.Generation
	s.current = next
	s.revisions = append(s.revisions, newEntry(next, size))
	s.pruneLocked()
	s.markLocked()
	return r.Generation, nil
}

// Confirm removes the deadline of the present revision. Confirming twice is not an error;
// confirming another generation than the present one is ErrStale.
func (s *Store) Confirm(generation uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.current
	if generation == 0 || generation != r.Generation {
		return fmt.Errorf("%w: confirming %d, present is %d", ErrStale, generation, r.Generation)
	}
	if r.ConfirmBy.IsZero() {
		return nil
	}
	r.ConfirmBy, r.RevertTo = time.Time{}, 0
	size, err := s.writeRevisionLocked(r)
	if err != nil {
		return err
	}
	s.current = r
	s.revisions[len(s.revisions)-1] = newEntry(r, size)
	return nil
}

// Compact writes the present revision as a whole, if it was written as at least so many deltas of
// another one, so that it needs no other file. Until then a damaged base also damages the present
// document.
func (s *Store) Compact(changes int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.current
	if r.Base == 0 || len(r.Splices) < changes {
		return nil
	}
	r.Base, r.Splices = 0, nil
	size, err := s.writeRevisionLocked(r)
	if err != nil {
		return err
	}
	s.current = r
	s.revisions[len(s.revisions)-1] = newEntry(r, size)
	return nil
}

// writeRevisionLocked returns the number of written bytes.
func (s *Store) writeRevisionLocked(r revision) (int, error) {
	written := r
	if r.Base != 0 {
		written.Text = ""
	}
	payload, err := json.Marshal(written)
	if err != nil {
		return 0, fmt.Errorf("encoding generation %d: %w", r.Generation, err)
	}
	return len(payload), s.writeLocked(revisionName(r.Generation), payload)
}

// pruneLocked removes the oldest revisions beyond the bounds. A failed removal is tried again next
// time.
func (s *Store) pruneLocked() {
	total := 0
	kept := make([]entry, 0, len(s.revisions))
	bases := map[uint64]bool{} // of those that are kept
	for _, e := range slices.Backward(s.revisions) {
		needed := e.Generation == s.current.Generation || e.Generation == s.current.RevertTo || len(kept) < 2 || bases[e.Generation]
		full := len(kept) >= maxRevisions || total+e.size > maxRevisionBytes
		if full && !needed && s.fs.remove(revisionName(e.Generation)) == nil {
			continue
		}
		bases[e.base] = true
		total += e.size
		kept = append(kept, e)
	}
	slices.Reverse(kept)
	s.revisions = kept
}
