package api

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	nouns "github.com/isthmus-net/isthmus/router/noun"
	"github.com/isthmus-net/isthmus/router/reason"
)

// Kind describes the objects of one noun to its calls. Named returns the usual kind.
type Kind[T proto.Message] struct {
	name     string
	key      func(T) string
	compare  func(a, b string) int // order of the keys
	size     uint32                // of a page, if the request has none
	maxSize  uint32
	onlyName func(key string) T
	// quiet clears the fields whose change alone is not an event. Nil: none.
	quiet func(T)
	// match returns the filter fields of a List request as text, and a function that applies them.
	// Nil: the noun has no filters.
	match func(request proto.Message) (filter string, match func(T) bool, err error)
}

// Named returns the kind of objects that have a field "name" and are listed in its order, 1000 per
// page by default and 5000 at most. noun is the singular, for messages.
func Named[T proto.Message](noun string) Kind[T] {
	var none T
	field := nouns.Field(none, "name")
	return Kind[T]{
		name: noun, compare: strings.Compare, size: 1000, maxSize: 5000,
		key: func(o T) string { return o.ProtoReflect().Get(field).String() },
		onlyName: func(key string) T {
			o := none.ProtoReflect().New()
			o.Set(field, protoreflect.ValueOfString(key))
			return o.Interface().(T)
		},
	}
}

// quietly returns the kind with fields whose change alone is not an event.
func (k Kind[T]) quietly(quiet func(T)) Kind[T] {
	k.quiet = quiet
	return k
}

// The kinds of the nouns.
var (
	Tunnels = Named[*isthmusv1.TunnelStatus]("tunnel").quietly(func(t *isthmusv1.TunnelStatus) {
		t.RxBytes, t.TxBytes, t.RxPackets, t.TxPackets, t.DataReceived = 0, 0, 0, 0, nil
	})
	Peers = Named[*isthmusv1.PeerStatus]("peer").quietly(func(p *isthmusv1.PeerStatus) { p.MessagesReceived, p.MessagesSent = 0, 0 })
	Pools = Named[*isthmusv1.PoolStatus]("pool").quietly(func(p *isthmusv1.PoolStatus) {
		for _, m := range p.Members {
			m.Reason = ""
			for _, t := range m.Targets {
				t.LastError, t.Failed = "", nil
			}
		}
	})
	// Links are watched without their counters, which change all the time.
	Links = Named[*isthmusv1.LinkStatus]("link").quietly(func(l *isthmusv1.LinkStatus) {
		l.Stalls = 0
		for _, one := range l.Lanes {
			one.RttP50, one.RttP99, one.Buckets, one.LastError = nil, nil, 0, ""
			one.RxBytes, one.TxBytes, one.RxPackets, one.TxPackets = 0, 0, 0, 0
			for _, d := range []*isthmusv1.LaneDirection{one.Out, one.In} {
				if d != nil {
					d.Loss = nil
				}
			}
		}
	})
	Names    = Named[*isthmusv1.NameStatus]("name").quietly(func(n *isthmusv1.NameStatus) { n.Next, n.LastError, n.Gone = nil, "", nil })
	Secrets  = Named[*isthmusv1.SecretInfo]("secret")
	Policies = func() Kind[*isthmusv1.PolicyStatus] {
		k := Named[*isthmusv1.PolicyStatus]("policy")
		k.maxSize = 10000
		return k
	}()
	Routes = Kind[*isthmusv1.Route]{
		name: "route", key: (*isthmusv1.Route).GetPrefix, compare: CompareRoutes, size: 1000, maxSize: 10000, match: matchRoutes,
		onlyName: func(prefix string) *isthmusv1.Route { return &isthmusv1.Route{Prefix: prefix} },
	}
	Ports = Kind[*isthmusv1.PortUse]{
		name: "port", key: PortKey, compare: ComparePorts, size: 1000, maxSize: 1000, onlyName: portOf,
		quiet: func(p *isthmusv1.PortUse) { p.Growth, p.ExhaustedIn = 0, nil },
	}
	// Revisions are listed newest first.
	Revisions = Kind[*isthmusv1.Revision]{
		name: "revision", key: func(r *isthmusv1.Revision) string { return fmt.Sprintf("%020d", r.Generation) },
		compare: func(a, b string) int { return strings.Compare(b, a) }, size: 100, maxSize: 1000,
	}
)

