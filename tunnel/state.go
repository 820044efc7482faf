package tunnel

import (
	"net/netip"
	"time"
)

// Status says whether a tunnel carries traffic.
type Status string

// The states of a tunnel. Unknown is not Down: no conclusion follows from it.
const (
	Unknown    Status = "unknown"
	Down       Status = "down"
	Connecting Status = "connecting"
	// Suspect means that the keys are negotiated and nothing shows that data passes both ways: see
	// State.Silence. Routes do not use the tunnel.
	Suspect Status = "suspect"
	Up      Status = "up"
	// Disabled means that the document shuts the tunnel down.
	Disabled Status = "disabled"
)

// Statuses lists every state, the best first.
var Statuses = []Status{Up, Suspect, Connecting, Down, Disabled, Unknown}

// State is the observed state of one tunnel.
type State struct {
	Name      string
	Kind      Kind
	Interface string
	Status    Status
	Since     time.Time      // of Status
	Remote    netip.AddrPort // outside address of the peer as seen; zero port when not known

	RxBytes, TxBytes     uint64
	RxPackets, TxPackets uint64

	LastError string   // why it is or was last down, as text; empty if it never failed
	Failure   Failure  // the same for programs; zero without a failure, or if it is unknown
	Evidence  Evidence // what the peer revealed about itself since the tunnel was last up
	// since when the driver would have noticed an IKE packet; zero: it does not watch
	Listening time.Time
	// when the peer's address last sent one, while the tunnel is not up; zero: not since Listening
	Heard        time.Time
	NextTry      time.Time // zero: none planned
	Algorithms   string    // negotiated
	Established  time.Time // of the IKE SA; zero when there is none
	Keyed        time.Time // of the present keys
	TimesUp      uint64
	NATTraversal bool

	Silence Silence // while data does not pass both ways although the keys are negotiated
	// when data last came; zero: not since the tunnel came up
	Data time.Time
	// Answers describes the answers to echo requests: "off", "answered", "unanswered" or "never
	// answered"; empty: unknown.
	Answers string
	Device  Device // of a WireGuard tunnel
}

// Device is the state of a WireGuard device, without secrets.
type Device struct {
	PublicKey     [32]byte // zero: the device has no private key
	PeerPublicKey [32]byte
	Preshared     bool
	Port          uint16
	Embedded      bool // in the daemon, not in the kernel
	Keepalive     time.Duration
	// Stranger is the address that last sent a handshake of a key that is not the peer's, or for a
	// key that is not ours, and StrangerAt when. Only an embedded device sees it.
	Stranger   netip.AddrPort
	StrangerAt time.Time
	// OtherKey means that the stranger has another public key for this side.
	OtherKey bool
}

// Silence says which direction of a tunnel carries no data although its keys are negotiated.
type Silence struct {
	Since   time.Time // when the last data came, or when the tunnel came up
	Sent    uint64    // packets sent since then that the peer should have answered
	Inbound bool      // nothing comes from the peer; false: the peer's packets come, but no answers
	Ever    bool      // data came with the present keys, or before
}

// Reason is the reason why a negotiation failed.
type Reason string

// The reasons. Refusals by the peer come from its notifications (RFC 7296, section 3.10.1), which
// contain no details; refusals by this node come with the peer's offer, in Evidence.
const (
	NoAnswer     Reason = "no-answer"      // to IKE_SA_INIT
	NoAnswerAuth Reason = "no-answer-auth" // to IKE_AUTH, although IKE_SA_INIT was answered
	// the peer no longer answers on an established IKE SA
	PeerLost        Reason = "peer-lost"
	IKERefused      Reason = "ike-refused"      // NO_PROPOSAL_CHOSEN to IKE_SA_INIT
	IKEUnacceptable Reason = "ike-unacceptable" // the peer's IKE proposals are not ours
	IKEVersion      Reason = "ike-version"      // the peer speaks IKEv1
	ESPRefused      Reason = "esp-refused"      // NO_PROPOSAL_CHOSEN to a first CHILD SA
	ESPUnacceptable Reason = "esp-unacceptable" // the peer's ESP proposals are not ours
	RekeyRefused    Reason = "rekey-refused"    // the CHILD SA is up and cannot be renewed
	// AUTHENTICATION_FAILED, which has no details
	AuthRefused Reason = "auth-refused"
	KeyDiffers  Reason = "key-differs" // the peer authenticated with another PSK
	Certificate Reason = "certificate" // the peer authenticated with a certificate
	// the peer presented another identity, or asked for another one of this node
	Identity       Reason = "identity"
	TSRefused      Reason = "ts-refused"       // TS_UNACCEPTABLE
	TSUnacceptable Reason = "ts-unacceptable"  // the peer's traffic selectors are not ours
	TSNarrowed     Reason = "ts-narrowed"      // up, with narrower selectors
	ClosedByPeer   Reason = "closed-by-peer"   // it sent a DELETE
	Waiting        Reason = "waiting-for-peer" // respondOnly, and the peer has not initiated
	Local          Reason = "local"            // the kernel or charon refused on this node
	NoHandshake    Reason = "no-handshake"     // WireGuard: the peer does not answer
	NoEndpoint     Reason = "no-endpoint"      // WireGuard: the peer has not called yet
	NoData         Reason = "no-data"          // the keys are negotiated, and no data comes
	OneWay         Reason = "one-way"          // the peer's data comes, but no answer to ours
	Other          Reason = "other"            // see LastError
)

// Failure is a reason, and since when it has been the same.
type Failure struct {
	Reason Reason
	Since  time.Time
}

// Evidence is what a peer reveals when it initiates, unlike in its refusals. Texts are as charon
// logs them.
type Evidence struct {
	// IKE proposals that this node had to refuse, as
	// "AES_CBC_128/HMAC_SHA1_96/PRF_HMAC_SHA1/MODP_2048"
	IKEOffer  string
	ESPOffer  string // the same of a CHILD SA
	Identity  string // the peer's identity, if no tunnel matches
	CalledUs  string // the identity that it requested of this node then
	Selectors string // its traffic selectors that were refused
	IKEv1     bool   // it initiated with IKEv1
	OtherKey  bool   // its authentication shows that it has another PSK
	HalfOpen  bool   // it initiated, was answered, and did not continue
}

// With returns the evidence merged with more; newer texts replace older ones.
func (e Evidence) With(more Evidence) Evidence {
	for _, f := range []struct{ to, from *string }{
		{&e.IKEOffer, &more.IKEOffer}, {&e.ESPOffer, &more.ESPOffer}, {&e.Identity, &more.Identity},
		{&e.CalledUs, &more.CalledUs}, {&e.Selectors, &more.Selectors},
	} {
		if *f.from != "" {
			*f.to = *f.from
		}
	}
	e.IKEv1 = e.IKEv1 || more.IKEv1
	e.OtherKey = e.OtherKey || more.OtherKey
	e.HalfOpen = e.HalfOpen || more.HalfOpen
	return e
}

// Caller is an address that has requested an IKE SA without a matching tunnel.
type Caller struct {
	Address     netip.Addr
	First, Last time.Time
	Attempts    uint64
}
