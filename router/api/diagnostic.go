package api

import (
	"cmp"
	"context"
	"math"
	"net/netip"
	"strconv"
	"strings"
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

// Bounds of a capture.
const (
	maxCaptures        = 2 // at the same time
	maxCaptureCount    = 10_000
	minCaptureDuration = time.Second
	maxCaptureDuration = 5 * time.Minute
	minCaptureSize     = 64
	maxCaptureSize     = 65_535
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
	return s.diagnose(stream.Context(), s.pinging, "pings", func(ctx context.Context) error { return s.router.Ping(ctx, q, stream.Send) })
}

// diagnose makes a call if one of the places of its kind is free. Its context ends with the caller
// and with the server. The error is a status.
func (s *services) diagnose(caller context.Context, places chan struct{}, what string, call func(context.Context) error) error {
	select {
	case places <- struct{}{}:
		defer func() { <-places }()
	default:
		return reason.TooManyCalls.Errorf("%d %s are under way on the node, which is the most; try again later", cap(places), what)
	}
	ctx, cancel := context.WithCancel(caller)
	defer cancel()
	go func() {
		select {
		case <-s.stopping:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := call(ctx)
	if ctx.Err() != nil && caller.Err() == nil {
		return reason.Stopping.Errorf("the server is stopping")
	}
	return statusOf(err)
}

// checkCapture returns a request with the defaults in place of missing values, apart from those of
// the filter. The error is a status.
func checkCapture(r *isthmusv1.CaptureRequest) (*isthmusv1.CaptureRequest, error) {
	q := proto.CloneOf(r)
	if q.GetTunnel() == "" && q.GetAttachment() == "" && !q.GetUnderlay() {
		return nil, reason.RequestInvalid.Errorf("at: it is missing; give a tunnel, an attachment or the underlay")
	}
	if r.Host != "" {
		a, err := netip.ParseAddr(r.Host)
		switch {
		case err != nil:
			return nil, reason.RequestInvalid.Errorf("host: %q is not a valid address; give one as 10.1.2.3 or fd00::1", r.Host)
		case a.Zone() != "":
			return nil, reason.RequestInvalid.Errorf("host: %q has a zone; leave it out", r.Host)
		case a.Is4In6():
			return nil, reason.RequestInvalid.Errorf("host: %q is an IPv4 address in IPv6 form; give %v", r.Host, a.Unmap())
		}
	}
	q.Count, q.Size = cmp.Or(r.Count, 1000), cmp.Or(r.Size, maxCaptureSize)
	if q.Duration == nil {
		q.Duration = durationpb.New(time.Minute)
	}
	duration := q.Duration.AsDuration()
	switch {
	case q.Port > math.MaxUint16:
		return nil, reason.RequestInvalid.Errorf("port %d: must be 1 to %d", q.Port, math.MaxUint16)
	case q.Count > maxCaptureCount:
		return nil, reason.RequestInvalid.Errorf("count %d: must be 1 to %d", q.Count, maxCaptureCount)
	case !q.Duration.IsValid() || duration < minCaptureDuration || duration > maxCaptureDuration:
		return nil, reason.RequestInvalid.Errorf("duration %v: must be %v to %v", duration, minCaptureDuration, maxCaptureDuration)
	case q.Size < minCaptureSize || q.Size > maxCaptureSize:
		return nil, reason.RequestInvalid.Errorf("size %d: must be %d to %d bytes", q.Size, minCaptureSize, maxCaptureSize)
	}
	return q, nil
}

// Capture implements DiagnosticService.
func (s *services) Capture(r *isthmusv1.CaptureRequest, stream grpc.ServerStreamingServer[isthmusv1.CaptureReply]) error {
	q, err := checkCapture(r)
	if err != nil {
		return err
	}
	return s.diagnose(stream.Context(), s.capturing, "captures", func(ctx context.Context) error { return s.router.Capture(ctx, q, stream.Send) })
}

// captured describes a capture for the audit log.
func captured(r *isthmusv1.CaptureRequest) string {
	var parts []string
	add := func(name, value string) {
		if value != "" {
			parts = append(parts, name+" "+value)
		}
	}
	add("tunnel", r.GetTunnel())
	add("attachment", r.GetAttachment())
	if r.GetUnderlay() {
		parts = append(parts, "underlay")
	}
	add("host", r.Host)
	add("protocol", r.Protocol)
	if r.Port != 0 {
		add("port", strconv.Itoa(int(r.Port)))
	}
	return strings.Join(parts, " ")
}
