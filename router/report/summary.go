package report

import (
	"fmt"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Summary describes the state of the node in one line.
func (r *Report) Summary() string {
	status, _ := r.Status()
	if status.GetGeneration() == 0 {
		return "no document yet: isthmus apply -f FILE"
	}
	bad := 0
	for _, c := range status.GetConditions() {
		if c.Severity == "error" {
			bad++
		}
	}
	text := fmt.Sprintf("generation %d", status.GetGeneration())
	if status.GetAppliedGeneration() != status.GetGeneration() {
		text += fmt.Sprintf(" (applied: %d)", status.GetAppliedGeneration())
	}
	n := status.GetSummary()
	return fmt.Sprintf("%s, %d of %d tunnels up, %d errors", text, n.GetTunnelsUp(), n.GetTunnels(), bad)
}

// summary counts the objects of the node.
func (r *Report) summary() *isthmusv1.Summary {
	s := &isthmusv1.Summary{}
	r.Observed.Read(func(seen *observe.State) {
		for _, c := range seen.Target.Tunnels {
			s.Tunnels++
			if seen.Tunnels[c.Name].Status == tunnel.Up {
				s.TunnelsUp++
			}
			if c.Disabled {
				s.TunnelsDisabled++
			}
		}
	})
	for _, p := range r.BGP.Peers() {
		s.Peers++
		if p.State == bgp.Established {
			s.PeersEstablished++
		}
		if p.State == bgp.Disabled {
			s.PeersDisabled++
		}
		s.PrefixesAccepted += uint64(p.Accepted)
		s.PrefixesAnnounced += uint64(p.Announced)
	}
	routes := r.FIB.Count()
	s.Routes, s.RoutesInstalled = uint64(routes.Routes), uint64(routes.Installed)
	rules := r.Observed.Rules()
	s.Guard, s.GuardPackets = rules.Guarded, rules.Guard.Packets
	for _, c := range r.Capabilities {
		if c.Summarize != nil {
			c.Summarize(s)
		}
	}
	return s
}
