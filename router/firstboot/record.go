package firstboot

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// Records stores the record of the first boot.
type Records interface {
	Private(name string) ([]byte, error)
	SetPrivate(name string, value []byte, now time.Time) error
}

const recordName = "first-boot"

// record is the state of the first boot. It keeps from the user-data only what is needed later.
type record struct {
	Done       bool      `json:",omitempty"` // user-data is not read again
	Time       time.Time `json:",omitzero"`
	Digest     string    `json:",omitempty"` // of the user-data that was used
	Refused    string    `json:",omitempty"` // of the user-data that was refused last
	Generation uint64    `json:",omitempty"`

	API     []netip.Prefix `json:",omitempty"`
	Hosts   []string       `json:",omitempty"`
	Shell   bool           `json:",omitempty"`
	Quiet   bool           `json:",omitempty"`
	Context string         `json:",omitempty"` // for the first admin, public
	Admin   string         `json:",omitempty"` // the admin's name

	// Addresses are the last addresses from the platform: the daemon starts before the network, and
	// a document may need them then.
	Addresses spec.Platform `json:",omitzero"`

	// Instance is the machine that this state belongs to. Other is another machine that it was
	// found on, Since the time of that, and Authority the authority at that time.
	Instance  string    `json:",omitempty"`
	Other     string    `json:",omitempty"`
	Since     time.Time `json:",omitzero"`
	Authority string    `json:",omitempty"`
}

func (b *Boot) load() error {
	data, err := b.o.Records.Private(recordName)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(data, &b.rec)
	}
	if err != nil {
		return fmt.Errorf("reading the record of the first boot: %w", err)
	}
	return nil
}

// save stores a change; without success, nothing changes.
func (b *Boot) save(change func(*record)) error {
	b.saving.Lock()
	defer b.saving.Unlock()
	b.mu.Lock()
	next := b.rec
	b.mu.Unlock()
	change(&next)
	data, err := json.Marshal(next)
	if err == nil {
		err = b.o.Records.SetPrivate(recordName, data, time.Now())
	}
	if err != nil {
		return fmt.Errorf("storing the record of the first boot: %w", err)
	}
	b.mu.Lock()
	b.rec = next
	b.mu.Unlock()
	return nil
}

func (b *Boot) record() record {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rec
}
