package capability

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/translog"
	"github.com/isthmus-net/isthmus/router/fault"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// Translations is the log of translations; see router/egress/translog.
type Translations interface {
	// Who returns the flows that match a query; the error reports what may be missing.
	Who(context.Context, translog.Query) ([]translog.Record, error)
	// Status returns the state of the log.
	Status() translog.Status
	// Limit sets the bounds of the log, and Use the rules under which flows begin from now on.
	Limit(egress.Log)
	Use(nat.Config)
	// Run records until ctx is done.
	Run(context.Context) error
}

// Translog records which source used which public address toward which destination.
type Translog struct {
	Log       Translations // nil: it could not be opened
	Documents interface {
		Status() document.Status
		Document(generation uint64) (uint64, *isthmusv1.Spec, string, error)
	}
	History func() []store.Revision // newest first
}

// Capability describes Translog.
func (l Translog) Capability() Capability {
	c := Capability{
		Name: "log of translations", Section: "egress.log", Conditions: l.conditions,
		Kinds: []*condition.Kind{condition.TranslationLogDamaged, condition.TranslationLogIncomplete},
	}
	if l.Log == nil {
		return c
	}
	c.Run, c.Rules = l.Log.Run, l.Log.Use
	c.Jobs = []apply.Job{{
		Key: "translation log", Stage: apply.StageGuard, Part: func(t *plan.Target) any { return t.Log },
		Do: func(_ context.Context, t *plan.Target) error { l.Log.Limit(t.Log); return nil },
	}}
	return c
}

func (l Translog) conditions() []*isthmusv1.Condition {
	switch {
	case !l.Documents.Status().Target.Log.Enabled:
		return nil
	case l.Log == nil:
		return logConditions(translog.Status{Problems: []string{"it could not be opened when the daemon started"}})
	}
	return logConditions(l.Log.Status())
}

// mostFlows bounds the flows of an answer.
const mostFlows = 1000

// Who returns the flows that had a public address and port at a time.
func (l Translog) Who(ctx context.Context, q *isthmusv1.WhoRequest) (*isthmusv1.WhoResponse, error) {
	now := time.Now()
	public, err := netip.ParseAddr(q.Address)
	if err != nil || public.Zone() != "" {
		return nil, fmt.Errorf("%w: address: %q is not an address", fault.ErrInvalid, q.Address)
	}
	if q.Port > 65535 {
		return nil, fmt.Errorf("%w: port: %d is not from 0 to 65535", fault.ErrInvalid, q.Port)
	}
	at, within := now, time.Second
	if q.At != nil {
		if at = q.At.AsTime(); !q.At.IsValid() || at.After(now.Add(time.Minute)) {
			return nil, fmt.Errorf("%w: at: %v lies in the future", fault.ErrInvalid, at)
		}
	}
	if q.Within != nil {
		if within = q.Within.AsDuration(); !q.Within.IsValid() || within < 0 || within > time.Hour {
			return nil, fmt.Errorf("%w: within: must be 0s to 1h", fault.ErrInvalid)
		}
	}
	protocol, ok := nat.PolicyProtocol(q.Protocol, public.Is6())
	if !ok {
		return nil, fmt.Errorf(`%w: protocol: %q is none of "tcp", "udp" and "icmp"`, fault.ErrInvalid, q.Protocol)
	}
	var destination netip.Addr
	if q.Destination != "" {
		if destination, err = netip.ParseAddr(q.Destination); err != nil {
			return nil, fmt.Errorf("%w: destination: %q is not an address", fault.ErrInvalid, q.Destination)
		}
	}

	if q.AnyPort && (q.Port != 0 || !destination.IsValid()) {
		return nil, fmt.Errorf("%w: any_port: give the destination, and no port", fault.ErrInvalid)
	}

	answer := &isthmusv1.WhoResponse{}
	pools, err := l.poolsAt(at)
	if err != nil {
		answer.Gaps = append(answer.Gaps, "the pools at that time are unknown, the present ones are used: "+err.Error())
	}
	outside, pooled := netip.AddrPortFrom(public, uint16(q.Port)), err != nil
	for _, p := range pools {
		for _, a := range p.Addresses {
			if a.Public != public && a.Address != public {
				continue
			}
			outside, pooled = netip.AddrPortFrom(a.Address, outside.Port()), true
			if p.Blocks != nil && !q.AnyPort {
				if source, ok := p.Owner(a.Address, outside.Port()); ok {
					answer.BlockSource = source.String()
				}
			}
		}
	}
	if l.Log == nil {
		if err := unpooled(pooled, public, at); err != nil {
			return nil, err
		}
		return answer, nil
	}
	found, err := l.Log.Who(ctx, translog.Query{Outside: outside, From: at.Add(-within), To: at.Add(within), Protocol: protocol, Destination: destination, AnyPort: q.AnyPort, Limit: mostFlows + 1})
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		answer.Gaps = append(answer.Gaps, err.Error())
	} else if len(found) == 0 {
		if err := unpooled(pooled, public, at); err != nil {
			return nil, err
		}
	}
	if !l.Documents.Status().Target.Log.Enabled {
		answer.Gaps = append(answer.Gaps, "no log of translations is kept (egress.log): flows that ended may be missing")
	}
	answer.Gaps = append(answer.Gaps, l.Log.Status().Problems...)
	for _, f := range found {
		if len(answer.Flows) == mostFlows {
			answer.Truncated = true
			break
		}
		answer.Flows = append(answer.Flows, translatedFlow(f))
	}
	return answer, nil
}

