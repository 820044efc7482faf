package machine

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/image/slot"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/store"
)

// chip is a TPM whose sealed data opens while it is there and unchanged.
type chip struct {
	mu    sync.Mutex
	is    byte // another value: another chip, or another PCR 7
	gone  error
	calls int
	// forgets replaces Open when it is not nil.
	forgets func() ([]byte, error)
}

func (c *chip) Seal(_ context.Context, data []byte) ([]byte, error) {
	return c.turn(append([]byte{c.is}, data...))
}

func (c *chip) Open(_ context.Context, sealed []byte) ([]byte, error) {
	if c.forgets != nil {
		return c.forgets()
	}
	out, err := c.turn(sealed)
	if err == nil && out[0] != c.is {
		return nil, errors.New("PCR 7 is not as it was")
	}
	if err != nil {
		return nil, err
	}
	return out[1:], nil
}

func (c *chip) turn(data []byte) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls++
	if c.gone != nil {
		return nil, c.gone
	}
	out := slices.Clone(data)
	for i := range out {
		out[i] ^= 0x5a
	}
	return out, nil
}

// fail makes the chip fail, or work again with nil.
func (c *chip) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = err
}

// sealed is a node with a state directory, which a test can restart.
type sealed struct {
	t    *testing.T
	dir  string
	sys  string
	chip chip
	st   *store.Store
	seal *Seal
	*fake
	m *Machine
}

