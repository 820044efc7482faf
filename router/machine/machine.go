// Package machine manages the machine below the router: its slots, its power, and its firmware. The
// helper (image/helper), which is root, works on disks; this room decides when a slot is good.
package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/isthmus-net/isthmus/image/helper"
	"github.com/isthmus-net/isthmus/image/slot"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/condition"
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

// before is the state before an upgrade, which the machine needs after the reboot to judge the new
// slot.
type before struct {
	Trial   slot.Name `json:"trial"`
	Applied bool      `json:"applied"`
	Tunnels []string  `json:"tunnels,omitempty"` // that were up
	Peers   []string  `json:"peers,omitempty"`   // whose sessions were established
	// Missing is why the trial was not good at the last check.
	Missing []string `json:"missing,omitempty"`
}

const record = "upgrade"

// now returns the present state.
func (m *Machine) now() (b before) {
	s, _ := m.Node.Status()
	b.Applied = s.GetGeneration() == s.GetAppliedGeneration()
	tunnels, _ := m.Node.Tunnels()
	for _, t := range tunnels {
		if t.GetState() == "up" {
			b.Tunnels = append(b.Tunnels, t.GetName())
		}
	}
	peers, _ := m.Node.Peers()
	for _, p := range peers {
		if p.GetState() == "established" {
			b.Peers = append(b.Peers, p.GetName())
		}
	}
	return b
}

// listed bounds the names of one kind in a message.
const listed = 5

// missing returns why a slot is not good yet: what does not work, and what differs from before.
func missing(was, is before, ready bool, serves error, conditions []*isthmusv1.Condition) (out []string) {
	if serves != nil {
		out = append(out, "the API does not answer: "+serves.Error())
	}
	if !ready {
		out = append(out, "the rules of the document are not in the kernel")
	}
	for _, c := range conditions {
		if c.GetType() == "CharonUnreachable" || c.GetType() == "GuardMissing" || c.GetType() == "GenerationHeldBack" || c.GetType() == "DocumentUnusable" {
			out = append(out, c.GetType()+": "+c.GetMessage())
		}
	}
	if was.Applied && !is.Applied {
		out = append(out, "the document is not applied without an error, as it was before")
	}
	gone := func(kind string, was, is []string) {
		var names []string
		for _, n := range was {
			if !slices.Contains(is, n) {
				names = append(names, n)
			}
		}
		if n := len(names); n > listed {
			names = append(names[:listed], fmt.Sprintf("and %d more", n-listed))
		}
		if len(names) > 0 {
			out = append(out, kind+strings.Join(names, ", "))
		}
	}
	gone("tunnels that were up before and are not: ", was.Tunnels, is.Tunnels)
	gone("peers that were established before and are not: ", was.Peers, is.Peers)
	return out
}

const (
	judgePace = 2 * time.Second
	// steady is how long everything has to be as before until a slot is good.
	steady = 10 * time.Second
)

// Judge marks the running slot good once everything is as it was before the upgrade, and reports
// what is missing until then. It returns when there is nothing to judge, or ctx is done. The helper
// gives up a trial that is not marked good in time.
func (m *Machine) Judge(ctx context.Context) {
	pace := time.NewTicker(judgePace)
	defer pace.Stop()
	var good time.Time // since when
	var reported string
	for {
		st, err := m.Helper.Status(ctx)
		switch {
		case errors.Is(err, slot.ErrNoSlots):
			return
		case err != nil:
			m.Log.Warn("querying the system helper failed", "err", err)
		case st.Env.Trial == slot.None || st.Env.Trial != st.Running:
			m.endTrial(st)
			return
		default:
			was := m.read()
			lacks := missing(was, m.now(), m.Node.Ready(), m.Serves(ctx), m.conditions())
			m.onTrial(st, lacks)
			if text := strings.Join(lacks, "; "); text != reported {
				reported = text
				m.Log.Info("a slot is on trial", "slot", st.Running, "until", st.Deadline, "missing", text)
				was.Missing = lacks
				m.write(was)
			}
			switch now := time.Now(); {
			case len(lacks) > 0:
				good = time.Time{}
			case good.IsZero():
				good = now
			case now.Sub(good) >= steady:
				if err := m.Helper.Do(ctx, helper.DoGood); err != nil {
					m.Log.Warn("marking the slot good failed", "slot", st.Running, "err", err)
				} else {
					m.Log.Info("the slot is good", "slot", st.Running, "version", st.Slots[st.Running].Version)
					continue // the next loop clears its condition at once
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-pace.C:
		}
	}
}

func (m *Machine) conditions() []*isthmusv1.Condition {
	s, _ := m.Node.Status()
	return s.GetConditions()
}

func (m *Machine) read() (b before) {
	text, err := m.Records.Private(record)
	if err == nil {
		err = json.Unmarshal(text, &b)
	}
	if err != nil {
		// Without a record, it is enough that the slot works at all.
		return before{}
	}
	return b
}

func (m *Machine) write(b before) {
	text, err := json.Marshal(b)
	if err == nil {
		err = m.Records.SetPrivate(record, text, time.Now())
	}
	if err != nil {
		m.Log.Warn("storing the state before or after an upgrade failed", "err", err)
	}
}

func (m *Machine) onTrial(st *helper.Status, lacks []string) {
	text := fmt.Sprintf("slot %s (version %s) is on trial until %s: ", st.Running, st.Slots[st.Running].Version, st.Deadline.UTC().Format(time.RFC3339))
	if len(lacks) == 0 {
		text += "everything is as it was before the upgrade; the slot is marked good in a moment"
	} else {
		text += strings.Join(lacks, "; ") + "; if this does not change, the machine returns to the other slot (`isthmus system rollback` does it now)"
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.trial, m.missed = condition.SlotOnTrial.Warning(time.Time{}, "%s", text), lacks
}

// endTrial sets the conditions of a machine whose slot is not on trial.
func (m *Machine) endTrial(st *helper.Status) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.trial, m.missed, m.failed = nil, nil, nil
	if st.Env.Failed != slot.None {
		m.failed = condition.SlotFailed.Warning(time.Time{}, "slot %s (version %s) was given up, and the machine has returned to slot %s: %s; run `isthmus system upgrade` with a slot that works",
			st.Env.Failed, st.Slots[st.Env.Failed].Version, st.Running, m.why(st))
	}
}

// why returns why a trial was given up.
func (m *Machine) why(st *helper.Status) string {
	b := m.read()
	if b.Trial != st.Env.Failed || len(b.Missing) == 0 {
		return "its daemon did not report why: it did not start, it ended again and again, or the kernel did not start it"
	}
	return strings.Join(b.Missing, "; ")
}

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
