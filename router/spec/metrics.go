package spec

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/tunnel"
)

const (
	// DefaultMetricsPort is the port of Prometheus' node exporter, which users of Prometheus know.
	DefaultMetricsPort = 9100
	maxMetricsListen   = 4
)

// metrics checks the addresses of the metrics over plain HTTP. It needs the tunnels, the
// attachments and the pools.
func (c *checker) metrics(m *isthmusv1.Metrics) {
	if m == nil {
		return
	}
	const remedy = "write the address in the `inside` of a tunnel, or give an address of the node that spokes have a route to"
	out := Metrics{Port: DefaultMetricsPort}
	switch port := m.GetPort(); {
	case port >= 1024 && port <= 65535:
		out.Port = uint16(port)
	case port != 0:
		c.Problem("metrics.port", strconv.FormatUint(uint64(port), 10), "is not a port from 1024 to 65535", "choose one in this range")
	}
	if len(m.GetFrom()) == 0 {
		c.Missing("metrics.from", "name the prefixes from which Prometheus reads, such as 10.0.0.0/24")
	}
	out.From = c.sourceList("metrics.from", m.GetFrom())
	if len(m.GetListen()) == 0 {
		c.Missing("metrics.listen", "give a local inside address of a tunnel, or an address of the node that spokes have a route to")
	}
	for i, text := range m.GetListen()[:c.limited("metrics.listen", len(m.GetListen()), maxMetricsListen)] {
		at := fmt.Sprintf("metrics.listen[%d]", i)
		a, ok := c.Address(at, text)
		if !ok {
			continue
		}
		if !c.spend(1 + len(c.s.Tunnels) + len(c.s.Attachments)) {
			return
		}
		local := func(t Tunnel) bool {
			return slices.ContainsFunc(t.Inside, func(in tunnel.Inside) bool { return in.Local.Addr() == a })
		}
		remote := func(t Tunnel) bool {
			return slices.ContainsFunc(t.Inside, func(in tunnel.Inside) bool { return in.Remote == a })
		}
		plain := func(x Attachment) bool { return x.Interface != c.s.Underlay.Interface }
		pooled := slices.IndexFunc(c.s.Pools, func(p nat.Pool) bool {
			return slices.ContainsFunc(p.Addresses, func(o nat.PoolAddress) bool { return o.Address == a || o.Public == a })
		})
		switch {
		case a == c.s.Underlay.Address || a == c.s.Underlay.PublicAddress:
			c.Problem(at, text, "is the address of the underlay, where strangers are", remedy)
		case pooled >= 0:
			c.Problem(at, text, "is an address of pool "+c.s.Pools[pooled].Name+", which partners reach", remedy)
		case slices.ContainsFunc(c.s.Tunnels, local):
		case a.IsLinkLocalUnicast() || slices.ContainsFunc(c.s.Tunnels, remote):
			c.Problem(at, text, "is not a local inside address of a tunnel", remedy)
		case !a.IsGlobalUnicast():
			c.Problem(at, text, "is not a unicast address of a host", remedy)
		case nat.PlatformOf(a).IsValid():
			c.notPlatform(at, text, a)
		case len(c.s.Tunnels) == 0 && !slices.ContainsFunc(c.s.Attachments, plain):
			c.Problem(at, text, "is served on tunnels and on attachments with an interface of their own, and there is none", "write the network of Prometheus in `attachments`, or use the port of the API")
		}
		if slices.Contains(out.Listen, a) {
			c.Problem(at, text, "is listed twice", "keep one of them")
		}
		out.Listen = append(out.Listen, a)
	}
	c.s.Metrics = out
}
