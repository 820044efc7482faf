package build

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/image/slot"
)

// root makes the smallest tree that Audit accepts.
func root(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	put(t, dir, "etc/shadow", "root:*:20000:0:99999:7:::\nisthmus:!*:20000::::::\n", 0o640)
	put(t, dir, "etc/machine-id", "", 0o644)
	put(t, dir, "usr/bin/tool", "\x7fELF-----BEGIN PRIVATE KEY-----", 0o755)
	put(t, dir, "etc/ssl/certs/ca.pem", "-----BEGIN CERTIFICATE-----\n", 0o644)
	return dir
}

func put(t *testing.T, dir, path, text string, perm os.FileMode) {
	t.Helper()
	path = filepath.Join(dir, path)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600), os.Chmod(path, perm)); err != nil {
		t.Fatal(err)
	}
}

func TestAudit(t *testing.T) {
	if problems := Audit(root(t)); len(problems) > 0 {
		t.Fatalf("a good root: %q", problems)
	}
	for want, spoil := range map[string]func(dir string){
		"etc/shadow: root has a password":             func(d string) { put(t, d, "etc/shadow", "root:$y$j9T$abc:20000::::::\n", 0o640) },
		"etc/shadow: guest has a password, or needs":  func(d string) { put(t, d, "etc/shadow", "root:*:1::::::\nguest::1::::::\n", 0o640) },
		"usr/bin/su: it is setuid":                    func(d string) { put(t, d, "usr/bin/su", "x", 0o755|os.ModeSetuid) },
		"usr/bin/wall: it is setuid or setgid":        func(d string) { put(t, d, "usr/bin/wall", "x", 0o755|os.ModeSetgid) },
		"etc/motd: everyone may write it":             func(d string) { put(t, d, "etc/motd", "x", 0o666) },
		"etc/ssh/ssh_host_ed25519_key: it belongs":    func(d string) { put(t, d, "etc/ssh/ssh_host_ed25519_key", "x", 0o600) },
		"root/.ssh/authorized_keys: it belongs":       func(d string) { put(t, d, "root/.ssh/authorized_keys", "x", 0o600) },
		"etc/.bash_history: it belongs":               func(d string) { put(t, d, "etc/.bash_history", "x", 0o600) },
		"etc/key.pem: it has a private key":           func(d string) { put(t, d, "etc/key.pem", "junk\n-----BEGIN EC PRIVATE KEY-----\n", 0o600) },
		"usr/share/x: it has a private key":           func(d string) { put(t, d, "usr/share/x", "untrusted comment: minisign encrypted secret key\n", 0o600) },
		"etc/machine-id: it must exist and be empty":  func(d string) { put(t, d, "etc/machine-id", "0123456789abcdef0123456789abcdef\n", 0o444) },
		"var: it must be empty, and has log":          func(d string) { put(t, d, "var/log/x", "x", 0o600) },
		"etc/shadow: open":                            func(d string) { os.Remove(filepath.Join(d, "etc/shadow")) },
		"etc/machine-id: it must exist and be empty,": func(d string) { os.Remove(filepath.Join(d, "etc/machine-id")) },
	} {
		dir := root(t)
		spoil(dir)
		problems := strings.Join(Audit(dir), "\n")
		if !strings.Contains(problems, want) {
			t.Errorf("%q, want %q", problems, want)
		}
	}
}

func TestPackages(t *testing.T) {
	const status = `Package: zlib1g
Status: install ok installed
Architecture: amd64
Multi-Arch: same
Version: 1:1.3.dfsg+really1.3.1-1+b1
Description: compression library - runtime
 Version: of no package

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1

Package: perl-base
Status: install ok installed
Architecture: amd64
Version: 5.40.1-6
`
	got := Packages(status)
	if len(got) != 1 || got[0].PackageURL != "pkg:deb/debian/zlib1g@1%3A1.3.dfsg%2Breally1.3.1-1%2Bb1?arch=amd64" || got[0].Version != "1:1.3.dfsg+really1.3.1-1+b1" {
		t.Errorf("%+v", got)
	}
}

