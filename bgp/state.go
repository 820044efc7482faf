package bgp

import (
	"net/netip"
	"time"
)

// SessionState is the state of a session: those of RFC 4271 section 8.2.2 and our own.
type SessionState string

// The states of a session.
const (
	Unknown     SessionState = "unknown" // the BGP process is not there to ask
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
)

// PeerState is what was seen of one session.
type PeerState struct {
	Name             string
	State            SessionState
	Since            time.Time
	RouterID         netip.Addr
	Received         uint32 // prefixes
	Accepted         uint32
	Announced        uint32
	MessagesIn       uint64
	MessagesOut      uint64
	LastError        string
	HoldTime         time.Duration // negotiated
	TimesUp          uint64
	GracefulRestart  bool      // negotiated
	NextTry          time.Time // of a quarantined or held-down session
	QuarantineReason string
}

// Path is one accepted way to a prefix.
type Path struct {
	Peer    string
	NextHop netip.Addr
	ASPath  []uint32 // AS_SEQUENCE members in order; sets are flattened at the end
	Stale   bool     // kept through a graceful restart
}

// Update is the whole set of usable paths of one prefix, best first: all of them are of equal preference and are used together. It replaces what was
// known; an empty set means that the prefix has no path.
type Update struct {
	Prefix netip.Prefix
	Paths  []Path
}
