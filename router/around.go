package router

import (
	"context"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
)

const (
	// lookPause is how long changes around are gathered before they are read, lookRetry how long after a failure.
	lookPause = 50 * time.Millisecond
	lookRetry = 5 * time.Second
)

// around is what was last read of the machine. A failed reading leaves it as it was.
type around struct {
	mu   sync.Mutex
	seen fib.Surroundings
	read bool
}

// known says whether the machine has been read.
func (a *around) known() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.read
}

// has says whether the machine has an interface.
func (a *around) has(iface string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, ok := a.seen.Devices[iface]
	return ok
}

func (a *around) get() fib.Surroundings {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.seen
}

// lookAround follows the machine's own addresses, interfaces and routes.
func (r *Router) lookAround(ctx context.Context) error {
	nudge := make(chan struct{}, 1)
	go func() {
		for ctx.Err() == nil {
			err := r.Addresses.Around(ctx, func() {
				select {
				case nudge <- struct{}{}:
				default:
				}
			})
			if ctx.Err() != nil {
				return
			}
			r.Log.Warn("changes of the machine's addresses are not heard; trying again", "err", err)
			pause(ctx, lookRetry)
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-nudge:
		case <-retry(r.around.known()):
		}
		pause(ctx, lookPause)
		r.surroundings()
	}
}

