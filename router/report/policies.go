package report

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// policies returns the egress policies with the counters of a state, by name.
func (r *Report) policies(state nat.State) []*isthmusv1.PolicyStatus {
	config := r.Observed.Target().NAT
	seen := map[string]nat.PolicyState{}
	for _, s := range state.Policies {
		seen[s.Name] = s
	}
	sick := r.Observed.SickProxies()
	out := make([]*isthmusv1.PolicyStatus, 0, len(config.Policies))
	for _, p := range config.Policies {
		s, installed := seen[p.Name]
		status := &isthmusv1.PolicyStatus{
			Name: p.Name, Action: string(p.Action), Pool: p.Pool, Protocol: p.Protocol,
			Sources: texts(p.Sources), Destinations: texts(p.Destinations),
			Names: p.Names, Flows: s.Flows.Packets, Bytes: s.Flows.Bytes, Installed: installed && state.Present,
		}
		if p.To.IsValid() {
			_, down := sick[p.Name]
			status.To, status.Down = strings.TrimSuffix(p.To.String(), ":0"), down
		}
		for _, r := range p.Ports {
			status.Ports = append(status.Ports, r.String())
		}
		if i := slices.IndexFunc(config.Pools, func(o nat.Pool) bool { return o.Name == p.Pool }); i >= 0 {
			status.PublicAddresses = texts(publicAddresses(config.Pools[i]))
		}
		out = append(out, status)
	}
	return out
}

// drops returns the dropped packets of a state, by reason.
func drops(state nat.State) (out []*isthmusv1.Drop) {
	for _, reason := range nat.Reasons {
		c := state.Drops[reason]
		out = append(out, &isthmusv1.Drop{Reason: string(reason), Description: reason.String(), Packets: c.Packets, Bytes: c.Bytes})
	}
	return out
}

func publicAddresses(p nat.Pool) []netip.Addr {
	out := make([]netip.Addr, len(p.Addresses))
	for i, a := range p.Addresses {
		out[i] = a.Public
	}
	return out
}
