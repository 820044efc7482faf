package host

import (
	"fmt"
	"slices"
	"sync/atomic"
	"time"
)

// Machine is what this kernel can do, as it was when Open tried it.
type Machine struct {
	names  []string
	writes atomic.Uint64
}

// Open tries what the kernel can do, in a network namespace of its own.
func Open() (*Machine, error) {
	results, err := Probe()
	if err != nil {
		return nil, fmt.Errorf("trying what the kernel can do: %w", err)
	}
	return &Machine{names: Names(results)}, nil
}

// Has tells whether the kernel has a capability.
func (m *Machine) Has(capability string) bool { return slices.Contains(m.names, capability) }

// Capabilities returns what the kernel has, by name.
func (m *Machine) Capabilities() []string { return m.names }

// Forward has the kernel forward packets, or not.
func (m *Machine) Forward(on bool) error {
	n, err := Tune(Forwarding(on))
	m.writes.Add(uint64(n))
	return err
}

// Prepare sets the kernel parameters that a router with this underlay interface needs, all but forwarding. See router.Host.
func (m *Machine) Prepare(underlay string, portless time.Duration) error {
	n, err := Tune(append(Sysctls(underlay), Portless(portless)...))
	m.writes.Add(uint64(n))
	return err
}

// Writes returns how many parameters were changed.
func (m *Machine) Writes() uint64 { return m.writes.Load() }
