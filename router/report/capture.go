package report

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/fault"
	"github.com/isthmus-net/isthmus/router/packets"
	"github.com/isthmus-net/isthmus/router/plan"
)

// Capture implements api.Router.
func (r *Report) Capture(ctx context.Context, q *isthmusv1.CaptureRequest, reply func(*isthmusv1.CaptureReply) error) error {
	iface, of, err := r.capturable(q)
	if err != nil {
		return err
	}
	filter, err := captureFilter(q)
	if err != nil {
		return err
	}
	begun := false
	missing := 0
	end, err := r.Options.Capture(ctx, packets.Request{
		Interface: iface, Filter: filter, Count: int(q.GetCount()), Duration: q.GetDuration().AsDuration(), Size: int(q.GetSize()),
	}, func(all []packets.Packet, lost int) error {
		m := &isthmusv1.CaptureReply{Missing: uint64(lost)}
		if missing = lost; !begun {
			begun, m.Interface = true, iface
		}
		for _, p := range all {
			m.Packets = append(m.Packets, &isthmusv1.CapturedPacket{Time: timestamppb.New(p.Time), Leaving: p.Leaving, Length: uint32(p.Length), Data: p.Data})
		}
		return reply(m)
	})
	switch {
	case errors.Is(err, packets.ErrNoInterface):
		return fmt.Errorf("%s: %w: the machine does not have its interface %s; see isthmus status", of, fault.ErrPrecondition, iface)
	case errors.Is(err, packets.ErrDown):
		return fmt.Errorf("%s: %w: %w; see isthmus status", of, fault.ErrPrecondition, err)
	case err != nil:
		return err
	}
	return reply(&isthmusv1.CaptureReply{Missing: uint64(missing), End: string(end)})
}

// capturable returns the interface of a capture, and words for it.
func (r *Report) capturable(q *isthmusv1.CaptureRequest) (iface, of string, err error) {
	t := r.Observed.Target()
	switch at := q.GetAt().(type) {
	case *isthmusv1.CaptureRequest_Tunnel:
		c, err := r.enabled(at.Tunnel)
		return c.Interface, "tunnel " + at.Tunnel, err
	case *isthmusv1.CaptureRequest_Attachment:
		i := slices.IndexFunc(t.Attachments, func(a plan.Attachment) bool { return a.Name == at.Attachment })
		if i < 0 {
			return "", "", fmt.Errorf("attachment %q: %w", at.Attachment, fault.ErrNotFound)
		}
		return t.Attachments[i].Interface, "attachment " + at.Attachment, nil
	}
	if t.Underlay.Interface == "" {
		return "", "", fmt.Errorf("underlay: %w: the node does not have a document with an underlay yet", fault.ErrPrecondition)
	}
	return t.Underlay.Interface, "underlay", nil
}

// captureFilter returns the filter of a request.
func captureFilter(q *isthmusv1.CaptureRequest) (f packets.Filter, err error) {
	if q.GetHost() != "" {
		if f.Host, err = netip.ParseAddr(q.GetHost()); err != nil {
			return f, fmt.Errorf("%w: host: %w", api.ErrInvalid, err)
		}
	}
	if name := q.GetProtocol(); name != "" {
		var known bool
		if f.Protocols, known = nat.Protocols(name); !known {
			return f, fmt.Errorf(`%w: protocol: %q is not a protocol; give "tcp", "udp", "icmp", "esp" or a number from 0 to 255`, api.ErrInvalid, name)
		}
	}
	f.Port = uint16(q.GetPort())
	if f.Port != 0 && f.Protocols != nil && !slices.Contains(f.Protocols, nat.TCP) && !slices.Contains(f.Protocols, nat.UDP) {
		return f, fmt.Errorf("%w: port %d: protocol %q does not have ports that can be selected; leave one of them out, or give tcp or udp", api.ErrInvalid, f.Port, q.GetProtocol())
	}
	return f, nil
}
