package machine

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/image/helper"
	"github.com/isthmus-net/isthmus/image/slot"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/store"
)

// fake is a helper with the rules of the real one, a node, and records.
type fake struct {
	mu       sync.Mutex
	st       helper.Status
	none     bool
	did      []string
	refusal  error
	fails    map[string]error // by verb
	ready    bool
	serves   error
	status   isthmusv1.SystemStatus
	tunnels  map[string]string
	peers    map[string]string
	recorded []byte
	seal     *Seal // nil: of a store without one
	opened   int   // calls of SecretsOpened
	marked   time.Time
}

// noSeal is a store whose secrets are not sealed.
type noSeal struct{ Sealed }

func (noSeal) Seal() store.Seal { return store.Seal{} }

func (n node) SecretsOpened(context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.opened++
	return nil
}

func (f *fake) Status(context.Context) (*helper.Status, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.none {
		return nil, slot.ErrNoSlots
	}
	st := f.st
	return &st, nil
}

func (f *fake) Do(_ context.Context, verb string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.none {
		return slot.ErrNoSlots
	}
	if err := f.fails[verb]; err != nil {
		return err
	}
	if onTrial := f.st.Env.Trial == f.st.Running; onTrial && verb == helper.DoTry || !onTrial && (verb == helper.DoGood || verb == helper.DoReject) {
		return errors.New("not in this state of the slots")
	}
	f.did = append(f.did, verb)
	switch verb {
	case helper.DoReject:
		f.st.Env = slot.Env{Good: f.st.Running.Other(), Failed: f.st.Running}
	case helper.DoGood:
		f.st.Env, f.marked = slot.Env{Good: f.st.Running}, time.Now()
	case helper.DoTry:
		f.st.Env = slot.Env{Good: f.st.Running, Trial: f.st.Running.Other(), Tries: 3}
	}
	return nil
}

func (f *fake) Write(_ context.Context, _ int64, _ string, _ bool, body io.Reader) error {
	if _, err := io.Copy(io.Discard, body); err != nil {
		return err
	}
	return f.refusal
}

func (f *fake) Ready() bool { f.mu.Lock(); defer f.mu.Unlock(); return f.ready }
func (f *fake) Tunnels() (out []*isthmusv1.TunnelStatus, _ <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for n, s := range f.tunnels {
		out = append(out, &isthmusv1.TunnelStatus{Name: n, State: s})
	}
	slices.SortFunc(out, func(a, b *isthmusv1.TunnelStatus) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}
func (f *fake) Peers() (out []*isthmusv1.PeerStatus, _ <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for n, s := range f.peers {
		out = append(out, &isthmusv1.PeerStatus{Name: n, State: s})
	}
	return out, nil
}

type node struct{ *fake }

func (n node) Status() (*isthmusv1.SystemStatus, <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return &isthmusv1.SystemStatus{Generation: n.status.Generation, AppliedGeneration: n.status.AppliedGeneration, Conditions: n.status.Conditions}, nil
}

func (f *fake) Private(string) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.recorded == nil {
		return nil, errors.New("not found")
	}
	return f.recorded, nil
}

func (f *fake) SetPrivate(_ string, value []byte, _ time.Time) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.recorded = value
	return nil
}

func newFake() *fake {
	f := &fake{ready: true, tunnels: map[string]string{"aws-0": "up", "aws-1": "down"}, peers: map[string]string{"aws-0": "established"},
		st: helper.Status{Running: slot.A, Env: slot.Env{Good: slot.A}, Keys: []string{"K"}, Slots: map[slot.Name]helper.Inside{
			slot.A: {Release: slot.Release{Version: "1", Serial: 1}}, slot.B: {Release: slot.Release{Version: "2", Serial: 2}}}}}
	f.status.Generation, f.status.AppliedGeneration = 5, 5
	return f
}

func (f *fake) machine() *Machine {
	if f.seal == nil {
		f.seal = NewSeal(SealOptions{Store: noSeal{}})
	}
	return New(Options{Helper: f, Node: node{f}, Records: f, Seal: f.seal, Sys: "/nowhere", Log: slog.New(slog.DiscardHandler),
		Serves: func(context.Context) error { f.mu.Lock(); defer f.mu.Unlock(); return f.serves }})
}

