package spec

import (
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Spec is a checked document. It has the defaults that depend on nothing else; router/plan adds the
// values that depend on the ledger: IDs, interface names and allocated inside addresses.
type Spec struct {
	Node     Node
	Underlay Underlay
	// DerivedMTU means that the document does not give underlay.mtu; see DefaultMTU.
	DerivedMTU bool
	Tunnels    []Tunnel // in the order of the document; those of Links follow
	Links      []Link
	Peers      []Peer
	Announce   []netip.Prefix
	Routes     []StaticRoute
	Pools      []nat.Pool
	Policies   []nat.Policy
	Maps       []PrefixMap
	Zones      []nat.Zone
	// Attachments are the plain interfaces that lead to networks.
	Attachments []Attachment
	Access      Access
	Metrics     Metrics
	Exports     []Export
	// Health has the pools with probes or announcements.
	Health []egress.ProbedPool
	// Proxies are the probed proxies of policies, by the names of the policies.
	Proxies []egress.ProbedPool
	// Names lacks the proxy's interfaces.
	Names egress.DNS
	// ProxyFrom are the tunnels and attachments with hosts that may query the DNS proxy at
	// addresses other than inside addresses; empty: all.
	ProxyFrom []string
	// Takeover lacks the interfaces and local addresses of its paths.
	Takeover egress.Takeover

	Log egress.Log
	// Secrets are the fields that name secrets.
	Secrets []SecretUse
	// PortlessTimeout is the conntrack timeout of flows without ports; 0: the machine's.
	PortlessTimeout time.Duration

	rules  int     // of the policies, each name counted with one address of each family
	lines  Lines   // of the text before its policies were edited
	layout *layout // nil: the text cannot be edited in place
}

// policiesField is the path of the policies.
const policiesField = "egress.policies"

// Line returns the line of a field in the document's text, from 1, or that of the nearest enclosing
// field of the text. It returns 0 when there is none or the document has no text. Single policies
// have no lines: there may be ten thousand, and edits move them.
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
	// Transit means that forwarded packets take the default route of tunnels.
	Transit bool
}

// Access is who may reach the node itself.
type Access struct {
	// API and SSH are the sources that may reach these.
	API, SSH []netip.Prefix
	// Input is "drop" or "keep"; empty: the default of the daemon.
	Input string
	// SSHKeys may log in by SSH: lines of authorized_keys.
	SSHKeys []string
}

// Metrics are the metrics over plain HTTP. Port 0: there are none.
type Metrics struct {
	Listen []netip.Addr
	Port   uint16
	From   []netip.Prefix
}

// Export is a receiver of events: a syslog server, or a webhook.
type Export struct {
	Name     string
	Syslog   netip.AddrPort
	Protocol string // of syslog: tcp or udp
	Webhook  string
	Secret   secret.Ref
	// MinSeverity is info, warning or error.
	MinSeverity string
}

// Tunnel is a checked tunnel. Config lacks ID, Interface and Underlay, and Inside if it is
// allocated.
type Tunnel struct {
	tunnel.Config
	MSS   uint16 // 0: from the MTU
	Cloud string // name of a preset of tunnel/cloud; empty: none
	// Sources are those of the document; empty: router/plan derives them.
	Sources []netip.Prefix
	path    string
}

// Path returns the field path of the tunnel, or of the link whose lane it is.
func (t Tunnel) Path() string { return t.path }

// Link is a checked link to another node. Its lanes are Tunnels.
type Link struct {
	Name, Node string
	Lanes      []string // names of the tunnels, by number
	// Inside are the addresses of the link itself, which its lanes share.
	Inside []tunnel.Inside
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

// AttachmentRoute is a checked route to a network behind an attachment. A zero Via means on-link.
type AttachmentRoute struct {
	Prefix netip.Prefix
	Via    netip.Addr
}

// Peer is a checked BGP peer. The embedded Peer lacks Interface, and its addresses and TTL if they
// follow from the tunnel.
type Peer struct {
	bgp.Peer
	// EitherOpens is true when router/plan decides which side opens the session.
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
	// Resilient means that Tunnels are the lanes of one link.
	Resilient bool
}

// PrefixMap is a checked map of a prefix behind tunnels to another prefix.
type PrefixMap struct {
	Tunnels        []string
	Inside, Mapped netip.Prefix
}
