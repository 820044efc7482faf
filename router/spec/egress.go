package spec

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Limits of probes, names and listeners.
const (
	maxTargets = 16
	maxNames   = 1000
	maxWatched = 8
	// maxRoutable bounds the addresses on which the proxy listens for every tunnel and attachment.
	maxRoutable = 4
)

func (c *checker) zones(list []*isthmusv1.Zone) {
	var taken []placed
	for i, z := range list {
		path := fmt.Sprintf("egress.zones[%d]", i)
		c.Name("zone", path+".name", z.GetName())
		out := nat.Zone{Name: z.GetName()}
		if len(z.GetSources()) == 0 {
			c.Missing(path+".sources", "give the prefixes of the sources in the zone")
		}
		for j, text := range z.GetSources() {
			at := fmt.Sprintf("%s.sources[%d]", path, j)
			p, ok := c.Prefix(at, text)
			if !ok {
				continue
			}
			taken = append(taken, placed{p, at})
			out.Prefixes = append(out.Prefixes, p)
		}
		c.s.Zones = append(c.s.Zones, out)
		c.zoneNames[out.Name] = true
	}
	overlaps(taken, nil, func(i, j int) {
		c.Problem(taken[i].path, taken[i].prefix.String(), "overlaps "+taken[j].prefix.String()+" of "+taken[j].path, "a source is in one zone")
	})
}

func (c *checker) probes(path string, p *isthmusv1.Probes, addresses []netip.Addr) egress.Probes {
	out := egress.Probes{
		Interval: c.duration(path+".interval", p.GetInterval(), 5*time.Second, time.Second, time.Hour),
		HoldDown: c.duration(path+".holdDown", p.GetHoldDown(), time.Minute, 0, 24*time.Hour),
		Rise:     int(c.Number(path+".rise", p.GetRise(), 2, 1, 100)),
		Fall:     int(c.Number(path+".fall", p.GetFall(), 3, 1, 100)),
	}
	out.Timeout = c.duration(path+".timeout", p.GetTimeout(), min(2*time.Second, out.Interval), time.Second, out.Interval)
	switch n := len(p.GetTargets()); {
	case n == 0:
		c.Missing(path+".targets", `give the targets that must answer, such as "tcp://198.51.100.7:443"`)
	case n > maxTargets:
		c.Problem(path+".targets", strconv.Itoa(n), "are more than 16", "keep those that matter")
	}
	for i, text := range p.GetTargets()[:min(len(p.GetTargets()), maxTargets)] {
		at := fmt.Sprintf("%s.targets[%d]", path, i)
		t, err := egress.ParseTarget(text)
		if err != nil {
			c.Problem(at, text, err.Error(), `write it as "tcp://198.51.100.7:443", "https://api.partner.example/health" or "icmp://198.51.100.7"`)
			continue
		}
		if a, err := netip.ParseAddr(t.Host); err == nil {
			if _, ok := c.Address(at, a.String()); !ok {
				continue
			}
			c.notPlatform(at, text, a)
		} else if name, err := egress.ParseName(t.Host); err != nil || egress.IsWildcard(name) {
			c.Problem(at, text, "has a host that is neither an address nor a domain name", "give one of them")
			continue
		}
		if slices.Contains(out.Targets, t) {
			c.Problem(at, text, "is listed twice", "keep one of them")
		}
		out.Targets = append(out.Targets, t)
	}
	if len(out.Targets) == 0 || len(out.Targets) < len(p.GetTargets()) {
		return out // further problems would only follow from these
	}
	for _, a := range addresses {
		targets, _ := out.For(a)
		switch {
		case len(targets) == 0:
			c.Problem(path+".targets", "", "has none of the family of "+a.String(), "add one, or one with a name")
		case int64(p.GetQuorum()) > int64(len(targets)):
			c.Problem(path+".quorum", strconv.FormatUint(uint64(p.GetQuorum()), 10), fmt.Sprintf("is more than the %d targets of %v", len(targets), a), "give at most as many")
		default:
			continue
		}
		break
	}
	out.Quorum = int(p.GetQuorum())
	return out
}

