package report

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/live"
	"github.com/isthmus-net/isthmus/router/observe"
)

// endsAtOnce bounds the flows that one read of the table ends.
const endsAtOnce = 20_000

// EndFlows implements api.Router. Flows that begin during the call may stay. It reads the table
// again for each endsAtOnce flows, so that memory does not grow with their number.
func (r *Report) EndFlows(ctx context.Context, q *isthmusv1.EndFlowsRequest) (*isthmusv1.EndFlowsResponse, error) {
	source, err := prefixOf("source", q.Source)
	if err != nil {
		return nil, err
	}
	var destination netip.Prefix
	if q.Destination != "" {
		if destination, err = prefixOf("destination", q.Destination); err != nil {
			return nil, err
		}
		if destination.Addr().Is6() != source.Addr().Is6() {
			return nil, fmt.Errorf("%w: destination: %q is of another family than the source", api.ErrInvalid, q.Destination)
		}
	}
	protocol, ok := nat.PolicyProtocol(q.Protocol, source.Addr().Is6())
	if !ok {
		return nil, fmt.Errorf(`%w: protocol: %q is none of "tcp", "udp" and "icmp"`, api.ErrInvalid, q.Protocol)
	}
	if q.Port > 65535 || q.Port > 0 && protocol != unix.IPPROTO_TCP && protocol != unix.IPPROTO_UDP {
		return nil, fmt.Errorf("%w: port: %d is not from 1 to 65535, or the protocol is neither tcp nor udp", api.ErrInvalid, q.Port)
	}
	if r.Flows == nil {
		return nil, fmt.Errorf("%w: %v", api.ErrPrecondition, observe.ErrUncounted)
	}
	t := r.Observed.Target()
	own := live.Of(&t, r.Observed.Facts()).NAT.Own
	family := uint8(unix.AF_INET)
	if source.Addr().Is6() {
		family = unix.AF_INET6
	}
	out := &isthmusv1.EndFlowsResponse{}
	for {
		left := endsAtOnce
		n, err := r.Flows.End(ctx, family, func(f *conntrack.Flow) bool {
			if left == 0 || f.Status&conntrack.Dying != 0 || protocol != 0 && f.Protocol != protocol {
				return false
			}
			t := f.Track()
			there := func(a netip.Addr) bool { return destination.Contains(a) }
			if !source.Contains(t.Source) || destination.IsValid() && !there(t.Destination) && !there(t.GoesTo) ||
				q.Port > 0 && t.Port != uint16(q.Port) && t.ServerPort != uint16(q.Port) ||
				slices.Contains(own, t.Source) || slices.Contains(own, t.GoesTo) {
				return false
			}
			left--
			return true
		})
		out.Flows += uint64(n)
		if err != nil {
			return nil, fmt.Errorf("%d flows ended, then: %w", out.Flows, err)
		}
		if left > 0 {
			return out, nil
		}
	}
}

// prefixOf parses an address or a prefix.
func prefixOf(field, s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p != p.Masked() {
		return p, fmt.Errorf("%w: %s: %q is neither an address nor a prefix, as 10.1.0.7 or 10.1.0.0/24", api.ErrInvalid, field, s)
	}
	return p, nil
}
