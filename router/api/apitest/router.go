// Package apitest has an in-memory Router and a server around it, for tests of the API and its
// clients.
package apitest

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/bell"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/store"
)

// Router is an api.Router. Its documents are lines of text, each the name of a tunnel. A line that
// begins with "bad" is a problem, one with "lone" a note, one with "#" a comment. It is strict: it
// refuses whatever the real one may refuse.
type Router struct {
	now func() time.Time

	mu        sync.Mutex
	changed   bell.Bell
	revisions []*isthmusv1.GetSpecResponse
	history   []*isthmusv1.Revision
	confirm   time.Time
	tunnels   []*isthmusv1.TunnelStatus
	strays    []*isthmusv1.StrayTunnel
	peers     []*isthmusv1.PeerStatus
	routes    []*isthmusv1.Route
	policies  []*isthmusv1.PolicyStatus
	pools     []*isthmusv1.PoolStatus
	names     []*isthmusv1.NameStatus
	ports     []*isthmusv1.PortUse
	status    *isthmusv1.SystemStatus
	secrets   map[string]string
	former    map[string]string // values of secrets
	resets    []string
}

// New returns an empty Router.
func New(now func() time.Time) *Router {
	return &Router{
		now: now, secrets: map[string]string{}, former: map[string]string{}, status: &isthmusv1.SystemStatus{Node: "node-1", Version: "v0.0.0-test"},
	}
}

// SetTunnels replaces the tunnels, which must be in order, and signals a change. The other Set
// methods do the same for their objects.
func (r *Router) SetTunnels(all ...*isthmusv1.TunnelStatus) { set(r, &r.tunnels, all) }

// SetStrays sets the stray tunnels. Call it before the server starts.
func (r *Router) SetStrays(all ...*isthmusv1.StrayTunnel) { r.strays = all }

func (r *Router) SetPeers(all ...*isthmusv1.PeerStatus) { set(r, &r.peers, all) }
func (r *Router) SetRoutes(all ...*isthmusv1.Route)     { set(r, &r.routes, all) }
func (r *Router) SetPolicies(all ...*isthmusv1.PolicyStatus) {
	set(r, &r.policies, all)
}

func (r *Router) SetPools(all ...*isthmusv1.PoolStatus) { set(r, &r.pools, all) }
func (r *Router) SetNames(all ...*isthmusv1.NameStatus) { set(r, &r.names, all) }
func (r *Router) SetPorts(all ...*isthmusv1.PortUse)    { set(r, &r.ports, all) }

// SetConditions replaces the conditions of the node.
func (r *Router) SetConditions(all ...*isthmusv1.Condition) {
	r.mu.Lock()
	r.status.Conditions = all
	r.mu.Unlock()
	r.changed.Ring()
}

func set[T any](r *Router, where *[]T, all []T) {
	r.mu.Lock()
	*where = all
	r.mu.Unlock()
	r.changed.Ring()
}

// list returns a function that returns the objects at where.
func list[T any](r *Router, where *[]T) func() []T {
	return func() []T {
		r.mu.Lock()
		defer r.mu.Unlock()
		return *where
	}
}

