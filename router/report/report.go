// Package report describes the state of a node, and the reasons for it: it makes every message that
// the API and the command line show, from the documents, the jobs of router/apply and the
// observations of router/observe.
package report

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/bell"
	"github.com/isthmus-net/isthmus/router/capability"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/echo"
	"github.com/isthmus-net/isthmus/router/event/export"
	"github.com/isthmus-net/isthmus/router/fault"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/router/packets"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Documents manages the documents of a node; see router/document.
type Documents interface {
	Status() document.Status
	Validate(ctx context.Context, src *isthmusv1.Source) (problems, noted spec.Problems, err error)
	Preview(ctx context.Context, caller netip.Addr, src *isthmusv1.Source) (uint64, []plan.Change, spec.Problems, error)
	Apply(ctx context.Context, c document.Change, src *isthmusv1.Source) (uint64, []plan.Change, error)
	Edit(ctx context.Context, c document.Change, e spec.Edit) (uint64, []plan.Change, error)
	SetDisabled(ctx context.Context, c document.Change, e spec.Disabling) (uint64, []plan.Change, error)
	Confirm(generation uint64) error
	Progress(generation uint64) (present, applied uint64, err error)
	Rollback(ctx context.Context, c document.Change, generation uint64) (uint64, []plan.Change, error)
	Document(generation uint64) (uint64, *isthmusv1.Spec, string, error)
	Effective() (uint64, *isthmusv1.Spec, error)
	Notes() spec.Problems
	SetSecret(ctx context.Context, author, name string, value []byte) (document.Secret, error)
	AddSecret(ctx context.Context, author, name string, value []byte) (document.Secret, error)
	RollbackSecret(ctx context.Context, author, name string) (document.Secret, error)
	DeleteSecret(ctx context.Context, author, name string) error
	Secrets() []document.Secret
}

// FIB is the forwarding table.
type FIB interface {
	// Routes returns the wanted routes and whether the kernel has them.
	Routes() []fib.RouteState
	// Installed reports whether the kernel has a wanted route.
	Installed(fib.Key) bool
	// Count counts them.
	Count() fib.Counts
}

// Flows ends flows in the connection table.
type Flows interface {
	// End deletes the entries that f selects from the connection table, and returns their number.
	End(ctx context.Context, family uint8, f func(*conntrack.Flow) bool) (int, error)
}

// NAT installs and proves the rules; see package nat.
type NAT interface {
	nat.Driver
	nat.Prover
	nat.Sampler
}

// Addresses creates the host from which a proof's canary calls.
type Addresses interface {
	// Surroundings reads addresses, routes and rules that isthmus did not make.
	Surroundings() (fib.Surroundings, error)
	// Canary creates a host with the address from behind the interface fib.Canary, and a route to
	// it. mtu is in bytes; 0: the kernel's default. dial connects from the host to a TCP port of
	// to. remove deletes all of it and may be called again. Only one such host can exist at a time.
	Canary(from, to netip.Addr, mtu int) (dial func(ctx context.Context, port uint16) (net.Conn, error), remove func() error, err error)
}

// Counters counts the writes since the start of the daemon.
type Counters struct {
	Vici, Netlink, NFTables, WireGuard, BGP, BGPStarts uint64
}

// Options are the dependencies of a Report.
type Options struct {
	Documents Documents
	Applied   *apply.Applier
	Observed  *observe.Observer
	Store     *store.Store
	// Drivers make the tunnels.
	Drivers map[tunnel.Kind]tunnel.Driver
	BGP     bgp.Driver
	// Tables reads the tables of BGP. Nil: there are none.
	Tables    bgp.Tables
	FIB       FIB
	NAT       NAT
	Addresses Addresses
	Flows     Flows // nil: flows are not ended
	Translog  capability.Translog
	// Pools and Ports have lists for Snapshot.
	Pools func() []*isthmusv1.PoolStatus
	Ports func() *isthmusv1.ListPortsResponse
	// Allowances has the counters of packets beyond the cloud's allowances, for Snapshot. Nil:
	// there are none.
	Allowances func() []capability.AllowanceCounter
	// Exports has the receivers of events, for Snapshot. Nil: there are none.
	Exports func() []export.State
	// Capabilities are the node's other capabilities, for their conditions.
	Capabilities []capability.Capability
	// Ping sends echo requests; see router/echo.
	Ping func(context.Context, echo.Request, func(echo.Result) error) error
	// Capture copies packets; see router/packets.
	Capture   func(context.Context, packets.Request, func([]packets.Packet, int) error) (packets.End, error)
	Callers   func() []tunnel.Caller
	Resolvers func() []netip.Addr
	Kernel    func() []string // capabilities of the kernel
	Counters  func() Counters
	Notices   func() []*isthmusv1.Condition
	Platform  func() *isthmusv1.PlatformStatus
	Version   string
	Bell      *bell.Bell
	Log       *slog.Logger
}