func newSealed(t *testing.T) *sealed {
	t.Helper()
	s := &sealed{t: t, dir: t.TempDir(), sys: t.TempDir(), chip: chip{is: 1}, fake: newFake()}
	pcr := filepath.Join(s.sys, "class/tpm/tpm0/pcr-sha256/7")
	if err := errors.Join(os.MkdirAll(filepath.Dir(pcr), 0o755), os.WriteFile(pcr, []byte(strings.Repeat("AB", 32)+"\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	s.start()
	t.Cleanup(func() { s.st.Close() })
	for _, name := range []string{"psk-a", "psk-b"} {
		s.setSecret(name, "value of "+name)
	}
	return s
}

// start is a start of the daemon.
func (s *sealed) start() {
	s.t.Helper()
	if s.st != nil {
		s.st.Close()
	}
	st, err := store.Open(s.dir)
	if err != nil {
		s.t.Fatal(err)
	}
	s.st = st
	s.seal = NewSeal(SealOptions{Store: st, Sealer: &s.chip, Sys: s.sys, Log: slog.New(slog.DiscardHandler)})
	s.fake.seal = s.seal
	s.seal.Await(s.t.Context())
	s.m = s.machine()
}

func (s *sealed) setSecret(name, value string) {
	s.t.Helper()
	if _, err := s.st.SetSecret(name, []byte(value), time.Now()); err != nil {
		s.t.Fatal(err)
	}
}

// reads checks which secrets can be read.
func (s *sealed) reads(want string) {
	s.t.Helper()
	var got []string
	for _, info := range s.st.Secrets() {
		if v, err := s.st.Lookup(info.Ref); err == nil {
			got = append(got, info.Ref.Name+"="+string(v))
		} else if !errors.Is(err, store.ErrSealed) {
			s.t.Error(err)
		}
	}
	if text := strings.Join(got, " "); text != want {
		s.t.Errorf("can be read: %q, want %q", text, want)
	}
}

// tells checks the types of the conditions, and that each word is in one of them.
func (s *sealed) tells(types string, words ...string) {
	s.t.Helper()
	var got []string
	var text string
	for _, c := range s.m.Conditions() {
		got, text = append(got, c.Type), text+c.Message+"\n"
	}
	if strings.Join(got, " ") != types {
		s.t.Errorf("conditions %v, want %s: %s", got, types, text)
	}
	for _, w := range words {
		if !strings.Contains(text, w) {
			s.t.Errorf("%q is not in %s", w, text)
		}
	}
}

const both = "psk-a=value of psk-a psk-b=value of psk-b"

func (s *sealed) sealWith(abandon bool) (string, error) {
	r, err := s.m.Seal(s.t.Context(), &isthmusv1.SealRequest{With: TPM2, Abandon: abandon})
	return r.GetRecovery(), err
}

// TestSealed checks that a sealed node starts with its secrets. When its TPM does not open them,
// the node reports it, opens them with the recovery string, and does not need the string at the
// next start.
func TestSealed(t *testing.T) {
	s := newSealed(t)
	recovery, err := s.sealWith(false)
	if err != nil {
		t.Fatal(err)
	}
	s.reads(both)
	s.start()
	s.reads(both)
	s.tells("")
	if m, err := s.m.Get(t.Context()); err != nil || m.Seal != "tpm2" || m.Sealed != "" {
		t.Errorf("%v, %v", m, err)
	}

	s.chip.is = 2
	s.start()
	s.reads("")
	s.tells("Sealed", "PCR 7 is not as it was", "secrets psk-a, psk-b cannot be read", "isthmus system unseal", "isthmus system seal tpm2 --abandon")
	if m, err := s.m.Get(t.Context()); err != nil || m.Sealed != "PCR 7 is not as it was" {
		t.Errorf("%v, %v", m, err)
	}
	if _, err := s.sealWith(false); !errors.Is(err, api.ErrPrecondition) || !strings.Contains(err.Error(), "--abandon") {
		t.Errorf("sealing over unreadable secrets: %v", err)
	}
	other, _ := ParseRecovery(recovery)
	other[0] ^= 1
	for text, want := range map[string]string{
		"": "has 14 groups", recovery[1:]: "has 14 groups", recovery[:len(recovery)-1] + "A": "one letter of it is wrong", Recovery(other): "belongs to another seal"} {
		if recovery[len(recovery)-1] == 'A' && strings.HasSuffix(text, "A") {
			continue
		}
		if _, err := s.m.Unseal(t.Context(), &isthmusv1.UnsealRequest{Recovery: text}); !errors.Is(err, api.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("recovery %q: %v, want %s", text, err, want)
		}
	}
	r, err := s.m.Unseal(t.Context(), &isthmusv1.UnsealRequest{Recovery: " " + strings.ToLower(strings.ReplaceAll(recovery, "-", "  ")) + "\n"})
	if err != nil || r.NotSealed != "" || s.opened != 1 {
		t.Fatal(r, err, s.opened)
	}
	s.reads(both)
	s.tells("")
	s.start()
	s.reads(both)
	s.tells("")

	// Without a TPM, the string opens the seal, and the reason why the key cannot be sealed is
	// reported.
	s.chip.fail(errors.New("no such device"))
	s.start()
	s.reads("")
	s.tells("Sealed", "no such device")
	r, err = s.m.Unseal(t.Context(), &isthmusv1.UnsealRequest{Recovery: recovery})
	if err != nil || !strings.Contains(r.NotSealed, "no such device") {
		t.Fatal(r, err)
	}
	s.reads(both)
	s.tells("SealNotRenewed", "no such device", "isthmus system seal none")
	if _, err := s.m.Seal(t.Context(), &isthmusv1.SealRequest{}); err != nil {
		t.Fatal(err)
	}
	s.start()
	s.reads(both)
	s.tells("")
}

// TestSealedAgain checks that without the recovery string, the secrets can be set again, and sealed
// for the present machine.
func TestSealedAgain(t *testing.T) {
	s := newSealed(t)
	recovery, err := s.sealWith(false)
	if err != nil {
		t.Fatal(err)
	}
	s.chip.is = 2
	s.start()
	s.setSecret("psk-a", "again")
	s.reads("psk-a=again")
	s.tells("Sealed SecretsNotSealed", "secret psk-b cannot be read")
	if _, err := s.sealWith(true); err != nil {
		t.Fatal(err)
	}
	s.tells("Sealed", "sealed before, and that seal was abandoned")
	s.start()
	s.reads("psk-a=again")
	// The string of the former seal still opens the secrets under it.
	if _, err := s.m.Unseal(t.Context(), &isthmusv1.UnsealRequest{Recovery: recovery}); err != nil {
		t.Fatal(err)
	}
	s.reads("psk-a=again psk-b=value of psk-b")
	s.start()
	s.reads("psk-a=again psk-b=value of psk-b")
	s.tells("")
}

// TestNoSeal checks that a machine that cannot seal says why, and changes nothing.
func TestNoSeal(t *testing.T) {
	for want, change := range map[string]func(*sealed){
		"the machine has no TPM 2.0": func(s *sealed) { os.RemoveAll(filepath.Join(s.sys, "class")) },
		"the firmware has measured nothing": func(s *sealed) {
			os.WriteFile(filepath.Join(s.sys, "class/tpm/tpm0/pcr-sha256/7"), []byte(noPCR+"\n"), 0o644)
		},
		"which this machine does not have":                    func(s *sealed) { s.chip.fail(slot.ErrNoSlots) },
		"sealing with the TPM: TPM_RC_LOCKOUT":                func(s *sealed) { s.chip.fail(errors.New("TPM_RC_LOCKOUT")) },
		"opening what was sealed: it returned something else": func(s *sealed) { s.chip.forgets = func() ([]byte, error) { return make([]byte, 32), nil } },
		"opening what was sealed: TPM_RC_INTEGRITY": func(s *sealed) {
			s.chip.forgets = func() ([]byte, error) { return nil, errors.New("TPM_RC_INTEGRITY") }
		},
		"slot b is on trial, and the other version may not": func(s *sealed) { s.fake.st.Env.Trial = slot.B },
	} {
		s := newSealed(t)
		change(s)
		if text, err := s.sealWith(false); err == nil || text != "" || !strings.Contains(err.Error(), want) {
			t.Errorf("%q, %v; want %s", text, err, want)
		}
		if is := s.st.Seal(); is.With != "" {
			t.Errorf("%s: %+v", want, is)
		}
		s.reads(both)
	}
	s := newSealed(t)
	if _, err := s.m.Seal(t.Context(), &isthmusv1.SealRequest{With: "rot13"}); !errors.Is(err, api.ErrInvalid) {
		t.Error(err)
	}
}

// TestKeepSeal checks that a TPM that answers late opens the seal without a person, and that
// secrets that could not be encrypted are encrypted then.
func TestKeepSeal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSealed(t)
		if _, err := s.sealWith(false); err != nil {
			t.Fatal(err)
		}
		s.chip.fail(errors.New("not yet"))
		s.start()
		s.setSecret("psk-b", "late")
		s.reads("psk-b=late")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go s.seal.Keep(ctx, s.m.Node.SecretsOpened)
		time.Sleep(3 * SealPace)
		if n := s.chip.calls; n < 3 || n > 10 || s.opened != 0 {
			t.Errorf("the TPM was called %d times", n)
		}
		s.chip.fail(nil)
		time.Sleep(2 * SealPace)
		synctest.Wait()
		s.reads("psk-a=value of psk-a psk-b=late")
		s.tells("")
		if s.opened != 1 {
			t.Errorf("the document was applied %d times", s.opened)
		}
		if is := s.st.Seal(); is.Bare != 0 {
			t.Errorf("%+v", is)
		}
	})
}