// matchRoutes selects routes within a prefix and by the peer of a next hop.
func matchRoutes(request proto.Message) (string, func(*isthmusv1.Route) bool, error) {
	r := request.(*isthmusv1.ListRoutesRequest)
	var within netip.Prefix
	if r.Within != "" {
		var err error
		if within, err = netip.ParsePrefix(r.Within); err != nil {
			return "", nil, reason.RequestInvalid.Errorf("within %q: must be a prefix, such as 10.0.0.0/8", r.Within)
		}
		within = within.Masked()
	}
	return r.Within + " " + r.Peer, func(route *isthmusv1.Route) bool {
		if within.IsValid() {
			p, err := netip.ParsePrefix(route.Prefix)
			if err != nil || p.Bits() < within.Bits() || !within.Contains(p.Addr()) {
				return false
			}
		}
		return r.Peer == "" || slices.ContainsFunc(route.NextHops, func(n *isthmusv1.NextHop) bool { return n.Peer == r.Peer })
	}, nil
}

// CompareRoutes orders prefixes in text form: IPv4 first, then by address, then the shorter prefix
// first. If one of the texts is not a valid prefix, both are compared as text.
func CompareRoutes(a, b string) int {
	pa, aerr := netip.ParsePrefix(a)
	pb, berr := netip.ParsePrefix(b)
	if aerr != nil || berr != nil {
		return strings.Compare(a, b)
	}
	return pa.Compare(pb)
}

// PortKey returns the key of a use of ports: pool, address, destination, protocol and port.
func PortKey(p *isthmusv1.PortUse) string {
	return fmt.Sprintf("%s %s %s %s %d", p.Pool, p.Address, p.Destination, p.Protocol, p.Port)
}

// portOf returns a use with only the fields of its key. Fields that do not parse stay empty.
func portOf(key string) *isthmusv1.PortUse {
	p := &isthmusv1.PortUse{}
	fmt.Sscan(key, &p.Pool, &p.Address, &p.Destination, &p.Protocol, &p.Port)
	return p
}

// ComparePorts orders keys by pool, address, destination, protocol and port.
func ComparePorts(a, b string) int {
	p, q := portOf(a), portOf(b)
	addrs := func(a, b string) int {
		x, xerr := netip.ParseAddr(a)
		y, yerr := netip.ParseAddr(b)
		if xerr != nil || yerr != nil {
			return strings.Compare(a, b)
		}
		return x.Compare(y)
	}
	return cmp.Or(strings.Compare(p.Pool, q.Pool), addrs(p.Address, q.Address), addrs(p.Destination, q.Destination),
		strings.Compare(p.Protocol, q.Protocol), cmp.Compare(p.Port, q.Port))
}

// get returns one object of an ordered list.
func (k Kind[T]) get(all []T, key string) (T, error) {
	i, ok := slices.BinarySearchFunc(all, key, func(o T, key string) int { return k.compare(k.key(o), key) })
	if !ok {
		var none T
		return none, notFound(k.name, key)
	}
	return all[i], nil
}

// page returns the matching objects of an ordered list that come after the token's object, and the
// token of the next page. filter is the text from which match was made: a token is valid only for
// the list and the filter that it came from.
func (k Kind[T]) page(all []T, size uint32, token, filter string, match func(T) bool) ([]T, string, error) {
	if size > k.maxSize {
		return nil, "", reason.RequestInvalid.Errorf("page_size %d: must be 1 to %d", size, k.maxSize)
	}
	if size == 0 {
		size = k.size
	}
	start := 0
	if token != "" {
		after, ok := k.readToken(token, filter)
		if !ok {
			return nil, "", reason.PageToken.Errorf("page_token: belongs to another list or filter; start again without it")
		}
		i, found := slices.BinarySearchFunc(all, after, func(o T, key string) int { return k.compare(k.key(o), key) })
		if start = i; found {
			start++
		}
	}
	var out []T
	for _, o := range all[start:] {
		if match != nil && !match(o) {
			continue
		}
		if len(out) == int(size) {
			return out, k.token(k.key(out[len(out)-1]), filter), nil
		}
		out = append(out, o)
	}
	return out, "", nil
}

