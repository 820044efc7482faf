package report

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/echo"
	"github.com/isthmus-net/isthmus/router/fault"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Ping implements api.Router.
func (r *Report) Ping(ctx context.Context, q *isthmusv1.PingRequest, reply func(*isthmusv1.PingReply) error) error {
	to, err := netip.ParseAddr(q.GetAddress())
	if err != nil {
		return fmt.Errorf("%w: address: %w", api.ErrInvalid, err)
	}
	e := echo.Request{To: to, Count: int(q.GetCount()), Interval: q.GetInterval().AsDuration(), Size: int(q.GetSize()), DontFragment: q.GetDontFragment()}
	for _, a := range r.Observed.Machine().Addresses {
		if isBroadcast(a.Prefix, to) {
			return fmt.Errorf("%w: address: %v is the broadcast address of %v at interface %s; give the address of one host", api.ErrInvalid, to, a.Prefix.Masked(), a.Interface)
		}
	}
	if name := q.GetTunnel(); name != "" {
		if e.Interface, e.From, err = r.tunnelTo(name, to); err != nil {
			return err
		}
	}
	err = r.Options.Ping(ctx, e, func(result echo.Result) error {
		m := &isthmusv1.PingReply{Sequence: uint32(result.Sequence)}
		if result.From.IsValid() {
			m.Address = result.From.String()
		}
		if result.Err != nil {
			m.Error = result.Err.Error()
		} else {
			m.RoundTrip = durationpb.New(result.RoundTrip)
		}
		return reply(m)
	})
	if errors.Is(err, echo.ErrNoInterface) {
		return fmt.Errorf("tunnel %s: %w: the machine does not have its interface %s yet; see isthmus describe tunnel %s", q.GetTunnel(), fault.ErrPrecondition, e.Interface, q.GetTunnel())
	}
	return err
}

// isBroadcast reports whether an address is the broadcast address of a network (RFC 922). Networks
// of one or two addresses have none (RFC 3021).
func isBroadcast(network netip.Prefix, a netip.Addr) bool {
	return a.Is4() && network.Addr().Is4() && network.Bits() < 31 && network.Contains(a) && !network.Contains(a.Next())
}

// enabled returns a tunnel that the document does not disable.
func (r *Report) enabled(name string) (c tunnel.Config, err error) {
	t := r.Observed.Target()
	i, ok := t.Tunnel(name)
	if !ok {
		return c, fmt.Errorf("tunnel %q: %w", name, fault.ErrNoTunnel)
	}
	if c = t.Tunnels[i]; c.Disabled {
		return c, fmt.Errorf("tunnel %s: %w: it is disabled in the document; enable it", name, fault.ErrPrecondition)
	}
	return c, nil
}

// tunnelTo returns the interface of a tunnel, and its inside address of the family of to.
func (r *Report) tunnelTo(name string, to netip.Addr) (iface string, from netip.Addr, err error) {
	c, err := r.enabled(name)
	if err != nil {
		return "", from, err
	}
	for _, in := range c.Inside {
		if in.Local.Addr().Is4() == to.Is4() {
			from = in.Local.Addr()
			break
		}
	}
	if !from.IsValid() {
		family := "IPv4"
		if to.Is6() {
			family = "IPv6"
		}
		return "", from, fmt.Errorf("%w: tunnel %s: it has no inside address of %s, the family of %v; add one to the tunnel's inside, or ping without the tunnel", api.ErrInvalid, name, family, to)
	}
	return c.Interface, from, nil
}
