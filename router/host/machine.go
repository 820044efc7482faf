package host

import (
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
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

// Prepare sets the kernel parameters that a router with these interfaces needs, all but forwarding. See router.Host.
func (m *Machine) Prepare(underlay string, attached []string, portless time.Duration) error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("reading the size of the memory: %w", err)
	}
	n, err := Tune(slices.Concat(Sysctls(underlay, attached), Portless(portless), Conntrack(info.Totalram*uint64(info.Unit))))
	m.writes.Add(uint64(n))
	return err
}

// Writes returns how many parameters were changed.
func (m *Machine) Writes() uint64 { return m.writes.Load() }
