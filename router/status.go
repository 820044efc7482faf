package router

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress/translog"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/store"
	"github.com/isthmus-net/isthmus/tunnel"
)

// stamp leaves the zero time unset.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// texts turns values into their text forms.
func texts[T fmt.Stringer](list []T) []string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = v.String()
	}
	return out
}

// trouble returns a condition for the object of the scheduler, if its last attempt failed.
func (r *Router) trouble() map[string]*isthmusv1.Condition {
	out := map[string]*isthmusv1.Condition{}
	for _, o := range r.work.failed() {
		out[o.key] = &isthmusv1.Condition{
			Type: "NotApplied", Severity: "error", Since: stamp(o.since),
			Message: fmt.Sprintf("%s: %v; trying again at %s", o.key, o.err, o.due.UTC().Format(time.TimeOnly)),
		}
	}
	return out
}

// tunnels returns the wanted tunnels as they were last seen, by name.
func (r *Router) tunnels() []*isthmusv1.TunnelStatus {
	trouble := r.trouble()
	r.state.mu.Lock()
	defer r.state.mu.Unlock()
	out := make([]*isthmusv1.TunnelStatus, 0, len(r.state.target.Tunnels))
	for _, c := range r.state.target.Tunnels {
		s, seen := r.state.seen[c.Name]
		if !seen {
			s.Status = tunnel.Unknown
		}
		t := tunnelStatus(c, s)
		if i, ok := r.state.places[c.Name]; ok {
			explained(t, r.state.spec, r.state.doc, i, s)
		}
		if cond := trouble["tunnel/"+c.Name]; cond != nil {
			t.Conditions = append(t.Conditions, cond)
		}
		out = append(out, t)
	}
	return out
}

func tunnelStatus(c tunnel.Config, s tunnel.State) *isthmusv1.TunnelStatus {
	t := &isthmusv1.TunnelStatus{
		Name: c.Name, Id: c.ID, Kind: string(c.Kind()), Interface: c.Interface, Mtu: uint32(c.MTU),
		State: string(s.Status), Since: stamp(s.Since),
		RxBytes: s.RxBytes, TxBytes: s.TxBytes, RxPackets: s.RxPackets, TxPackets: s.TxPackets,
		LastError: s.LastError, NextTry: stamp(s.NextTry), Algorithms: s.Algorithms,
		Established: stamp(s.Established), Keyed: stamp(s.Keyed), TimesUp: s.TimesUp, NatTraversal: s.NATTraversal,
		Heard: stamp(s.Heard), Listening: stamp(s.Listening),
	}
	switch {
	case s.Remote.IsValid() && s.Remote.Port() != 0:
		t.RemoteAddress = s.Remote.String()
	case c.Outside().Port() != 0:
		t.RemoteAddress = c.Outside().String()
	case c.Outside().Addr().IsValid():
		t.RemoteAddress = c.Outside().Addr().String()
	}
	for _, in := range c.Inside {
		t.Inside = append(t.Inside, &isthmusv1.Inside{Local: in.Local.String(), Remote: in.Remote.String()})
	}
	return t
}

// peers returns the wanted BGP sessions as they were last seen, by name.
func (r *Router) peers() []*isthmusv1.PeerStatus {
	seen := map[string]bgp.PeerState{}
	for _, p := range r.BGP.Peers() {
		seen[p.Name] = p
	}
	r.state.mu.Lock()
	defer r.state.mu.Unlock()
	out := make([]*isthmusv1.PeerStatus, 0, len(r.state.target.BGP.Peers))
	for _, c := range r.state.target.BGP.Peers {
		s, ok := seen[c.Name]
		if !ok {
			s.State = bgp.Unknown
		}
		out = append(out, peerStatus(c, s))
	}
	return out
}

