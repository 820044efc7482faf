package auth

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"google.golang.org/protobuf/encoding/protojson"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/disk"
	"github.com/isthmus-net/isthmus/router/store"
)

type adminRecord struct {
	Serial   string
	Exported bool
}

// exportAdmin writes the first admin's context, once in the life of the store. If power is lost in
// between, the certificate of that attempt becomes invalid and the next start makes another.
func (a *Authority) exportAdmin(o Options) error {
	var r adminRecord
	data, err := a.store.Private("admin")
	switch {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return err
	default:
		if err := json.Unmarshal(data, &r); err != nil {
			return err
		}
		if r.Exported {
			return nil
		}
		if err := a.store.DeleteClient(r.Serial); err != nil {
			return err
		}
	}
	key, keyPEM, err := newKey()
	if err != nil {
		return err
	}
	certificate, c, err := a.issue("admin", Admin, key.Public(), adminLifetime)
	if err != nil {
		return err
	}
	if err := a.setAdmin(adminRecord{Serial: c.Serial}); err != nil {
		return err
	}
	text, err := protojson.MarshalOptions{Multiline: true}.Marshal(&isthmusv1.ClientContext{
		Address: o.Address, ServerName: ServerName, Authority: a.Certificate(), Certificate: certificate, Key: keyPEM,
	})
	if err != nil {
		return err
	}
	if err := disk.Replace(o.Bundle, append(text, '\n'), 0o600); err != nil {
		return err
	}
	if err := a.setAdmin(adminRecord{Serial: c.Serial, Exported: true}); err != nil {
		return err
	}
	_, err = fmt.Fprintf(o.Notice, "isthmusd: the first admin's certificate and key are in %s; move the file to the admin's machine, it is not written again\n", o.Bundle)
	return err
}

// WithdrawFirst revokes the certificate of the first admin's context and removes its file. The
// context is not needed if an admin's own request was signed, and its key is on the disk.
func (a *Authority) WithdrawFirst() error {
	data, err := a.store.Private("admin")
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	var r adminRecord
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err == nil {
		err = a.Revoke(r.Serial)
	}
	if errors.Is(err, store.ErrNotFound) {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("withdrawing the first admin's context: %w", err)
	}
	if err := os.Remove(a.options.Bundle); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("withdrawing the first admin's context: %w", err)
	}
	return nil
}

// Fingerprint returns the SHA-256 of the present authority's certificate, in hexadecimal; empty:
// none exists.
func (a *Authority) Fingerprint() string {
	c, err := a.authority()
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%x", sha256.Sum256(c.cert.Raw))
}

func (a *Authority) setAdmin(r adminRecord) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return a.store.SetPrivate("admin", data, a.now())
}
