package appliance

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/swtpm"
)

// withTPM gives the next start a TPM that keeps what it has in a directory.
func (b *bench) withTPM(state string) {
	b.extra = []string{"-chardev", "socket,id=tpm,path=" + swtpm.StartFor(b.t, state).Socket(), "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0"}
}

// given runs the command line with something on its standard input.
func (b *bench) given(stdin string, args ...string) string {
	b.t.Helper()
	cmd := exec.CommandContext(b.t.Context(), built(b.t, "isthmus"), append([]string{"--context", b.context, "--address", b.api}, args...)...)
	var out, why bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &why
	if err := cmd.Run(); err != nil {
		b.t.Fatalf("isthmus %s: %v: %s", strings.Join(args, " "), err, why.String())
	}
	b.t.Logf("isthmus %s\n%s%s", strings.Join(args, " "), why.String(), out.String())
	return out.String()
}

// shows waits until a command's output has a text.
func (b *bench) shows(text string, args ...string) {
	b.t.Helper()
	for end := time.Now().Add(bootLimit); ; time.Sleep(time.Second) {
		out, _ := exec.CommandContext(b.t.Context(), built(b.t, "isthmus"), append([]string{"--context", b.context, "--address", b.api}, args...)...).CombinedOutput()
		if strings.Contains(string(out), text) {
			b.t.Logf("isthmus %s\n%s", strings.Join(args, " "), out)
			return
		}
		if time.Now().After(end) {
			b.t.Fatalf("isthmus %s: want %q in\n%s", strings.Join(args, " "), text, out)
		}
	}
}

// lane is a document whose tunnel has a secret.
const lane = first + `tunnels:
- {name: lane-0, inside: [{local: 169.254.30.1/30}], wireguard: {privateKey: lane-key, peerPublicKey: "bmXOC+F1FxEMF9dyiK2H5/1SUtzH0JuVo51h2wPfgyo=", endpoint: "203.0.113.77:51820", listenPort: 51820}}
`

// TestSeal: a node with sealed secrets comes back from a loss of power with its tunnel; with another PCR 7, and without its TPM, it serves the API and says that it is sealed, and the
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
	b.shows("lane-0", "get", "tunnels")
	recovery := b.given("", "system", "seal", "tpm2")
	b.shows("secrets       sealed with tpm2\n", "system", "status")
	b.stop()

	// A loss of power: a TPM counts it, and must not refuse because of it.
	b.withTPM(tpm)
	b.start(UEFI, "")
	b.serves("")
	b.shows("secrets       sealed with tpm2\n", "system", "status")
	if out, err := b.cli(t.Context(), "get", "status"); err != nil || strings.Contains(out, "Seal") {
		t.Error(out, err)
	}
	b.stop()

	// Secure Boot is another PCR 7.
	b.withTPM(tpm)
	b.start(SecureBoot, "")
	b.shows("Sealed", "get", "status")
	b.shows("sealed", "get", "secrets")
	b.shows("PCR 7 is not as it was", "system", "status")
	b.given(recovery, "system", "unseal")
	b.shows("secrets       sealed with tpm2\n", "system", "status")
	if out, err := b.cli(t.Context(), "get", "status"); err != nil || strings.Contains(out, "Seal") {
		t.Error(out, err)
	}
	b.stop()

	// A machine without a TPM.
	b.extra = nil
	b.start(BIOS, "")
	b.shows("Sealed", "get", "status")
	b.given("BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBEA=", "secret", "set", "lane-key")
	b.given("", "system", "seal", "none")
	b.shows("secrets       encrypted with a key on the same disk\n", "system", "status")
	if out, err := b.cli(t.Context(), "get", "status"); err != nil || strings.Contains(out, "Seal") {
		t.Error(out, err)
	}
}
