package tunnel

import (
	"net/netip"
	"time"
)

// Status says whether a tunnel carries traffic.
type Status string

// The states of a tunnel. Unknown is not Down: nothing is concluded from it.
const (
	Unknown    Status = "unknown"
	Down       Status = "down"
	Connecting Status = "connecting"
	Up         Status = "up"
)

// State is what was read back of one tunnel.
type State struct {
	Name      string
	Kind      Kind
	Interface string
	Status    Status
	Since     time.Time      // of Status
	Remote    netip.AddrPort // outside address of the peer as seen; zero port when not known

	RxBytes, TxBytes     uint64
	RxPackets, TxPackets uint64

	LastError string   // why it is or was last down, in words; empty when it never failed
	Failure   Failure  // the same for programs; zero when nothing is wrong or nothing is known
	Evidence  Evidence // what the peer let out about itself since the tunnel was last up
	// since when the driver would have noticed an IKE packet; zero: it does not look
	Listening time.Time
	// when the peer's address last sent one, while the tunnel is not up; zero: not since Listening
	Heard        time.Time
	NextTry      time.Time // zero: none planned
	Algorithms   string    // negotiated
	Established  time.Time // of the IKE SA; zero when there is none
	Keyed        time.Time // of the present keys
	TimesUp      uint64
	NATTraversal bool
}

// Reason says why a negotiation failed.
type Reason string

// The reasons. Those about what the peer refused come from its notifications (RFC 7296, section
// 3.10.1), which say no more than that; those about what this node refused come with what the peer
// wanted, in Evidence.
const (
	NoAnswer        Reason = "no-answer"        // to IKE_SA_INIT
	NoAnswerAuth    Reason = "no-answer-auth"   // to IKE_AUTH, although IKE_SA_INIT was answered
	PeerLost        Reason = "peer-lost"        // an established IKE SA is answered no more
	IKERefused      Reason = "ike-refused"      // NO_PROPOSAL_CHOSEN to IKE_SA_INIT
	IKEUnacceptable Reason = "ike-unacceptable" // the peer's IKE proposals are not ours
	IKEVersion      Reason = "ike-version"      // the peer speaks IKEv1
	ESPRefused      Reason = "esp-refused"      // NO_PROPOSAL_CHOSEN to a first CHILD SA
	ESPUnacceptable Reason = "esp-unacceptable" // the peer's ESP proposals are not ours
	RekeyRefused    Reason = "rekey-refused"    // the CHILD SA is up and cannot be renewed
	// AUTHENTICATION_FAILED: the peer says neither what nor why
	AuthRefused Reason = "auth-refused"
	KeyDiffers  Reason = "key-differs" // what the peer signed was signed with another PSK
	// the peer presented another identity, or called us by another
	Identity       Reason = "identity"
	TSRefused      Reason = "ts-refused"       // TS_UNACCEPTABLE
	TSUnacceptable Reason = "ts-unacceptable"  // the peer's traffic selectors are not ours
	TSNarrowed     Reason = "ts-narrowed"      // up, for less than everything
	ClosedByPeer   Reason = "closed-by-peer"   // it sent a DELETE
	Waiting        Reason = "waiting-for-peer" // respondOnly, and the peer has not called
	Local          Reason = "local"            // the kernel or charon refused on this node
	Other          Reason = "other"            // LastError has all there is
)

// Failure is a reason and since when it has been the same.
type Failure struct {
	Reason Reason
	Since  time.Time
}

// Evidence is what a peer tells when it calls itself, which its refusals never do. Texts are as
// charon logs them.
type Evidence struct {
	// IKE proposals that this node had to refuse, as
	// "AES_CBC_128/HMAC_SHA1_96/PRF_HMAC_SHA1/MODP_2048"
	IKEOffer  string
	ESPOffer  string // the same of a CHILD SA
	Identity  string // of itself, when no tunnel fits
	CalledUs  string // identity by which it asked for this node then
	Selectors string // its traffic selectors that were refused
	IKEv1     bool   // it called with IKEv1
	OtherKey  bool   // it proved to have another PSK
	HalfOpen  bool   // it called, was answered, and did not go on
}

// With returns the evidence with what more is known added to it; newer texts stand for older ones.
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

// Caller is an address that has asked for an IKE SA and that no tunnel is for.
type Caller struct {
	Address     netip.Addr
	First, Last time.Time
	Attempts    uint64
}