// set changes the fake.
func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// upgraded returns a fake whose machine has been upgraded and has started from slot b, with nothing
// up yet.
func upgraded(t *testing.T) (*fake, *Machine) {
	t.Helper()
	f := newFake()
	if _, err := f.machine().try(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.set(func() {
		f.st.Running, f.st.Env.Tries = slot.B, 2
		f.tunnels, f.peers = map[string]string{"aws-0": "connecting", "aws-1": "down"}, map[string]string{"aws-0": "idle"}
		f.status.AppliedGeneration, f.ready = 0, false
	})
	return f, f.machine()
}

func TestJudge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, m := upgraded(t)
		ended := make(chan struct{})
		go func() { m.Judge(t.Context()); close(ended) }()
		lacks := func(want ...string) {
			t.Helper()
			time.Sleep(steady + 2*judgePace)
			synctest.Wait()
			c := m.Conditions()
			if len(c) != 1 || c[0].Type != "SlotOnTrial" {
				t.Fatalf("conditions %v", c)
			}
			for _, w := range want {
				if !strings.Contains(c[0].Message, w) {
					t.Errorf("%q is not in %s", w, c[0].Message)
				}
			}
			got, err := m.Get(t.Context())
			if err != nil || len(got.Slots[1].Missing) != len(want) || !got.Slots[1].Trial {
				t.Errorf("%v, %v; want %d that are missing", got, err, len(want))
			}
		}
		lacks("rules of the document are not in the kernel", "not applied without an error", "tunnels that were up before and are not: aws-0", "established before and are not: aws-0")
		f.set(func() {
			f.ready, f.status.AppliedGeneration = true, 5
			f.tunnels["aws-0"], f.peers["aws-0"] = "up", "established"
		})
		f.set(func() { f.serves = errors.New("late") })
		lacks("the API does not answer: late")
		f.set(func() {
			f.serves = nil
			f.status.Conditions = []*isthmusv1.Condition{{Type: "CharonUnreachable", Message: "no charon"}, {Type: "PoolDegraded"}}
		})
		lacks("CharonUnreachable: no charon")
		// A state that is good only for a moment is not enough.
		f.set(func() { f.status.Conditions = nil })
		time.Sleep(steady / 2)
		f.set(func() { f.tunnels["aws-0"] = "connecting" })
		lacks("aws-0")
		select {
		case <-ended:
			t.Fatal("marked good")
		default:
		}
		f.set(func() { f.tunnels["aws-0"] = "up" })
		<-ended
		if late := time.Since(f.marked); late != 0 {
			t.Errorf("the slot is good, but its condition ends %v later", late)
		}
		if c := m.Conditions(); len(c) != 0 {
			t.Error(c)
		}
		if e := f.st.Env; e != (slot.Env{Good: slot.B}) {
			t.Error(e)
		}
	})
}

// TestFailed checks that the former slot reports why a trial was given up.
func TestFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, m := upgraded(t)
		ctx, cancel := context.WithCancel(t.Context())
		go m.Judge(ctx)
		time.Sleep(judgePace)
		synctest.Wait()
		cancel()
		f.set(func() { f.st.Running, f.st.Env = slot.A, slot.Env{Good: slot.A, Failed: slot.B} })
		m = f.machine()
		m.Judge(t.Context())
		c := m.Conditions()
		if len(c) != 1 || c[0].Type != "SlotFailed" || !strings.Contains(c[0].Message, "slot b (version 2)") || !strings.Contains(c[0].Message, "tunnels that were up before and are not: aws-0") {
			t.Errorf("conditions %v", c)
		}
		f.set(func() { f.recorded = nil })
		m.Judge(t.Context())
		if c := m.Conditions(); !strings.Contains(c[0].Message, "did not report why") {
			t.Errorf("conditions %v", c)
		}
		if got, err := m.Get(t.Context()); err != nil || !strings.Contains(got.Failed, "did not report why") {
			t.Errorf("%v, %v", got, err)
		}
		if _, err := m.try(t.Context()); err != nil || len(m.Conditions()) != 0 {
			t.Errorf("%v, conditions %v", err, m.Conditions())
		}
	})
}

func TestMissingIsBounded(t *testing.T) {
	var was before
	for range 1000 {
		was.Tunnels = append(was.Tunnels, "tunnel")
	}
	if got := missing(was, before{}, true, nil, nil); len(got) != 1 || len(got[0]) > 200 || !strings.Contains(got[0], "and 995 more") {
		t.Error(got)
	}
}

func TestWithoutSlots(t *testing.T) {
	f := newFake()
	f.none = true
	m := f.machine()
	m.Judge(t.Context())
	if got, err := m.Get(t.Context()); err != nil || len(got.Slots) != 0 {
		t.Error(got, err)
	}
	if err := m.Reboot(t.Context()); !errors.Is(err, slot.ErrNoSlots) {
		t.Error(err)
	}
	if _, err := m.Rollback(t.Context()); !errors.Is(err, slot.ErrNoSlots) {
		t.Error(err)
	}
}

