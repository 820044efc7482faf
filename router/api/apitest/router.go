// Package apitest has an in-memory Router and a server around it, for tests of the API and its
// clients.
package apitest

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/bell"
	"github.com/isthmus-net/isthmus/router/fault"
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
	paths     []*isthmusv1.Path
	starts    uint64 // of BGP
	policies  []*isthmusv1.PolicyStatus
	pools     []*isthmusv1.PoolStatus
	links     []*isthmusv1.LinkStatus
	names     []*isthmusv1.NameStatus
	ports     []*isthmusv1.PortUse
	status    *isthmusv1.SystemStatus
	secrets   map[string]string
	former    map[string]string // values of secrets
	resets    []string
	stuck     bool
	reverted  uint64 // generation that Revert replaced
	asked     int    // calls of Progress
	pings     atomic.Int32
	captures  atomic.Int32
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

// SetPaths replaces the paths that peers send and that are sent to them, which must be in the order
// of prefixes. A sent path is listed for every peer.
func (r *Router) SetPaths(all ...*isthmusv1.Path) { set(r, &r.paths, all) }

// SetStarts sets how often BGP has been started; 0: it does not run.
func (r *Router) SetStarts(n uint64) {
	r.mu.Lock()
	r.starts = n
	r.mu.Unlock()
}

func (r *Router) SetPolicies(all ...*isthmusv1.PolicyStatus) {
	set(r, &r.policies, all)
}

func (r *Router) SetLinks(all ...*isthmusv1.LinkStatus) { set(r, &r.links, all) }
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

// SetQuietly replaces the conditions, and signals no change.
func (r *Router) SetQuietly(all ...*isthmusv1.Condition) {
	r.mu.Lock()
	r.status.Conditions = all
	r.mu.Unlock()
}

// SetStuck sets whether documents are accepted and not applied.
func (r *Router) SetStuck(stuck bool) {
	r.mu.Lock()
	r.stuck = stuck
	r.mu.Unlock()
	r.changed.Ring()
}

// Generation implements api.Router.
func (r *Router) Generation() uint64 {
	st, _ := r.Status()
	return st.GetGeneration()
}

// Health implements api.Router: an object of a condition does not serve.
func (r *Router) Health() map[string]bool {
	st, _ := r.Status()
	out := map[string]bool{"": true}
	for _, c := range st.GetConditions() {
		serves := c.Severity != "error"
		out["condition/"+c.Type] = serves
		out[strings.Replace(c.Object, " ", "/", 1)] = serves
		out[""] = out[""] && serves
	}
	return out
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
		api.Links.From(list(r, &r.links)),
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
		Summary: &isthmusv1.Summary{
			Tunnels: uint32(len(r.tunnels)), Peers: uint32(len(r.peers)), Routes: uint64(len(r.routes)), RoutesInstalled: uint64(len(r.routes)),
			Pools: uint32(len(r.pools)), Guard: true, GuardPackets: 3,
		},
	}
	for _, t := range r.tunnels {
		if t.State == "up" {
			st.Summary.TunnelsUp++
		}
	}
	if len(r.ports) > 0 {
		st.Summary.Ports = r.ports[0]
	}
	if r.stuck {
		st.AppliedGeneration--
	}
	if !r.confirm.IsZero() {
		st.ConfirmUntil = timestamppb.New(r.confirm)
	}
	return st, changed
}

// Addresses that answer pings of the fake in their own way. Any other one answers at once.
const (
	PingSilent   = "192.0.2.1"
	PingNarrow   = "192.0.2.2" // the path MTU is 1400
	PingHangs    = "192.0.2.3" // until the caller is gone; see Pings
	PingFlaky    = "192.0.2.4" // does not answer the second request
	PingNoRouter = "192.0.2.5"
)