// retry fires after a while as long as the machine has not been read.
func retry(known bool) <-chan time.Time {
	if known {
		return nil
	}
	return time.After(lookRetry)
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// surroundings reads the machine, and has what depends on it worked on when it changed.
func (r *Router) surroundings() {
	now, err := r.Addresses.Surroundings()
	if err != nil {
		r.Log.Warn("the machine's addresses and routes could not be read; what was read before stays", "err", err)
		return
	}
	r.around.mu.Lock()
	same := r.around.read && reflect.DeepEqual(now, r.around.seen)
	appeared := false
	for name := range now.Devices {
		_, known := r.around.seen.Devices[name]
		appeared = appeared || r.around.read && !known
	}
	r.around.seen, r.around.read = now, true
	r.around.mu.Unlock()
	if appeared {
		// It may be what others waited for: an underlay has its kernel parameters, and a tunnel may be made on it.
		r.work.again("host")
		for _, o := range r.work.failed() {
			r.work.again(o.key)
		}
	}
	if !same {
		r.work.again("nat")
		r.work.again("routes")
		r.state.bell.Ring()
	}
}

// own returns the node's own addresses: those of the machine on interfaces that lead to no network inside, but for those of pools, and the one that the
// document names.
func (r *Router) own(c nat.Config) []netip.Addr {
	seen := r.around.get()
	own := slices.Clone(c.Own)
	for _, a := range seen.Own(c.Attached()) {
		pooled := slices.ContainsFunc(c.Pools, func(p nat.Pool) bool {
			return slices.ContainsFunc(p.Addresses, func(q nat.PoolAddress) bool { return q.Address == a })
		})
		if !pooled && !slices.Contains(own, a) {
			own = append(own, a)
		}
	}
	return own
}

// links returns the interfaces between which packets are forwarded, as far as they are there.
func (r *Router) links(c nat.Config) (all nat.Links) {
	seen := r.around.get()
	for _, name := range slices.Sorted(slices.Values(append(c.Attached(), c.Underlay))) {
		if link, ok := seen.Devices[name]; ok {
			all = append(all, nat.Link{Interface: name, Index: link.Index})
		}
	}
	return all
}

func (r *Router) resolvers() []netip.Addr {
	if r.Resolvers == nil {
		return nil
	}
	return r.Resolvers()
}

// reserved returns what no route may take away from the node.
func reserved(t plan.Target, seen fib.Surroundings, resolvers []netip.Addr) (all []fib.Reserved) {
	one := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
	for _, p := range spec.Unroutable {
		all = append(all, fib.Reserved{Prefix: p, Why: "which no router forwards; have the peer not announce it"})
	}
	need := func(a netip.Addr, why string) {
		all = append(all, fib.Reserved{Prefix: one(a), Covered: true, Own: max(0, seen.Best(a)), Why: why})
	}
	for _, p := range nat.Platform {
		if !p.IsSingleIP() || p.Addr() == alibaba && !slices.Contains(resolvers, alibaba) {
			continue // that is a prefix above, or a shared address (RFC 6598) that other networks use
		}
		need(p.Addr(), "at which the cloud's platform serves this node; announce more exact prefixes")
	}
	all = append(all, fib.Reserved{Prefix: one(alibaba), Why: "at which Alibaba Cloud serves its machines; announce more exact prefixes"})
	for _, a := range seen.Gateways(t.Underlay.Interface) {
		need(a, "a router of the underlay; announce more exact prefixes")
	}
	for _, a := range resolvers {
		if !a.IsLoopback() {
			need(a, "a DNS server of this node; announce more exact prefixes")
		}
	}
	for _, a := range seen.Addresses {
		if a.Prefix.Addr().IsLoopback() || a.Prefix.Addr().IsLinkLocalUnicast() {
			continue
		}
		all = append(all, fib.Reserved{Prefix: one(a.Prefix.Addr()), Why: "an address of this node; have the peer not announce it"})
		if !a.Prefix.IsSingleIP() {
			all = append(all, fib.Reserved{Prefix: a.Prefix.Masked(), Why: fmt.Sprintf("the network that interface %s is connected to; have the peer not announce it", a.Interface)})
		}
	}
	for _, p := range t.NAT.Pools {
		for _, a := range p.Addresses {
			all = append(all, fib.Reserved{Prefix: one(a.Address), Why: "an address of pool " + p.Name + "; have the peer not announce it"})
		}
	}
	for _, c := range t.Tunnels {
		for _, in := range c.Inside {
			for _, a := range []netip.Addr{in.Local.Addr(), in.Remote} {
				all = append(all, fib.Reserved{Prefix: one(a), Why: "an inside address of tunnel " + c.Name + "; have the peer not announce it"})
			}
		}
		if a := c.Outside().Addr(); a.IsValid() {
			all = append(all, fib.Reserved{Prefix: one(a), Covered: true, Why: "the outside address of a tunnel, and would draw encrypted packets into a tunnel; announce more exact prefixes"})
		}
	}
	return all
}

// alibaba is where Alibaba Cloud's machines find their metadata.
var alibaba = netip.MustParseAddr("100.100.100.200")

// strange returns the interfaces that have a network and that the document does not name, with their networks in words.
func strange(t plan.Target, seen fib.Surroundings) (out []string) {
	networks := map[string][]string{}
	for _, a := range seen.Addresses {
		named := a.Interface == t.Underlay.Interface || slices.Contains(t.NAT.Attached(), a.Interface)
		if !named && !a.Prefix.IsSingleIP() && !a.Prefix.Addr().IsLoopback() && !a.Prefix.Addr().IsLinkLocalUnicast() {
			networks[a.Interface] = append(networks[a.Interface], a.Prefix.Masked().String())
		}
	}
	for name, all := range networks {
		out = append(out, fmt.Sprintf("%s (%s)", name, strings.Join(all, ", ")))
	}
	slices.Sort(out)
	return out
}

// wayConditions tells of peers' outside addresses to which the kernel does not send by the underlay.
func (r *Router) wayConditions() (out []*isthmusv1.Condition) {
	r.state.mu.Lock()
	t := r.state.target
	r.state.mu.Unlock()
	seen := r.around.get()
	u := t.Underlay
	if len(seen.Addresses) > 0 && u.Interface != "" && !slices.ContainsFunc(seen.Addresses, func(a fib.Assigned) bool { return a.Interface == u.Interface && a.Prefix.Addr() == u.Address }) {
		out = append(out, &isthmusv1.Condition{Type: "NoUnderlayAddress", Severity: "error",
			Message: fmt.Sprintf("interface %s does not have underlay.address %v; `ip address` shows those that it has", u.Interface, u.Address)})
	}
	if link, ok := seen.Devices[u.Interface]; ok && len(t.Tunnels) > 0 && link.MTU < u.MTU {
		out = append(out, &isthmusv1.Condition{Type: "UnderlayMTU", Severity: "error",
			Message: fmt.Sprintf("interface %s has an MTU of %d and the document counts on %d: packets of tunnels that have no mtu of their own are fragmented or lost; set underlay.mtu to %d", u.Interface, link.MTU, u.MTU, link.MTU)})
	}
	for _, c := range t.Tunnels {
		to := c.Outside().Addr()
		if by := seen.Way(to); to.IsValid() && by != "" && by != t.Underlay.Interface {
			out = append(out, &isthmusv1.Condition{Type: "NotByUnderlay", Severity: "error",
				Message: fmt.Sprintf("tunnel %s: the kernel sends to %v by interface %s, and the document says %s; add a route to it by %s, or change underlay.interface", c.Name, to, by, t.Underlay.Interface, t.Underlay.Interface)})
		}
	}
	return out
}

// surprises returns what the machine has that the writer of a document may not have thought of.
func surprises(s *spec.Spec, t plan.Target, seen fib.Surroundings) (out spec.Problems) {
	if len(seen.Addresses) == 0 {
		return nil // it has not been read yet
	}
	note := func(path, value, rule, remedy string) {
		out = append(out, spec.Problem{Path: path, Value: value, Rule: rule, Remedy: remedy, Line: s.Line(path)})
	}
	for _, name := range strange(t, seen) {
		iface, _, _ := strings.Cut(name, " ")
		note("attachments", name, "is an interface that the document does not name: nothing is forwarded from or to it",
			fmt.Sprintf("if a network behind it is a spoke, add `- {name: lan, interface: %s, sources: [...]}`", iface))
	}
	if !slices.ContainsFunc(seen.Addresses, func(a fib.Assigned) bool {
		return a.Interface == t.Underlay.Interface && a.Prefix.Addr() == t.Underlay.Address
	}) {
		note("underlay.address", t.Underlay.Address.String(), "is not an address of interface "+t.Underlay.Interface+" at present", "`ip address` shows those that it has")
	}
	return out
}

// cut adds to changes which addresses of the node, with what listens there, are the node's no more, which services are closed, and that the caller
// loses the API. The zero caller loses nothing.
func (r *Router) cut(changes []plan.Change, from, to plan.Target, caller netip.Addr) []plan.Change {
	seen := r.around.get()
	has := func(t plan.Target, a netip.Addr) bool {
		return slices.ContainsFunc(t.NAT.Pools, func(p nat.Pool) bool {
			return slices.ContainsFunc(p.Addresses, func(q nat.PoolAddress) bool { return q.Address == a })
		})
	}
	for i := range changes {
		c := &changes[i]
		add := func(said string) {
			if c.Interrupts != "" {
				said = c.Interrupts + "; " + said
			}
			c.Interrupts = said
		}
		switch {
		case c.Kind == "access" && c.Name == "api" && caller.IsValid() && !slices.ContainsFunc(to.NAT.API.From, func(p netip.Prefix) bool { return p.Contains(caller) }):
			add(fmt.Sprintf("this document closes the API to you (%v); use --confirm-within", caller))
		case c.Kind == "access" && c.Name == "input" && to.NAT.Input.Drop && !from.NAT.Input.Drop:
			if ports := r.Host.Listening(to.Underlay.Address); len(ports) > 0 {
				add("what listens now: " + strings.Join(ports, ", "))
			}
		}
		if c.Kind != "pool" || c.Action == plan.Remove {
			continue
		}
		for _, a := range to.NAT.Pool(c.Name).Addresses {
			if a.Address == to.Underlay.Address || has(from, a.Address) || !slices.ContainsFunc(seen.Addresses, func(o fib.Assigned) bool { return o.Prefix.Addr() == a.Address }) {
				continue
			}
			said := fmt.Sprintf("%v is an address of the node, which does not answer there any more", a.Address)
			if ports := r.Host.Listening(a.Address); len(ports) > 0 {
				said += ": " + strings.Join(ports, ", ")
			}
			add(said)
		}
	}
	return changes
}
