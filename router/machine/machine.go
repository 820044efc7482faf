// Package machine manages the machine below the router: its slots, its power, and its firmware. The
// helper (image/helper), which is root, works on disks; this room decides when a slot is good.
package machine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/isthmus-net/isthmus/image/helper"
	"github.com/isthmus-net/isthmus/image/slot"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
)

// Helper works on the disk and the machine on request; helper.Client is one.
type Helper interface {
	Status(ctx context.Context) (*helper.Status, error)
	Do(ctx context.Context, verb string) error
	Write(ctx context.Context, size int64, signature string, older bool, body io.Reader) error
}

// Node is the router as its users see it.
type Node interface {
	// Ready reports whether the rules of the document are in the kernel.
	Ready() bool
	Status() (*isthmusv1.SystemStatus, <-chan struct{})
	Tunnels() ([]*isthmusv1.TunnelStatus, <-chan struct{})
	Peers() ([]*isthmusv1.PeerStatus, <-chan struct{})
	// SecretsOpened applies the document again, with secrets that could not be read before.
	SecretsOpened(ctx context.Context) error
}

// Records keeps data across the boot from one slot to the other.
type Records interface {
	Private(name string) ([]byte, error)
	SetPrivate(name string, value []byte, now time.Time) error
}

// Options configure a Machine.
type Options struct {
	Helper  Helper
	Node    Node
	Records Records
	// Seal is that of the secrets.
	Seal *Seal
	// Serves returns an error unless the API answers.
	Serves func(ctx context.Context) error
	// Sys is /sys.
	Sys string
	Log *slog.Logger
}

// Machine is the machine that the router runs on. Its methods are safe for concurrent use.
type Machine struct {
	Options

	mu     sync.Mutex
	trial  *isthmusv1.Condition // nil: the running slot is not on trial
	missed []string
	failed *isthmusv1.Condition // nil: no trial was given up
}

// New returns the machine.
func New(o Options) *Machine { return &Machine{Options: o} }

// Conditions returns the conditions of the slots, the disk and the seal.
func (m *Machine) Conditions() (out []*isthmusv1.Condition) {
	copied := copies(Disks(m.Sys), rootDisk(m.Sys))
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range []*isthmusv1.Condition{m.trial, m.failed, copied} {
		if c != nil {
			out = append(out, c)
		}
	}
	return append(out, m.Options.Seal.Conditions()...)
}

// Get returns the state of the machine.
func (m *Machine) Get(ctx context.Context) (*isthmusv1.Machine, error) {
	f := ReadFirmware(m.Sys)
	out := &isthmusv1.Machine{Firmware: "bios", SecureBoot: f.SecureBoot, Tpm: f.TPM, Pcr7: f.PCR7, Lockdown: f.Lockdown}
	if f.UEFI {
		out.Firmware = "uefi"
	}
	out.Seal, out.Sealed = m.Options.Seal.Status()
	st, err := m.Helper.Status(ctx)
	if errors.Is(err, slot.ErrNoSlots) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	out.Keys = st.Keys
	for _, n := range []slot.Name{slot.A, slot.B} {
		in := st.Slots[n]
		s := &isthmusv1.Slot{Name: string(n), Version: in.Version, Serial: in.Serial, Key: in.KeyID, Running: n == st.Running, Good: n == st.Env.Good, Trial: n == st.Env.Trial}
		if s.Trial {
			s.Tries = int32(st.Env.Tries)
			if s.Running {
				s.Deadline, s.Missing = timestamppb.New(st.Deadline), m.missed
			}
		}
		out.Slots = append(out.Slots, s)
	}
	if st.Env.Failed != slot.None {
		out.Failed = m.why(st)
	}
	return out, nil
}

