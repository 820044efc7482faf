package topology

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"

	"github.com/isthmus-net/isthmus/tunnel/apipa"
	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

// pair makes the tunnels of all links. Links are sorted by name, and inside addresses are allocated
// over all nodes and clouds together.
func (c *checker) pair() {
	p := pairer{t: c.t}
	for _, l := range c.t.links {
		if err := p.link(l); err != nil {
			c.Problem(l.path, l.name, "cannot be given inside addresses: "+err.Error(), "remove a link")
		}
	}
	slices.SortFunc(c.t.Tunnels, func(a, b Tunnel) int { return cmp.Compare(a.Name, b.Name) })
}

type pairer struct {
	t    *Topology
	used apipa.Account
}

func (p *pairer) link(l link) error {
	a, b := p.t.gateway(l.a), p.t.gateway(l.b)
	switch {
	case a == nil:
		return p.lanes(l, p.t.node(l.a), p.t.node(l.b))
	case b == nil && a.Cloud == "azure":
		return p.azureNode(l, a, p.t.node(l.b))
	case b == nil:
		return p.gatewayNode(l, a, p.t.node(l.b))
	case a.Cloud == "aws":
		return p.awsGateway(l, a, b)
	}
	return p.azureGCP(l, a, b)
}

func (n *Node) end(instance int) End {
	return End{Name: n.Name, ASN: n.ASN, Instance: instance, Outside: Address{Addr: n.Public}}
}

// end returns an end of a gateway whose instances have an outside address each.
func (g *Gateway) end(instance int) End {
	return End{Name: g.Name, Cloud: g.Cloud, ASN: g.ASN, Instance: instance, Outside: Address{Name: fmt.Sprintf("%s_%d", upper(g.Name), instance)}}
}

// awsEnd returns the end of a tunnel of AWS: each tunnel has an outside address of its own.
func (g *Gateway) awsEnd(tunnel string, instance int) End {
	e := g.end(instance)
	e.Outside.Name = upper(tunnel)
	return e
}

// lanes makes the WireGuard tunnels between two nodes.
func (p *pairer) lanes(l link, a, b *Node) error {
	for i := range l.lanes {
		block, err := p.block(l, apipa.Default)
		if err != nil {
			return err
		}
		t := Tunnel{Name: fmt.Sprintf("%s-%d", l.name, i), Connection: l.name, Ends: [2]End{a.end(i), b.end(i)}}
		t.number(block)
		p.t.Tunnels = append(p.t.Tunnels, t)
	}
	return nil
}

// gatewayNode makes the tunnels from AWS, two for each connection, or Google, one from each
// interface, to a node. The gateway has the first host address of each /30: AWS requires it, Google
// accepts it.
func (p *pairer) gatewayNode(l link, g *Gateway, n *Node) error {
	for i := range 2 {
		block, err := p.block(l, preset(g).Inside.Is)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("%s-%d", l.name, i)
		e := g.end(i)
		if g.Cloud == "aws" {
			e = g.awsEnd(name, i)
		}
		t := Tunnel{Name: name, Connection: l.name, Key: name, Ends: [2]End{e, n.end(0)}}
		t.number(block)
		p.t.Tunnels = append(p.t.Tunnels, t)
	}
	return nil
}

// azureNode makes the tunnels from both instances of Azure to a node, which are one connection with
// one key. Azure has one address for the node, and one of each instance for the connection. A node
// answers both instances, so that no tunnel is dead.
func (p *pairer) azureNode(l link, g *Gateway, n *Node) error {
	rule := preset(g).Inside.Is
	own, err := p.block(l, rule)
	if err != nil {
		return err
	}
	for i := range 2 {
		theirs, err := p.block(l, rule)
		if err != nil {
			return err
		}
		t := Tunnel{Name: fmt.Sprintf("%s-%d", l.name, i), Connection: l.name, Key: l.name, Ends: [2]End{g.end(i), n.end(0)}}
		t.Ends[0].Inside, t.Ends[1].Inside = theirs, own
		p.t.Tunnels = append(p.t.Tunnels, t)
	}
	return nil
}

