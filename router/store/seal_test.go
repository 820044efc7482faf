package store

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/isthmus-net/isthmus/router/secret"
)

// machineKey is what a machine of these tests opens of a blob: it seals with a byte of its own.
func machineKey(blob []byte, machine byte) []byte {
	out := slices.Clone(blob)
	for i := range out {
		out[i] ^= machine
	}
	return out
}

func testKey(b byte) []byte { return bytes.Repeat([]byte{b}, SealKeySize) }

const machine = 0x5a

// openAll opens what is closed, as the machine would at a start.
func openAll(t *testing.T, s *Store) {
	t.Helper()
	for _, k := range s.Seal().Closed {
		if _, err := s.OpenSeal(machineKey(k.Blob, machine)); err != nil {
			t.Errorf("opening key %s: %v", k.ID, err)
		}
	}
}

func sealWith(key byte) func(*Store, model) (model, error) {
	return func(s *Store, m model) (model, error) {
		return m, s.SetSeal("tpm2", testKey(key), machineKey(testKey(key), machine))
	}
}

// sealing has every kind of write under a seal.
var sealing = []func(s *Store, m model) (model, error){
	accept("one", false), setSecret("psk", "first"), setSecret("md5", "one"), sealWith(1),
	func(s *Store, m model) (model, error) {
		m.secrets = "md5=one psk=second "
		_, err := s.SetSecret("psk", []byte("second"), noon)
		return m, err
	},
	sealWith(2),
	func(s *Store, m model) (model, error) { return m, s.RenewSeal(machineKey(testKey(2), machine)) },
	func(s *Store, m model) (model, error) { return m, s.DropFormer() },
	func(s *Store, m model) (model, error) { return m, s.SetSeal("", nil, nil) },
}

func reopen(t *testing.T, fs *faultFS) *Store {
	t.Helper()
	s, err := open(fs)
	if err != nil {
		t.Fatal(err)
	}
	if d := s.Damage(); len(d) > 0 {
		t.Error(d)
	}
	return s
}

