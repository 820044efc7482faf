package gobgp

import (
	"net/netip"
	"slices"
	"strings"

	api "github.com/osrg/gobgp/v3/api"
	packet "github.com/osrg/gobgp/v3/pkg/packet/bgp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-net/isthmus/bgp"
)

// sessionStates maps the states as GoBGP logs them.
var sessionStates = map[string]bgp.SessionState{
	"BGP_FSM_IDLE":        bgp.Idle,
	"BGP_FSM_CONNECT":     bgp.Connect,
	"BGP_FSM_ACTIVE":      bgp.Active,
	"BGP_FSM_OPENSENT":    bgp.OpenSent,
	"BGP_FSM_OPENCONFIRM": bgp.OpenConfirm,
	"BGP_FSM_ESTABLISHED": bgp.Established,
}

// decoder turns the paths of watch events into updates. Consecutive paths often have the same
// attributes, so it caches those of the last path.
type decoder struct {
	id func(address string) (uint32, bool)

	raw  []*anypb.Any
	hop  netip.Addr
	list []uint32
	kept bool
}

// updates returns the updates of an event. For each prefix in it, an update has the whole set of
// used paths, because with multipath GoBGP sends all of them again whenever one changes. It has
// none when the best path is a withdrawal or our own.
func (d *decoder) updates(paths []*api.Path) []update {
	var us []update
	for _, p := range paths {
		prefix, ok := decodePrefix(p.GetNlri())
		if !ok {
			continue // an End-of-RIB has no NLRI
		}
		if len(us) == 0 || us[len(us)-1].prefix != prefix {
			us = append(us, update{prefix: prefix})
		}
		id, ok := d.id(p.GetNeighborIp())
		if !ok || p.GetIsWithdraw() {
			continue
		}
		if !sameAttributes(d.raw, p.GetPattrs()) {
			d.raw = p.GetPattrs()
			d.hop, d.list, d.kept = decodeAttributes(d.raw)
		}
		u := &us[len(us)-1]
		if len(u.paths) < maxPaths {
			u.paths = append(u.paths, path{peer: id, nextHop: d.hop, asPath: d.list, kept: d.kept})
		}
	}
	return us
}

func sameAttributes(a, b []*anypb.Any) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].GetTypeUrl() != b[i].GetTypeUrl() || string(a[i].GetValue()) != string(b[i].GetValue()) {
			return false
		}
	}
	return true
}

func decodePrefix(a *anypb.Any) (netip.Prefix, bool) {
	var n api.IPAddressPrefix
	if !is(a, "apipb.IPAddressPrefix") || proto.Unmarshal(a.GetValue(), &n) != nil {
		return netip.Prefix{}, false
	}
	addr, err := netip.ParseAddr(n.GetPrefix())
	if err != nil || addr.Zone() != "" {
		return netip.Prefix{}, false
	}
	p, err := addr.Prefix(int(n.GetPrefixLen()))
	return p, err == nil
}

// decodeAttributes returns the next hop, the AS path, and whether the path must not be announced
// to external peers. Missing or unreadable values stay zero, since no traffic depends on them.
func decodeAttributes(attrs []*anypb.Any) (hop netip.Addr, list []uint32, kept bool) {
	for _, a := range attrs {
		switch {
		case is(a, "apipb.NextHopAttribute"):
			var x api.NextHopAttribute
			if proto.Unmarshal(a.GetValue(), &x) == nil {
				hop, _ = netip.ParseAddr(x.GetNextHop())
			}
		case is(a, "apipb.MpReachNLRIAttribute"):
			var x api.MpReachNLRIAttribute
			if proto.Unmarshal(a.GetValue(), &x) == nil && len(x.GetNextHops()) > 0 {
				hop, _ = netip.ParseAddr(x.GetNextHops()[0])
			}
		case is(a, "apipb.CommunitiesAttribute"):
			var x api.CommunitiesAttribute
			if proto.Unmarshal(a.GetValue(), &x) == nil {
				kept = slices.ContainsFunc(x.GetCommunities(), func(c uint32) bool {
					return c == uint32(packet.COMMUNITY_NO_EXPORT) || c == uint32(packet.COMMUNITY_NO_ADVERTISE)
				})
			}
		case is(a, "apipb.AsPathAttribute"):
			var x api.AsPathAttribute
			if proto.Unmarshal(a.GetValue(), &x) != nil {
				continue
			}
			var sets []uint32
			for _, s := range x.GetSegments() {
				switch s.GetType() {
				case api.AsSegment_AS_SEQUENCE:
					list = append(list, s.GetNumbers()...)
				case api.AsSegment_AS_SET:
					sets = append(sets, s.GetNumbers()...)
				}
			}
			list = append(list, sets...)
			list = list[:min(len(list), maxASPath)]
		}
	}
	return hop.WithZone(""), list, kept
}

