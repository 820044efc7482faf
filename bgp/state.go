package bgp

import (
	"net/netip"
	"time"
)

// SessionState is the state of a session: those of RFC 4271 section 8.2.2 and our own.
type SessionState string

// The states of a session.
const (
	Unknown     SessionState = "unknown" // the BGP process is not running
	Idle        SessionState = "idle"
	Connect     SessionState = "connect"
	Active      SessionState = "active"
	OpenSent    SessionState = "opensent"
	OpenConfirm SessionState = "openconfirm"
	Established SessionState = "established"
	// Quarantined sessions are held down because their peer crashed the BGP process.
	Quarantined SessionState = "quarantined"
	// PrefixLimit sessions are held down because the peer sent more prefixes than allowed.
	PrefixLimit SessionState = "prefix-limit"
	// Disabled sessions are shut down by the document.
	Disabled SessionState = "disabled"
)

// SessionStates lists every state.
var SessionStates = []SessionState{Unknown, Idle, Connect, Active, OpenSent, OpenConfirm, Established, Quarantined, PrefixLimit, Disabled}

// PeerState is the observed state of one session.
type PeerState struct {
	Name  string
	State SessionState
	Since time.Time // of State
	// Restarting means that the session is not up and its paths are kept: the peer restarts
	// gracefully (RFC 4724), or our own BGP process does. While it is false, a session that is not
	// Established has no path, even if Updates are still in flight.
	Restarting bool
	RouterID   netip.Addr
	Received   uint32 // prefixes the peer sent
	Accepted   uint32 // prefixes whose used paths include one of the peer
	Announced  uint32 // prefixes announced to the peer
	// prefixes not announced because of Export.MaxPrefixes
	HeldBack         uint32
	MessagesIn       uint64
	MessagesOut      uint64
	LastError        string
	LastErrorAt      time.Time     // of LastError
	HoldTime         time.Duration // negotiated
	TimesUp          uint64
	GracefulRestart  bool      // negotiated
	BothFamilies     bool      // negotiated: the session carries IPv4 and IPv6
	NextTry          time.Time // of a quarantined or held-down session
	QuarantineReason string
	Filtered         Filtered
}

// Filtered counts the results of filtering a peer's messages, since the daemon was started or the
// peer was added.
type Filtered struct {
	Messages uint64 // sent by the peer
	// UPDATE messages treated as withdrawals because they were malformed (RFC 7606)
	Withdrawn uint64
	Resets    uint64 // sessions and connections ended because of a malformed message
	// Discarded are the path attributes removed from UPDATE messages, by type: those that this node
	// does not use, and malformed ones. At most 256.
	Discarded []Discarded
	// Note is the reason why the last malformed UPDATE of the session was treated as a withdrawal;
	// empty: none was.
	Note string
}

// Discarded counts the path attributes of one type.
type Discarded struct {
	Type  uint8
	Count uint64
}

// Path is one accepted path to a prefix. Traffic goes through the tunnel of Peer; NextHop is the
// peer's claim and must not steer anything.
type Path struct {
	Peer    string
	NextHop netip.Addr
	ASPath  []uint32 // AS_SEQUENCE members in order; sets are flattened at the end
	// Kept means that the path is not passed on to external peers (NO_EXPORT, NO_ADVERTISE, RFC
	// 1997).
	Kept bool
}

// Update is the complete set of usable paths of one prefix, best first. All of them have equal
// preference and are used together: the same LOCAL_PREF, AS_PATH length, ORIGIN and
// MULTI_EXIT_DISC, and all from external or all from internal peers; the neighbouring AS may
// differ. An Update replaces the former paths; an empty set means that the prefix has none.
type Update struct {
	Prefix netip.Prefix
	Paths  []Path
}