// TestSeal: while the seal is closed secrets cannot be read and everything else can; the key opens
// them; on another machine they can be set again, and the former ones still be had with the key.
func TestSeal(t *testing.T) {
	fs := newFaultFS()
	s := reopen(t, fs)
	for _, name := range []string{"a", "b"} {
		if _, err := s.SetSecret(name, []byte("first "+name), noon); err != nil {
			t.Fatal(err)
		}
		if _, err := s.SetSecret(name, []byte("value of "+name), noon); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.SetPrivate("authority", []byte("of the daemon"), noon); err != nil {
		t.Fatal(err)
	}
	ref, _ := s.Ref("a")
	if err := s.SetSeal("tpm2", testKey(1), machineKey(testKey(1), machine)); err != nil {
		t.Fatal(err)
	}
	want := "a=value of a b=value of b "
	if again, _ := s.Ref("a"); again != ref || s.secretsText(t) != want {
		t.Errorf("sealing has changed %v to %v: %s", ref, again, s.secretsText(t))
	}

	s = reopen(t, fs)
	is := s.Seal()
	if is.With != "tpm2" || len(is.Closed) != 1 || fmt.Sprint(is.Secrets) != "[a b]" || is.Bare != 0 {
		t.Errorf("%+v", is)
	}
	for _, f := range fs.files() {
		for _, text := range [][]byte{[]byte("value of"), testKey(1)[:8]} {
			if data, _ := fs.readFile(f); bytes.Contains(data, text) {
				t.Errorf("%s has %q", f, text)
			}
		}
	}
	if _, err := s.Ref("a"); !errors.Is(err, ErrSealed) || errors.Is(err, secret.ErrNotFound) || errors.Is(err, ErrDamaged) {
		t.Errorf("the reference to a sealed secret: %v", err)
	}
	if _, err := s.Lookup(ref); !errors.Is(err, ErrSealed) {
		t.Errorf("a sealed secret: %v", err)
	}
	if _, err := s.RollbackSecret("a", noon); !errors.Is(err, ErrSealed) {
		t.Errorf("its former value: %v", err)
	}
	if v, err := s.Private("authority"); err != nil || string(v) != "of the daemon" {
		t.Errorf("%q, %v", v, err)
	}
	for _, info := range s.Secrets() {
		if !info.Sealed || info.Ref.Fingerprint != "" {
			t.Errorf("%+v", info)
		}
	}

	if _, err := s.OpenSeal(testKey(9)); !errors.Is(err, ErrNotFound) {
		t.Errorf("a key of another node: %v", err)
	}
	if _, err := s.OpenSeal(testKey(1)[1:]); err == nil {
		t.Error("a short key opens the seal")
	}
	if present, err := s.OpenSeal(testKey(1)); err != nil || !present {
		t.Error(present, err)
	}
	if again, _ := s.Ref("a"); again != ref || s.secretsText(t) != want {
		t.Errorf("after opening %v, was %v: %s", again, ref, s.secretsText(t))
	}
	if v, err := s.FormerSecret("a"); err != nil || string(v) != "first a" {
		t.Errorf("the former value is %q, %v", v, err)
	}

	// Another machine: one secret is set again, and the node sealed with that machine's key.
	s = reopen(t, fs)
	if _, err := s.SetSecret("a", []byte("again"), noon); err != nil {
		t.Fatal(err)
	}
	if is = s.Seal(); fmt.Sprint(is.Secrets) != "[b]" || is.Bare != 1 {
		t.Errorf("%+v", is)
	}
	if _, err := s.FormerSecret("a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("the former value of one that was sealed: %v", err)
	}
	if err := s.SetSeal("tpm2", testKey(2), machineKey(testKey(2), 1)); err != nil {
		t.Fatal(err)
	}
	if is = s.Seal(); fmt.Sprint(is.Secrets) != "[b]" || is.Bare != 0 || len(is.Closed) != 0 {
		t.Errorf("%+v", is)
	}
	s = reopen(t, fs)
	if present, err := s.OpenSeal(machineKey(s.Seal().Closed[0].Blob, 1)); err != nil || !present {
		t.Error(present, err)
	}
	if present, err := s.OpenSeal(testKey(1)); err != nil || present {
		t.Errorf("the former key: %v, %v", present, err)
	}
	if got := s.secretsText(t); got != "a=again b=value of b " {
		t.Error(got)
	}
	if err := s.SetSeal("", nil, nil); err != nil {
		t.Fatal(err)
	}
	if slices.Contains(fs.files(), sealFile) || s.Seal().With != "" {
		t.Errorf("the seal is still there: %v", fs.files())
	}
	if s = reopen(t, fs); s.secretsText(t) != "a=again b=value of b " {
		t.Error(s.secretsText(t))
	}
}

// TestSealedSwap: a sealed value that is put in the place of another, or whose key is named
// wrongly, is damage and not that value.
func TestSealedSwap(t *testing.T) {
	fs := newFaultFS()
	s := reopen(t, fs)
	for _, name := range []string{"a", "b"} {
		if _, err := s.SetSecret(name, []byte("value of "+name), noon); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.SetSeal("tpm2", testKey(1), testKey(1)); err != nil {
		t.Fatal(err)
	}
	swapped := s.secrets["b"]
	swapped.Name = "a"
	if err := s.putLocked(secretDir, s.secrets, swapped); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, fs)
	if _, err := s.OpenSeal(testKey(1)); err != nil {
		t.Fatal(err)
	}
	if d := s.Damage(); len(d) != 1 || s.secretsText(t) != "b=value of b " {
		t.Errorf("damage %v, has %s", d, s.secretsText(t))
	}
}

// TestSealedFull: keys do not become more and more while the disk takes nothing.
func TestSealedFull(t *testing.T) {
	s := reopen(t, newFaultFS())
	if _, err := s.SetSecret("a", []byte("x"), noon); err != nil {
		t.Fatal(err)
	}
	for i := byte(1); ; i++ {
		// as after writes that failed
		s.seal.Keys = append([]SealedKey{{fmt.Sprint(i), testKey(i)}}, s.seal.Keys...)
		s.opened[fmt.Sprint(i)] = s.keys.seal
		if i < maxSealedKeys {
			continue
		}
		if err := s.SetSeal("tpm2", testKey(i), testKey(i)); !errors.Is(err, ErrFull) {
			t.Errorf("with %d keys: %v", i, err)
		}
		break
	}
}

// TestEncryptAgain: a secret that could not be encrypted with the sealed key is, later.
func TestEncryptAgain(t *testing.T) {
	s := reopen(t, newFaultFS())
	if err := s.SetSeal("tpm2", testKey(1), testKey(1)); err != nil {
		t.Fatal(err)
	}
	present := s.seal
	s.seal = seal{}
	if _, err := s.SetSecret("a", []byte("bare"), noon); err != nil {
		t.Fatal(err)
	}
	s.seal = present
	if is := s.Seal(); is.Bare != 1 {
		t.Errorf("%+v", is)
	}
	if err := s.EncryptAgain(); err != nil {
		t.Fatal(err)
	}
	if is := s.Seal(); is.Bare != 0 || s.secretsText(t) != "a=bare " {
		t.Errorf("%+v, %s", is, s.secretsText(t))
	}
}

// TestFlippedRecord: a flipped bit makes no record of either format another one, nor a newer one.
func TestFlippedRecord(t *testing.T) {
	if _, err := decodeRecord("private/a.sealed", encodeRecord(withSeals, "private/a.sealed", nil)); !errors.Is(err, ErrNewer) {
		t.Errorf("format 2 of what is not a secret: %v", err)
	}
	for _, format := range []uint64{plain, withSeals} {
		record := encodeRecord(format, "secrets/a.sealed", []byte(`{"name":"a"}`))
		if got, err := decodeRecord("secrets/a.sealed", record); err != nil || string(got) != `{"name":"a"}` {
			t.Errorf("%q, %v", got, err)
		}
		for i := range len(record) * 8 {
			flipped := bytes.Clone(record)
			flipped[i/8] ^= 1 << (i % 8)
			if got, err := decodeRecord("secrets/a.sealed", flipped); !errors.Is(err, ErrDamaged) {
				t.Errorf("bit %d of format %d: %q, %v", i, format, got, err)
			}
		}
	}
}

// TestSealRefuses: a key that is closed is not sealed again, and one of a wrong size is none.
func TestSealRefuses(t *testing.T) {
	fs := newFaultFS()
	s := reopen(t, fs)
	if err := s.SetSeal("tpm2", testKey(1)[1:], nil); err == nil {
		t.Error("a short key was taken")
	}
	if err := s.RenewSeal([]byte("x")); !errors.Is(err, ErrSealed) {
		t.Errorf("without a seal: %v", err)
	}
	if err := s.SetSeal("tpm2", testKey(1), []byte("blob")); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, fs)
	if err := s.RenewSeal([]byte("x")); !errors.Is(err, ErrSealed) {
		t.Errorf("closed: %v", err)
	}
	if is := s.Seal(); len(is.Closed) != 1 || string(is.Closed[0].Blob) != "blob" {
		t.Errorf("%+v", is)
	}
}
