// Package topology reads one document about several nodes and the clouds' own VPN gateways around
// them, pairs their ends to tunnels, and writes the configuration of each: the nodes' documents,
// and the clouds' commands or Terraform. It is pure: the same text gives the same output, whatever
// the order of its lists.
package topology

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/spec"
)

// Topology is a checked topology. Its lists are sorted by name.
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

// Tunnel is a pair of ends that one of them attempts. A gateway is before a node, and gateways are
// sorted by their clouds' names.
type Tunnel struct {
	Name string
	// Connection is the name of the cloud's object that contains the tunnel, or of the lanes' link.
	Connection string
	Ends       [2]End
	Key        string // name of the pre-shared key; empty for WireGuard
	// Dead is the reason why the tunnel never comes up, though a cloud attempts it; empty if it
	// does.
	Dead string
}

// End is one end of a tunnel.
type End struct {
	Name  string // of a node or gateway
	Cloud string // empty for a node
	// Instance numbers the instances of an end: Azure's instances, Google's interfaces, the tunnels
	// of a connection of AWS, lanes.
	Instance int
	ASN      uint32
	Outside  Address
	Inside   netip.Prefix
}

// Address is an outside address, which may still be unknown.
type Address struct {
	Name string     // of the variable that holds it; empty for a node
	Addr netip.Addr // not valid while unknown
}

// String returns the address, or its name while the address is unknown.
func (a Address) String() string {
	if a.Addr.IsValid() {
		return a.Addr.String()
	}
	return a.Name
}

// Key is the source of a pre-shared key.
type Key struct {
	Name        string
	Environment string // name of the variable
	// set if the key is not in the environment; then Environment is its name in commands
	File string
}

// link is a link of the document.
type link struct {
	name  string
	a, b  string // a gateway first
	lanes int
	path  string
}

// Read decodes and checks a topology. The outside addresses in set are added to those of the text.
// The Topology may be used only if there are no problems.
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

// OutsideAddress is an address that a cloud chooses.
type OutsideAddress struct {
	Address
	Gateway string
}

// Outside returns the addresses that the clouds choose, sorted by name.
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

// upper returns a name of a variable.
func upper(name string) string { return strings.ToUpper(strings.ReplaceAll(name, "-", "_")) }

// lower returns a name of a Terraform object.
func lower(name string) string { return strings.ToLower(strings.ReplaceAll(name, "-", "_")) }

// key returns the source of a key.
func (t *Topology) key(name string) Key {
	return t.Keys[slices.IndexFunc(t.Keys, func(k Key) bool { return k.Name == name })]
}

// sharedReach reports whether two spokes share a group.
func (t *Topology) sharedReach(a, b Spoke) bool { return t.reach[a.Name][b.Name] }