// Nouns implements api.Router. A tunnel called panic makes its list panic.
func (r *Router) Nouns() []api.Noun {
	tunnels := func() []*isthmusv1.TunnelStatus {
		all := list(r, &r.tunnels)()
		if len(all) > 0 && all[0].Name == "panic" {
			panic("panic of the fake router")
		}
		return all
	}
	return []api.Noun{
		api.Tunnels.FromCounted(tunnels, nil, func(request, response proto.Message) {
			if request.(*isthmusv1.ListTunnelsRequest).PageToken == "" {
				response.(*isthmusv1.ListTunnelsResponse).Strays = r.strays
			}
		}),
		api.Peers.From(list(r, &r.peers)),
		api.Routes.From(list(r, &r.routes)),
		api.Policies.FromCounted(list(r, &r.policies), nil, func(_, response proto.Message) {
			out := response.(*isthmusv1.ListPoliciesResponse)
			out.Drops = []*isthmusv1.Drop{{Reason: "guard", Description: "an inside source toward the Internet", Packets: 3, Bytes: 180}, {Reason: "foreign-source", Description: "a source that does not belong to the attachment", Packets: 7, Bytes: 588}}
			out.GuardPackets, out.GuardBytes = 3, 180
		}),
		api.Pools.From(list(r, &r.pools)),
		api.Names.From(list(r, &r.names)),
		api.Ports.FromCounted(list(r, &r.ports), nil, func(_, response proto.Message) {
			totals := response.(*isthmusv1.ListPortsResponse)
			totals.Counted, totals.Placements = timestamppb.New(r.now()), 2
			totals.Table = &isthmusv1.ConnectionTable{Entries: 70_000, Assured: 60_000, Limit: 262_144, InsertFailed: 5}
			for _, p := range list(r, &r.ports)() {
				totals.Addresses = append(totals.Addresses, &isthmusv1.AddressUse{Pool: p.Pool, Address: p.Address, PublicAddress: p.PublicAddress, Flows: p.Used, Services: 1})
			}
		}),
		api.Secrets.From(r.Secrets),
		api.Revisions.From(r.History),
	}
}

// Changed implements api.Router.
func (r *Router) Changed() <-chan struct{} { return r.changed.Wait() }

// Who returns a live and an ended flow for every address and port, except for port 1, which no flow
// had.
func (r *Router) Who(_ context.Context, q *isthmusv1.WhoRequest) (*isthmusv1.WhoResponse, error) {
	if q.Address == "" {
		return nil, fmt.Errorf("%w: address: is required", api.ErrInvalid)
	}
	if q.Port == 1 {
		return &isthmusv1.WhoResponse{Gaps: []string{"no log of translations is kept"}}, nil
	}
	outside := fmt.Sprintf("%s:%d", q.Address, q.Port)
	start := timestamppb.New(time.Date(2026, 11, 20, 12, 1, 0, 0, time.UTC))
	return &isthmusv1.WhoResponse{BlockSource: "10.1.0.7", Flows: []*isthmusv1.TranslatedFlow{
		{Start: start, End: timestamppb.New(start.AsTime().Add(90 * time.Second)), Protocol: "tcp", Inside: "10.1.0.7:40122", Outside: outside, Destination: "198.51.100.7:443",
			Policy: "partners", PacketsSent: 12, BytesSent: 1840, PacketsReceived: 10, BytesReceived: 52000},
		{Start: start, Protocol: "udp", Inside: "10.1.0.7:5353", Outside: outside, Destination: "198.51.100.8:53", PacketsSent: 1, BytesSent: 61},
	}}, nil
}

// EndFlows reports three ended flows.
func (r *Router) EndFlows(_ context.Context, q *isthmusv1.EndFlowsRequest) (*isthmusv1.EndFlowsResponse, error) {
	if q.Source == "" {
		return nil, fmt.Errorf("%w: source: an address or a prefix is needed", api.ErrInvalid)
	}
	return &isthmusv1.EndFlowsResponse{Flows: 3}, nil
}

// ProveEgress reports that flows may be seen as 203.0.113.9, whatever their destinations are. It
// reports a violation if another address is expected.
func (r *Router) ProveEgress(_ context.Context, q *isthmusv1.ProveEgressRequest) (*isthmusv1.EgressProof, error) {
	if len(q.Destinations) == 0 {
		return nil, fmt.Errorf("%w: destinations: at least one prefix is needed", api.ErrInvalid)
	}
	p := &isthmusv1.EgressProof{
		Node: r.status.Node, Generation: 1, Time: timestamppb.Now(), Sources: []string{"0.0.0.0/0"}, Destinations: q.Destinations,
		Expected: q.Expect, States: []*isthmusv1.EgressProofState{{Name: "now", PublicAddresses: []string{"203.0.113.9"}}}, GuardPackets: 3, GuardBytes: 180,
	}
	if len(q.Expect) > 0 && !slices.Contains(q.Expect, "203.0.113.9") {
		p.Violations = []string{"now: flows may be seen as 203.0.113.9, which is not expected"}
	}
	if q.Canary != "" {
		p.Canaries = []*isthmusv1.CanaryResult{{Address: cmp.Or(q.CanarySource, "203.0.113.9"), SeenAs: "203.0.113.9"}}
	}
	p.Holds = len(p.Violations) == 0
	return p, nil
}

