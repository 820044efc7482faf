package gobgp

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"time"

	api "github.com/osrg/gobgp/v3/api"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-net/isthmus/bgp"
)

const (
	// deferral bounds how long updates to a peer that has come back are deferred while others are
	// still expected (Selection_Deferral_Timer, RFC 4724 section 4.1). GoBGP's default is six
	// minutes.
	deferral = 10 * time.Second

	// exactLimit is the largest prefix limit that GoBGP itself enforces. GoBGP counts the whole
	// Adj-RIB-In on each UPDATE, which is quadratic in the size of the table; larger limits are
	// compared with the counters instead.
	exactLimit = 20_000

	importPolicy = "import"
	exportPolicy = "export"

	// Well-known communities: LLGR_STALE (RFC 9494), NO_EXPORT and NO_ADVERTISE (RFC 1997).
	llgrStale   = "65535:6"
	noExport    = "65535:65281"
	noAdvertise = "65535:65282"
)

var (
	ipv4 = &api.Family{Afi: api.Family_AFI_IP, Safi: api.Family_SAFI_UNICAST}
	ipv6 = &api.Family{Afi: api.Family_AFI_IP6, Safi: api.Family_SAFI_UNICAST}
)

// family returns the address family of an address.
func family(a netip.Addr) *api.Family {
	if a.Is4() {
		return ipv4
	}
	return ipv6
}

// families returns the address families of a session: first that of its addresses.
func families(p *bgp.Peer) []*api.Family {
	own := []*api.Family{family(p.Address)}
	if p.OtherLocal.IsValid() {
		own = append(own, ipv6)
	}
	return own
}

// check returns an error if a peer must not be passed to GoBGP.
func check(asn uint32, p bgp.Peer) error {
	usable := func(a netip.Addr) bool {
		return a.IsValid() && !a.Is4In6() && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast()
	}
	switch {
	case p.Name == "":
		return fmt.Errorf("a peer has no name")
	case !usable(p.Address):
		return fmt.Errorf("address %v is not a valid peer address", p.Address)
	case !usable(p.LocalAddress):
		return fmt.Errorf("local address %v is not a valid session address", p.LocalAddress)
	case p.Address.Is4() != p.LocalAddress.Is4():
		return fmt.Errorf("address %v and local address %v are of different families", p.Address, p.LocalAddress)
	case p.OtherLocal.IsValid() && (!p.Address.Is4() || p.OtherLocal.Is4() || !usable(p.OtherLocal)):
		return fmt.Errorf("address %v is not that of IPv6 in a session of IPv4", p.OtherLocal)
	case p.Address == p.LocalAddress:
		return fmt.Errorf("address %v is also the local address", p.Address)
	case p.ASN == 0:
		return fmt.Errorf("ASN 0 is reserved (RFC 7607)")
	case p.HoldTime < 3*time.Second || p.HoldTime > 65535*time.Second || p.HoldTime%time.Second != 0:
		return fmt.Errorf("hold time %v is not a whole number of seconds from 3s to 65535s", p.HoldTime)
	case p.Keepalive < time.Second || p.Keepalive > p.HoldTime || p.Keepalive%time.Second != 0:
		return fmt.Errorf("keepalive %v is not a whole number of seconds from 1s to the hold time", p.Keepalive)
	case p.GracefulRestart < 0 || p.GracefulRestart > 4095*time.Second:
		return fmt.Errorf("restart time %v is not from 0 to 4095s", p.GracefulRestart)
	case p.ASOverride && p.ASN == asn:
		return fmt.Errorf("AS override needs an external peer")
	case len(p.Interface) > 15:
		return fmt.Errorf("interface name %q is longer than 15 bytes", p.Interface)
	}
	for _, r := range slices.Concat(p.Import.Allow, p.Export.Allow) {
		if !r.Prefix.IsValid() || r.Prefix != r.Prefix.Masked() || r.Min > r.Max || int(r.Max) > r.Prefix.Addr().BitLen() {
			return fmt.Errorf("rule %v from %d to %d matches no prefix", r.Prefix, r.Min, r.Max)
		}
	}
	return nil
}

