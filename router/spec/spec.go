package spec

import (
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Spec is a checked document. Defaults that depend on nothing else are filled in; what depends on the ledger (ids,
// interface names, allocated inside addresses) is left to router/plan.
type Spec struct {
	Node     Node
	Underlay Underlay
	Tunnels  []Tunnel // in the order of the document
	Peers    []Peer
	Announce []netip.Prefix
	Routes   []StaticRoute
	Pools    []nat.Pool
	Policies []nat.Policy
	Maps     []PrefixMap
	Zones    []nat.Zone
	// Attachments are the plain interfaces that lead to networks.
	Attachments []Attachment
	Access      Access
	// Health has the pools that are probed, or that announce something.
	Health []egress.ProbedPool
	// Proxies are the proxies of policies that are probed, by the policies' names.
	Proxies []egress.ProbedPool
	// Names lacks the proxy's interfaces.
	Names egress.DNS
	// ProxyFrom are the tunnels and attachments whose hosts may ask the proxy at addresses that are no inside address; empty: all.
	ProxyFrom []string
	// Takeover lacks the interfaces and local addresses of its ways.
	Takeover egress.Takeover

	Log egress.Log
	// Secrets are the fields that name secrets.
	Secrets []SecretUse
	// PortlessTimeout is how long flows without ports are remembered; 0: as the machine has it.
	PortlessTimeout time.Duration

	rules  int     // that the policies make, each name with one address of each family
	lines  Lines   // of the text in which the document came, before its policies were edited
	layout *layout // nil: its text cannot be edited in place
}

// policiesField is where the policies are.
const policiesField = "egress.policies"

// Line returns the line of a field in the document's text, or of the nearest enclosing one that the text has, from 1; 0
// when there is none or the document was not text. Policies have no lines of their own: there may be ten thousand, and they are edited.
func (s *Spec) Line(path string) int {
	line := s.lines.line(path)
	if s.layout != nil && line > s.lines.line(policiesField) {
		line += s.layout.added
	}
	return line
}

// Node is the router itself.
type Node struct {
	Name     string
	ASN      uint32
	RouterID netip.Addr
}

// Underlay is the interface toward the Internet.
type Underlay struct {
	Interface     string
	Address       netip.Addr
	PublicAddress netip.Addr
	MTU           int
}

// Access is who may reach the node itself.
type Access struct {
	// API and SSH are the sources that may reach these.
	API, SSH []netip.Prefix
	// Input is "drop" or "keep"; empty: as the daemon was started.
	Input string
	// SSHKeys may log in by SSH: lines of authorized_keys.
	SSHKeys []string
}

// Tunnel is a checked tunnel. Config lacks ID, Interface and Underlay, and Inside when it is to be allocated.
type Tunnel struct {
	tunnel.Config
	MSS   uint16 // 0: from the MTU
	Cloud string // name of a preset of tunnel/cloud; empty: none
	// Sources are those that the document gives; empty: none, and the planner finds them.
	Sources []netip.Prefix
}

// Attachment is a checked plain interface that leads to a network.
type Attachment struct {
	Name, Interface string
	Sources         []netip.Prefix
	Routes          []AttachmentRoute
	path            string
}

// Path returns the field path of the attachment, for problems that only the planner can see.
func (a Attachment) Path() string { return a.path }

// AttachmentRoute is a checked route to a network behind an attachment. Via is zero when the network is on the link.
type AttachmentRoute struct {
	Prefix netip.Prefix
	Via    netip.Addr
}

// Peer is a checked BGP peer. The embedded Peer lacks Interface, and its addresses and TTL when they follow from
// the tunnel.
type Peer struct {
	bgp.Peer
	// EitherOpens is true when the document leaves it to the plan who opens the session.
	EitherOpens bool
	path        string
}

// Path returns the field path of the peer, for problems that only the planner can see.
func (p Peer) Path() string { return p.path }

// StaticRoute is a checked static route.
type StaticRoute struct {
	Prefix    netip.Prefix
	Tunnels   []string
	Blackhole bool
}

// PrefixMap is a checked map of a prefix behind tunnels to another one.
type PrefixMap struct {
	Tunnels        []string
	Inside, Mapped netip.Prefix
}
