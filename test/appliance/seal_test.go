package appliance

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/swtpm"
)

// withTPM gives the next start a TPM that keeps its state in a directory.
func (b *bench) withTPM(state string) {
	b.extra = []string{"-chardev", "socket,id=tpm,path=" + swtpm.StartFor(b.t, state).Socket(), "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0"}
}

// given runs the command line with a text on its standard input.
func (b *bench) given(stdin string, args ...string) string {
	b.t.Helper()
	file := filepath.Join(b.dir, "stdin")
	b.ok(os.WriteFile(file, []byte(stdin), 0o600))
	out, err := b.cliInput(file, args...)
	b.t.Logf("isthmus %s\n%s", strings.Join(args, " "), out)
	b.ok(err)
	return out
}

// says waits until a command's output has a text.
func (b *bench) says(text string, args ...string) {
	b.t.Helper()
	b.ok(lab.Until(b.t.Context(), bootLimit, func() error {
		out, err := b.quiet(args...)
		if err != nil || !strings.Contains(out, text) {
			return fmt.Errorf("isthmus %s: %v: want %q in\n%s", strings.Join(args, " "), err, text, out)
		}
		b.t.Logf("isthmus %s\n%s", strings.Join(args, " "), out)
		return nil
	}))
}

// lane is a document whose tunnel has a secret.
var lane = first + `tunnels:
- {name: lane-0, inside: [{local: 169.254.30.1/30}], wireguard: {privateKey: lane-key, peerPublicKey: "bmXOC+F1FxEMF9dyiK2H5/1SUtzH0JuVo51h2wPfgyo=", endpoint: "203.0.113.77:51820", listenPort: 51820}}
`

// TestSeal checks that a node with sealed secrets comes back from a loss of power with its tunnel.
// With another PCR 7, and without its TPM, it serves the API and reports that it is sealed, and the
// recovery string opens it.
func TestSeal(t *testing.T) {
	b := newBench(t)
	tpm := t.TempDir()
	b.withTPM(tpm)
	b.start(UEFI, b.seed())
	b.enrol()
	b.serves("")
	b.given("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEA=", "secret", "set", "lane-key")
	b.apply(lane)
	b.says("lane-0", "get", "tunnels")
	recovery := regexp.MustCompile(`(?m)^([A-Z2-7]{4}-){13}[A-Z2-7]{4}$`).FindString(b.given("", "system", "seal", "tpm2"))
	b.says("secrets       sealed with tpm2\n", "system", "status")
	b.stop()

	// A loss of power: a TPM counts it, and must not refuse because of it.
	b.withTPM(tpm)
	b.start(UEFI, "")
	b.serves("")
	b.says("secrets       sealed with tpm2\n", "system", "status")
	if out, err := b.cli("get", "status"); err != nil || strings.Contains(out, "Seal") {
		t.Error(out, err)
	}
	b.stop()

	// Secure Boot is another PCR 7.
	b.withTPM(tpm)
	b.start(SecureBoot, "")
	b.says("Sealed", "get", "status")
	b.says("sealed", "get", "secrets")
	b.says("PCR 7 has changed", "system", "status")
	b.given(recovery, "system", "unseal")
	b.says("secrets       sealed with tpm2\n", "system", "status")
	if out, err := b.cli("get", "status"); err != nil || strings.Contains(out, "Seal") {
		t.Error(out, err)
	}
	b.stop()

	// A machine without a TPM.
	b.extra = nil
	b.start(BIOS, "")
	b.says("Sealed", "get", "status")
	b.given("BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBEA=", "secret", "set", "lane-key")
	b.given("", "system", "seal", "none")
	b.says("secrets       encrypted with a key on the same disk\n", "system", "status")
	if out, err := b.cli("get", "status"); err != nil || strings.Contains(out, "Seal") {
		t.Error(out, err)
	}
}
