package spec

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/secret"
)

// Secrets returns the reference of a stored secret, and false when no secret has the name.
type Secrets func(name string) (secret.Ref, bool)

// Check resolves a document. The Spec is valid only if neither Decode nor Check has found a
// problem.
func Check(d Document, secrets Secrets) (*Spec, Problems) {
	c := newChecker(d, secrets)
	c.document(d)
	return &c.s, c.Problems()
}

// CheckWithin is like Check, but ends soon after ctx is done, with its error.
func CheckWithin(ctx context.Context, d Document, secrets Secrets) (*Spec, Problems, error) {
	c := newChecker(d, secrets)
	c.ctx = ctx
	c.document(d)
	if err := ctx.Err(); err != nil {
		return nil, nil, fmt.Errorf("checking the document: %w", err)
	}
	return &c.s, c.Problems(), nil
}

func newChecker(d Document, secrets Secrets) *checker {
	return &checker{
		Fields:      Fields{lines: d.lines, unread: d.unread},
		s:           Spec{lines: d.lines.outside(policiesField), layout: d.layout},
		secrets:     secrets,
		platform:    d.platform,
		mtu:         d.mtu,
		processors:  d.processors,
		tunnels:     map[string]Tunnel{},
		links:       map[string]Link{},
		ports:       map[uint16]string{500: "IKE", 4500: "IKE"},
		gateways:    map[string]string{},
		peerings:    map[netip.Addr]string{},
		announce:    map[netip.Prefix]bool{},
		dests:       map[netip.Prefix]string{},
		attached:    map[string]string{},
		zoneNames:   map[string]bool{},
		sources:     map[netip.Addr]string{},
		publics:     map[netip.Addr]string{},
		announcing:  map[netip.Prefix]string{},
		domainNames: map[string]bool{},
	}
}

func (c *checker) document(d Document) {
	if d.unread[""] {
		return // every problem would be dropped
	}
	m := d.Message
	if m == nil {
		m = &isthmusv1.Spec{}
	}
	c.s.Secrets = SecretUses(m)
	c.node(m)
	c.underlay(m.GetUnderlay())
	if len(m.GetPeers()) > 0 && !c.s.Node.RouterID.IsValid() && c.s.Underlay.Address.Is6() {
		c.Missing("node.routerId", "give an IPv4 address, because an IPv6 underlay has none; it need not exist (RFC 6286)")
	}
	for i, t := range m.GetTunnels()[:c.limited("tunnels", len(m.GetTunnels()), maxTunnels)] {
		c.tunnel(fmt.Sprintf("tunnels[%d]", i), t)
	}
	for i, l := range m.GetLinks()[:c.limited("links", len(m.GetLinks()), maxLinks)] {
		c.link(fmt.Sprintf("links[%d]", i), l)
	}
	c.insideOverlaps()
	c.outside()
	for i, p := range m.GetPeers()[:c.limited("peers", len(m.GetPeers()), maxPeers)] {
		if !c.spend(1) {
			return
		}
		c.peer(fmt.Sprintf("peers[%d]", i), p)
	}
	c.otherFamilies()
	for i, text := range m.GetAnnounce() {
		at := fmt.Sprintf("announce[%d]", i)
		if p, ok := c.Prefix(at, text); ok {
			if c.announce[p] {
				c.Problem(at, text, "is announced twice", "keep one of them")
			}
			c.announce[p] = true
			c.s.Announce = append(c.s.Announce, p)
		}
	}
	for i, r := range m.GetStaticRoutes() {
		c.route(fmt.Sprintf("staticRoutes[%d]", i), r)
	}
	for i, a := range m.GetAttachments() {
		c.attachment(fmt.Sprintf("attachments[%d]", i), a)
	}
	c.access(m.GetAccess())
	if !c.spend(1) {
		return
	}
	c.zones(m.GetEgress().GetZones())
	c.resolution(m.GetEgress())
	addresses := 0
	for i, p := range m.GetEgress().GetPools() {
		if addresses += len(p.GetAddresses()); addresses > maxPoolAddresses {
			c.Problem(fmt.Sprintf("egress.pools[%d].addresses", i), p.GetName(), fmt.Sprintf("has with the pools before more than %d addresses", maxPoolAddresses), "use fewer, or another node")
			break
		}
		c.pool(fmt.Sprintf("egress.pools[%d]", i), p)
	}
	c.listenersAndPools()
	c.metrics(m.GetMetrics())
	c.exports(m.GetEvents().GetExport())
	c.takeover(m.GetEgress())
	for i, p := range m.GetEgress().GetMaps()[:c.limited("egress.maps", len(m.GetEgress().GetMaps()), maxMaps)] {
		c.prefixMap(fmt.Sprintf("egress.maps[%d]", i), p)
	}
	for i, p := range m.GetEgress().GetPolicies() {
		if !c.spend(1) {
			return
		}
		c.policy(fmt.Sprintf("egress.policies[%d]", i), p)
	}
	if c.bounded(c.s.Policies, c.paths, 0) {
		c.ties()
		c.loops()
	}
	c.announced()
	c.translationLog("egress.log", m.GetEgress().GetLog())
}

