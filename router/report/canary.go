package report

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/live"
	"github.com/isthmus-net/isthmus/router/plan"
)

// canaryTimeout bounds a call.
const canaryTimeout = 5 * time.Second

// canary is the URL to call, and the inside address to call from; without an address the node
// itself calls.
type canary struct {
	url  *url.URL
	from netip.Addr
}

// readCanary returns nil if the request has no canary.
func readCanary(q *isthmusv1.ProveEgressRequest) (*canary, error) {
	if q.Canary == "" {
		if q.CanarySource != "" {
			return nil, fmt.Errorf("%w: canary_source: %s has nothing to call; give canary as well", api.ErrInvalid, q.CanarySource)
		}
		return nil, nil
	}
	u, err := url.Parse(q.Canary)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("%w: canary: %q is not an http or https URL", api.ErrInvalid, q.Canary)
	}
	c := &canary{url: u}
	if q.CanarySource == "" {
		return c, nil
	}
	c.from, err = netip.ParseAddr(q.CanarySource)
	if err != nil || c.from.Zone() != "" || c.from.Is4In6() {
		return nil, fmt.Errorf("%w: canary_source: %q is not an address", api.ErrInvalid, q.CanarySource)
	}
	if to, err := netip.ParseAddr(u.Hostname()); err == nil && to.Is4() != c.from.Is4() {
		return nil, fmt.Errorf("%w: canary_source: %s is not of the family of %s, which is to be called", api.ErrInvalid, c.from, to)
	}
	return c, nil
}

// refuseSource returns why a canary must not call from an address: during a call the node has a
// route to it.
func (r *Report) refuseSource(from netip.Addr, t plan.Target) error {
	refuse := func(format string, args ...any) error {
		return fmt.Errorf("%w: canary_source: %s %s; give an inside address that no host uses", api.ErrInvalid, from, fmt.Sprintf(format, args...))
	}
	has := func(list []netip.Prefix) bool {
		return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(from) })
	}
	for _, p := range t.NAT.Pools {
		if slices.ContainsFunc(p.Addresses, func(a nat.PoolAddress) bool { return a.Public == from }) {
			return refuse("is a public address of pool %s", p.Name)
		}
	}
	seen := r.Observed.Machine()
	for _, o := range seen.Routes {
		if o.Prefix.IsSingleIP() && o.Prefix.Addr() == from {
			return refuse("has a route of its own, by interface %s", o.Interface)
		}
	}
	for _, o := range r.FIB.Routes() {
		if o.Key == fib.Main(netip.PrefixFrom(from, from.BitLen())) {
			return refuse("has a route of its own")
		}
	}
	// A host fits into the networks of attachments, next to the addresses in use.
	attached := t.NAT.Attached()
	seen.Addresses = slices.Clone(seen.Addresses)
	for i, a := range seen.Addresses {
		if slices.Contains(attached, a.Interface) {
			seen.Addresses[i].Prefix = netip.PrefixFrom(a.Prefix.Addr(), a.Prefix.Addr().BitLen())
		}
	}
	for _, p := range live.Of(&t, live.Facts{Machine: seen, Resolvers: r.resolvers()}).Reserved {
		if p.Key.Domain == 0 && p.Key.Prefix.Contains(from) {
			why, _, _ := strings.Cut(p.Why, ";")
			return refuse("is in %s, %s", p.Key.Prefix, why)
		}
	}
	if !slices.ContainsFunc(t.NAT.Policies, func(p nat.Policy) bool { return has(p.Sources) }) {
		return refuse("is in the sources of no policy")
	}
	if !slices.ContainsFunc(t.NAT.Attachments, func(a nat.Attachment) bool { return has(a.Sources) }) {
		return refuse("is in the sources of no attachment")
	}
	if slices.Contains(attached, fib.Canary) {
		return fmt.Errorf("%w: canary_source: interface %s is an attachment of the document, and the canary needs the name", api.ErrPrecondition, fib.Canary)
	}
	return nil
}

// takeTurn waits for other proofs to end. While a canary calls from inside, the rules are more than
// those of the document.
func (r *Report) takeTurn(ctx context.Context) (done func(), err error) {
	select {
	case r.proving <- struct{}{}:
		return sync.OnceFunc(func() { <-r.proving }), nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for another proof: %w", context.Cause(ctx))
	}
}

