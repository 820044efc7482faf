package apitest

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/fault"
	"github.com/isthmus-net/isthmus/router/store"
)

func (r *Router) generationLocked() uint64 { return uint64(len(r.revisions)) }

func names(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			out = append(out, line)
		}
	}
	return out
}

func text(s *isthmusv1.Source) string {
	if s.GetSpec() == nil {
		return s.GetText()
	}
	var out []string
	for _, t := range s.GetSpec().GetTunnels() {
		out = append(out, t.Name)
	}
	return strings.Join(out, "\n")
}

func (r *Router) Validate(_ context.Context, s *isthmusv1.Source) (*isthmusv1.ValidateResponse, error) {
	out := &isthmusv1.ValidateResponse{}
	for i, name := range names(text(s)) {
		switch path, line := fmt.Sprintf("tunnels[%d].name", i), uint32(i+1); {
		case name == "panic":
			panic("panic of the fake router")
		case strings.HasPrefix(name, "bad"):
			out.Problems = append(out.Problems, &isthmusv1.Problem{Path: path, Value: name, Rule: "must not begin with bad", Remedy: "choose a better name", Line: line})
		case strings.HasPrefix(name, "lone"):
			out.Notes = append(out.Notes, &isthmusv1.Problem{Path: path, Value: name, Rule: "has no second one", Remedy: "add it", Line: line})
		}
	}
	return out, nil
}

func (r *Router) changesLocked(to string) []*isthmusv1.Change {
	var was []string
	if n := len(r.revisions); n > 0 {
		was = names(r.revisions[n-1].Text)
	}
	now := names(to)
	var out []*isthmusv1.Change
	for _, n := range now {
		if !slices.Contains(was, n) {
			out = append(out, &isthmusv1.Change{Action: isthmusv1.Change_ACTION_ADD, Kind: "tunnel", Name: n})
		}
	}
	for _, n := range was {
		if !slices.Contains(now, n) {
			out = append(out, &isthmusv1.Change{Action: isthmusv1.Change_ACTION_REMOVE, Kind: "tunnel", Name: n, Interrupts: "traffic through it stops"})
		}
	}
	return out
}

