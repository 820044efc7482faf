package store

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"time"
)

// Client is an issued client certificate. A certificate that is not in the store is not valid, so a
// lost file locks one client out and admits no stranger.
type Client struct {
	Serial  string    `json:"serial"` // hexadecimal, lower case
	Name    string    `json:"name"`
	Role    string    `json:"role"`
	Issued  time.Time `json:"issued"`
	Expires time.Time `json:"expires"`
	Revoked bool      `json:"revoked"`
	// RenewedFrom is the serial of the preceding certificate, First the time when the first of them
	// was issued, and Key the SHA-256 of the public key (SubjectPublicKeyInfo) in hexadecimal.
	// Empty, zero and empty: it was not renewed from another.
	RenewedFrom string    `json:"renewedFrom,omitzero"`
	First       time.Time `json:"first,omitzero"`
	Key         string    `json:"key,omitzero"`
	// Change is the sequence number of the certificate's last change; SetClient sets it.
	Change uint64 `json:"change,omitzero"`
}

const (
	clientDir    = "clients"
	clientSuffix = ".json"
)

var clientSerial = regexp.MustCompile(`^[0-9a-f]{1,40}$`)

func clientName(serial string) string { return clientDir + "/" + serial + clientSuffix }

func (s *Store) loadClients() error {
	return s.scanLocked(clientDir, clientSuffix, func(serial string, payload []byte) error {
		var c Client
		if err := json.Unmarshal(payload, &c); err != nil {
			return fmt.Errorf("client %s: %w: %w", serial, ErrDamaged, err)
		}
		s.clients[serial] = c
		s.clientChange = max(s.clientChange, c.Change)
		return nil
	})
}

// Client returns one issued certificate, or an error that wraps ErrNotFound.
func (s *Store) Client(serial string) (Client, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.clients[serial]
	if !ok {
		return Client{}, fmt.Errorf("client certificate %q: %w", serial, ErrNotFound)
	}
	return c, nil
}

// Clients returns the issued certificates in the order of issue.
func (s *Store) Clients() []Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Client, 0, len(s.clients))
	for _, c := range s.clients {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b Client) int {
		if d := a.Issued.Compare(b.Issued); d != 0 {
			return d
		}
		return slices.Compare([]byte(a.Serial), []byte(b.Serial))
	})
	return out
}

// SetClient adds a certificate or replaces its record.
func (s *Store) SetClient(c Client) error {
	if !clientSerial.MatchString(c.Serial) {
		return fmt.Errorf("storing client certificate: bad serial %q", c.Serial)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c.Change = s.clientChange + 1
	payload, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("storing client certificate: %w", err)
	}
	if err := s.writeLocked(clientName(c.Serial), payload); err != nil {
		return err
	}
	delete(s.lost, clientName(c.Serial))
	s.clients[c.Serial] = c
	s.clientChange = c.Change
	s.markLocked()
	return nil
}

// DeleteClient deletes a certificate, which makes it invalid. Deleting an unknown one is not an
// error.
func (s *Store) DeleteClient(serial string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.clients[serial]; !ok {
		return nil
	}
	if err := s.removeLocked(clientName(serial)); err != nil {
		return err
	}
	delete(s.clients, serial)
	return nil
}
