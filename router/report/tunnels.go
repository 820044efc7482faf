package report

import (
	"encoding/base64"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/observe"
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

// trouble returns a condition for each job that failed, by its key.
func (r *Report) trouble() map[string]*isthmusv1.Condition {
	out := map[string]*isthmusv1.Condition{}
	for _, f := range r.Applied.Failures() {
		out[f.Key] = condition.NotApplied.Error(f.Since, "%s: %v; trying again at %s", f.Key, f.Err, f.Next.UTC().Format(time.TimeOnly))
	}
	return out
}

// tunnels returns the wanted tunnels with their last known state, by name.
func (r *Report) tunnels() (out []*isthmusv1.TunnelStatus) {
	trouble, now := r.trouble(), time.Now()
	r.Observed.Read(func(seen *observe.State) {
		doc := document.Explanation(seen.Spec)
		places := make(map[string]int, len(doc.Tunnels))
		for i, t := range doc.Tunnels {
			places[t.Name] = i
		}
		out = make([]*isthmusv1.TunnelStatus, 0, len(seen.Target.Tunnels))
		for _, c := range seen.Target.Tunnels {
			s, known := seen.Tunnels[c.Name]
			if !known {
				s.Status = tunnel.Unknown
			}
			t := tunnelStatus(c, s)
			if i, ok := places[c.Name]; ok && !c.Disabled {
				doc.Tunnels[i].Config = c // with allocated inside addresses
				explained(t, seen.Spec, doc, i, s)
			}
			t.Conditions = tunnelConditions(t, seen.LostTunnels[c.Name], now)
			if cond := trouble["tunnel/"+c.Name]; cond != nil {
				t.Conditions = append(t.Conditions, cond)
			}
			out = append(out, t)
		}
	})
	return out
}

// isDisabled is the reason why an object that the document disables is not up.
const isDisabled = "disabled in the document"

func tunnelStatus(c tunnel.Config, s tunnel.State) *isthmusv1.TunnelStatus {
	t := &isthmusv1.TunnelStatus{
		Name: c.Name, Id: c.ID, Kind: string(c.Kind()), Interface: c.Interface, Mtu: uint32(c.MTU),
		State: string(s.Status), Since: stamp(s.Since),
		RxBytes: s.RxBytes, TxBytes: s.TxBytes, RxPackets: s.RxPackets, TxPackets: s.TxPackets,
		LastError: s.LastError, NextTry: stamp(s.NextTry), Algorithms: s.Algorithms,
		Established: stamp(s.Established), Keyed: stamp(s.Keyed), TimesUp: s.TimesUp, NatTraversal: s.NATTraversal,
		Heard: stamp(s.Heard), Listening: stamp(s.Listening), DataReceived: stamp(s.Data), Probe: s.Answers,
	}
	if c.Disabled {
		t.LastError = isDisabled
	}
	if t.LastError != "" {
		t.LastErrorSince = stamp(s.Failure.Since)
		if s.Failure.Since.IsZero() {
			t.LastErrorSince = stamp(s.Since)
		}
	}
	if d := s.Device; c.WireGuard != nil && d != (tunnel.Device{}) {
		t.Wireguard = &isthmusv1.WireGuardStatus{
			PublicKey: base64.StdEncoding.EncodeToString(d.PublicKey[:]), PeerPublicKey: base64.StdEncoding.EncodeToString(d.PeerPublicKey[:]),
			PresharedKey: d.Preshared, ListenPort: uint32(d.Port), Device: "kernel", LastHandshake: stamp(s.Keyed),
		}
		if d.Embedded {
			t.Wireguard.Device = "embedded"
		}
		if d.Keepalive > 0 {
			t.Wireguard.Keepalive = durationpb.New(d.Keepalive)
		}
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
