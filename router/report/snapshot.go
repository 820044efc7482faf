package report

import (
	"github.com/isthmus-net/isthmus/bgp"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/capability"
	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/router/event/export"
)

// Snapshot is the state of a node for metrics. Its messages are those of the API.
type Snapshot struct {
	Status  *isthmusv1.SystemStatus
	Tunnels []*isthmusv1.TunnelStatus
	Peers   []*isthmusv1.PeerStatus
	// Limits are the prefixes that peers may send, by name of the peer. Without a limit a peer has
	// no entry.
	Limits map[string]uint32
	// IPv4 and IPv6 count the routes that isthmus owns.
	IPv4, IPv6 RouteCount
	Policies   []*isthmusv1.PolicyStatus
	Drops      []*isthmusv1.Drop
	Pools      []*isthmusv1.PoolStatus
	Ports      *isthmusv1.ListPortsResponse
	Allowances []Allowance
	Exports    []Export
}

// Export is the state of a receiver of events.
type Export = export.State

// Allowance is a counter of packets beyond an allowance of the cloud.
type Allowance = capability.AllowanceCounter

// RouteCount counts routes of one family.
type RouteCount struct {
	Installed, Missing int // whether the kernel has them as wanted
	Withheld           int // of Missing: those with the condition Withheld
}

// Snapshot returns the state of the node. It reads charon and the kernel no more often than lists
// of the API do, and the routes without making a message of each.
func (r *Report) Snapshot() Snapshot {
	rules := r.Observed.Rules()
	s := Snapshot{
		Status: r.status(), Tunnels: r.tunnels(), Peers: r.peers(), Limits: map[string]uint32{},
		Policies: r.policies(rules), Drops: drops(rules), Pools: r.Pools(), Ports: r.Ports(),
	}
	if r.Allowances != nil {
		s.Allowances = r.Allowances()
	}
	if r.Exports != nil {
		s.Exports = r.Exports()
	}
	for _, p := range r.Observed.Target().BGP.Peers {
		if p.MaxPrefixes > 0 {
			s.Limits[p.Name] = p.MaxPrefixes
		}
	}
	for _, route := range r.FIB.Routes() {
		n := &s.IPv4
		if route.Key.Prefix.Addr().Is6() {
			n = &s.IPv6
		}
		switch {
		case route.Installed:
			n.Installed++
		default:
			n.Missing++
		}
		if route.Takes != nil {
			n.Withheld++
		}
	}
	return s
}

// Recorded returns the state that the event log follows. Unlike Snapshot it reads neither rules nor
// ports, and has the conditions of all objects.
func (r *Report) Recorded() event.Snapshot {
	d := r.Documents.Status()
	s := event.Snapshot{
		Tunnels: r.tunnels(), Peers: r.peers(), Conditions: r.allConditions(), Revisions: r.revisions(),
		Generation: d.Present.Generation, Applied: d.Applied,
	}
	if r.Pools != nil {
		s.Pools = r.Pools()
	}
	return s
}

// PeerStates lists the states that a session is reported in.
func PeerStates() (out []string) {
	for _, s := range bgp.SessionStates {
		out = append(out, string(s))
	}
	return out
}

// AllowanceKinds lists the kinds of allowances.
func AllowanceKinds() []string { return capability.AllowanceKinds }

// AddressStates lists the states that an address of a pool is reported in.
func AddressStates() []string { return capability.AddressStates() }
