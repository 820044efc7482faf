package router

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

var _ api.Router = (*Router)(nil)

// Validate implements api.Router.
func (r *Router) Validate(ctx context.Context, src *isthmusv1.Source) (*isthmusv1.ValidateResponse, error) {
	problems, notes, err := r.validate(ctx, src)
	return &isthmusv1.ValidateResponse{Problems: problemMessages(problems), Notes: problemMessages(notes)}, err
}

// Plan implements api.Router.
func (r *Router) Plan(ctx context.Context, src *isthmusv1.Source) (*isthmusv1.PlanResponse, error) {
	generation, changes, noted, err := r.preview(ctx, src)
	if err != nil {
		return nil, refusal(err)
	}
	return &isthmusv1.PlanResponse{Generation: generation, Changes: changeMessages(changes), Notes: problemMessages(noted)}, nil
}

// Apply implements api.Router.
func (r *Router) Apply(ctx context.Context, author string, q *isthmusv1.ApplyRequest) (*isthmusv1.ApplyResponse, error) {
	generation, changes, err := r.apply(ctx, q.GetSource(), q.ExpectedGeneration, q.GetConfirmWithin().AsDuration(), author)
	if err != nil {
		return nil, refusal(err)
	}
	return &isthmusv1.ApplyResponse{Generation: generation, Changes: changeMessages(changes), Notes: problemMessages(r.notes()), GoesBackIn: r.goesBackIn()}, nil
}

// EditPolicies implements api.Router.
func (r *Router) EditPolicies(ctx context.Context, author string, q *isthmusv1.EditPoliciesRequest) (*isthmusv1.ApplyResponse, error) {
	e := spec.Edit{Set: q.GetSet(), Delete: q.GetDelete()}
	if q.GetText() != "" {
		e.Read([]byte(q.GetText()))
	}
	generation, changes, err := r.edit(ctx, e, q.ExpectedGeneration, q.GetConfirmWithin().AsDuration(), q.GetDryRun(), author)
	if err != nil {
		return nil, refusal(err)
	}
	return &isthmusv1.ApplyResponse{Generation: generation, Changes: changeMessages(changes), GoesBackIn: r.goesBackIn()}, nil
}

// goesBackIn returns the time that is left to confirm the present document, nil when it stays.
func (r *Router) goesBackIn() *durationpb.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.present.ConfirmBy.IsZero() {
		return nil
	}
	return durationpb.New(max(0, time.Until(r.present.ConfirmBy)))
}

// Confirm implements api.Router.
func (r *Router) Confirm(_ context.Context, author string, generation uint64) error {
	if err := r.confirm(generation); err != nil {
		return err
	}
	r.Log.Info("confirmed", "generation", generation, "author", author)
	return nil
}

// Rollback implements api.Router.
func (r *Router) Rollback(ctx context.Context, author string, q *isthmusv1.RollbackRequest) (*isthmusv1.ApplyResponse, error) {
	generation, changes, err := r.goBack(ctx, q.GetToGeneration(), q.ExpectedGeneration, author)
	if err != nil {
		return nil, refusal(err)
	}
	return &isthmusv1.ApplyResponse{Generation: generation, Changes: changeMessages(changes), Notes: problemMessages(r.notes()), GoesBackIn: r.goesBackIn()}, nil
}

// Spec implements api.Router.
func (r *Router) Spec(_ context.Context, generation uint64) (*isthmusv1.GetSpecResponse, error) {
	generation, message, text, err := r.document(generation)
	if err != nil {
		return nil, refusal(err)
	}
	return &isthmusv1.GetSpecResponse{Generation: generation, Spec: message, Text: text}, nil
}

// History implements api.Router.
func (r *Router) History() []*isthmusv1.Revision {
	var out []*isthmusv1.Revision
	for _, h := range r.Store.History() {
		out = append(out, &isthmusv1.Revision{Generation: h.Generation, Time: stamp(h.Time), Author: h.Author, Reason: h.Reason, Changes: h.Changes})
	}
	return out
}

// Tunnels implements api.Router.
func (r *Router) Tunnels() ([]*isthmusv1.TunnelStatus, <-chan struct{}) {
	changed := r.state.bell.Wait()
	return r.tunnels(), changed
}

// Strays implements api.Router.
func (r *Router) Strays() []*isthmusv1.StrayTunnel { return r.strays() }

// Peers implements api.Router.
func (r *Router) Peers() ([]*isthmusv1.PeerStatus, <-chan struct{}) {
	changed := r.state.bell.Wait()
	return r.peers(), changed
}

// ResetPeer implements api.Router.
func (r *Router) ResetPeer(ctx context.Context, name string, soft bool) error {
	return r.BGP.Reset(ctx, name, soft)
}