func (r *Router) Status() (*isthmusv1.SystemStatus, <-chan struct{}) {
	changed := r.changed.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	st := &isthmusv1.SystemStatus{
		Node: r.status.Node, Version: r.status.Version, Started: timestamppb.New(r.now()), Conditions: r.status.Conditions,
		Generation: r.generationLocked(), AppliedGeneration: r.generationLocked(), Capabilities: []string{"wireguard", "xfrm-interface"},
		Counters: &isthmusv1.Counters{ViciWrites: 4, NetlinkWrites: 17, NftablesTransactions: 1, BgpStarts: 1},
	}
	if !r.confirm.IsZero() {
		st.ConfirmUntil = timestamppb.New(r.confirm)
	}
	return st, changed
}

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
		return nil, fmt.Errorf("%w: no document can be edited: apply one first", api.ErrPrecondition)
	}
	if q.DryRun {
		return &isthmusv1.ApplyResponse{Generation: r.generationLocked(), Changes: changes}, nil
	}
	var confirm time.Time
	if q.ConfirmWithin != nil {
		confirm = r.now().Add(q.ConfirmWithin.AsDuration())
	}
	return r.acceptLocked(author, "policies", r.revisions[len(r.revisions)-1].Text, changes, confirm), nil
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
	return r.accept(author, fmt.Sprintf("rollback to %d", to), was.Text, q.ExpectedGeneration, time.Time{})
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

// History returns the accepted documents, newest first.
func (r *Router) History() []*isthmusv1.Revision {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.history)
}

func (r *Router) ResetPeer(_ context.Context, name string, soft bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.ContainsFunc(r.peers, func(p *isthmusv1.PeerStatus) bool { return p.Name == name }) {
		return fmt.Errorf("peer %q: %w", name, api.ErrNotFound)
	}
	r.resets = append(r.resets, fmt.Sprintf("%s soft=%v", name, soft))
	return nil
}

// Resets returns the sessions that were reset, as "name soft=true".
func (r *Router) Resets() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.resets)
}

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

// Server is an API server on the loopback address and on a unix socket, with a fake Router and
// Machine.
type Server struct {
	Machine   *Machine
	Router    *Router
	Authority *auth.Authority
	Address   string
	Socket    string
	Context   string // file of the first admin
	Audit     string // file
}

// Serve starts a server that stops with the test. now is the clock of the certificates and of the
// audit log.
func Serve(t testing.TB, now func() time.Time, router *Router) *Server {
	t.Helper()
	dir := t.TempDir()
	s := &Server{
		Router: router, Machine: NewMachine(), Socket: filepath.Join(dir, "api.sock"),
		Context: filepath.Join(dir, "admin.yaml"), Audit: filepath.Join(dir, "audit.log"),
	}
	st, err := store.Open(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	audit, err := auth.OpenAudit(s.Audit, now)
	if err != nil {
		t.Fatal(err)
	}
	// The context needs an address before the listener has one, so it has a placeholder.
	s.Authority, err = auth.New(auth.Options{Store: st, Address: "node-1.example:7443", Bundle: s.Context, Notice: io.Discard, Audit: audit, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	server, err := api.Listen(api.Options{Router: s.Router, Machine: s.Machine, Authority: s.Authority, Address: "127.0.0.1:0", Socket: s.Socket})
	if err != nil {
		t.Fatal(err)
	}
	s.Address = server.Address().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serving: %v", err)
		}
		audit.Close()
		st.Close()
	})
	return s
}