// TestAwaitSeal checks that the start waits for a helper that starts too.
func TestAwaitSeal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSealed(t)
		if _, err := s.sealWith(false); err != nil {
			t.Fatal(err)
		}
		s.chip.fail(slot.ErrNoSlots)
		time.AfterFunc(3*time.Second, func() { s.chip.fail(nil) })
		s.st.Close()
		st, err := store.Open(s.dir)
		if err != nil {
			t.Fatal(err)
		}
		s.st = st
		begun := time.Now()
		s.seal = NewSeal(SealOptions{Store: st, Sealer: &s.chip, Sys: s.sys, Log: slog.New(slog.DiscardHandler)})
		s.seal.Await(t.Context())
		s.reads(both)
		if took := time.Since(begun); took < 3*time.Second || took > 4*time.Second {
			t.Errorf("waited for %v", took)
		}
	})
}

// TestRecovery checks that the string is the key, and that any wrong letter is found.
func TestRecovery(t *testing.T) {
	key := []byte("0123456789abcdef0123456789ABCDEF")
	text := Recovery(key)
	if len(text) != 14*4+13 || strings.Count(text, "-") != 13 {
		t.Error(text)
	}
	if got, err := ParseRecovery(text); err != nil || string(got) != string(key) {
		t.Errorf("%q, %v", got, err)
	}
	for i, r := range text {
		for _, other := range "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567" {
			if r == '-' || r == other {
				continue
			}
			wrong := text[:i] + string(other) + text[i+1:]
			if got, err := ParseRecovery(wrong); err == nil {
				t.Errorf("%s is accepted as %x", wrong, got)
			}
		}
	}
	if _, err := ParseRecovery(strings.Repeat("A", 1<<16)); err == nil {
		t.Error("a long text is accepted")
	}
}
