package helper

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/image/slot"
	"github.com/isthmus-net/isthmus/image/tpm"
	"github.com/isthmus-net/isthmus/test/swtpm"
)

// measured is a measurement as by a firmware.
const measured = "7:sha256=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

// TestTPM checks that data opens only with the TPM that sealed it, and only while PCR 7 is
// unchanged, and that failed guesses at other objects do not keep it from opening.
func TestTPM(t *testing.T) {
	ctx := context.Background()
	state := t.TempDir()
	tool := func(p *swtpm.TPM, name string, args ...string) string {
		t.Helper()
		out, err := p.Tool(state, name, args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	chip := swtpm.Start(t, state)
	tool(chip, "tpm2_pcrextend", measured)
	c := newComputer(t)
	c.tpm = &tpm.TPM{Path: chip.Socket()}
	client, stop := c.boot(slot.A, 0)
	key := strings.Repeat("k", 32)
	sealed, err := client.Seal(ctx, []byte(key))
	if err != nil || strings.Contains(string(sealed), key) {
		t.Fatalf("%q, %v", sealed, err)
	}
	opens := func(what string, want bool) {
		t.Helper()
		got, err := client.Open(ctx, sealed)
		if (string(got) == key) != want || (err == nil) != want {
			t.Errorf("%s: %q, %v", what, got, err)
		}
		t.Logf("%s: %v", what, err)
	}
	opens("the same machine", true)

	// Guess until the TPM is locked.
	tool(chip, "tpm2_dictionarylockout", "--setup-parameters", "--max-tries=2", "--recovery-time=3600", "--lockout-recovery-time=3600")
	tool(chip, "tpm2_createprimary", "-Q", "-C", "o", "-c", "primary")
	if err := os.WriteFile(filepath.Join(state, "text"), []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	tool(chip, "tpm2_create", "-Q", "-C", "primary", "-p", "right", "-i", "text", "-u", "public", "-r", "private")
	tool(chip, "tpm2_load", "-Q", "-C", "primary", "-u", "public", "-r", "private", "-c", "object")
	for range 3 {
		if out, err := chip.Tool(state, "tpm2_unseal", "-c", "object", "-p", "wrong"); err == nil {
			t.Errorf("a wrong guess opens: %s", out)
		}
	}
	if out := tool(chip, "tpm2_getcap", "properties-variable"); !strings.Contains(strings.Join(strings.Fields(out), " "), "inLockout: 1") {
		t.Errorf("the TPM is not locked: %s", out)
	}
	opens("a TPM that is locked for objects with a PIN", true)

	again := func(p *swtpm.TPM) {
		t.Helper()
		stop()
		c.tpm = &tpm.TPM{Path: p.Socket()}
		client, stop = c.boot(slot.A, 0)
	}
	chip.Stop()
	chip = swtpm.Start(t, state)
	again(chip)
	tool(chip, "tpm2_pcrextend", measured)
	opens("the same machine after a restart", true)
	tool(chip, "tpm2_pcrextend", measured)
	opens("another PCR 7", false)

	other := swtpm.Start(t, t.TempDir())
	tool(other, "tpm2_pcrextend", measured)
	again(other)
	opens("another machine, with a copy of the disk", false)
	other.Stop()
	opens("a machine whose TPM is lost", false)

	if _, err := client.Seal(ctx, []byte(key)); err == nil {
		t.Error("a machine without a TPM seals")
	}
	if _, err := client.Seal(ctx, make([]byte, tpm.MaxSealed+1)); err == nil || !strings.Contains(err.Error(), "want 1 to 128") {
		t.Errorf("a large piece: %v", err)
	}
	if _, err := client.Open(ctx, nil); err == nil {
		t.Error("nothing opens")
	}
}