// compilePeer returns the GoBGP neighbour of a peer. restarting sets the Restart State and
// Forwarding State bits of its OPEN.
func compilePeer(asn uint32, c peerConfig, restarting bool) *api.Peer {
	p := c.Peer
	seconds := func(d time.Duration) uint64 { return uint64(d / time.Second) }
	var carried []*api.AfiSafi
	for _, family := range families(&p) {
		f := &api.AfiSafi{
			Config:            &api.AfiSafiConfig{Family: family, Enabled: true},
			MpGracefulRestart: &api.MpGracefulRestart{Config: &api.MpGracefulRestartConfig{Enabled: p.GracefulRestart > 0}},
		}
		if p.MaxPrefixes > 0 && p.MaxPrefixes <= exactLimit {
			f.PrefixLimits = &api.PrefixLimit{Family: family, MaxPrefixes: p.MaxPrefixes}
		}
		carried = append(carried, f)
	}
	n := &api.Peer{
		Conf: &api.PeerConf{
			NeighborAddress: p.Address.String(),
			PeerAsn:         p.ASN,
			LocalAsn:        asn,
			ReplacePeerAsn:  p.ASOverride,
			// GoBGP would keep the path that a looped path replaces in its table. The import
			// policy replaces it, and rejects looped paths from peers that may not send our ASN at
			// all.
			AllowOwnAsn: 255,
		},
		Transport: &api.Transport{
			LocalAddress: p.LocalAddress.String(),
			PassiveMode:  true, // the relay dials
		},
		Timers: &api.Timers{Config: &api.TimersConfig{
			HoldTime:          seconds(p.HoldTime),
			KeepaliveInterval: seconds(p.Keepalive),
			// An administrative reset should be short.
			IdleHoldTimeAfterReset: 1,
		}},
		GracefulRestart: &api.GracefulRestart{
			Enabled:         p.GracefulRestart > 0,
			RestartTime:     uint32(seconds(p.GracefulRestart)),
			DeferralTime:    uint32(seconds(deferral)),
			LocalRestarting: restarting && p.GracefulRestart > 0,
		},
		AfiSafis: carried,
	}
	if p.AllowOwnAS > 0 {
		n.Conf.AllowOwnAsn = uint32(p.AllowOwnAS)
	}
	return n
}

func hostPrefix(a netip.Addr) string { return netip.PrefixFrom(a, a.BitLen()).String() }

// compilePolicies returns the two policies of the whole server, made of those of the peers. GoBGP
// applies them to every path and peer; paths that no statement accepts are rejected by the default
// of the assignment. For the peers in withdraw (by name), all paths that are not announced are
// withdrawn: GoBGP sends a path with LLGR_STALE as a withdrawal to a peer without long-lived
// graceful restart, and it has no other way to withdraw what a former policy announced.
func compilePolicies(asn uint32, peers []peerConfig, withdraw map[string]bool) *api.SetPoliciesRequest {
	b := policyBuilder{asn: asn}
	in := &api.Policy{Name: importPolicy, Statements: []*api.Statement{{
		Name:       "local",
		Conditions: &api.Conditions{RouteType: api.Conditions_ROUTE_TYPE_LOCAL},
		Actions:    &api.Actions{RouteAction: api.RouteAction_ACCEPT},
	}}}
	in.Statements = append(in.Statements, b.policies(peers, (*bgp.Peer).ImportPolicy)...)

	out := &api.Policy{Name: exportPolicy, Statements: b.policies(peers, (*bgp.Peer).ExportPolicy)}
	var back []string
	for _, p := range peers {
		if withdraw[p.Peer.Name] {
			back = append(back, hostPrefix(p.Peer.Address))
		}
	}
	if len(back) > 0 {
		out.Statements = append(out.Statements, &api.Statement{
			Name:       "withdraw",
			Conditions: &api.Conditions{NeighborSet: b.neighbors(back)},
			Actions: &api.Actions{
				RouteAction: api.RouteAction_ACCEPT,
				Community:   &api.CommunityAction{Type: api.CommunityAction_ADD, Communities: []string{llgrStale}},
			},
		})
	}
	return &api.SetPoliciesRequest{DefinedSets: b.sets, Policies: []*api.Policy{in, out}}
}

// policyBuilder numbers sets and statements, whose names are global in GoBGP.
type policyBuilder struct {
	asn  uint32
	sets []*api.DefinedSet
	n    int
}

func (b *policyBuilder) name(kind string) string {
	b.n++
	return fmt.Sprintf("%s-%d", kind, b.n)
}

func (b *policyBuilder) set(t api.DefinedType, list ...string) *api.MatchSet {
	s := &api.DefinedSet{DefinedType: t, Name: b.name("set"), List: list}
	b.sets = append(b.sets, s)
	return &api.MatchSet{Name: s.Name}
}

// neighbors needs at least one neighbour: GoBGP treats an empty set as all.
func (b *policyBuilder) neighbors(list []string) *api.MatchSet {
	return b.set(api.DefinedType_NEIGHBOR, list...)
}

// policies returns the statements for the terms of all peers, which keep each peer's order of
// terms. Peers with the same term share its statement, so that a path is compared with each set of
// rules once.
func (b *policyBuilder) policies(peers []peerConfig, policy func(*bgp.Peer, uint32) bgp.Policy) (ss []*api.Statement) {
	type shared struct {
		term      bgp.Term
		neighbors []string
	}
	all := make([]bgp.Policy, len(peers))
	for i := range peers {
		all[i] = policy(&peers[i].Peer, b.asn)
	}
	for at := 0; ; at++ {
		var groups []*shared
		for i, p := range all {
			if at >= len(p) {
				continue
			}
			k := slices.IndexFunc(groups, func(s *shared) bool { return reflect.DeepEqual(s.term, p[at]) })
			if k < 0 {
				k = len(groups)
				groups = append(groups, &shared{term: p[at]})
			}
			groups[k].neighbors = append(groups[k].neighbors, hostPrefix(peers[i].Peer.Address))
		}
		if len(groups) == 0 {
			return ss
		}
		for _, s := range groups {
			ss = append(ss, b.statements(s.neighbors, s.term)...)
		}
	}
}

