package document

import (
	"context"
	"fmt"
	"time"

	"github.com/isthmus-net/isthmus/router/fault"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// Secret is a stored secret, with the fields of documents that name it.
type Secret struct {
	store.SecretInfo
	UsedBy []string // paths of fields
}

// SetSecret stores a secret and applies the new value. A value that does not fit a field that names
// the secret is refused.
func (m *Manager) SetSecret(ctx context.Context, author, name string, value []byte) (Secret, error) {
	if err := m.fits(name, value); err != nil {
		return Secret{}, err
	}
	info, err := m.Store.SetSecret(name, value, time.Now())
	if err != nil {
		return Secret{}, err
	}
	return m.secretSet(ctx, author, "secret set", info)
}

// AddSecret stores a secret as SetSecret does, and refuses to replace another value.
func (m *Manager) AddSecret(ctx context.Context, author, name string, value []byte) (Secret, error) {
	if err := m.fits(name, value); err != nil {
		return Secret{}, err
	}
	info, stored, err := m.Store.AddSecret(name, value, time.Now())
	if err != nil {
		return Secret{}, err
	}
	if !stored {
		m.mu.Lock()
		defer m.mu.Unlock()
		uses, _ := m.uses()
		return Secret{info, uses[name]}, nil
	}
	return m.secretSet(ctx, author, "secret added", info)
}

// RollbackSecret restores the former value of a secret.
func (m *Manager) RollbackSecret(ctx context.Context, author, name string) (Secret, error) {
	value, err := m.Store.FormerSecret(name)
	if err != nil {
		return Secret{}, err
	}
	if err := m.fits(name, value); err != nil {
		return Secret{}, err
	}
	info, err := m.Store.RollbackSecret(name, time.Now())
	if err != nil {
		return Secret{}, err
	}
	return m.secretSet(ctx, author, "secret rolled back", info)
}

// secretSet applies the new value of a stored secret.
func (m *Manager) secretSet(ctx context.Context, author, what string, info store.SecretInfo) (Secret, error) {
	m.Log.Info(what, "name", info.Ref.Name, "author", author)
	// The secret is stored, even if the caller has gone meanwhile.
	if err := m.secretsChanged(context.WithoutCancel(ctx)); err != nil {
		return Secret{}, fmt.Errorf("the secret is stored, but the present document cannot be planned with it: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	uses, _ := m.uses()
	return Secret{info, uses[info.Ref.Name]}, nil
}

// fits returns why a value does not fit a field of the present document that names the secret.
func (m *Manager) fits(name string, value []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []spec.SecretUse
	if m.spec != nil {
		list = m.spec.Secrets
	} else {
		list = m.usesIn(m.present.Generation, m.present.Text)
	}
	for _, u := range list {
		if u.Name != name {
			continue
		}
		if err := u.Kind.Check(value); err != nil {
			return fmt.Errorf("%w: secret %s is used by %s: %w; the stored one stays", fault.ErrInvalid, name, u.Path, err)
		}
	}
	return nil
}

// Secrets returns the stored secrets, by name.
func (m *Manager) Secrets() (out []Secret) {
	m.mu.Lock()
	defer m.mu.Unlock()
	uses, _ := m.uses() // uses that cannot be read are not shown
	for _, info := range m.Store.Secrets() {
		out = append(out, Secret{info, uses[info.Ref.Name]})
	}
	return out
}

// DeleteSecret deletes a secret that no document uses.
func (m *Manager) DeleteSecret(_ context.Context, author, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	uses, err := m.uses()
	if err != nil {
		return err
	}
	if u := uses[name]; len(u) > 0 {
		return fmt.Errorf("%w: secret %s is used by %s", fault.ErrPrecondition, name, u[0])
	}
	m.version++ // a plan in progress may name it
	if err := m.Store.DeleteSecret(name); err != nil {
		return err
	}
	m.Log.Info("secret deleted", "name", name, "author", author)
	return nil
}

// uses returns the field paths that use each secret: in the present document, and in the one that
// comes back unless the present one is confirmed.
func (m *Manager) uses() (map[string][]string, error) {
	paths := map[string][]string{}
	add := func(u []spec.SecretUse, of string) {
		for _, one := range u {
			paths[one.Name] = append(paths[one.Name], one.Path+of)
		}
	}
	if m.spec != nil && m.unstored == nil && m.held == nil {
		add(m.spec.Secrets, "")
	} else {
		add(m.usesIn(m.present.Generation, m.present.Text), "")
	}
	if m.present.ConfirmBy.IsZero() || m.present.RevertTo == 0 {
		return paths, nil
	}
	former, err := m.Store.Revision(m.present.RevertTo)
	if err == nil {
		add(m.usesIn(former.Generation, former.Text), fmt.Sprintf(" of generation %d", former.Generation))
	}
	return paths, err
}

// usesIn returns the uses of secrets in the text of a generation that is not applied. The text is
// parsed once, since callers may repeat the query.
func (m *Manager) usesIn(generation uint64, text string) (out []spec.SecretUse) {
	if known, ok := m.textUses[generation]; ok {
		return known
	}
	d, _ := spec.Decode([]byte(text))
	out = spec.SecretUses(d.Message)
	if len(m.textUses) > 1 || m.textUses == nil {
		m.textUses = map[uint64][]spec.SecretUse{}
	}
	m.textUses[generation] = out
	return out
}