// checker resolves one document. Most of its maps have paths: the problem of a second use names the
// field of the first.
type checker struct {
	Fields
	s        Spec
	secrets  Secrets
	platform Platform
	mtu      func(iface string) int
	// processors is 0 when it is unknown.
	processors int

	// The cost of the check: see spend.
	ctx   context.Context // nil: never done
	steps int
	tired bool

	// Tunnels.
	tunnels  map[string]Tunnel
	links    map[string]Link
	inside   []placed                // inside addresses and blocks
	insideAt map[netip.Prefix]string // index of inside; nil until insideOf needs it
	ports    map[uint16]string       // UDP ports of this node
	gateways map[string]string       // pairs of IPsec identities

	// Peers.
	peerings map[netip.Addr]string
	peersOf  map[string][]int      // index of s.Peers by tunnel; nil until keepOut needs it
	announce map[netip.Prefix]bool // the document's own prefixes

	// Routes and attachments.
	dests    map[netip.Prefix]string // destinations
	attached map[string]string       // interfaces of attachments

	// Zones and pools.
	zoneNames  map[string]bool
	sources    map[netip.Addr]string   // addresses of pools
	publics    map[netip.Addr]string   // public addresses of pools
	announcing map[netip.Prefix]string // prefixes that pools announce
	pools      map[string]*poolFacts   // index of s.Pools; nil until poolNamed needs it

	// Policies.
	paths       []string // of s.Policies
	domainNames map[string]bool
	proxy       bool // there is a DNS proxy
}

type placed struct {
	prefix netip.Prefix
	path   string
}

// duration checks a duration between min and max: whole seconds unless min has a fraction, and the
// default when it is not given.
func (c *checker) duration(path string, d *durationpb.Duration, def, min, max time.Duration) time.Duration {
	if d == nil {
		return def
	}
	v, step, kind := d.AsDuration(), time.Second, "a whole number of seconds "
	if min%time.Second != 0 {
		step, kind = time.Millisecond, ""
	}
	if v < min || v > max || v%step != 0 {
		c.Problem(path, v.String(), fmt.Sprintf("is not %sfrom %v to %v", kind, min, max), "choose one in this range")
		return def
	}
	return v
}

func (c *checker) secret(path, name string) secret.Ref {
	if name == "" {
		c.Missing(path, "store the secret with `isthmus secret set NAME` and give its NAME")
		return secret.Ref{}
	}
	ref, ok := c.secrets(name)
	if !ok {
		// The field may hold the secret itself by mistake: do not repeat it unless it looks like a
		// name.
		shown, remedy := name, "store it with `isthmus secret set "+name+"`"
		if !nameRule.MatchString(name) {
			shown, remedy = "", "store the secret with `isthmus secret set NAME` and give its NAME, not the secret"
		}
		c.Problem(path, shown, "is not a stored secret", remedy)
	}
	return ref
}