// statements returns the statements for a term: one for each address family in its rules.
func (b *policyBuilder) statements(peers []string, t bgp.Term) []*api.Statement {
	statement := func(prefixes *api.MatchSet) *api.Statement {
		c := &api.Conditions{PrefixSet: prefixes, NeighborSet: b.neighbors(peers)}
		if t.OwnAS {
			// GoBGP matches the first form without a regular expression. The second finds our ASN
			// in an AS_SET.
			c.AsPathSet = b.set(api.DefinedType_AS_PATH, fmt.Sprintf("_%d_", b.asn), fmt.Sprintf("[{,]%d[,}]", b.asn))
		}
		if t.Kept {
			c.CommunitySet = b.set(api.DefinedType_COMMUNITY, noExport, noAdvertise)
		}
		return &api.Statement{Name: b.name("statement"), Conditions: c, Actions: b.actions(t)}
	}
	if t.Prefixes == nil {
		return []*api.Statement{statement(nil)}
	}
	var ss []*api.Statement
	for _, v4 := range []bool{true, false} {
		prefixes := compileRules(t.Prefixes, v4)
		if len(prefixes) == 0 {
			continue
		}
		s := &api.DefinedSet{DefinedType: api.DefinedType_PREFIX, Name: b.name("set"), Prefixes: prefixes}
		b.sets = append(b.sets, s)
		ss = append(ss, statement(&api.MatchSet{Name: s.Name}))
	}
	return ss
}

func (b *policyBuilder) actions(t bgp.Term) *api.Actions {
	if t.Reject {
		return &api.Actions{RouteAction: api.RouteAction_REJECT}
	}
	a := &api.Actions{RouteAction: api.RouteAction_ACCEPT}
	if t.LocalPreference != 0 {
		a.LocalPref = &api.LocalPrefAction{Value: t.LocalPreference}
	}
	if t.MED != nil {
		a.Med = &api.MedAction{Type: api.MedAction_REPLACE, Value: int64(*t.MED)}
	}
	if t.Prepend > 0 {
		a.AsPrepend = &api.AsPrependAction{Asn: b.asn, Repeat: uint32(t.Prepend)}
	}
	if t.NextHopSelf {
		a.Nexthop = &api.NexthopAction{Self: true}
	}
	return a
}

// compileRules returns the rules of one address family as a prefix set. GoBGP looks only at the
// longest entry that contains a prefix, so each entry also gets the ranges of the rules whose
// prefix contains its own.
func compileRules(rules []bgp.Rule, v4 bool) []*api.Prefix {
	var ps []*api.Prefix
	type entry struct {
		prefix   netip.Prefix
		min, max uint8
	}
	seen := map[entry]bool{}
	for _, r := range rules {
		if r.Prefix.Addr().Is4() != v4 {
			continue
		}
		for _, o := range rules {
			e := entry{r.Prefix, max(o.Min, uint8(r.Prefix.Bits())), o.Max}
			if !(bgp.Rule{Prefix: o.Prefix, Max: 128}).Match(r.Prefix) || o.Prefix.Addr().Is4() != v4 || e.min > e.max || seen[e] {
				continue
			}
			seen[e] = true
			ps = append(ps, &api.Prefix{IpPrefix: e.prefix.String(), MaskLengthMin: uint32(e.min), MaskLengthMax: uint32(e.max)})
		}
	}
	return ps
}

// compileAnnounce returns the path for an own prefix. With LOCAL_PREF 0, a path of a peer for the
// same prefix wins. The prefix is then still announced, and its traffic goes to that peer.
func compileAnnounce(p netip.Prefix) (*api.Path, error) {
	nlri := &api.IPAddressPrefix{Prefix: p.Addr().String(), PrefixLen: uint32(p.Bits())}
	n, err := anypb.New(nlri)
	if err != nil {
		return nil, fmt.Errorf("encoding %v: %w", p, err)
	}
	f := family(p.Addr())
	attrs := []proto.Message{&api.OriginAttribute{Origin: 0}, &api.LocalPrefAttribute{LocalPref: 0}}
	if p.Addr().Is4() {
		attrs = append(attrs, &api.NextHopAttribute{NextHop: "0.0.0.0"})
	} else {
		attrs = append(attrs, &api.MpReachNLRIAttribute{Family: f, NextHops: []string{"::"}, Nlris: []*anypb.Any{n}})
	}
	out := &api.Path{Family: f, Nlri: n}
	for _, a := range attrs {
		x, err := anypb.New(a)
		if err != nil {
			return nil, fmt.Errorf("encoding attributes of %v: %w", p, err)
		}
		out.Pattrs = append(out.Pattrs, x)
	}
	return out, nil
}