func is(a *anypb.Any, name string) bool {
	_, n, _ := strings.Cut(a.GetTypeUrl(), "/")
	return n == name
}

func decodeCounters(p *api.Peer) countersMessage {
	s := p.GetState()
	id, _ := netip.ParseAddr(s.GetRouterId())
	m := countersMessage{
		RouterID:        id,
		In:              s.GetMessages().GetReceived().GetTotal(),
		Out:             s.GetMessages().GetSent().GetTotal(),
		HoldTime:        uint32(p.GetTimers().GetState().GetNegotiatedHoldTime()),
		GracefulRestart: p.GetGracefulRestart().GetPeerRestartTime() > 0,
	}
	m.BothFamilies = len(p.GetAfiSafis()) > 1 && offersBoth(s.GetRemoteCap())
	for _, f := range p.GetAfiSafis() {
		m.Received += uint32(f.GetState().GetReceived())
	}
	return m
}

// offersBoth reports whether the capabilities of an OPEN have both families of unicast.
func offersBoth(capabilities []*anypb.Any) bool {
	var four, six bool
	for _, a := range capabilities {
		var x api.MultiProtocolCapability
		if !is(a, "apipb.MultiProtocolCapability") || proto.Unmarshal(a.GetValue(), &x) != nil {
			continue
		}
		four, six = four || proto.Equal(x.GetFamily(), ipv4), six || proto.Equal(x.GetFamily(), ipv6)
	}
	return four && six
}

// decodePath returns the attributes of a path in a table, without its peer.
func decodePath(p *api.Path) (a pathAttributes) {
	a.NextHop, a.ASPath, _ = decodeAttributes(p.GetPattrs())
	a.At, a.Stale = p.GetAge().AsTime(), p.GetStale()
	a.RouterID, _ = netip.ParseAddr(p.GetSourceId())
	for _, raw := range p.GetPattrs() {
		v := raw.GetValue()
		switch {
		case is(raw, "apipb.OriginAttribute"):
			var x api.OriginAttribute
			if proto.Unmarshal(v, &x) == nil {
				a.Origin = uint8(min(x.GetOrigin(), 2))
			}
		case is(raw, "apipb.MultiExitDiscAttribute"):
			var x api.MultiExitDiscAttribute
			if proto.Unmarshal(v, &x) == nil {
				a.MED = new(x.GetMed())
			}
		case is(raw, "apipb.LocalPrefAttribute"):
			var x api.LocalPrefAttribute
			if proto.Unmarshal(v, &x) == nil {
				a.LocalPreference = new(x.GetLocalPref())
			}
		case is(raw, "apipb.CommunitiesAttribute"):
			var x api.CommunitiesAttribute
			if proto.Unmarshal(v, &x) == nil {
				a.Communities = x.GetCommunities()[:min(len(x.GetCommunities()), maxCommunities)]
			}
		case is(raw, "apipb.LargeCommunitiesAttribute"):
			var x api.LargeCommunitiesAttribute
			if proto.Unmarshal(v, &x) != nil {
				continue
			}
			for _, l := range x.GetCommunities()[:min(len(x.GetCommunities()), maxCommunities)] {
				a.Large = append(a.Large, [3]uint32{l.GetGlobalAdmin(), l.GetLocalData1(), l.GetLocalData2()})
			}
		case is(raw, "apipb.AsPathAttribute"):
			var x api.AsPathAttribute
			if proto.Unmarshal(v, &x) != nil {
				continue
			}
			for _, s := range x.GetSegments() {
				n := s.GetNumbers()
				if a.FirstAS == 0 && len(n) > 0 {
					a.FirstAS = n[0]
				}
				if a.ASLength += uint32(len(n)); s.GetType() == api.AsSegment_AS_SET && len(n) > 0 {
					a.ASLength -= uint32(len(n) - 1)
				}
			}
		}
	}
	return a
}