func peerStatus(c bgp.Peer, s bgp.PeerState) *isthmusv1.PeerStatus {
	p := &isthmusv1.PeerStatus{
		Name: c.Name, Tunnel: c.Tunnel, Address: c.Address.String(), LocalAddress: c.LocalAddress.String(), Asn: c.ASN,
		State: string(s.State), Since: stamp(s.Since),
		PrefixesReceived: s.Received, PrefixesAccepted: s.Accepted, PrefixesAnnounced: s.Announced, PrefixesHeldBack: s.HeldBack,
		MessagesReceived: s.MessagesIn, MessagesSent: s.MessagesOut,
		LastError: s.LastError, TimesUp: s.TimesUp, GracefulRestart: s.GracefulRestart, NextTry: stamp(s.NextTry),
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
	if s.HeldBack > 0 {
		p.Conditions = append(p.Conditions, &isthmusv1.Condition{
			Type: "PrefixesHeldBack", Severity: "warning", Since: stamp(s.Since),
			Message: fmt.Sprintf("%d prefixes are not announced: export.maxPrefixes is %d; put aggregates into `announce`, or raise it to what the peer takes", s.HeldBack, c.Export.MaxPrefixes),
		})
	}
	if s.State == bgp.Quarantined {
		p.Conditions = append(p.Conditions, &isthmusv1.Condition{
			Type: "Quarantined", Severity: "error", Since: stamp(s.Since),
			Message: s.QuarantineReason + "; `isthmus reset peer " + c.Name + "` ends it",
		})
	}
	return p
}

// routes returns the routes that isthmus owns, by prefix.
func (r *Router) routes() []*isthmusv1.Route {
	states := r.FIB.Routes()
	slices.SortFunc(states, func(a, b fib.RouteState) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()))
	})
	r.state.mu.Lock()
	defer r.state.mu.Unlock()
	names := map[string]string{} // tunnels by interface
	for _, c := range r.state.target.Tunnels {
		names[c.Interface] = c.Name
	}
	out := make([]*isthmusv1.Route, 0, len(states))
	for _, s := range states {
		route := &isthmusv1.Route{Prefix: s.Prefix.String(), Source: sourceName(s.Source), Installed: s.Installed, Blackhole: s.Blackhole}
		from := map[fib.NextHop]bgp.Path{}
		if s.Source == fib.BGP {
			l := r.state.paths[s.Prefix]
			route.Since = stamp(l.at)
			for i, p := range l.paths {
				if i == 0 {
					route.AsPath = asPath(p.ASPath)
				}
				from[nextHop(r.state.peers[p.Peer], s.Prefix)] = p
			}
		}
		for _, h := range s.NextHops {
			hop := &isthmusv1.NextHop{Tunnel: names[h.Interface], Interface: h.Interface, Dead: !slices.Contains(s.Alive, h)}
			if p, ok := from[h]; ok {
				hop.Peer = p.Peer
				if p.NextHop.IsValid() {
					hop.Gateway = p.NextHop.String()
				}
			}
			route.NextHops = append(route.NextHops, hop)
		}
		if s.Takes != nil {
			route.Conditions = append(route.Conditions, &isthmusv1.Condition{
				Type: "Withheld", Severity: "warning", Message: fmt.Sprintf("the prefix takes %s, %s", shown(s.Takes.Prefix), s.Takes.Why),
			})
		}
		out = append(out, route)
	}
	return out
}