// awsGateway makes the tunnels from AWS to the two instances or interfaces of another cloud's
// gateway. Each of these is a customer gateway with a connection of two tunnels. Azure needs a
// connection for each of these four, and attempts each from both instances: AWS answers the
// instance whose address the customer gateway has.
func (p *pairer) awsGateway(l link, aws, g *Gateway) error {
	rule := preset(aws).Inside.Is
	if g.Cloud == "azure" {
		rule.From = preset(g).Inside.Is.From
	}
	for i := range 2 {
		for k := range 2 {
			block, err := p.block(l, rule)
			if err != nil {
				return err
			}
			name := fmt.Sprintf("%s-%d-%d", l.name, i, k)
			t := Tunnel{Name: name, Connection: name, Key: name, Ends: [2]End{aws.awsEnd(name, k), g.end(i)}}
			t.number(block)
			p.t.Tunnels = append(p.t.Tunnels, t)
		}
	}
	if g.Cloud == "azure" {
		for k := range 2 {
			p.dead(fmt.Sprintf("%s-%%d-%d", l.name, k), 1, "AWS answers only %s, the address of the customer gateway that has this tunnel")
		}
	}
	return nil
}

// azureGCP makes a tunnel between each instance of Azure and each interface of Google with the same
// number. Azure has one BGP address for an interface, but Google has an address of a /30 in each
// tunnel, so a second tunnel to the interface is not possible.
func (p *pairer) azureGCP(l link, azure, gcp *Gateway) error {
	rule := preset(gcp).Inside.Is
	rule.From = preset(azure).Inside.Is.From
	for i := range 2 {
		block, err := p.block(l, rule)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("%s-%d", l.name, i)
		t := Tunnel{Name: name, Connection: name, Key: name, Ends: [2]End{azure.end(i), gcp.end(i)}}
		t.number(block)
		p.t.Tunnels = append(p.t.Tunnels, t)
	}
	p.dead(l.name+"-%d", 0, "Google has a tunnel from this interface only to %s")
	return nil
}

// dead adds, for two connections of Azure whose names contain the number of the answered instance,
// the attempts of the other instance. That instance uses its address of the other connection,
// because a connection must name one for each.
func (p *pairer) dead(connection string, azure int, why string) {
	find := func(i int) Tunnel {
		name := fmt.Sprintf(connection, i)
		return p.t.Tunnels[slices.IndexFunc(p.t.Tunnels, func(t Tunnel) bool { return t.Name == name })]
	}
	for i := range 2 {
		t, other := find(i), find(1-i)
		t.Name += "-dead"
		t.Dead = fmt.Sprintf(why, t.Ends[azure].Outside.Name)
		t.Ends[azure] = other.Ends[azure]
		t.Ends[azure].Inside = netip.PrefixFrom(t.Ends[azure].Inside.Addr(), 32)
		p.t.Tunnels = append(p.t.Tunnels, t)
	}
}

// number assigns the first host address of a /30 to the first end, and the second to the second.
func (t *Tunnel) number(block netip.Prefix) {
	first := block.Addr().Next()
	t.Ends[0].Inside, t.Ends[1].Inside = netip.PrefixFrom(first, 30), netip.PrefixFrom(first.Next(), 30)
}

func preset(g *Gateway) cloud.Preset {
	p, _ := cloud.Lookup(g.Cloud)
	return p
}

// slotBits is the prefix length of the slots in which a link looks for inside addresses: the need
// of a link with two tunnels.
const slotBits = 29

// block takes the next free block for a link. The link's name chooses the slot in which it looks
// first, so that other links keep their addresses when one is added or removed, unless two names
// choose the same slot.
func (p *pairer) block(l link, rule apipa.Rule) (netip.Prefix, error) {
	var slots []netip.Prefix
	for _, from := range rule.From {
		for a := from.Addr(); from.Contains(a); {
			slots = append(slots, netip.PrefixFrom(a, slotBits))
			for range 1 << (32 - slotBits) {
				a = a.Next()
			}
		}
	}
	h := fnv.New32a()
	h.Write([]byte(l.name))
	start := int(h.Sum32() % uint32(len(slots)))
	rule.From = append(slices.Clone(slots[start:]), slots[:start]...)
	out, err := p.used.Free(rule)
	if err == nil {
		p.used.Use(out)
	}
	return out, err
}
