package store

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

// Revision is one accepted document with everything that was decided about it.
type Revision struct {
	Generation uint64    `json:"generation"`
	Time       time.Time `json:"time"`
	Author     string    `json:"author"`
	Reason     string    `json:"reason"`
	Changes    uint32    `json:"changes"`

	// ConfirmBy is when the daemon goes back to RevertTo unless Confirm is called before. Zero: it stays.
	ConfirmBy time.Time `json:"confirmBy,omitzero"`
	RevertTo  uint64    `json:"revertTo,omitzero"`

	// Text is the document as it was written; Ledger a JSON value of router/plan. History leaves both out.
	Text   string          `json:"text"`
	Ledger json.RawMessage `json:"ledger,omitempty"`
}

// Bounds of the history. The present document and the one to go back to stay in any case.
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
		r, err := decodeRevision(payload)
		if err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		s.current = r
		s.revisions = append(s.revisions, newEntry(r, payload))
		return nil
	})
	if err != nil {
		return err
	}
	s.newest = s.current.Generation
	// A damaged file keeps its number: a new document must not take its place.
	for name := range s.lost {
		var g uint64
		if _, err := fmt.Sscanf(name, revisionDir+"/%d"+revisionSuffix, &g); err == nil {
			s.newest = max(s.newest, g)
		}
	}
	return nil
}

func decodeRevision(payload []byte) (Revision, error) {
	var r Revision
	if err := json.Unmarshal(payload, &r); err != nil {
		return Revision{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return r, nil
}

// entry is a line of the history.
type entry struct {
	Revision     // without text and ledger
	size     int // of the file in bytes
}

func newEntry(r Revision, payload []byte) entry {
	r.Text, r.Ledger = "", nil
	return entry{r, len(payload)}
}

// Current returns the present revision; false when no document was accepted yet.
func (s *Store) Current() (Revision, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.current
	r.Ledger = slices.Clone(r.Ledger)
	return r, r.Generation != 0
}

// History returns the revisions that are kept, newest first, without text and ledger.
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
	if s.lost[name] {
		return Revision{}, fmt.Errorf("generation %d: %w", generation, ErrDamaged)
	}
	if !slices.ContainsFunc(s.revisions, func(e entry) bool { return e.Generation == generation }) {
		return Revision{}, fmt.Errorf("generation %d: %w", generation, ErrNotFound)
	}
	data, err := s.fs.readFile(name)
	if err != nil {
		return Revision{}, fmt.Errorf("reading generation %d: %w", generation, err)
	}
	payload, err := decodeRecord(name, data)
	if err != nil {
		return Revision{}, err
	}
	return decodeRevision(payload)
}

// Accept makes r the present revision and returns its generation, which is higher than any before; r.Generation is
// ignored. base is the generation that the plan behind r was made from, 0 for none; when it is not the present one,
// the error wraps ErrStale and nothing is changed. After an error that wraps ErrFailed, only a restart tells whether r
// is the present one.
func (s *Store) Accept(base uint64, r Revision) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if base != s.current.Generation {
		return 0, fmt.Errorf("%w: based on %d, present is %d", ErrStale, base, s.current.Generation)
	}
	r.Generation = s.newest + 1
	payload, err := s.writeRevisionLocked(r)
	if err != nil {
		return 0, err
	}
	s.newest = r.Generation
	s.current = r
	s.revisions = append(s.revisions, newEntry(r, payload))
	s.pruneLocked()
	return r.Generation, nil
}

// Confirm takes the deadline off the present revision. Confirming twice is not an error; confirming another
// generation than the present one is ErrStale.
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
	payload, err := s.writeRevisionLocked(r)
	if err != nil {
		return err
	}
	s.current = r
	s.revisions[len(s.revisions)-1] = newEntry(r, payload)
	return nil
}

func (s *Store) writeRevisionLocked(r Revision) ([]byte, error) {
	payload, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encoding generation %d: %w", r.Generation, err)
	}
	return payload, s.writeLocked(revisionName(r.Generation), payload)
}

// pruneLocked removes the oldest revisions beyond the bounds. What cannot be removed now is tried again next time.
func (s *Store) pruneLocked() {
	total := 0
	kept := make([]entry, 0, len(s.revisions))
	for _, e := range slices.Backward(s.revisions) {
		needed := e.Generation == s.current.Generation || e.Generation == s.current.RevertTo || len(kept) < 2
		full := len(kept) >= maxRevisions || total+e.size > maxRevisionBytes
		if full && !needed && s.fs.remove(revisionName(e.Generation)) == nil {
			continue
		}
		total += e.size
		kept = append(kept, e)
	}
	slices.Reverse(kept)
	s.revisions = kept
}