// Report answers queries about a node and passes requests to it. It implements api.Router.
type Report struct {
	Options
	started time.Time
	resets  resets
	// full while the rules are compared with the document, or contain more for a canary
	proving chan struct{}
}

// New returns a Report.
func New(o Options) *Report {
	return &Report{Options: o, started: time.Now(), proving: make(chan struct{}, 1)}
}

var _ api.Router = (*Report)(nil)

// Validate implements api.Router.
func (r *Report) Validate(ctx context.Context, src *isthmusv1.Source) (*isthmusv1.ValidateResponse, error) {
	problems, notes, err := r.Documents.Validate(ctx, src)
	return &isthmusv1.ValidateResponse{Problems: problemMessages(problems), Notes: problemMessages(notes)}, err
}

// Plan implements api.Router.
func (r *Report) Plan(ctx context.Context, src *isthmusv1.Source) (*isthmusv1.PlanResponse, error) {
	generation, changes, noted, err := r.Documents.Preview(ctx, api.Caller(ctx), src)
	if err != nil {
		return nil, refusal(err)
	}
	return &isthmusv1.PlanResponse{Generation: generation, Changes: changeMessages(changes), Notes: problemMessages(noted)}, nil
}

// Apply implements api.Router.
func (r *Report) Apply(ctx context.Context, author string, q *isthmusv1.ApplyRequest) (*isthmusv1.ApplyResponse, error) {
	c := change(ctx, author, q.ExpectedGeneration, q.GetConfirmWithin().AsDuration())
	c.Message = q.GetMessage()
	generation, changes, err := r.Documents.Apply(ctx, c, q.GetSource())
	if err != nil {
		return nil, refusal(err)
	}
	return &isthmusv1.ApplyResponse{Generation: generation, Changes: changeMessages(changes), Notes: problemMessages(r.Documents.Notes()), GoesBackIn: r.goesBackIn()}, nil
}

// EditPolicies implements api.Router.
func (r *Report) EditPolicies(ctx context.Context, author string, q *isthmusv1.EditPoliciesRequest) (*isthmusv1.ApplyResponse, error) {
	e := spec.Edit{Set: q.GetSet(), Delete: q.GetDelete()}
	if q.GetText() != "" {
		e.Read([]byte(q.GetText()))
	}
	c := change(ctx, author, q.ExpectedGeneration, q.GetConfirmWithin().AsDuration())
	c.Message, c.Dry = q.GetMessage(), q.GetDryRun()
	generation, changes, err := r.Documents.Edit(ctx, c, e)
	if err != nil {
		return nil, refusal(err)
	}
	return &isthmusv1.ApplyResponse{Generation: generation, Changes: changeMessages(changes), GoesBackIn: r.goesBackIn()}, nil
}

// SetDisabled implements api.Router.
func (r *Report) SetDisabled(ctx context.Context, author string, q *isthmusv1.SetDisabledRequest) (*isthmusv1.ApplyResponse, error) {
	c := change(ctx, author, q.ExpectedGeneration, q.GetConfirmWithin().AsDuration())
	c.Message, c.Dry = q.GetMessage(), q.GetDryRun()
	generation, changes, err := r.Documents.SetDisabled(ctx, c, spec.Disabling{Tunnels: q.GetTunnels(), Peers: q.GetPeers(), Disabled: q.GetDisabled()})
	if err != nil {
		return nil, refusal(err)
	}
	return &isthmusv1.ApplyResponse{Generation: generation, Changes: changeMessages(changes), GoesBackIn: r.goesBackIn()}, nil
}

// goesBackIn returns the time left to confirm the present document, nil if it stays.
func (r *Report) goesBackIn() *durationpb.Duration {
	by := r.Documents.Status().Present.ConfirmBy
	if by.IsZero() {
		return nil
	}
	return durationpb.New(max(0, time.Until(by)))
}

func change(ctx context.Context, author string, expected *uint64, confirm time.Duration) document.Change {
	return document.Change{Author: author, Caller: api.Caller(ctx), Expected: expected, Confirm: confirm}
}

// Confirm implements api.Router.
func (r *Report) Confirm(_ context.Context, author string, generation uint64) error {
	if err := r.Documents.Confirm(generation); err != nil {
		return err
	}
	r.Log.Info("confirmed", "generation", generation, "author", author)
	return nil
}

// Progress implements api.Router.
func (r *Report) Progress(generation uint64) (present, applied uint64, err error) {
	return r.Documents.Progress(generation)
}

