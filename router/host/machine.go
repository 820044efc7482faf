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

// Machine has the capabilities of this kernel, as Open probed them.
type Machine struct {
	names  []string
	kept   string
	mu     sync.Mutex // one tune at a time
	writes atomic.Uint64
}

// Open probes the capabilities of the kernel, in a separate network namespace. It stores the former
// values of changed kernel parameters in the file kept, for Restore; empty: they are not stored.
func Open(kept string) (*Machine, error) {
	results, err := Probe()
	if err != nil {
		return nil, fmt.Errorf("probing the kernel: %w", err)
	}
	return &Machine{names: Names(results), kept: kept}, nil
}

// NewMachine returns a Machine without capabilities, which only sets kernel parameters. See Open
// for kept.
func NewMachine(kept string) *Machine { return &Machine{kept: kept} }

// Has reports whether the kernel has a capability.
func (m *Machine) Has(capability string) bool { return slices.Contains(m.names, capability) }

// Capabilities returns the capabilities of the kernel, by name.
func (m *Machine) Capabilities() []string { return m.names }

// Forward turns packet forwarding on or off.
func (m *Machine) Forward(on bool) error {
	return m.tune(Forwarding(on))
}

// Prepare sets the kernel parameters that a router with these interfaces needs, except forwarding.
// See router.Host.
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
	return m.forget(restored) // they belong to the machine again
}

// tune is Tune with the former values stored. An error of storing them, as on a full disk, is
// returned once and does not keep the parameters from being set.
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
		unkept = fmt.Errorf("storing the former values of kernel parameters: %w", unkept)
	}
	n, err := Tune(want)
	m.writes.Add(uint64(n))
	return errors.Join(unkept, err)
}

// Writes returns how many parameters were changed.
func (m *Machine) Writes() uint64 { return m.writes.Load() }