func TestVHD(t *testing.T) {
	const size = 3 << 20
	vhd := func(change func(footer []byte)) string {
		path := filepath.Join(t.TempDir(), "x.vhd")
		footer := make([]byte, 512)
		copy(footer, "conectix")
		binary.BigEndian.PutUint64(footer[48:], size)
		binary.BigEndian.PutUint32(footer[60:], 2)
		change(footer)
		if err := os.WriteFile(path, append(make([]byte, size), footer...), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if err := checkVHD(vhd(func([]byte) {})); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func([]byte){
		"no footer":        func(f []byte) { f[0] = 'x' },
		"not a fixed disk": func(f []byte) { f[63] = 3 },
		"its size is":      func(f []byte) { binary.BigEndian.PutUint64(f[48:], size-512) },
	} {
		if err := checkVHD(vhd(change)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// TestPartitions checks that the loader's file and the layout agree about the partitions.
func TestPartitions(t *testing.T) {
	cfg, err := os.ReadFile("../grub.cfg")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`set env="($disk,gpt3)/grubenv"`, "part=gpt4; else part=gpt5", "root=/dev/isthmus/slot-$s", "isthmus.slot=$s", `mark="isthmus.start=$start"`} {
		if !strings.Contains(string(cfg), want) {
			t.Errorf("grub.cfg has no %s", want)
		}
	}
	script, err := os.ReadFile("../rootfs/etc/initramfs-tools/scripts/local-top/isthmus-root")
	if want := fmt.Sprintf("bs=512 skip=%d count=1", slot.EnvAt/512); err != nil || !strings.Contains(string(script), want) {
		t.Errorf("the initial RAM disk does not read the loader's block with %s (%v)", want, err)
	}
	table := partitions()
	for i, label := range []string{"bios", "esp", slot.EnvLabel, slot.A.Label(), slot.B.Label()} {
		if lines := strings.Split(strings.TrimSpace(table), "\n"); !strings.Contains(lines[3+i], "name="+label) {
			t.Errorf("partition %d is %s, want %s", i+1, lines[3+i], label)
		}
	}
	if end := slotAAt + 2*SlotMiB + 64; end > DiskMiB {
		t.Errorf("the slots leave no room for data: %d MiB of %d", end, DiskMiB)
	}
	if DiskMiB%1024 != 0 {
		t.Error("the disk does not have a whole number of GiB")
	}
	if slot.SignatureAt(slot.B)+slot.SignatureLimit > envMiB*mib {
		t.Error("the signatures are beyond their partition")
	}
}

func TestInstallLoader(t *testing.T) {
	boot, core := make([]byte, sector), make([]byte, 3*sector)
	if err := install(boot, core, 2048); err != nil {
		t.Fatal(err)
	}
	if got := binary.LittleEndian.Uint64(boot[0x5c:]); got != 2048 {
		t.Errorf("the boot sector reads sector %d", got)
	}
	if got := binary.LittleEndian.Uint64(core[sector-12:]); got != 2049 {
		t.Errorf("the core continues at sector %d", got)
	}
	if err := install(boot, core[:sector], 2048); err == nil {
		t.Error("a core of one sector was accepted")
	}
}

// TestSources checks that the image has security updates, whichever mirror its packages come from.
func TestSources(t *testing.T) {
	for _, c := range []struct{ mirror, security, want string }{
		{"http://a.test/debian", "http://b.test/debian-security", "deb http://a.test/debian trixie main|deb http://a.test/debian trixie-updates main|deb http://b.test/debian-security trixie-security main"},
		{"http://a.test/debian", "", ""}, {"", "", ""},
	} {
		if got := strings.Join(sources(c.mirror, c.security), "|"); got != c.want {
			t.Errorf("%s, %s: %s", c.mirror, c.security, got)
		}
	}
}