// Routes implements api.Router.
func (r *Router) Routes() ([]*isthmusv1.Route, <-chan struct{}) {
	changed := r.state.bell.Wait()
	return r.routes(), changed
}

// countersAge is how old the counters of the policies may be: reading many of them back is not free.
const countersAge = 2 * time.Second

// Policies implements api.Router. When the kernel cannot be read, what was last read is returned as not installed.
func (r *Router) Policies() ([]*isthmusv1.PolicyStatus, <-chan struct{}) {
	changed := r.state.bell.Wait()
	list, _ := r.policies()
	return list, changed
}

// Pools implements api.Router.
func (r *Router) Pools() ([]*isthmusv1.PoolStatus, <-chan struct{}) {
	changed := r.state.bell.Wait()
	return r.pools(), changed
}

// Names implements api.Router.
func (r *Router) Names() ([]*isthmusv1.NameStatus, <-chan struct{}) {
	changed := r.state.bell.Wait()
	return r.policyNames(), changed
}

// Drops implements api.Router.
func (r *Router) Drops() (out []*isthmusv1.Drop) {
	_, drops := r.policies()
	for _, reason := range nat.Reasons {
		c := drops[reason]
		out = append(out, &isthmusv1.Drop{Reason: string(reason), Description: reason.String(), Packets: c.Packets, Bytes: c.Bytes})
	}
	return out
}

// Ports implements api.Router.
func (r *Router) Ports() ([]*isthmusv1.PortUse, <-chan struct{}) {
	changed := r.state.bell.Wait()
	return r.ports(), changed
}

// PortTotals implements api.Router.
func (r *Router) PortTotals() *isthmusv1.ListPortsResponse { return r.portTotals() }

// Recount implements api.Router.
func (r *Router) Recount(ctx context.Context) {
	if r.placer != nil {
		r.placer.recount(ctx)
	}
}

// Status implements api.Router.
func (r *Router) Status() (*isthmusv1.SystemStatus, <-chan struct{}) {
	changed := r.state.bell.Wait()
	return r.status(), changed
}

// SetSecret implements api.Router.
func (r *Router) SetSecret(ctx context.Context, author, name string, value []byte) (*isthmusv1.SecretInfo, error) {
	if err := r.fits(name, value); err != nil {
		return nil, err
	}
	info, err := r.Store.SetSecret(name, value, time.Now())
	if err != nil {
		return nil, err
	}
	return r.secretSet(ctx, author, "secret set", info)
}

// RollbackSecret implements api.Router.
func (r *Router) RollbackSecret(ctx context.Context, author, name string) (*isthmusv1.SecretInfo, error) {
	value, err := r.Store.FormerSecret(name)
	if err != nil {
		return nil, err
	}
	if err := r.fits(name, value); err != nil {
		return nil, err
	}
	info, err := r.Store.RollbackSecret(name, time.Now())
	if err != nil {
		return nil, err
	}
	return r.secretSet(ctx, author, "secret rolled back", info)
}