// takeover checks how the addresses of pools are taken over. It needs the pools.
func (c *checker) takeover(e *isthmusv1.Egress) {
	t := e.GetTakeover()
	if t == nil {
		return
	}
	out := egress.Takeover{
		Interval: c.duration("egress.takeover.interval", t.GetInterval(), 250*time.Millisecond, 100*time.Millisecond, 10*time.Second),
		Fall:     int(c.Number("egress.takeover.fall", t.GetFall(), 4, 2, 100)),
	}
	switch n := len(t.GetWatch()); {
	case t.GetLink() != "":
		if n > 0 {
			c.Problem("egress.takeover.watch", strings.Join(t.GetWatch(), ", "), "is given with `link`, which has the addresses of the other node", "remove one of the two")
			return
		}
		out.Paths = c.watchLink(t.GetLink())
	case n == 0:
		c.Missing("egress.takeover.watch", "give the `link` to the node that shares the pools, or remote inside addresses of the tunnels to the node that shares the pools")
	case n > maxWatched:
		c.Problem("egress.takeover.watch", strconv.Itoa(n), "are more than 8", "keep those that fail apart")
	}
	disabled := 0
	for i, text := range t.GetWatch()[:min(len(t.GetWatch()), maxWatched)] {
		at := fmt.Sprintf("egress.takeover.watch[%d]", i)
		a, ok := c.Address(at, text)
		if !ok {
			continue
		}
		remote := func(t Tunnel) bool {
			return slices.ContainsFunc(t.Inside, func(in tunnel.Inside) bool { return in.Remote == a })
		}
		if i := slices.IndexFunc(c.s.Tunnels, remote); i >= 0 && c.s.Tunnels[i].Disabled {
			disabled++
		}
		if !slices.ContainsFunc(c.s.Tunnels, remote) {
			c.Problem(at, text, "is not a remote inside address of a tunnel", "write both addresses in the `inside` of the tunnel to the other node")
		}
		if slices.ContainsFunc(out.Paths, func(w egress.Path) bool { return w.To == a }) {
			c.Problem(at, text, "is listed twice", "keep one of them")
		}
		out.Paths = append(out.Paths, egress.Path{To: a})
	}
	// A disabled tunnel does not answer, which must not look as if the other node were gone.
	if len(out.Paths) > 0 && disabled == len(out.Paths) {
		c.Problem("egress.takeover.watch", strings.Join(t.GetWatch(), ", "), "are only in tunnels that are disabled", "enable one of these tunnels, or remove `takeover`")
	}
	for i, p := range e.GetPools() {
		if p.GetProbes() == nil {
			c.Problem(fmt.Sprintf("egress.pools[%d].probes", i), "", "is required with `egress.takeover`", "only probes show whether an address leads here")
		}
	}
	for _, p := range c.s.Pools {
		for _, a := range p.Addresses {
			out.Addresses = append(out.Addresses, egress.SharedAddress{Address: a.Address, Public: a.Public})
		}
	}
	c.s.Takeover = out
}

// watchLink returns the paths to the node of a link: each lane, and the network outside them.
func (c *checker) watchLink(name string) (paths []egress.Path) {
	const at = "egress.takeover.link"
	link, ok := c.links[name]
	if !ok || len(link.Lanes) == 0 {
		c.Problem(at, name, "is not a link", "give the `name` of one of `links`")
		return nil
	}
	for _, lane := range link.Lanes {
		inside := c.tunnels[lane].Inside
		if len(inside) == 0 {
			return nil // the block of the link is refused
		}
		paths = append(paths, egress.Path{To: inside[0].Remote})
	}
	endpoint := c.tunnels[link.Lanes[0]].WireGuard.Endpoint
	if !endpoint.IsValid() {
		c.Problem(at, name, "has no `endpoint`, so that there is no second way to see the other node", "give the link an endpoint")
		return nil
	}
	return append(paths, egress.Path{Interface: c.s.Underlay.Interface, From: c.s.Underlay.Address, To: endpoint.Addr()})
}

func (c *checker) translationLog(path string, l *isthmusv1.TranslationLog) {
	if l == nil {
		return
	}
	const least = 64 << 20
	c.s.Log = egress.Log{Enabled: true, MaxBytes: egress.DefaultLogBytes,
		MaxAge: c.duration(path+".maxAge", l.GetMaxAge(), egress.DefaultLogAge, time.Hour, 10*365*24*time.Hour)}
	switch v := l.GetMaxBytes(); {
	case v == 0:
	case v < least || v > 1<<62:
		c.Problem(path+".maxBytes", fmt.Sprint(v), "is out of range", fmt.Sprintf("give %d (64 MiB) or more", least))
	default:
		c.s.Log.MaxBytes = int64(v)
	}
}