// unpooled is the error for an address that no pool had.
func unpooled(pooled bool, a netip.Addr, at time.Time) error {
	if pooled {
		return nil
	}
	return fmt.Errorf("%w: no pool had the address %v at %s", fault.ErrNotFound, a, at.UTC().Format(time.RFC3339))
}

func translatedFlow(f translog.Record) *isthmusv1.TranslatedFlow {
	name := nat.ProtocolName(f.Protocol)
	if f.Protocol == nat.ICMPv6 {
		name = "icmp"
	}
	end := netip.AddrPort.String
	if nat.Portless(f.Protocol) {
		end = func(a netip.AddrPort) string { return a.Addr().String() }
	}
	return &isthmusv1.TranslatedFlow{
		Start: stamp(f.Start), End: stamp(f.End), Vanished: f.Vanished, Protocol: name, Policy: f.Policy,
		Inside: end(f.Inside), Outside: end(f.Outside), Destination: end(f.Destination),
		PacketsSent: f.Sent.Packets, BytesSent: f.Sent.Bytes, PacketsReceived: f.Received.Packets, BytesReceived: f.Received.Bytes,
	}
}

// poolsAt returns the pools of the document in force at a time; with an error, the present pools.
func (l Translog) poolsAt(at time.Time) ([]nat.Pool, error) {
	status := l.Documents.Status()
	present, now := status.Present, status.Target.NAT.Pools
	history := l.History() // newest first
	i := slices.IndexFunc(history, func(h store.Revision) bool { return !h.Time.After(at) })
	if i >= 0 && history[i].Generation == present.Generation {
		return now, nil
	}
	if i < 0 {
		if len(history) > 0 && history[len(history)-1].Generation == 1 {
			return nil, nil // before the first document
		}
		return now, fmt.Errorf("the document of %s is not kept", at.UTC().Format(time.RFC3339))
	}
	_, _, text, err := l.Documents.Document(history[i].Generation)
	if err != nil {
		return now, err
	}
	d, problems := spec.Decode([]byte(text))
	// Secrets may have been deleted since, and do not affect pools.
	s, more := spec.Check(d, func(string) (secret.Ref, bool) { return secret.Ref{}, true })
	if problems = append(problems, more...); len(problems) > 0 {
		return now, problems
	}
	return s.Pools, nil
}

// logConditions reports what the log of translations lacks, or will lack.
func logConditions(s translog.Status) (out []*isthmusv1.Condition) {
	if len(s.Problems) > 0 {
		out = append(out, condition.TranslationLogDamaged.Error(time.Time{}, "%s", "the log of translations is damaged or not written: "+strings.Join(s.Problems, "; ")))
	}
	if s.Lost > 0 {
		out = append(out, condition.TranslationLogIncomplete.Warning(time.Time{}, "%d records were lost since the start, because the disk was too slow", s.Lost))
	}
	if s.Damaged > 0 {
		out = append(out, condition.TranslationLogIncomplete.Warning(time.Time{}, "%d ends of flows could not be read since the start", s.Damaged))
	}
	return out
}