// shown returns a prefix, a single address without its length.
func shown(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// formerly names the generation that a document goes back to.
func formerly(generation uint64) string {
	if generation == 0 {
		return "no document"
	}
	return fmt.Sprint(generation)
}

func sourceName(s fib.Source) string {
	switch s {
	case fib.Static:
		return "static"
	case fib.BGP:
		return "bgp"
	}
	return "former run"
}

func asPath(path []uint32) string {
	words := make([]string, len(path))
	for i, n := range path {
		words[i] = fmt.Sprint(n)
	}
	return strings.Join(words, " ")
}

// readCounters reads the counters of NAT back unless that was done a moment ago.
func (r *Router) readCounters() nat.State {
	r.counters.Lock()
	defer r.counters.Unlock()
	if time.Since(r.counters.at) < countersAge {
		return r.counters.state
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	state, err := r.NAT.Observe(ctx)
	if err != nil {
		r.Log.Warn("reading NAT back failed; its last state is shown", "err", err)
		r.counters.state.Present = false
		return r.counters.state
	}
	r.counters.state, r.counters.at = state, time.Now()
	return state
}

// policies returns the egress policies with their counters, by name, and what was dropped.
func (r *Router) policies() ([]*isthmusv1.PolicyStatus, map[nat.Reason]nat.Counter) {
	state := r.readCounters()
	r.state.mu.Lock()
	config := r.state.target.NAT
	r.state.mu.Unlock()
	seen := map[string]nat.PolicyState{}
	for _, s := range state.Policies {
		seen[s.Name] = s
	}
	sick := r.sickProxies()
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
	return out, state.Drops
}

func publicAddresses(p nat.Pool) []netip.Addr {
	out := make([]netip.Addr, len(p.Addresses))
	for i, a := range p.Addresses {
		out[i] = a.Public
	}
	return out
}

// Room in bytes for documents, secrets and the audit log: so little that somebody should make some, and too little for a large document.
const (
	tight = 16 << 20
	full  = 2 << 20
)

func (r *Router) roomConditions() []*isthmusv1.Condition {
	c := &isthmusv1.Condition{Type: "StateNotWritable", Severity: "error", Since: stamp(r.started)}
	bytes, readOnly, err := r.Store.Room()
	switch {
	case err != nil:
		c.Message = err.Error()
	case readOnly:
		c.Message = "the file system of the state directory is read-only: what runs goes on, changes are refused"
	case bytes < tight:
		c.Type, c.Severity = "StateFull", "warning"
		if bytes < full {
			c.Severity = "error"
		}
		c.Message = fmt.Sprintf("%d KiB are left on the file system of the state directory: without room changes are refused", bytes>>10)
	default:
		return nil
	}
	return []*isthmusv1.Condition{c}
}

// status tells about the node as a whole.
func (r *Router) status() *isthmusv1.SystemStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &isthmusv1.SystemStatus{
		Node: r.target.Node.Name, Version: r.Version, Started: stamp(r.started),
		Generation: r.present.Generation, AppliedGeneration: r.applied, ConfirmUntil: stamp(r.present.ConfirmBy),
		Capabilities: r.Host.Capabilities(),
	}
	c := r.Counters()
	s.Counters = &isthmusv1.Counters{
		ViciWrites: c.Vici, NetlinkWrites: c.Netlink, NftablesTransactions: c.NFTables, WireguardWrites: c.WireGuard,
		BgpWrites: c.BGP, BgpStarts: c.BGPStarts,
	}
	if r.invalid != nil {
		s.Conditions = append(s.Conditions, &isthmusv1.Condition{
			Type: "DocumentUnusable", Severity: "error", Since: stamp(r.started),
			Message: r.invalid.Error() + "; what runs is left as it is: mend the cause and apply a document",
		})
	}
	s.Conditions = append(s.Conditions, r.startConditions()...)
	s.Conditions = append(s.Conditions, r.secretConditions()...)
	if r.Platform != nil {
		s.Platform = r.Platform()
	}
	if r.Notices != nil {
		s.Conditions = append(s.Conditions, r.Notices()...)
	}
	if newest := r.Store.Newest(); newest > r.present.Generation {
		c := &isthmusv1.Condition{
			Type: "DocumentDamaged", Severity: "error", Since: stamp(r.started),
			Message: fmt.Sprintf("generation %d cannot be read, and the node has generation %d instead: apply the document again", newest, r.present.Generation),
		}
		if _, err := r.Store.Revision(newest); errors.Is(err, store.ErrNewer) {
			c.Type = "DocumentNewer"
			c.Message = fmt.Sprintf("generation %d was %v; the node has generation %d instead", newest, store.ErrNewer, r.present.Generation)
		}
		s.Conditions = append(s.Conditions, c)
	}
	s.Conditions = append(s.Conditions, r.roomConditions()...)
	for _, err := range r.Store.Damage() {
		kind := "StoreDamaged"
		if errors.Is(err, store.ErrNewer) {
			kind = "StoreNewer"
		}
		s.Conditions = append(s.Conditions, &isthmusv1.Condition{
			Type: kind, Severity: "warning", Since: stamp(r.started), Message: err.Error(),
		})
	}
	if !r.present.ConfirmBy.IsZero() {
		c := &isthmusv1.Condition{
			Type: "NotConfirmed", Severity: "warning", Since: stamp(r.present.Time),
			Message: fmt.Sprintf("generation %d goes back to %s at %s unless `isthmus confirm %[1]d` is called", r.present.Generation, formerly(r.present.RevertTo), r.present.ConfirmBy.UTC().Format(time.RFC3339)),
		}
		if r.stuck != nil {
			c.Severity, c.Message = "error", fmt.Sprintf("generation %d was not confirmed, and going back to %s fails: %v", r.present.Generation, formerly(r.present.RevertTo), r.stuck)
		}
		if r.unstored != nil {
			c.Message = fmt.Sprintf("generation %d was not confirmed, and %s is carried out again, but cannot be stored: %v", r.present.Generation, formerly(r.present.RevertTo), r.stuck)
		}
		s.Conditions = append(s.Conditions, c)
	}
	s.Conditions = append(s.Conditions, r.charon.conditions()...)
	s.Conditions = append(s.Conditions, r.guardConditions()...)
	s.Conditions = append(s.Conditions, r.wayConditions()...)
	s.Conditions = append(s.Conditions, r.takeoverConditions()...)
	s.Conditions = append(s.Conditions, r.poolConditions()...)
	s.Conditions = append(s.Conditions, r.proxyConditions()...)
	s.Conditions = append(s.Conditions, r.nameConditions()...)
	s.Conditions = append(s.Conditions, r.portConditions()...)
	if r.target.Log.Enabled {
		log := translog.Status{Problems: []string{"it could not be opened when the daemon started"}}
		if r.Translations != nil {
			log = r.Translations.Status()
		}
		s.Conditions = append(s.Conditions, logConditions(log)...)
	}
	for _, o := range r.work.failed() {
		s.Conditions = append(s.Conditions, &isthmusv1.Condition{
			Type: "NotApplied", Severity: "error", Since: stamp(o.since), Message: fmt.Sprintf("%s: %v", o.key, o.err),
		})
	}
	return s
}