// token returns a checksum over the kind, the filter and the key of the last object, followed by
// that key. It survives restarts of the daemon, and it need not be secret.
func (k Kind[T]) token(after, filter string) string {
	return base64.RawURLEncoding.EncodeToString(append(k.tokenSum(after, filter), after...))
}

func (k Kind[T]) tokenSum(after, filter string) []byte {
	sum := sha256.Sum256([]byte(k.name + "\x00" + filter + "\x00" + after))
	return sum[:8]
}

func (k Kind[T]) readToken(token, filter string) (string, bool) {
	data, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil || len(data) < 8 {
		return "", false
	}
	after := string(data[8:])
	return after, string(data[:8]) == string(k.tokenSum(after, filter))
}

// diff calls event for each object that two ordered lists do not have in common, or that differs.
func (k Kind[T]) diff(was, now []T, event func(isthmusv1.EventType, T) error) error {
	for len(was) > 0 || len(now) > 0 {
		var err error
		order := 0
		switch {
		case len(was) == 0:
			order = 1
		case len(now) == 0:
			order = -1
		default:
			order = k.compare(k.key(was[0]), k.key(now[0]))
		}
		switch {
		case order < 0:
			err = event(isthmusv1.EventType_EVENT_TYPE_REMOVED, k.onlyName(k.key(was[0])))
			was = was[1:]
		case order > 0:
			err = event(isthmusv1.EventType_EVENT_TYPE_ADDED, now[0])
			now = now[1:]
		default:
			if !k.same(was[0], now[0]) {
				err = event(isthmusv1.EventType_EVENT_TYPE_UPDATED, now[0])
			}
			was, now = was[1:], now[1:]
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (k Kind[T]) same(a, b T) bool {
	if any(a) == any(b) {
		return true
	}
	if k.quiet == nil {
		return proto.Equal(a, b)
	}
	a, b = proto.CloneOf(a), proto.CloneOf(b)
	k.quiet(a)
	k.quiet(b)
	return proto.Equal(a, b)
}

// watch sends the present objects, a mark, and then each change until the client or the server ends
// it. It has no queue: while a slow client reads, changes accumulate in the Router's own state, and
// watch then sends the difference from the list it sent last. An object that changed twice in
// between is sent once.
func (k Kind[T]) watch(ctx context.Context, stopping <-chan struct{}, changed func() <-chan struct{}, list func() []T, send func(isthmusv1.EventType, T) error) error {
	var sent []T
	for marked := false; ; {
		next := changed()
		now := list()
		if err := k.diff(sent, now, send); err != nil {
			return err
		}
		sent = now
		if !marked {
			var none T
			if err := send(isthmusv1.EventType_EVENT_TYPE_MARK, none); err != nil {
				return err
			}
			marked = true
		}
		// Comparing 100,000 routes takes some ten milliseconds, and a watch may use a hundredth of
		// one processor. The first change after a quiet period is sent at once.
		pause := time.NewTimer(watchPause + time.Duration(len(now))*10*time.Microsecond)
		err := wait(ctx, stopping, pause.C)
		pause.Stop()
		if err == nil {
			err = wait(ctx, stopping, next)
		}
		if err != nil {
			return err
		}
	}
}

const watchPause = 50 * time.Millisecond

func wait[T any](ctx context.Context, stopping <-chan struct{}, c <-chan T) error {
	select {
	case <-c:
		return nil
	case <-stopping:
		return reason.Stopping.Errorf("the server is stopping")
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}
