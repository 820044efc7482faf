package api

import (
	"cmp"
	"context"
	"net/netip"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/reason"
)

// Bounds of a ping. The smallest data is a token by which answers are matched, and the largest fits
// an Ethernet jumbo frame of 9,000 bytes with IPv4.
const (
	maxPings        = 4 // at the same time
	maxPingCount    = 100
	minPingInterval = 200 * time.Millisecond
	maxPingInterval = 10 * time.Second
	minPingSize     = 8
	maxPingSize     = 8972
)

// checkPing returns a request with the defaults in place of missing values. The error is a status.
func checkPing(r *isthmusv1.PingRequest) (*isthmusv1.PingRequest, error) {
	a, err := netip.ParseAddr(r.Address)
	switch {
	case err != nil:
		return nil, reason.RequestInvalid.Errorf("address: %q is not a valid address; give one as 10.1.2.3 or fd00::1", r.Address)
	case a.Zone() != "":
		return nil, reason.RequestInvalid.Errorf("address: %q has a zone; leave it out, and give the tunnel", r.Address)
	case a.Is4In6():
		return nil, reason.RequestInvalid.Errorf("address: %q is an IPv4 address in IPv6 form; give %v", r.Address, a.Unmap())
	case !unicast(a):
		return nil, reason.RequestInvalid.Errorf("address: %q is not a unicast address; give the address of one host", r.Address)
	case a.Is6() && a.IsLinkLocalUnicast() && r.Tunnel == "":
		return nil, reason.RequestInvalid.Errorf("address: %q is link-local; give the tunnel that it is in", r.Address)
	}
	q := proto.CloneOf(r)
	q.Address, q.Count, q.Size = a.String(), cmp.Or(r.Count, 5), cmp.Or(r.Size, 56)
	if q.Interval == nil {
		q.Interval = durationpb.New(time.Second)
	}
	interval := q.Interval.AsDuration()
	switch {
	case q.Count > maxPingCount:
		return nil, reason.RequestInvalid.Errorf("count %d: must be 1 to %d", q.Count, maxPingCount)
	case !q.Interval.IsValid() || interval < minPingInterval || interval > maxPingInterval:
		return nil, reason.RequestInvalid.Errorf("interval %v: must be %v to %v", interval, minPingInterval, maxPingInterval)
	case q.Size < minPingSize || q.Size > maxPingSize:
		return nil, reason.RequestInvalid.Errorf("size %d: must be %d to %d bytes", q.Size, minPingSize, maxPingSize)
	}
	return q, nil
}

// unicast reports whether an address may be that of one host (RFC 1122 section 3.2.1.3).
// 240.0.0.0/4 is reserved, and 255.255.255.255 in it is the broadcast address.
func unicast(a netip.Addr) bool {
	if a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 240) {
		return false
	}
	return !a.IsUnspecified() && !a.IsMulticast()
}

// Ping implements DiagnosticService.
func (s *services) Ping(r *isthmusv1.PingRequest, stream grpc.ServerStreamingServer[isthmusv1.PingReply]) error {
	q, err := checkPing(r)
	if err != nil {
		return err
	}
	select {
	case s.pinging <- struct{}{}:
		defer func() { <-s.pinging }()
	default:
		return reason.TooManyCalls.Errorf("%d pings are under way on the node, which is the most; try again later", maxPings)
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	go func() {
		select {
		case <-s.stopping:
			cancel()
		case <-ctx.Done():
		}
	}()
	err = s.router.Ping(ctx, q, stream.Send)
	if ctx.Err() != nil && stream.Context().Err() == nil {
		return reason.Stopping.Errorf("the server is stopping")
	}
	return statusOf(err)
}
