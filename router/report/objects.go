package report

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/isthmus-net/isthmus/bgp"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/tunnel"
)

const (
	// lostFor is how long an object is not up before that is a condition: a new tunnel or session
	// needs a moment.
	lostFor = 5 * time.Second
	// maxObjects bounds the objects of one kind with conditions among those of the node.
	maxObjects = 20
)

// tunnelConditions returns the conditions of a tunnel's state. lost is since when it is not up.
func tunnelConditions(t *isthmusv1.TunnelStatus, lost, now time.Time) []*isthmusv1.Condition {
	why := t.LastError
	if e := t.Explanation; e != nil {
		why = e.What
		for _, more := range []string{e.Cause, e.Remedy} {
			if more != "" {
				why += "; " + more
			}
		}
	}
	switch {
	case t.State == string(tunnel.Up):
		if t.Explanation != nil {
			return []*isthmusv1.Condition{condition.TunnelDegraded.Warning(t.Explanation.Since.AsTime(), "%s", why)}
		}
	case t.State == string(tunnel.Disabled):
	case t.State == string(tunnel.Suspect):
		return []*isthmusv1.Condition{condition.TunnelSuspect.Error(t.Since.AsTime(), "%s", why)}
	case lost.IsZero() || now.Sub(lost) < lostFor:
	default:
		if why == "" {
			why = "the tunnel is " + t.State
		}
		return []*isthmusv1.Condition{condition.TunnelDown.Error(lost, "%s", why)}
	}
	return nil
}

// peerConditions returns the conditions of a session. lost is since when it is not established, and
// carried whether its tunnel is up.
func peerConditions(c bgp.Peer, s bgp.PeerState, lost, now time.Time, carried bool) (out []*isthmusv1.Condition) {
	if c.Disabled {
		return nil
	}
	if s.HeldBack > 0 {
		out = append(out, condition.PrefixesHeldBack.Warning(s.Since, "%d prefixes are not announced: export.maxPrefixes is %d; put aggregates into `announce`, or raise it to what the peer takes", s.HeldBack, c.Export.MaxPrefixes))
	}
	reset := "`isthmus reset peer " + c.Name + "` opens it at once"
	switch {
	case s.State == bgp.Quarantined:
		return append(out, condition.Quarantined.Error(s.Since, "%s", s.QuarantineReason+"; `isthmus reset peer "+c.Name+"` ends it"))
	case s.State == bgp.PrefixLimit:
		return append(out, condition.PrefixLimit.Error(s.Since, "the peer sent more than %d prefixes (maxPrefixes), and the session is held down until %s; have the peer send fewer, or raise maxPrefixes; %s", c.MaxPrefixes, s.NextTry.UTC().Format(time.RFC3339), reset))
	case s.State == bgp.Established || lost.IsZero() || now.Sub(lost) < lostFor:
		return out
	case s.Restarting:
		return append(out, condition.SessionDown.Warning(lost, "the peer restarts gracefully, and its routes stay until its restart time is over"))
	case !carried:
		return append(out, condition.SessionDown.Warning(lost, "tunnel %s is not up", c.Tunnel))
	}
	return append(out, condition.SessionDown.Error(lost, "%s", sessionWhy(c, s)))
}

// sessionWhy explains why a session whose tunnel is up is not established.
func sessionWhy(c bgp.Peer, s bgp.PeerState) string {
	var why []string
	if s.LastError != "" {
		why = append(why, s.LastError)
	}
	at := fmt.Sprintf("%s port 179", c.Address)
	switch {
	case s.State == bgp.Unknown:
		why = append(why, "the BGP process does not run")
	case c.Passive && (s.State == bgp.Active || s.State == bgp.Idle || s.State == bgp.Connect):
		why = append(why, fmt.Sprintf("this side waits for the peer to connect from %s (passive), and it has not; check the peer, or set `passive: false`", c.Address))
	case s.State == bgp.Active || s.State == bgp.Connect || s.State == bgp.Idle:
		why = append(why, fmt.Sprintf("the session with %s is %s; compare address, ASN (this side %s, the peer %d) and password with those of the peer", at, s.State, "has node.asn", c.ASN))
	default:
		why = append(why, fmt.Sprintf("the session with %s is in state %s", at, s.State))
	}
	return strings.Join(why, "; ")
}

// objectConditions returns the conditions of tunnels, peers and routes, each with its object.
func (r *Report) objectConditions() (out []*isthmusv1.Condition) {
	add := func(object string, all []*isthmusv1.Condition) {
		for _, c := range all {
			if c.Type == condition.NotApplied.Name {
				continue // the node has it for each job
			}
			c = proto.CloneOf(c)
			c.Object = object
			out = append(out, c)
		}
	}
	for _, t := range r.tunnels() {
		add("tunnel "+t.Name, t.Conditions)
	}
	// Without the BGP process, all sessions are unknown, and one condition says so.
	peers := r.peers()
	enabled := slices.DeleteFunc(slices.Clone(peers), func(p *isthmusv1.PeerStatus) bool { return p.State == string(bgp.Disabled) })
	stopped := len(enabled) > 0
	for _, p := range enabled {
		stopped = stopped && p.State == string(bgp.Unknown) && len(p.Conditions) > 0
	}
	if stopped {
		out = append(out, condition.BGPDown.Error(enabled[0].Conditions[0].Since.AsTime(), "the BGP process does not run, and %d sessions are unknown; it is started again after at most a minute: see the log of isthmusd", len(enabled)))
		peers = nil
	}
	for _, p := range peers {
		add("peer "+p.Name, p.Conditions)
	}
	if c := r.outranked(); c != nil {
		out = append(out, c)
	}
	if n := r.FIB.Count().Withheld; n > 0 {
		out = append(out, condition.RoutesWithheld.Warning(time.Time{}, "%d learned routes are not installed, because they would divert addresses that the node needs: `isthmus get routes` shows them", n))
	}
	return out
}

// outranked returns the condition of the routes that lose against others of the machine. Each of
// them has one in "get routes".
func (r *Report) outranked() *isthmusv1.Condition {
	machine := r.Observed.Machine()
	var lose []netip.Prefix
	others := machine.Outranking()
	transit := r.Observed.Target().Underlay.Transit
	for prefix := range others {
		s := fib.RouteState{Key: fib.Main(prefix), Transit: transit && prefix.Bits() == 0}
		if r.FIB.Installed(s.Key) && !transits(s, machine) {
			lose = append(lose, prefix)
		}
	}
	if len(lose) == 0 {
		return nil
	}
	slices.SortFunc(lose, netip.Prefix.Compare)
	first := others[lose[0]]
	return condition.RoutesOutranked.Warning(time.Time{}, "%d routes are not used, because the machine has others with smaller metrics, the first one to %v by interface %s with the metric %d: `isthmus get routes` shows them",
		len(lose), lose[0], first.Interface, first.Metric)
}

// limited bounds conditions for a message: of each type it keeps the first of at most maxObjects
// objects, and the last of these counts the others.
func limited(all []*isthmusv1.Condition) (out []*isthmusv1.Condition) {
	count := map[string]int{}
	last := map[string]int{}
	for _, c := range all {
		if c.Object != "" {
			if count[c.Type]++; count[c.Type] > maxObjects {
				continue
			}
			last[c.Type] = len(out)
		}
		out = append(out, c)
	}
	for kind, n := range count {
		if n > maxObjects {
			c := proto.CloneOf(out[last[kind]])
			c.Message += fmt.Sprintf("; and %d more have the condition %s", n-maxObjects, kind)
			out[last[kind]] = c
		}
	}
	return out
}