// secretSet has what uses a secret that was stored use its new value.
func (r *Router) secretSet(ctx context.Context, author, what string, info store.SecretInfo) (*isthmusv1.SecretInfo, error) {
	r.Log.Info(what, "name", info.Ref.Name, "author", author)
	// The secret is there, also for a caller who has gone meanwhile.
	if err := r.secretsChanged(context.WithoutCancel(ctx)); err != nil {
		return nil, fmt.Errorf("the secret is stored, but the present document cannot be planned with it: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	uses, _ := r.uses()
	return secretMessage(info, uses), nil
}

// fits says why a value does not fit a field of the present document that names the secret.
func (r *Router) fits(name string, value []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []spec.SecretUse
	if r.spec != nil {
		list = r.spec.Secrets
	} else {
		list = r.usesIn(r.present.Generation, r.present.Text)
	}
	for _, u := range list {
		if u.Name != name {
			continue
		}
		if err := u.Kind.Check(value); err != nil {
			return fmt.Errorf("%w: secret %s is used by %s: %w; the stored one stays", api.ErrInvalid, name, u.Path, err)
		}
	}
	return nil
}

// Secrets implements api.Router.
func (r *Router) Secrets() []*isthmusv1.SecretInfo {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []*isthmusv1.SecretInfo
	uses, _ := r.uses() // what is not known is not shown
	for _, info := range r.Store.Secrets() {
		out = append(out, secretMessage(info, uses))
	}
	return out
}

// DeleteSecret implements api.Router.
func (r *Router) DeleteSecret(_ context.Context, author, name string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	uses, err := r.uses()
	if err != nil {
		return err
	}
	if u := uses[name]; len(u) > 0 {
		return fmt.Errorf("%w: secret %s is used by %s", api.ErrPrecondition, name, u[0])
	}
	r.version++ // what is being planned may name it
	if err := r.Store.DeleteSecret(name); err != nil {
		return err
	}
	r.Log.Info("secret deleted", "name", name, "author", author)
	return nil
}

func secretMessage(info store.SecretInfo, uses map[string][]string) *isthmusv1.SecretInfo {
	return &isthmusv1.SecretInfo{Name: info.Ref.Name, Fingerprint: info.Ref.Fingerprint, Changed: stamp(info.Changed), UsedBy: uses[info.Ref.Name], Sealed: info.Sealed}
}

// uses returns where secrets are used, as field paths by name: in the present document, and in the one that comes back
// unless the present one is confirmed.
func (r *Router) uses() (map[string][]string, error) {
	paths := map[string][]string{}
	add := func(u []spec.SecretUse, of string) {
		for _, one := range u {
			paths[one.Name] = append(paths[one.Name], one.Path+of)
		}
	}
	if r.spec != nil && r.unstored == nil && r.held == nil {
		add(r.spec.Secrets, "")
	} else {
		add(r.usesIn(r.present.Generation, r.present.Text), "")
	}
	if r.present.ConfirmBy.IsZero() || r.present.RevertTo == 0 {
		return paths, nil
	}
	former, err := r.Store.Revision(r.present.RevertTo)
	if err == nil {
		add(r.usesIn(former.Generation, former.Text), fmt.Sprintf(" of generation %d", former.Generation))
	}
	return paths, err
}

// usesIn returns the uses of secrets in the text of a generation that is not carried out. It is read once: a reader may ask again and again.
func (r *Router) usesIn(generation uint64, text string) (out []spec.SecretUse) {
	if known, ok := r.textUses[generation]; ok {
		return known
	}
	d, _ := spec.Decode([]byte(text))
	out = spec.SecretUses(d.Message)
	if len(r.textUses) > 1 || r.textUses == nil {
		r.textUses = map[uint64][]spec.SecretUse{}
	}
	r.textUses[generation] = out
	return out
}

// refusal turns what is wrong with a document, or what is not there, into the errors of the API.
func refusal(err error) error {
	var problems spec.Problems
	switch {
	case errors.As(err, &problems):
		return &api.Refused{Problems: problemMessages(problems)}
	case errors.Is(err, store.ErrNotFound):
		return fmt.Errorf("%w: %w", api.ErrNotFound, err)
	}
	return err
}

func problemMessages(problems spec.Problems) []*isthmusv1.Problem {
	var out []*isthmusv1.Problem
	for _, p := range problems {
		out = append(out, &isthmusv1.Problem{Path: p.Path, Value: p.Value, Rule: p.Rule, Remedy: p.Remedy, Line: uint32(p.Line)})
	}
	return out
}

var actions = map[plan.Action]isthmusv1.Change_Action{
	plan.Add:     isthmusv1.Change_ACTION_ADD,
	plan.Modify:  isthmusv1.Change_ACTION_CHANGE,
	plan.Remove:  isthmusv1.Change_ACTION_REMOVE,
	plan.Replace: isthmusv1.Change_ACTION_REPLACE,
}

// Bounds of what a plan says of changes: an answer must not become larger than clients take. They are counted in any case.
const (
	maxChanges     = 20_000
	maxChangeBytes = 8 << 20
	maxFieldBytes  = 1 << 10 // of each field with its old and its new value
)

func changeMessages(changes []plan.Change) []*isthmusv1.Change {
	var out []*isthmusv1.Change
	size := 0
	for i, c := range changes {
		m := &isthmusv1.Change{Action: actions[c.Action], Kind: c.Kind, Name: c.Name, Interrupts: c.Interrupts}
		for _, f := range c.Fields {
			m.Fields = append(m.Fields, shortened(f))
		}
		if size += proto.Size(m); i == maxChanges || size > maxChangeBytes {
			return append(out, &isthmusv1.Change{Action: isthmusv1.Change_ACTION_CHANGE, Kind: "object", Name: fmt.Sprintf("and %d more, which are not listed", len(changes)-i)})
		}
		out = append(out, m)
	}
	return out
}

// shortened cuts out the middle of a long text.
func shortened(s string) string {
	if len(s) <= maxFieldBytes {
		return s
	}
	return strings.ToValidUTF8(s[:maxFieldBytes/2], "") + " ... " + strings.ToValidUTF8(s[len(s)-maxFieldBytes/2:], "")
}
