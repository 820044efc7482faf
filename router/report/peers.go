package report

import (
	"fmt"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/tunnel"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-net/isthmus/bgp"
)

// peers returns the wanted BGP sessions with their last known state, by name.
func (r *Report) peers() []*isthmusv1.PeerStatus {
	seen := map[string]bgp.PeerState{}
	for _, p := range r.BGP.Peers() {
		seen[p.Name] = p
	}
	var out []*isthmusv1.PeerStatus
	now := time.Now()
	r.Observed.Read(func(state *observe.State) {
		wanted := state.Target.BGP.Peers
		out = make([]*isthmusv1.PeerStatus, 0, len(wanted))
		for _, c := range wanted {
			s, ok := seen[c.Name]
			if !ok {
				s.State = bgp.Unknown
			}
			p := peerStatus(c, s)
			if c.Disabled {
				p.State, p.LastError = string(bgp.Disabled), isDisabled
				if i, ok := state.Target.Tunnel(c.Tunnel); ok && state.Target.Tunnels[i].Disabled {
					p.LastError = fmt.Sprintf("its tunnel %s is %s", c.Tunnel, isDisabled)
				}
			}
			p.Conditions = peerConditions(c, s, state.LostSessions[c.Name], now, state.Tunnels[c.Tunnel].Status == tunnel.Up)
			out = append(out, p)
		}
	})
	return out
}

func peerStatus(c bgp.Peer, s bgp.PeerState) *isthmusv1.PeerStatus {
	p := &isthmusv1.PeerStatus{
		Name: c.Name, Tunnel: c.Tunnel, Address: c.Address.String(), LocalAddress: c.LocalAddress.String(), Asn: c.ASN,
		State: string(s.State), Since: stamp(s.Since),
		PrefixesReceived: s.Received, PrefixesAccepted: s.Accepted, PrefixesAnnounced: s.Announced, PrefixesHeldBack: s.HeldBack,
		MessagesReceived: s.MessagesIn, MessagesSent: s.MessagesOut,
		LastError: lastError(s), TimesUp: s.TimesUp, GracefulRestart: s.GracefulRestart, NextTry: stamp(s.NextTry),
	}
	if p.LastError != "" {
		p.LastErrorTime = stamp(s.LastErrorAt)
	}
	p.MaxPrefixes, p.Passive, p.ExportMaxPrefixes = c.MaxPrefixes, c.Passive, c.Export.MaxPrefixes
	p.Limits = limitsInUse(c, s)
	if s.State == bgp.Established {
		p.Families = sessionFamilies(c, s)
	}
	p.Filter = &isthmusv1.PeerFilter{
		Messages: s.Filtered.Messages, Withdrawn: s.Filtered.Withdrawn, Resets: s.Filtered.Resets, Note: s.Filtered.Note,
	}
	for _, a := range s.Filtered.Discarded {
		p.Filter.Discarded = append(p.Filter.Discarded, &isthmusv1.DiscardedAttribute{Type: uint32(a.Type), Count: a.Count})
	}
	if s.HoldTime > 0 {
		p.HoldTime = durationpb.New(s.HoldTime)
	}
	if s.RouterID.IsValid() {
		p.RouterId = s.RouterID.String()
	}
	return p
}

// sessionFamilies returns the families of a session. That of its addresses is always one, since
// bgp/filter refuses an OPEN without it.
func sessionFamilies(c bgp.Peer, s bgp.PeerState) []string {
	const four, six = "IPv4 unicast", "IPv6 unicast"
	switch {
	case s.BothFamilies:
		return []string{four, six}
	case c.Address.Is4():
		return []string{four}
	}
	return []string{six}
}

// limitsInUse describes the limits of a session and their use.
func limitsInUse(c bgp.Peer, s bgp.PeerState) (out []string) {
	if c.MaxPrefixes > 0 {
		out = append(out, fmt.Sprintf("%d of at most %d prefixes received, %d of them used", s.Received, c.MaxPrefixes, s.Accepted))
	}
	if c.Export.MaxPrefixes > 0 {
		text := fmt.Sprintf("%d of at most %d prefixes announced", s.Announced, c.Export.MaxPrefixes)
		if s.HeldBack > 0 {
			text += fmt.Sprintf(", %d more held back", s.HeldBack)
		}
		out = append(out, text)
	}
	return out
}

// lastError returns the last error of a session that is not established: one of the past explains
// nothing about a session that is fine.
func lastError(s bgp.PeerState) string {
	if s.State == bgp.Established {
		return ""
	}
	return s.LastError
}