// callFromInside calls like an inside host, with forwarded packets. The caller must have the turn.
func (r *Report) callFromInside(ctx context.Context, c *canary, underlay string) *isthmusv1.CanaryResult {
	result := &isthmusv1.CanaryResult{Address: c.from.String()}
	seen, err := r.forwarded(ctx, c, underlay)
	if err != nil {
		result.Error = err.Error()
		return result
	}
	result.SeenAs = seen.String()
	return result
}

func (r *Report) forwarded(ctx context.Context, c *canary, underlay string) (netip.Addr, error) {
	to, err := r.resolve(ctx, c)
	if err != nil {
		return netip.Addr{}, err
	}
	// The rules are installed before the first packet, and stay until after the last one.
	withdraw, err := r.Applied.Admit(ctx, nat.Attachment{Interface: fib.Canary, Sources: []netip.Prefix{netip.PrefixFrom(c.from, c.from.BitLen())}})
	if err != nil {
		return netip.Addr{}, fmt.Errorf("admitting the canary: %w", err)
	}
	defer withdraw()
	dial, remove, err := r.Addresses.Canary(c.from, to, r.Observed.Machine().Devices[underlay].MTU)
	if err != nil {
		return netip.Addr{}, err
	}
	defer func() {
		if err := remove(); err != nil {
			r.Log.Warn("the canary was not taken away; trying again with the next rules", "err", err)
		}
	}()
	return fetch(ctx, c.url, func(ctx context.Context, address string) (net.Conn, error) {
		_, text, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("port %q: %w", text, err)
		}
		return dial(ctx, uint16(port))
	})
}

// resolve returns the address of a canary, in the family of the source.
func (r *Report) resolve(ctx context.Context, c *canary) (netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, canaryTimeout)
	defer cancel()
	family := "ip6"
	if c.from.Is4() {
		family = "ip4"
	}
	all, err := net.DefaultResolver.LookupNetIP(ctx, family, c.url.Hostname())
	if err != nil {
		return netip.Addr{}, err
	}
	for _, a := range all {
		if a = a.Unmap(); a.Zone() == "" && a != c.from && r.public(a) {
			return a, nil
		}
	}
	return netip.Addr{}, errNotPublic
}

func (r *Report) resolvers() []netip.Addr {
	if r.Resolvers == nil {
		return nil
	}
	return r.Resolvers()
}

// callCanaries calls the canary from each address, in parallel.
func (r *Report) callCanaries(ctx context.Context, target *url.URL, c nat.Config, from []netip.Addr) []*isthmusv1.CanaryResult {
	results := make([]*isthmusv1.CanaryResult, len(from))
	var wg sync.WaitGroup
	for i, a := range from {
		results[i] = &isthmusv1.CanaryResult{Address: a.String(), PublicAddress: publicOf(c, a).String()}
		wg.Go(func() {
			seen, err := callCanary(ctx, target, a, r.public)
			if err != nil {
				results[i].Error = err.Error()
				return
			}
			results[i].SeenAs = seen.String()
		})
	}
	wg.Wait()
	return results
}

var errNotPublic = errors.New("the canary is at an address of the node, its platform or a network inside")

func callCanary(ctx context.Context, target *url.URL, from netip.Addr, allowed func(netip.Addr) bool) (netip.Addr, error) {
	network := "tcp6"
	if from.Is4() {
		network = "tcp4"
	}
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), Control: func(_, address string, _ syscall.RawConn) error {
		// The address of a name is known only here.
		if to, err := netip.ParseAddrPort(address); err != nil || !allowed(to.Addr().Unmap()) {
			return errNotPublic
		}
		return nil
	}}
	return fetch(ctx, target, func(ctx context.Context, address string) (net.Conn, error) {
		return dialer.DialContext(ctx, network, address)
	})
}

// fetch returns the address in a canary's answer.
func fetch(ctx context.Context, target *url.URL, dial func(ctx context.Context, address string) (net.Conn, error)) (netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, canaryTimeout)
	defer cancel()
	client := http.Client{
		Transport: &http.Transport{
			DisableKeepAlives: true,
			// http.Transport's own context outlives the call: a call without an answer would go on
			// and keep its flow.
			DialContext: func(_ context.Context, _, address string) (net.Conn, error) { return dial(ctx, address) },
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return netip.Addr{}, err
	}
	response, err := client.Do(request)
	if err != nil {
		return netip.Addr{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 256))
	if err != nil {
		return netip.Addr{}, err
	}
	seen, err := netip.ParseAddr(strings.TrimSpace(string(body)))
	if err != nil || response.StatusCode != http.StatusOK {
		return netip.Addr{}, errors.New("the answer is not an address")
	}
	return seen, nil
}