// Ping implements api.Router. It refuses requests with missing values, and does not wait.
func (r *Router) Ping(ctx context.Context, q *isthmusv1.PingRequest, reply func(*isthmusv1.PingReply) error) error {
	if q.Count == 0 || q.Size == 0 || q.Interval == nil {
		return fmt.Errorf("the request has missing values: %v", q)
	}
	r.mu.Lock()
	known := q.Tunnel == "" || stateOf(r.tunnels, q.Tunnel) != ""
	r.mu.Unlock()
	if !known {
		return fmt.Errorf("tunnel %q: %w", q.Tunnel, fault.ErrNoTunnel)
	}
	if q.Address == PingHangs {
		r.pings.Add(1)
		defer r.pings.Add(-1)
		<-ctx.Done()
		return ctx.Err()
	}
	for n := range q.Count {
		m := &isthmusv1.PingReply{Sequence: n + 1}
		switch {
		case q.Address == PingSilent, q.Address == PingFlaky && n == 1:
			m.Error = "no answer within 1s"
		case q.Address == PingNarrow && q.DontFragment && q.Size+28 > 1400:
			m.Error = "packet too big: the path MTU is 1400"
		case q.Address == PingNoRouter:
			m.Address, m.Error = "10.9.0.1", "destination unreachable: the host does not answer\x1b[31m"
		default:
			m.Address, m.RoundTrip = q.Address, durationpb.New(1210*time.Microsecond+time.Duration(n)*150*time.Microsecond)
		}
		if err := reply(m); err != nil {
			return err
		}
	}
	return nil
}

// Hosts of captures of the fake. Any other one passes packets until the count is reached.
const (
	CaptureHangs = "192.0.2.3" // passes one packet, until the caller is gone; see Captures
	CaptureLossy = "192.0.2.6" // 7 packets are missing
)

// Packet returns the bytes of a packet of captures of the fake: an IPv4 header without data.
func Packet(n int) []byte {
	return []byte{0x45, 0, 0, 20, byte(n >> 8), byte(n), 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2}
}

// Capture implements api.Router. It refuses requests with missing values. Of two packets one
// leaves, and all have the same time.
func (r *Router) Capture(ctx context.Context, q *isthmusv1.CaptureRequest, reply func(*isthmusv1.CaptureReply) error) error {
	if q.Count == 0 || q.Size == 0 || q.Duration == nil || q.At == nil {
		return fmt.Errorf("the request has missing values: %v", q)
	}
	r.mu.Lock()
	known := q.GetTunnel() == "" || stateOf(r.tunnels, q.GetTunnel()) != ""
	r.mu.Unlock()
	if !known {
		return fmt.Errorf("tunnel %q: %w", q.GetTunnel(), fault.ErrNoTunnel)
	}
	if err := reply(&isthmusv1.CaptureReply{Interface: "t-" + cmp.Or(q.GetTunnel(), q.GetAttachment(), "underlay")}); err != nil {
		return err
	}
	packet := func(n int) *isthmusv1.CapturedPacket {
		data := Packet(n)
		return &isthmusv1.CapturedPacket{Time: timestamppb.New(time.Unix(1_790_000_000, 123_456_789)), Leaving: n%2 == 0, Length: 1420, Data: data}
	}
	if q.Host == CaptureHangs {
		r.captures.Add(1)
		defer r.captures.Add(-1)
		if err := reply(&isthmusv1.CaptureReply{Packets: []*isthmusv1.CapturedPacket{packet(0)}}); err != nil {
			return err
		}
		<-ctx.Done()
		return ctx.Err()
	}
	var missing uint64
	if q.Host == CaptureLossy {
		missing = 7
	}
	for n := 0; n < int(q.Count); {
		m := &isthmusv1.CaptureReply{Missing: missing}
		for ; n < int(q.Count) && len(m.Packets) < 3; n++ {
			m.Packets = append(m.Packets, packet(n))
		}
		if err := reply(m); err != nil {
			return err
		}
	}
	return reply(&isthmusv1.CaptureReply{Missing: missing, End: "count"})
}

// Captures returns how many captures of CaptureHangs are under way.
func (r *Router) Captures() int { return int(r.captures.Load()) }

// Pings returns how many pings of PingHangs are under way.
func (r *Router) Pings() int { return int(r.pings.Load()) }

// ResetTunnel refuses names that no tunnel has, and a second call.
func (r *Router) ResetTunnel(_ context.Context, name string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case stateOf(r.tunnels, name) == "":
		return fmt.Errorf("resetting tunnel %s: %w", name, fault.ErrNoTunnel)
	case slices.Contains(r.resets, "tunnel "+name):
		return fmt.Errorf("resetting tunnel %s: %w: it was reset a moment ago; try again in 10s", name, fault.ErrTooSoon)
	}
	r.resets = append(r.resets, "tunnel "+name)
	return nil
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
