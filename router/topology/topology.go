// Package topology knows several nodes and the clouds' own VPN gateways around them from one
// document, pairs their ends to tunnels, and writes what each of them needs: the nodes' documents,
// and the clouds' commands or Terraform. It is pure: the same text gives the same output, in
// whatever order its lists are.
package topology

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/spec"
)

// Topology is a checked topology. Lists are in the order of names.
type Topology struct {
	Gateways []Gateway
	Nodes    []Node
	Tunnels  []Tunnel
	Keys     []Key // of the tunnels of gateways

	links []link
	reach map[string]map[string]bool // spoke -> spokes that it may reach
	known map[string]netip.Addr      // outside addresses, by name
}

// Gateway is a VPN gateway of a cloud.
type Gateway struct {
	Name, Cloud            string
	ASN                    uint32
	Region, Network, Group string
	Spokes                 []Spoke

	path string
}

// Spoke is a network behind a gateway.
type Spoke struct {
	Name     string
	Prefixes []netip.Prefix
}

// Node is an isthmus node.
type Node struct {
	Name   string
	ASN    uint32
	Public netip.Addr

	message *isthmusv1.TopologyNode
	path    string
}

// Tunnel is one pairing of two ends that one of them attempts. A gateway is before a node, and
// gateways are in the order of their clouds' names.
type Tunnel struct {
	Name string
	// Connection is the name of the cloud's object to which the tunnel belongs, or of the lanes'
	// link.
	Connection string
	Ends       [2]End
	Key        string // name of the pre-shared key; empty for WireGuard
	// Dead says why the tunnel never comes up, though a cloud attempts it; empty when it does.
	Dead string
}

// End is one end of a tunnel.
type End struct {
	Name  string // of a node or gateway
	Cloud string // empty for a node
	// Instance counts what the end has several of: Azure's instances, Google's interfaces, the
	// tunnels of a connection of AWS, lanes.
	Instance int
	ASN      uint32
	Outside  Address
	Inside   netip.Prefix
}

// Address is an outside address, which may not be known yet.
type Address struct {
	Name string     // of the variable that holds it; empty for a node
	Addr netip.Addr // not valid when it is not known
}

// String returns the address, or its name while it is not known.
func (a Address) String() string {
	if a.Addr.IsValid() {
		return a.Addr.String()
	}
	return a.Name
}

// Key says where a pre-shared key comes from.
type Key struct {
	Name        string
	Environment string // name of the variable
	// when it is not in the environment: then Environment is what commands call it
	File string
}

// link is what the document connects.
type link struct {
	name  string
	a, b  string // a gateway first
	lanes int
	path  string
}

// Read decodes and checks a topology. Outside addresses in set come on top of those of the text.
// The Topology may be used only when there are no problems.
func Read(text []byte, set map[string]netip.Addr) (*Topology, spec.Problems) {
	m := &isthmusv1.Topology{}
	lines, problems := spec.DecodeMessage(text, m)
	c := &checker{Fields: spec.NewFields(lines, problems), t: &Topology{reach: map[string]map[string]bool{}, known: map[string]netip.Addr{}}}
	c.check(m, set)
	return c.t, c.Problems()
}

func (t *Topology) gateway(name string) *Gateway {
	i := slices.IndexFunc(t.Gateways, func(g Gateway) bool { return g.Name == name })
	if i < 0 {
		return nil
	}
	return &t.Gateways[i]
}

func (t *Topology) node(name string) *Node {
	i := slices.IndexFunc(t.Nodes, func(n Node) bool { return n.Name == name })
	if i < 0 {
		return nil
	}
	return &t.Nodes[i]
}

// Clouds returns the clouds that have gateways.
func (t *Topology) Clouds() (out []string) {
	for _, g := range t.Gateways {
		if !slices.Contains(out, g.Cloud) {
			out = append(out, g.Cloud)
		}
	}
	slices.Sort(out)
	return out
}

// OutsideAddress is what is known of an address that a cloud chooses.
type OutsideAddress struct {
	Address
	Gateway string
}

// Outside returns the addresses that the clouds choose, in the order of names.
func (t *Topology) Outside() (out []OutsideAddress) {
	for _, tu := range t.Tunnels {
		for _, e := range tu.Ends {
			o := OutsideAddress{e.Outside, e.Name}
			if e.Cloud != "" && !slices.Contains(out, o) {
				out = append(out, o)
			}
		}
	}
	slices.SortFunc(out, func(a, b OutsideAddress) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// upper makes a name of a variable.
func upper(name string) string { return strings.ToUpper(strings.ReplaceAll(name, "-", "_")) }

// lower makes a name of a Terraform object.
func lower(name string) string { return strings.ToLower(strings.ReplaceAll(name, "-", "_")) }

// key returns the source of a key.
func (t *Topology) key(name string) Key {
	return t.Keys[slices.IndexFunc(t.Keys, func(k Key) bool { return k.Name == name })]
}

// sharedReach reports whether two spokes share a group.
func (t *Topology) sharedReach(a, b Spoke) bool { return t.reach[a.Name][b.Name] }