// Upgrade writes a slot and starts a trial of it at the next boot. With reboot in the header the
// reboot begins before Upgrade returns, late enough for the caller to get the answer.
func (m *Machine) Upgrade(ctx context.Context, h *isthmusv1.UpgradeHeader, body io.Reader) (*isthmusv1.UpgradeResponse, error) {
	sig, err := slot.ParseSignature([]byte(h.GetSignature()))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", api.ErrInvalid, err)
	}
	if err := m.Helper.Write(ctx, h.GetSize(), h.GetSignature(), h.GetOlder(), body); errors.Is(err, helper.ErrInvalid) {
		return nil, fmt.Errorf("%w: %w", api.ErrInvalid, err)
	} else if err != nil {
		return nil, err
	}
	to, err := m.try(ctx)
	if err != nil {
		return nil, err
	}
	if h.GetReboot() {
		if err := m.Helper.Do(ctx, helper.DoReboot); err != nil {
			return nil, fmt.Errorf("the slot is written and is tried at the next boot, but the machine cannot be rebooted: %w", err)
		}
	}
	return &isthmusv1.UpgradeResponse{Slot: string(to), Version: sig.Release.Version, Serial: sig.Release.Serial}, nil
}

// try starts a trial of the other slot, after storing the present state.
func (m *Machine) try(ctx context.Context) (slot.Name, error) {
	st, err := m.Helper.Status(ctx)
	if err != nil {
		return slot.None, err
	}
	b := m.now()
	b.Trial = st.Running.Other()
	m.write(b)
	if err := m.Helper.Do(ctx, helper.DoTry); err != nil {
		return slot.None, err
	}
	// Clear the condition of an earlier trial that was given up.
	if st, err := m.Helper.Status(ctx); err == nil {
		m.endTrial(st)
	}
	return b.Trial, nil
}

// Rollback reboots into the other slot: a running trial is given up; else the other slot is on
// trial, and kept when it is good.
func (m *Machine) Rollback(ctx context.Context) (*isthmusv1.RollbackSlotResponse, error) {
	st, err := m.Helper.Status(ctx)
	if err != nil {
		return nil, err
	}
	to := st.Running.Other()
	if st.Env.Trial != slot.None && st.Env.Trial == st.Running {
		err = m.Helper.Do(ctx, helper.DoReject)
	} else {
		_, err = m.try(ctx)
	}
	if err != nil {
		return nil, err
	}
	if err := m.Helper.Do(ctx, helper.DoReboot); err != nil {
		return nil, fmt.Errorf("slot %s is next, but the machine cannot be rebooted: %w", to, err)
	}
	return &isthmusv1.RollbackSlotResponse{Slot: string(to)}, nil
}

// Reboot reboots the machine. It returns when that has begun, and the caller still gets its answer.
func (m *Machine) Reboot(ctx context.Context) error { return m.Helper.Do(ctx, helper.DoReboot) }

// PowerOff switches the machine off. It returns when that has begun, and the caller still gets its
// answer.
func (m *Machine) PowerOff(ctx context.Context) error { return m.Helper.Do(ctx, helper.DoPoweroff) }

// Seal seals the secrets. See Seal.Set.
func (m *Machine) Seal(ctx context.Context, r *isthmusv1.SealRequest) (*isthmusv1.SealResponse, error) {
	// An earlier version cannot read sealed secrets.
	if st, err := m.Helper.Status(ctx); err == nil && r.GetWith() != "" && st.Env.Trial != slot.None {
		return nil, fmt.Errorf("%w: slot %s is on trial, and the other version may not support seals: wait until it is good", api.ErrPrecondition, st.Env.Trial)
	}
	recovery, err := m.Options.Seal.Set(ctx, r.GetWith(), r.GetAbandon())
	if err != nil {
		return nil, err
	}
	return &isthmusv1.SealResponse{Recovery: recovery}, nil
}

// Unseal opens the seal of the secrets with its recovery string. See Seal.Unseal.
func (m *Machine) Unseal(ctx context.Context, r *isthmusv1.UnsealRequest) (*isthmusv1.UnsealResponse, error) {
	why, err := m.Options.Seal.Unseal(ctx, r.GetRecovery())
	if err != nil {
		return nil, err
	}
	// The secrets are readable, even if the caller has gone meanwhile.
	if err := m.Node.SecretsOpened(context.WithoutCancel(ctx)); err != nil {
		return nil, fmt.Errorf("the seal is open, but the present document cannot be applied with its secrets: %w", err)
	}
	return &isthmusv1.UnsealResponse{NotSealed: why}, nil
}