// signature returns the signature of a slot of version 3.
func signature(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	_, private, err := slot.NewKey()
	key, img := filepath.Join(dir, "key"), filepath.Join(dir, "slot")
	if err := errors.Join(err, os.WriteFile(key, private, 0o600), os.WriteFile(img, []byte("slot"), 0o600)); err != nil {
		t.Fatal(err)
	}
	text, err := slot.Sign(key, "", img, slot.Release{Version: "3", Serial: 3})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestUpgrade checks that each failing step is reported and ends the upgrade.
func TestUpgrade(t *testing.T) {
	sig, broken := signature(t), errors.New("broken")
	for _, c := range []struct {
		name    string
		sig     string
		reboot  bool
		refusal error
		fails   map[string]error
		err     error
		text    string
		did     string
	}{
		{name: "later", sig: sig, did: "try"},
		{name: "at once", sig: sig, reboot: true, did: "try reboot"},
		{name: "no signature", sig: "nonsense", err: api.ErrInvalid},
		{name: "a wrong slot", sig: sig, refusal: &helper.Refusal{Text: "wrong", Invalid: true}, err: api.ErrInvalid},
		{name: "a disk that fails", sig: sig, refusal: broken, err: broken},
		{name: "a loader that cannot be set", sig: sig, reboot: true, fails: map[string]error{helper.DoTry: broken}, err: broken},
		{name: "a machine that does not reboot", sig: sig, reboot: true, fails: map[string]error{helper.DoReboot: broken}, err: broken, text: "is tried at the next boot", did: "try"},
	} {
		f := newFake()
		f.refusal, f.fails = c.refusal, c.fails
		r, err := f.machine().Upgrade(t.Context(), &isthmusv1.UpgradeHeader{Signature: c.sig, Reboot: c.reboot}, bytes.NewReader(nil))
		if !errors.Is(err, c.err) || err != nil && !strings.Contains(err.Error(), c.text) || strings.Join(f.did, " ") != c.did {
			t.Errorf("%s: %v, did %q", c.name, err, f.did)
		}
		if errors.Is(err, api.ErrInvalid) != (c.err == api.ErrInvalid) {
			t.Errorf("%s: wrong kind of error: %v", c.name, err)
		}
		if err == nil && (r.Slot != "b" || r.Version != "3" || r.Serial != 3) {
			t.Errorf("%s: %v", c.name, r)
		}
	}
}

// TestRollback checks that a trial is given up, else the other slot is tried, and that the machine
// does not reboot when that failed.
func TestRollback(t *testing.T) {
	broken := errors.New("broken")
	trial := slot.Env{Good: slot.B, Trial: slot.A, Tries: 2}
	for _, c := range []struct {
		name  string
		env   slot.Env
		fails string
		did   string
	}{
		{"a trial", trial, "", "reject reboot"},
		{"a good slot", slot.Env{Good: slot.A}, "", "try reboot"},
		{"a trial that cannot be given up", trial, helper.DoReject, ""},
		{"a slot that cannot be tried", slot.Env{Good: slot.A}, helper.DoTry, ""},
		{"a machine that does not reboot", trial, helper.DoReboot, "reject"},
	} {
		f := newFake()
		f.st.Env, f.fails = c.env, map[string]error{c.fails: broken}
		r, err := f.machine().Rollback(t.Context())
		if (c.fails != "") != errors.Is(err, broken) || strings.Join(f.did, " ") != c.did || err == nil && r.Slot != "b" {
			t.Errorf("%s: %v, %v, did %q", c.name, r, err, f.did)
		}
	}
}

func TestFirmware(t *testing.T) {
	sys := t.TempDir()
	write := func(path, text string) {
		t.Helper()
		path = filepath.Join(sys, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if got := ReadFirmware(sys); got != (Firmware{}) {
		t.Error(got)
	}
	write(secureBoot, "\x06\x00\x00\x00\x01")
	write("class/tpm/tpm0/pcr-sha256/7", "65CAF8\n")
	write("kernel/security/lockdown", "none [integrity] confidentiality\n")
	if got, want := ReadFirmware(sys), (Firmware{UEFI: true, SecureBoot: true, TPM: true, PCR7: "65caf8", Lockdown: "integrity"}); got != want {
		t.Error(got)
	}
	write(secureBoot, "\x06\x00\x00\x00\x00")
	if ReadFirmware(sys).SecureBoot {
		t.Error("Secure Boot is reported as on")
	}
}

func TestDisks(t *testing.T) {
	sys := t.TempDir()
	partition := func(disk, name, label string) {
		t.Helper()
		dir := filepath.Join(sys, "devices/pci0", disk, name)
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.MkdirAll(filepath.Join(sys, "class/block"), 0o755),
			os.WriteFile(filepath.Join(dir, "uevent"), []byte("DEVNAME="+name+"\nDEVTYPE=partition\nPARTNAME="+label+"\n"), 0o644),
			os.Symlink("../../devices/pci0/"+disk+"/"+name, filepath.Join(sys, "class/block", name))); err != nil {
			t.Fatal(err)
		}
	}
	if got := Disks(sys); len(got) != 0 || copies(got, "") != nil {
		t.Errorf("a machine without slots: %q", got)
	}
	partition("vdb", "vdb3", "env")
	partition("vdb", "vdb4", "slot-a")
	partition("vda", "vda1", "environment")
	if got := Disks(sys); len(got) != 1 || got[0] != "vdb" || copies(got, "vdb") != nil {
		t.Errorf("one disk: %q", got)
	}
	partition("nvme0n1", "nvme0n1p3", "env")
	got := Disks(sys)
	if c := copies(got, "vdb"); c.GetType() != "DiskCopied" || !strings.Contains(c.GetMessage(), "runs from disk vdb and does not use nvme0n1,") {
		t.Errorf("two disks, %q: %v", got, c)
	}
	// The root is on another disk: Debian's packages on a machine that has a node's disk attached.
	if c := copies(got, "sda"); c != nil {
		t.Error(c)
	}
}
