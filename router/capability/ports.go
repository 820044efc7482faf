package capability

import (
	"net/netip"
	"slices"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/placement"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/ports"
)

// Ports keeps a port free for every new flow.
type Ports struct {
	Keeper *ports.Keeper // nil: ports are not managed
}

// Capability describes Ports.
func (p Ports) Capability() Capability {
	if p.Keeper == nil {
		return Capability{Name: "ports of pools", Section: "egress.pools", Nouns: []api.Noun{api.Ports.From(func() []*isthmusv1.PortUse { return nil })}}
	}
	return Capability{
		Name: "ports of pools", Section: "egress.pools", Nouns: []api.Noun{p.noun()}, Conditions: p.conditions, Run: p.Keeper.Run, Rules: p.Keeper.Use,
		Summarize: func(s *isthmusv1.Summary) {
			for _, u := range p.List() {
				if s.Ports == nil || u.Percent > s.Ports.Percent {
					s.Ports = u
				}
			}
		},
		Kinds: []*condition.Kind{
			condition.ConnectionTableFull, condition.ConnectionTableLow, condition.PlacementsFull, condition.PortsExhausted, condition.PortsLow, condition.PortsUnknown,
		},
	}
}

// List returns the use of ports, sorted.
func (p Ports) List() []*isthmusv1.PortUse { return portUses(p.Keeper.Figures()) }

// Counted returns the use of ports and of the connection table as last counted.
func (p Ports) Counted() *isthmusv1.ListPortsResponse {
	out := &isthmusv1.ListPortsResponse{}
	if p.Keeper != nil {
		out.Ports = p.List()
		p.total(out)
	}
	return out
}

// noun has the flows counted before each list, unless they were counted a moment ago.
func (p Ports) noun() api.Noun {
	return api.Ports.FromCounted(p.List, p.Keeper.Recount, func(_, response proto.Message) { p.total(response.(*isthmusv1.ListPortsResponse)) })
}

// public returns the public address of a pool's address.
func public(c nat.Config, pool string, a netip.Addr) string {
	p := c.Pool(pool)
	if i := slices.IndexFunc(p.Addresses, func(o nat.PoolAddress) bool { return o.Address == a }); i >= 0 {
		return p.Addresses[i].Public.String()
	}
	return ""
}

// portUses returns the use of ports, sorted.
func portUses(s ports.Figures) []*isthmusv1.PortUse {
	out := make([]*isthmusv1.PortUse, 0, len(s.Uses))
	told := map[nat.Service]bool{} // refusals are counted for a service, not for an address
	for _, u := range s.Uses {
		if told[u.Service] {
			u.Refused = 0
		}
		told[u.Service] = true
		p := &isthmusv1.PortUse{
			Pool: u.Pool, Address: u.Address.String(), PublicAddress: public(s.Config, u.Pool, u.Address),
			Destination: u.Destination.String(), Protocol: nat.ProtocolName(u.Protocol), Port: uint32(u.Port),
			Used: u.Used, Free: u.Free(), Percent: 100 * float64(u.Used) / float64(u.Room()), Growth: u.Growth, State: "ok", Refused: u.Refused,
		}
		if u.ExhaustedIn > 0 {
			p.ExhaustedIn = durationpb.New(u.ExhaustedIn)
		}
		switch {
		case u.Exhausted:
			p.State = "exhausted"
		case u.Alarm:
			p.State = "low"
		}
		out = append(out, p)
	}
	return out
}

// total sets the counters besides the uses.
func (p Ports) total(out *isthmusv1.ListPortsResponse) {
	s := p.Keeper.Figures()
	out.Counted, out.Placements = stamp(s.At), uint32(s.Placements)
	out.Table = &isthmusv1.ConnectionTable{
		Entries: s.Stats.Entries, Assured: s.Assured, Limit: s.Stats.Limit, Full: s.TableFull, Refused: s.TableRefused,
		InsertFailed: s.Stats.InsertFailed, Dropped: s.Stats.Dropped,
	}
	for _, t := range s.Totals {
		out.Addresses = append(out.Addresses, &isthmusv1.AddressUse{
			Pool: t.Pool, Address: t.Address.String(), PublicAddress: public(s.Config, t.Pool, t.Address), Flows: t.Flows, Services: t.Services,
		})
	}
}

// conditions reports pools, services and tables that run out of room.
func (p Ports) conditions() (out []*isthmusv1.Condition) {
	s := p.Keeper.Figures()
	add := func(c *isthmusv1.Condition) { out = append(out, c) }
	const remedy = "add an address to the pool, or spread the clients over more destinations"
	for _, u := range s.Uses {
		since := s.Alarms[ports.Alarm{Pool: u.Pool, Address: u.Address, Service: u.Service}]
		switch {
		case u.Exhausted && nat.Portless(u.Protocol):
			add(condition.PortsExhausted.Error(since, "address %s of pool %s is in use toward %s by one flow without ports, like all others; flows of other sources are refused: add an address to the pool", u.Address, u.Pool, u.Service))
		case u.Exhausted:
			add(condition.PortsExhausted.Error(since, "address %s of pool %s uses %d of %d ports to %s, and no other one has more; new flows are refused: %s", u.Address, u.Pool, u.Used, placement.Ports, u.Service, remedy))
		case u.Alarm:
			add(condition.PortsLow.Warning(since, "address %s of pool %s uses %d of %d ports to %s: %s", u.Address, u.Pool, u.Used, placement.Ports, u.Service, remedy))
		}
	}
	switch used := uint64(s.Stats.Entries) * 100; {
	case s.TableFull:
		add(condition.ConnectionTableFull.Error(s.TableFullSince, "connection tracking has %d of %d flows; new ones are refused: raise net.netfilter.nf_conntrack_max", s.Stats.Entries, s.Stats.Limit))
	case s.Stats.Limit > 0 && used >= 85*uint64(s.Stats.Limit):
		add(condition.ConnectionTableLow.Warning(time.Time{}, "connection tracking has %d of %d flows: raise net.netfilter.nf_conntrack_max", s.Stats.Entries, s.Stats.Limit))
	}
	if s.Overflow {
		add(condition.PlacementsFull.Warning(time.Time{}, "%d sources are placed, which is the maximum; others may find no port", s.Placements))
	}
	if s.Err != nil {
		add(condition.PortsUnknown.Warning(s.Since, "counting ports: %v; placements stay as they are", s.Err))
	}
	return out
}
