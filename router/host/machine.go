package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Machine is what this kernel can do, as it was when Open tried it.
type Machine struct {
	names  []string
	kept   string
	mu     sync.Mutex // one tune at a time
	writes atomic.Uint64
}

// Open tries what the kernel can do, in a network namespace of its own. The values that kernel parameters had before they were changed are
// kept in a file, for Restore; empty: they are not kept.
func Open(kept string) (*Machine, error) {
	results, err := Probe()
	if err != nil {
		return nil, fmt.Errorf("trying what the kernel can do: %w", err)
	}
	return &Machine{names: Names(results), kept: kept}, nil
}

// NewMachine returns a Machine that knows no capability, to set kernel parameters alone. See Open for kept.
func NewMachine(kept string) *Machine { return &Machine{kept: kept} }

// Has tells whether the kernel has a capability.
func (m *Machine) Has(capability string) bool { return slices.Contains(m.names, capability) }

// Capabilities returns what the kernel has, by name.
func (m *Machine) Capabilities() []string { return m.names }

// Forward has the kernel forward packets, or not.
func (m *Machine) Forward(on bool) error {
	return m.tune(Forwarding(on))
}

// Prepare sets the kernel parameters that a router with these interfaces needs, all but forwarding. See router.Host.
func (m *Machine) Prepare(underlay string, attached []string, portless time.Duration) error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("reading the size of the memory: %w", err)
	}
	want := slices.Concat(Sysctls(underlay, attached), Portless(portless), Conntrack(info.Totalram*uint64(info.Unit)))
	if portless > 0 {
		return m.tune(want)
	}
	restored, unread := m.restorable(Portless(time.Second))
	if err := errors.Join(m.tune(append(want, restored...)), unread); err != nil {
		return err
	}
	return m.forget(restored) // from now on they are the machine's again
}

// tune is Tune with the former values kept. That they cannot be kept, as on a full disk, is told once and keeps no router from routing.
func (m *Machine) tune(want []Sysctl) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	changing := map[string]string{}
	for _, s := range want {
		if have, err := os.ReadFile(filepath.Join("/proc/sys", s.Path)); err == nil && !s.meets(strings.TrimSpace(string(have))) {
			changing[s.Path] = strings.TrimSpace(string(have))
		}
	}
	unkept := keep(m.kept, changing)
	if unkept != nil {
		unkept = fmt.Errorf("keeping how kernel parameters were: %w", unkept)
	}
	n, err := Tune(want)
	m.writes.Add(uint64(n))
	return errors.Join(unkept, err)
}

// Writes returns how many parameters were changed.
func (m *Machine) Writes() uint64 { return m.writes.Load() }