func (r *Router) Plan(ctx context.Context, s *isthmusv1.Source) (*isthmusv1.PlanResponse, error) {
	v, _ := r.Validate(ctx, s)
	if len(v.Problems) > 0 {
		return nil, &api.Refused{Problems: v.Problems}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return &isthmusv1.PlanResponse{Generation: r.generationLocked(), Changes: r.changesLocked(text(s)), Notes: v.Notes}, nil
}

func (r *Router) Apply(ctx context.Context, author string, q *isthmusv1.ApplyRequest) (*isthmusv1.ApplyResponse, error) {
	v, _ := r.Validate(ctx, q.Source)
	if len(v.Problems) > 0 {
		return nil, &api.Refused{Problems: v.Problems}
	}
	var confirm time.Time
	if q.ConfirmWithin != nil {
		confirm = r.now().Add(q.ConfirmWithin.AsDuration())
	}
	a, err := r.accept(author, "apply", text(q.Source), q.ExpectedGeneration, confirm)
	r.explain(a, q.Message)
	if err == nil {
		a.Notes = v.Notes
	}
	return a, err
}

var nameField = regexp.MustCompile(`name: ([a-z0-9-]+)`)

// EditPolicies takes the names of policies from the text and ignores the rest of it.
func (r *Router) EditPolicies(_ context.Context, author string, q *isthmusv1.EditPoliciesRequest) (*isthmusv1.ApplyResponse, error) {
	var changes []*isthmusv1.Change
	add := func(name string) {
		changes = append(changes, &isthmusv1.Change{Action: isthmusv1.Change_ACTION_ADD, Kind: "policy", Name: name})
	}
	for _, p := range q.Set {
		add(p.Name)
	}
	for _, match := range nameField.FindAllStringSubmatch(q.Text, -1) {
		add(match[1])
	}
	var problems []*isthmusv1.Problem
	for i, c := range changes {
		if strings.HasPrefix(c.Name, "bad") {
			problems = append(problems, &isthmusv1.Problem{Path: fmt.Sprintf("policies[%d].name", i), Value: c.Name, Rule: "must not begin with bad", Line: uint32(i + 2)})
		}
	}
	if len(problems) > 0 {
		return nil, &api.Refused{Problems: problems}
	}
	for _, name := range q.Delete {
		changes = append(changes, &isthmusv1.Change{Action: isthmusv1.Change_ACTION_REMOVE, Kind: "policy", Name: name, Interrupts: "other policies decide its new flows"})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.expectsLocked(q.ExpectedGeneration); err != nil {
		return nil, err
	}
	if r.generationLocked() == 0 {
		return nil, fault.ErrNoDocument
	}
	if q.DryRun {
		return &isthmusv1.ApplyResponse{Generation: r.generationLocked(), Changes: changes}, nil
	}
	var confirm time.Time
	if q.ConfirmWithin != nil {
		confirm = r.now().Add(q.ConfirmWithin.AsDuration())
	}
	a := r.acceptLocked(author, "policies", r.revisions[len(r.revisions)-1].Text, changes, confirm)
	r.history[0].Message = q.Message
	return a, nil
}

// SetDisabled sets the state of tunnels and peers, and makes a generation with the same text.
func (r *Router) SetDisabled(_ context.Context, author string, q *isthmusv1.SetDisabledRequest) (*isthmusv1.ApplyResponse, error) {
	a, err := r.setDisabled(author, q)
	r.explain(a, q.Message)
	return a, err
}

func (r *Router) setDisabled(author string, q *isthmusv1.SetDisabledRequest) (*isthmusv1.ApplyResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.expectsLocked(q.ExpectedGeneration); err != nil {
		return nil, err
	}
	if r.generationLocked() == 0 {
		return nil, fault.ErrNoDocument
	}
	var changes []*isthmusv1.Change
	var problems []*isthmusv1.Problem
	edit := func(kind string, i int, name, present string) {
		switch c := (&isthmusv1.Change{Action: isthmusv1.Change_ACTION_CHANGE, Kind: kind, Name: name}); {
		case present == "":
			problems = append(problems, &isthmusv1.Problem{Path: fmt.Sprintf("%ss[%d]", kind, i), Value: name, Rule: "is not a " + kind + " of the present document", Remedy: "see `isthmus get " + kind + "s`"})
		case q.Disabled && present != "disabled":
			c.Fields, c.Interrupts = []string{"disabled: false -> true"}, "it is shut down"
			changes = append(changes, c)
		case !q.Disabled && present == "disabled":
			c.Fields = []string{"disabled: true -> false"}
			changes = append(changes, c)
		}
	}
	for i, name := range q.Tunnels {
		edit("tunnel", i, name, stateOf(r.tunnels, name))
	}
	for i, name := range q.Peers {
		edit("peer", i, name, stateOf(r.peers, name))
	}
	if len(problems) > 0 {
		return nil, &api.Refused{Problems: problems}
	}
	if q.DryRun || len(changes) == 0 {
		return &isthmusv1.ApplyResponse{Generation: r.generationLocked(), Changes: changes}, nil
	}
	state := "down"
	if q.Disabled {
		state = "disabled"
	}
	r.tunnels, r.peers = slices.Clone(r.tunnels), slices.Clone(r.peers)
	for i, t := range r.tunnels {
		if slices.Contains(q.Tunnels, t.Name) {
			r.tunnels[i] = proto.CloneOf(t)
			r.tunnels[i].State = state
		}
	}
	for i, p := range r.peers {
		if slices.Contains(q.Peers, p.Name) {
			r.peers[i] = proto.CloneOf(p)
			r.peers[i].State = state
		}
	}
	var confirm time.Time
	if q.ConfirmWithin != nil {
		confirm = r.now().Add(q.ConfirmWithin.AsDuration())
	}
	return r.acceptLocked(author, state, r.revisions[len(r.revisions)-1].Text, changes, confirm), nil
}

// stateOf returns the state of an object, and "" when no object has the name.
func stateOf[T interface {
	GetName() string
	GetState() string
}](all []T, name string) string {
	if i := slices.IndexFunc(all, func(o T) bool { return o.GetName() == name }); i >= 0 {
		return all[i].GetState()
	}
	return ""
}

func (r *Router) expectsLocked(generation *uint64) error {
	if generation != nil && *generation != r.generationLocked() {
		return fmt.Errorf("%w: expected %d, present is %d", store.ErrStale, *generation, r.generationLocked())
	}
	return nil
}

func (r *Router) accept(author, reason, text string, expected *uint64, confirm time.Time) (*isthmusv1.ApplyResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.expectsLocked(expected); err != nil {
		return nil, err
	}
	changes := r.changesLocked(text)
	if len(changes) == 0 {
		return &isthmusv1.ApplyResponse{Generation: r.generationLocked(), GoesBackIn: r.goesBackInLocked()}, nil
	}
	return r.acceptLocked(author, reason, text, changes, confirm), nil
}

func (r *Router) acceptLocked(author, reason, text string, changes []*isthmusv1.Change, confirm time.Time) *isthmusv1.ApplyResponse {
	defer r.changed.Ring()
	spec := &isthmusv1.Spec{}
	for _, n := range names(text) {
		spec.Tunnels = append(spec.Tunnels, &isthmusv1.Tunnel{Name: n})
	}
	g := r.generationLocked() + 1
	r.revisions = append(r.revisions, &isthmusv1.GetSpecResponse{Generation: g, Spec: spec, Text: text})
	r.history = slices.Insert(r.history, 0, &isthmusv1.Revision{
		Generation: g, Time: timestamppb.New(r.now()), Author: author, Reason: reason, Changes: uint32(len(changes)),
	})
	r.confirm = confirm
	return &isthmusv1.ApplyResponse{Generation: g, Changes: changes, GoesBackIn: r.goesBackInLocked()}
}

func (r *Router) goesBackInLocked() *durationpb.Duration {
	if r.confirm.IsZero() {
		return nil
	}
	return durationpb.New(r.confirm.Sub(r.now()))
}

func (r *Router) Confirm(_ context.Context, _ string, generation uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if generation != r.generationLocked() {
		return fmt.Errorf("%w: confirming %d, present is %d", store.ErrStale, generation, r.generationLocked())
	}
	r.confirm = time.Time{}
	return nil
}

// Revert replaces the present document with the one before, as when it was not confirmed in time.
func (r *Router) Revert() {
	r.mu.Lock()
	defer r.mu.Unlock()
	g := r.generationLocked()
	r.acceptLocked("isthmusd", fmt.Sprintf("not confirmed, back to %d", g-1), r.revisions[g-2].Text, nil, time.Time{})
	r.reverted = g
}

// Asked returns how often Progress was called.
func (r *Router) Asked() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.asked
}

// Progress implements api.Router.
func (r *Router) Progress(generation uint64) (present, applied uint64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked++
	present = r.generationLocked()
	applied = present
	if r.stuck {
		applied--
	}
	switch {
	case present == 0 || generation > present:
		err = fmt.Errorf("%w: generation %d", fault.ErrNoGeneration, generation)
	case generation > 0 && generation == r.reverted:
		err = fmt.Errorf("%w: generation %d", fault.ErrNotConfirmed, generation)
	}
	return present, applied, err
}

func (r *Router) Rollback(ctx context.Context, author string, q *isthmusv1.RollbackRequest) (*isthmusv1.ApplyResponse, error) {
	to := q.ToGeneration
	if to == 0 {
		r.mu.Lock()
		to = r.generationLocked() - 1
		r.mu.Unlock()
	}
	was, err := r.Spec(ctx, to)
	if err != nil || to == 0 {
		return nil, fmt.Errorf("generation %d: %w", to, api.ErrNotFound)
	}
	if q.DryRun {
		r.mu.Lock()
		defer r.mu.Unlock()
		return &isthmusv1.ApplyResponse{Generation: r.generationLocked(), Changes: r.changesLocked(was.Text)}, nil
	}
	a, err := r.accept(author, fmt.Sprintf("rollback to %d", to), was.Text, q.ExpectedGeneration, time.Time{})
	r.explain(a, q.Message)
	return a, err
}

// explain adds the reason of a change to the history.
func (r *Router) explain(a *isthmusv1.ApplyResponse, message string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a != nil && len(r.history) > 0 && r.history[0].Generation == a.Generation {
		r.history[0].Message = message
	}
}

func (r *Router) Spec(_ context.Context, generation uint64) (*isthmusv1.GetSpecResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if generation == 0 {
		generation = r.generationLocked()
	}
	if generation == 0 || generation > r.generationLocked() {
		return nil, fmt.Errorf("generation %d: %w", generation, api.ErrNotFound)
	}
	return r.revisions[generation-1], nil
}

// EffectiveSpec returns the present document with an MTU of the underlay.
func (r *Router) EffectiveSpec(ctx context.Context) (*isthmusv1.GetSpecResponse, error) {
	s, err := r.Spec(ctx, 0)
	if err != nil {
		return nil, err
	}
	s = proto.CloneOf(s)
	s.Spec.Underlay = &isthmusv1.Underlay{Mtu: 1500}
	s.Text += "underlay: {mtu: 1500}\n"
	return s, nil
}

// History returns the accepted documents, newest first.
func (r *Router) History() []*isthmusv1.Revision {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.history)
}
