package apitest

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/store"
)

func (r *Router) SetSecret(_ context.Context, _, name string, value []byte) (*isthmusv1.SecretInfo, error) {
	r.mu.Lock()
	if was, ok := r.secrets[name]; ok {
		r.former[name] = was
	}
	r.secrets[name] = string(value)
	r.mu.Unlock()
	all := r.Secrets()
	return all[slices.IndexFunc(all, func(i *isthmusv1.SecretInfo) bool { return i.Name == name })], nil
}

// AddSecret implements api.Router.
func (r *Router) AddSecret(ctx context.Context, author, name string, value []byte) (*isthmusv1.SecretInfo, error) {
	r.mu.Lock()
	was, had := r.secrets[name]
	r.mu.Unlock()
	if had && was != string(value) {
		return nil, fmt.Errorf("secret %s %w: the stored value has fingerprint %016x, the new one %016x", name, store.ErrTaken, len(was), len(value))
	}
	return r.SetSecret(ctx, author, name, value)
}

// RollbackSecret implements api.Router.
func (r *Router) RollbackSecret(ctx context.Context, author, name string) (*isthmusv1.SecretInfo, error) {
	r.mu.Lock()
	was, ok := r.former[name]
	r.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("former value of secret %q: %w", name, api.ErrNotFound)
	}
	return r.SetSecret(ctx, author, name, []byte(was))
}

// Secret returns the value of a secret.
func (r *Router) Secret(name string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.secrets[name]
}

// Secrets returns the secrets with the length of the value as the fingerprint. A secret with the
// name of a present tunnel is in use by that tunnel.
func (r *Router) Secrets() []*isthmusv1.SecretInfo {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []*isthmusv1.SecretInfo
	for name, value := range r.secrets {
		i := &isthmusv1.SecretInfo{Name: name, Fingerprint: fmt.Sprintf("%016x", len(value)), Changed: timestamppb.New(r.now())}
		if n := len(r.revisions); n > 0 {
			if at := slices.Index(names(r.revisions[n-1].Text), name); at >= 0 {
				i.UsedBy = []string{fmt.Sprintf("tunnels[%d].ipsec.psk", at)}
			}
		}
		out = append(out, i)
	}
	slices.SortFunc(out, func(a, b *isthmusv1.SecretInfo) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func (r *Router) DeleteSecret(_ context.Context, _, name string) error {
	for _, i := range r.Secrets() {
		if i.Name != name {
			continue
		}
		if len(i.UsedBy) > 0 {
			return fmt.Errorf("%w: secret %q is used by %s", api.ErrPrecondition, name, strings.Join(i.UsedBy, ", "))
		}
		r.mu.Lock()
		delete(r.secrets, name)
		r.mu.Unlock()
		return nil
	}
	return fmt.Errorf("secret %q: %w", name, secret.ErrNotFound)
}