// Rollback implements api.Router.
func (r *Report) Rollback(ctx context.Context, author string, q *isthmusv1.RollbackRequest) (*isthmusv1.ApplyResponse, error) {
	c := change(ctx, author, q.ExpectedGeneration, q.GetConfirmWithin().AsDuration())
	c.Message, c.Dry = q.GetMessage(), q.GetDryRun()
	generation, changes, err := r.Documents.Rollback(ctx, c, q.GetToGeneration())
	if err != nil {
		return nil, refusal(err)
	}
	return &isthmusv1.ApplyResponse{Generation: generation, Changes: changeMessages(changes), Notes: problemMessages(r.Documents.Notes()), GoesBackIn: r.goesBackIn()}, nil
}

// Spec implements api.Router.
func (r *Report) Spec(_ context.Context, generation uint64) (*isthmusv1.GetSpecResponse, error) {
	generation, message, text, err := r.Documents.Document(generation)
	if err != nil {
		return nil, refusal(err)
	}
	return &isthmusv1.GetSpecResponse{Generation: generation, Spec: message, Text: text}, nil
}

// EffectiveSpec implements api.Router.
func (r *Report) EffectiveSpec(context.Context) (*isthmusv1.GetSpecResponse, error) {
	generation, message, err := r.Documents.Effective()
	if err != nil {
		return nil, refusal(err)
	}
	text, err := spec.Encode(message)
	if err != nil {
		return nil, err
	}
	return &isthmusv1.GetSpecResponse{Generation: generation, Spec: message, Text: text}, nil
}

// Tunnels returns the tunnels, and a channel that is closed when they may have changed.
func (r *Report) Tunnels() ([]*isthmusv1.TunnelStatus, <-chan struct{}) {
	changed := r.Bell.Wait()
	return r.tunnels(), changed
}

// Peers returns the BGP sessions, and a channel that is closed when they may have changed.
func (r *Report) Peers() ([]*isthmusv1.PeerStatus, <-chan struct{}) {
	changed := r.Bell.Wait()
	return r.peers(), changed
}

// ResetPeer implements api.Router.
func (r *Report) ResetPeer(ctx context.Context, name string, soft bool) error {
	return r.BGP.Reset(ctx, name, soft)
}

// Status implements api.Router.
func (r *Report) Status() (*isthmusv1.SystemStatus, <-chan struct{}) {
	changed := r.Bell.Wait()
	return r.status(), changed
}

// SetSecret implements api.Router.
func (r *Report) SetSecret(ctx context.Context, author, name string, value []byte) (*isthmusv1.SecretInfo, error) {
	s, err := r.Documents.SetSecret(ctx, author, name, value)
	if err != nil {
		return nil, err
	}
	return secretMessage(s), nil
}

// AddSecret implements api.Router.
func (r *Report) AddSecret(ctx context.Context, author, name string, value []byte) (*isthmusv1.SecretInfo, error) {
	s, err := r.Documents.AddSecret(ctx, author, name, value)
	if err != nil {
		return nil, err
	}
	return secretMessage(s), nil
}

// RollbackSecret implements api.Router.
func (r *Report) RollbackSecret(ctx context.Context, author, name string) (*isthmusv1.SecretInfo, error) {
	s, err := r.Documents.RollbackSecret(ctx, author, name)
	if err != nil {
		return nil, err
	}
	return secretMessage(s), nil
}

// DeleteSecret implements api.Router.
func (r *Report) DeleteSecret(ctx context.Context, author, name string) error {
	return r.Documents.DeleteSecret(ctx, author, name)
}

func secretMessage(s document.Secret) *isthmusv1.SecretInfo {
	return &isthmusv1.SecretInfo{Name: s.Ref.Name, Fingerprint: s.Ref.Fingerprint, Changed: stamp(s.Changed), UsedBy: s.UsedBy, Sealed: s.Sealed}
}

// refusal turns problems of a document and missing objects into the errors of the API.
func refusal(err error) error {
	var problems spec.Problems
	switch {
	case errors.As(err, &problems):
		return &api.Refused{Problems: problemMessages(problems)}
	case errors.Is(err, store.ErrNotFound):
		return fmt.Errorf("%w: %w", fault.ErrNoGeneration, err)
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

// Bounds of the changes in the answer of a plan, which must not become larger than clients accept.
// Changes beyond them are still counted.
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

// shortened removes the middle of a long text.
func shortened(s string) string {
	if len(s) <= maxFieldBytes {
		return s
	}
	return strings.ToValidUTF8(s[:maxFieldBytes/2], "") + " ... " + strings.ToValidUTF8(s[len(s)-maxFieldBytes/2:], "")
}

// Who implements api.Router.
func (r *Report) Who(ctx context.Context, q *isthmusv1.WhoRequest) (*isthmusv1.WhoResponse, error) {
	return r.Translog.Who(ctx, q)
}
