package apitest

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
)

// Machine is an api.Machine with two slots. A slot's signature is its version. It refuses a version
// that begins with "bad", and treats one that begins with "old" as older. A reboot completes at
// once, and a slot whose version begins with "sick" fails its trial then.
type Machine struct {
	mu      sync.Mutex
	none    bool
	running int
	version [2]string
	failed  string
	seal    string
	closed  bool
	Powered []string
}

// NewMachine returns a machine that runs version 1.0 from slot a.
func NewMachine() *Machine { return &Machine{version: [2]string{"1.0", ""}} }

// SetNone removes the slots from the machine.
func (m *Machine) SetNone() { m.mu.Lock(); defer m.mu.Unlock(); m.none = true }

// errNone is the error of a machine without slots.
var errNone = fmt.Errorf("%w: this machine has no slots", api.ErrPrecondition)

func slotName(i int) string { return string(rune('a' + i)) }

// Get implements api.Machine.
func (m *Machine) Get(context.Context) (*isthmusv1.Machine, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := &isthmusv1.Machine{Firmware: "uefi", SecureBoot: true, Lockdown: "integrity", Seal: m.seal}
	if m.closed {
		out.Sealed = "PCR 7 is not as it was"
	}
	if m.none {
		return out, nil
	}
	out.Keys, out.Failed = []string{"E7620F1842B4E81F"}, m.failed
	for i, v := range m.version {
		s := &isthmusv1.Slot{Name: slotName(i), Version: v, Running: i == m.running, Good: i == m.running}
		if v != "" {
			s.Serial, s.Key = 1764000000, "E7620F1842B4E81F"
		}
		out.Slots = append(out.Slots, s)
	}
	return out, nil
}

// Upgrade implements api.Machine.
func (m *Machine) Upgrade(ctx context.Context, h *isthmusv1.UpgradeHeader, body io.Reader) (*isthmusv1.UpgradeResponse, error) {
	version := strings.TrimSpace(h.Signature)
	if strings.HasPrefix(version, "bad") {
		return nil, fmt.Errorf("%w: signature does not belong to this slot", api.ErrInvalid)
	}
	if strings.HasPrefix(version, "old") && !h.Older {
		return nil, fmt.Errorf("%w: slot is older than the one that runs", api.ErrPrecondition)
	}
	n, err := io.Copy(io.Discard, io.LimitReader(body, h.Size))
	if err != nil {
		return nil, err
	}
	if n != h.Size {
		return nil, fmt.Errorf("%w: it ended after %d of %d bytes", api.ErrInvalid, n, h.Size)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.none {
		return nil, errNone
	}
	other := 1 - m.running
	m.version[other] = version
	m.failed = ""
	if h.Reboot {
		m.start(other)
	}
	return &isthmusv1.UpgradeResponse{Slot: slotName(other), Version: version}, nil
}

// start starts a slot. A sick slot fails, and the former one stays.
func (m *Machine) start(slot int) {
	if strings.HasPrefix(m.version[slot], "sick") {
		m.failed = "tunnels that were up before and are not: aws-0"
		return
	}
	m.running = slot
}

// Rollback implements api.Machine.
func (m *Machine) Rollback(context.Context) (*isthmusv1.RollbackSlotResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch other := 1 - m.running; {
	case m.none:
		return nil, errNone
	case m.version[other] == "":
		return nil, fmt.Errorf("%w: slot %s: slot is empty", api.ErrPrecondition, slotName(other))
	default:
		m.start(other)
		return &isthmusv1.RollbackSlotResponse{Slot: slotName(other)}, nil
	}
}

// Reboot implements api.Machine.
func (m *Machine) Reboot(context.Context) error { return m.power("reboot") }

// PowerOff implements api.Machine.
func (m *Machine) PowerOff(context.Context) error { return m.power("poweroff") }

func (m *Machine) power(verb string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.none {
		return errNone
	}
	m.Powered = append(m.Powered, verb)
	m.closed = m.seal != "" && verb == "reboot" // as with another TPM
	return nil
}

// Recovery is the recovery string of each seal.
const Recovery = "AAAA-BBBB"

// Seal implements api.Machine.
func (m *Machine) Seal(_ context.Context, r *isthmusv1.SealRequest) (*isthmusv1.SealResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.With != "" && r.With != "tpm2" {
		return nil, fmt.Errorf("%w: seal %q", api.ErrInvalid, r.With)
	}
	if m.closed && !r.Abandon {
		return nil, fmt.Errorf("%w: the seal is closed", api.ErrPrecondition)
	}
	m.seal, m.closed = r.With, false
	if r.With == "" {
		return &isthmusv1.SealResponse{}, nil
	}
	return &isthmusv1.SealResponse{Recovery: Recovery}, nil
}

// Unseal implements api.Machine.
func (m *Machine) Unseal(_ context.Context, r *isthmusv1.UnsealRequest) (*isthmusv1.UnsealResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.Recovery != Recovery || m.seal == "" {
		return nil, fmt.Errorf("%w: the recovery string belongs to another seal", api.ErrInvalid)
	}
	m.closed = false
	return &isthmusv1.UnsealResponse{}, nil
}
