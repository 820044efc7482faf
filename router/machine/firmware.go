package machine

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Firmware is the state of the firmware and of the kernel's lockdown. It is only reported, except
// that Seal refuses to seal without a TPM and a measured PCR 7.
type Firmware struct {
	UEFI, SecureBoot bool
	TPM              bool
	PCR7             string // hex; empty: it cannot be read
	Lockdown         string // empty: the kernel has no lockdown
}

// secureBoot is the variable of UEFI 2.10, section 3.3 (globally defined variables): four bytes of
// attributes, then 1 when the firmware enforces Secure Boot.
const secureBoot = "firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"

var chosen = regexp.MustCompile(`\[([a-z]+)\]`)

// ReadFirmware reads below sys, which is /sys except in tests.
func ReadFirmware(sys string) (f Firmware) {
	if _, err := os.Stat(filepath.Join(sys, "firmware/efi")); err == nil {
		f.UEFI = true
	}
	if b, err := os.ReadFile(filepath.Join(sys, secureBoot)); err == nil && len(b) == 5 {
		f.SecureBoot = b[4] == 1
	}
	if _, err := os.Stat(filepath.Join(sys, "class/tpm/tpm0")); err == nil {
		f.TPM = true
	}
	if b, err := os.ReadFile(filepath.Join(sys, "class/tpm/tpm0/pcr-sha256/7")); err == nil {
		f.PCR7 = strings.ToLower(strings.TrimSpace(string(b)))
	}
	if b, err := os.ReadFile(filepath.Join(sys, "kernel/security/lockdown")); err == nil {
		if m := chosen.FindSubmatch(b); m != nil {
			f.Lockdown = string(m[1])
		}
	}
	return f
}
