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
	Kind      string
	Interface string
	Status    Status
	Since     time.Time      // of Status
	Remote    netip.AddrPort // outside address of the peer as seen; zero port when not known

	RxBytes, TxBytes     uint64
	RxPackets, TxPackets uint64

	LastError    string    // why it is or was last down, in words; empty when it never failed
	NextTry      time.Time // zero: none planned
	Algorithms   string    // negotiated
	Established  time.Time // of the IKE SA; zero when there is none
	Keyed        time.Time // of the present keys
	TimesUp      uint64
	NATTraversal bool
}
