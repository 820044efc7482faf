package capability

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/placement"
	"github.com/isthmus-net/isthmus/router/ports"
)

// TestRefusedIsToldOnce: what was refused belongs to a service, and is not repeated for each
// address of the pool.
func TestRefusedIsToldOnce(t *testing.T) {
	service := nat.Service{Destination: netip.MustParseAddr("198.51.100.7"), Protocol: unix.IPPROTO_TCP, Port: 443}
	other := service
	other.Port = 80
	figures := ports.Figures{}
	for _, a := range []string{"192.0.2.11", "192.0.2.12"} {
		for _, s := range []nat.Service{service, other} {
			figures.Uses = append(figures.Uses, placement.Use{Pool: "p", Address: netip.MustParseAddr(a), Service: s, Used: 1, Refused: uint64(s.Port)})
		}
	}
	refused := uint64(0)
	for _, p := range portUses(figures) {
		refused += p.Refused
	}
	if refused != 443+80 {
		t.Errorf("%d are refused, want %d", refused, 443+80)
	}
}
