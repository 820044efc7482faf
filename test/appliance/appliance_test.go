package appliance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/image/figures"
	"github.com/isthmus-net/isthmus/image/slot"
	"github.com/isthmus-net/isthmus/test/e2e"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/vm"
)

const (
	// bootLimit bounds one boot of an emulated machine that shares two processors.
	bootLimit = 10 * time.Minute
	// commandLimit bounds one command on its console.
	commandLimit = 2 * time.Minute
	// upgradeLimit bounds one command from outside, which may wait for two boots.
	upgradeLimit = 15 * time.Minute
)

// built returns a file that make image has made.
func built(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("../../bin", name))
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("run make image first: %v", err)
	}
	return path
}

// bench is a disk, the world around its machine, and the client files to use the machine from
// there.
type bench struct {
	t       *testing.T
	w       *world
	dir     string
	disk    string
	context string   // file
	first   []string // arguments of QEMU for devices before the disk
	extra   []string // and after it
	m       *Machine
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, w: newWorld(t), dir: t.TempDir()}
	b.disk, b.context = filepath.Join(b.dir, "disk.raw"), filepath.Join(b.dir, "admin.yaml")
	if out, err := exec.Command("cp", "--sparse=always", built(t, "image/disk.raw"), b.disk).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// As a cloud grows it.
	if err := os.Truncate(b.disk, 3<<30); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) ok(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// start starts the machine, and ends it with the test.
func (b *bench) start(f Firmware, seed string) {
	b.t.Helper()
	wire, err := b.w.cloud.NAT.Tap(b.t.Context(), "machine", vpc)
	b.ok(err)
	m, err := Start(b.t.Context(), Config{Disk: b.disk, First: b.first, Firmware: f, Seed: seed, UUID: "6c3cf9a5-1f5b-4f0e-9d3f-1d1c5f0a7b11", Extra: b.extra, Log: b.t.Logf, Files: []*os.File{wire},
		Net: []string{"-netdev", "tap,id=net0,fd=3", "-device", "virtio-net-pci,netdev=net0,romfile=,mac=" + mac}})
	if err != nil {
		b.t.Fatal(err)
	}
	b.m = m
	b.t.Cleanup(b.stop)
}

// stop cuts the power.
func (b *bench) stop() {
	if b.m == nil {
		return
	}
	if b.t.Failed() {
		b.t.Logf("the end of the console:\n%s", b.m.Tail(6000))
	}
	if err := b.m.Close(); err != nil {
		b.t.Error(err)
	}
	b.m = nil
}

// seed makes a NoCloud disk with the user-data of a first boot: the document, and a request for the
// certificate of an admin, whose key stays here.
func (b *bench) seed() string {
	b.t.Helper()
	request, err := b.cli("client", "request", "--name", "test")
	if err != nil {
		b.t.Fatal(err)
	}
	indented := func(text string) string {
		return "  " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n  ") + "\n"
	}
	request = request[strings.Index(request, "-----BEGIN"):]
	img := filepath.Join(b.dir, "seed.img")
	files := map[string]string{
		"user-data": "#isthmus\ndocument: |\n" + indented(first) + "admin:\n  request: |\n  " + strings.TrimRight(strings.ReplaceAll(indented(request), "\n", "\n  "), " "),
		"meta-data": "instance-id: test-1\n",
	}
	err = errors.Join(os.WriteFile(img, nil, 0o600), os.Truncate(img, 2<<20))
	if out, merr := exec.Command("mkfs.vfat", "-n", "CIDATA", img).CombinedOutput(); err != nil || merr != nil {
		b.t.Fatalf("%v, %v: %s", err, merr, out)
	}
	for name, text := range files {
		path := filepath.Join(b.dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			b.t.Fatal(err)
		}
		if out, err := exec.Command("mcopy", "-i", img, path, "::"+name).CombinedOutput(); err != nil {
			b.t.Fatalf("%v: %s", err, out)
		}
	}
	return img
}

// enrol waits for the node's answer on its console, and makes a context of it.
func (b *bench) enrol() {
	b.t.Helper()
	if err := b.m.Shown("-----END ISTHMUS CONTEXT-----", bootLimit); err != nil {
		b.t.Fatal(err)
	}
	console := filepath.Join(b.dir, "console.txt")
	if err := os.WriteFile(console, []byte(b.m.Text()), 0o600); err != nil {
		b.t.Fatal(err)
	}
	if out, err := b.cli("client", "accept", console); err != nil {
		b.t.Fatal(out, err)
	}
}

// shell waits for the root shell on the console.
func (b *bench) shell() {
	b.t.Helper()
	b.ok(b.m.Prompt(bootLimit))
	b.run("export SYSTEMD_COLORS=0 SYSTEMD_PAGER=cat PAGER=cat TERM=dumb; stty cols 300")
}

func (b *bench) run(command string) string {
	b.t.Helper()
	out, err := b.m.Run(command, commandLimit)
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// until repeats a command until its output matches.
func (b *bench) until(command, expression string) string {
	b.t.Helper()
	re := regexp.MustCompile(expression)
	for end := time.Now().Add(bootLimit); ; time.Sleep(time.Second) {
		out, err := b.m.Run(command, commandLimit)
		if err == nil && re.MatchString(out) {
			return out
		}
		if errors.Is(err, ErrEnded) || time.Now().After(end) {
			b.t.Fatalf("%s: %v: %s; want %s", command, err, out, expression)
		}
	}
}

// command returns the words of an isthmus command, as the operator runs it over the Internet.
func (b *bench) command(args ...string) []string {
	return append([]string{"env", "HOME=" + b.dir, "XDG_CONFIG_HOME=", built(b.t, "isthmus"), "--context", b.context, "--address", public + ":7443"}, args...)
}

// quiet runs the command line, and returns all its output.
func (b *bench) quiet(args ...string) (string, error) { return b.cliInput(os.DevNull, args...) }

// cliInput is quiet with a file as standard input.
func (b *bench) cliInput(file string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(b.t.Context(), upgradeLimit)
	defer cancel()
	return b.w.internet.Node.Exec(ctx, append([]string{"sh", "-c", `exec "$@" < "$0" 2>&1`, file}, b.command(args...)...)...)
}

// cli is quiet, and logs the output.
func (b *bench) cli(args ...string) (string, error) {
	began := time.Now()
	out, err := b.quiet(args...)
	b.t.Logf("isthmus %s (%.0f s)\n%s", strings.Join(args, " "), time.Since(began).Seconds(), out)
	return out, err
}

// apply applies a document.
func (b *bench) apply(document string) {
	b.t.Helper()
	file := filepath.Join(b.dir, "node.yaml")
	b.ok(os.WriteFile(file, []byte(document), 0o600))
	if out, err := b.cli("apply", "-f", file); err != nil {
		b.t.Fatal(out, err)
	}
}

// release makes another slot from the one that was built, and signs it with the key of this
// machine, which make image has used.
func (b *bench) release(version string, serial int64, change func(tree string) error) string {
	b.t.Helper()
	tree, img := filepath.Join(b.dir, "tree"), filepath.Join(b.dir, version+".slot")
	defer os.RemoveAll(tree)
	run := func(name string, args ...string) {
		b.t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			b.t.Fatalf("%s: %v: %s", name, err, out)
		}
	}
	run("unsquashfs", "-n", "-q", "-d", tree, built(b.t, "image/slot.img"))
	if err := change(tree); err != nil {
		b.t.Fatal(err)
	}
	run("mksquashfs", tree, img, "-comp", "gzip", "-Xcompression-level", "1", "-b", "256K", "-noappend", "-no-progress", "-quiet", "-no-xattrs")
	b.sign(img, img+".minisig", slot.Release{Version: version, Serial: serial})
	return img
}

func (b *bench) sign(img, signature string, r slot.Release) {
	b.t.Helper()
	cache, err := vm.CacheDir()
	if err != nil {
		b.t.Fatal(err)
	}
	sig, err := slot.Sign(filepath.Join(cache, "signing/own.key"), "", img, r)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(signature, sig, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

func write(tree, path, text string) error {
	path = filepath.Join(tree, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o755)
}

// unit adds a unit to a slot, which runs a command in the shell as early as /data is there.
func unit(tree, name, command string) error {
	const dir = "etc/systemd/system/"
	err := write(tree, dir+name+".service", "[Unit]\nDefaultDependencies=no\nRequiresMountsFor=/data\n[Service]\nType=oneshot\nExecStart=/bin/sh -c '"+command+"'\n")
	return errors.Join(err, os.Symlink("../"+name+".service", filepath.Join(tree, dir, "multi-user.target.wants", name+".service")))
}

// partition returns where on a disk a partition begins.
func (b *bench) partition(disk, name string) (start int64) {
	b.t.Helper()
	out, err := exec.Command("sfdisk", "--json", disk).Output()
	b.ok(err)
	m := regexp.MustCompile(`"start": (\d+),[^{]*?"name": "` + name + `"`).FindSubmatch(out)
	if m == nil {
		b.t.Fatalf("no partition %s in %s", name, out)
	}
	_, err = fmt.Sscan(string(m[1]), &start)
	b.ok(err)
	return start * 512
}

// loader returns the loader's state on the disk.
func (b *bench) loader() slot.Env {
	b.t.Helper()
	block, _ := b.block(b.disk)
	e, err := slot.ParseEnv(block)
	b.ok(err)
	return e
}

// block returns the loader's block of a disk, and where it is.
func (b *bench) block(disk string) ([]byte, int64) {
	b.t.Helper()
	start := b.partition(disk, "env")
	f, err := os.Open(disk)
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	area := make([]byte, slot.EnvArea)
	if _, err := f.ReadAt(area, start); err != nil && err != io.EOF {
		b.t.Fatal(err)
	}
	at, err := slot.FindEnv(area)
	if err != nil {
		b.t.Fatal(err)
	}
	return area[at : at+slot.EnvSize], start + at
}

// first is a document that admits the operator.
var first = fmt.Sprintf(`node: {name: hub-1, asn: %d}
underlay: {interface: eth0, address: %s, publicAddress: %s}
access: {api: [%s/32]}
`, e2e.NodeASN, e2e.NodePrivate.Addr(), public, operator)

// TestImage starts the image with each firmware, checks its content, has it do the main job, and
// upgrades it: to a slot that works, and to one that does not.
func TestImage(t *testing.T) {
	measured := figures.Measured{Slot: digest(t, built(t, "image/slot.img")), Machine: host(), Time: time.Now().UTC()}
	b := newBench(t)
	b.start(BIOS, b.seed())
	if err := b.m.Rescue(bootLimit); err != nil {
		t.Fatal(err)
	}
	b.enrol()
	b.serves("")
	t.Logf("the API served %.0f s after power on, enrolled by user-data alone (BIOS)", b.m.Since().Seconds())
	b.shell()
	t.Logf("root shell %.0f s after power on (BIOS)", b.m.Since().Seconds())
	b.until("systemctl is-active isthmusd strongswan isthmus-system | sort -u", `^active\s*$`)
	b.until("systemctl is-system-running || true", `running|degraded`)
	if failed := b.run("systemctl list-units --failed --no-legend --plain"); failed != "" {
		t.Errorf("units have failed:\n%s", failed)
	}
	t.Log(b.run("systemd-analyze"))
	for command, want := range map[string]string{
		"findmnt -n -o OPTIONS / | cut -d, -f1":                                 "ro",
		"findmnt -n -o FSTYPE /data":                                            "ext4",
		"findmnt -n -o OPTIONS /data | grep -c nosuid.*nodev.*noexec":           "1",
		"cat /etc/machine-id":                                                   "6c3cf9a51f5b4f0e9d3f1d1c5f0a7b11",
		"sysctl -n kernel.modules_disabled":                                     "1",
		"stat -c %U:%a /var/lib/isthmus":                                        "isthmus:700",
		"ps -o user= -C isthmusd | sort -u":                                     "isthmus",
		"touch /usr/x 2>/dev/null; echo $?":                                     "1",
		"find / -xdev -perm /6000 -type f | wc -l":                              "0",
		"sed -n 's/.*\\[\\(.*\\)\\].*/\\1/p' /sys/kernel/security/lockdown":     "integrity",
		"[ $(lsblk -bno SIZE /dev/isthmus/data) -gt 2000000000 ] && echo grown": "grown",
	} {
		if got := b.run(command); got != want {
			t.Errorf("%s: %q, want %q", command, got, want)
		}
	}
	measured.Sockets = strings.Split(b.run("ss -Hlntup | grep -v '\"systemd-timesyn\"' | awk '{print $1, $5}' | sed 's/%[a-z0-9]*//' | sort -u"), "\n")
	for _, socket := range measured.Sockets {
		if !figures.Known(strings.TrimSpace(socket)) {
			t.Errorf("%s listens", socket)
		}
	}
	measured.Boots = append(measured.Boots, b.parts("BIOS, first start"))
	if out, err := b.cli("system", "status"); err != nil || !strings.Contains(out, "running, good") || !strings.Contains(out, "bios") {
		t.Error(out, err)
	}

	b.sshServer()
	b.job()

	// An upgrade that goes well.
	serial := time.Now().Unix()
	good := b.release("9.1", serial, func(tree string) error { return write(tree, "usr/share/isthmus/trial-limit", "10m\n") })
	begun := time.Now()
	if out, err := b.cli("system", "upgrade", "-f", good); err != nil || !strings.Contains(out, "slot b, version 9.1, is good") {
		t.Fatal(out, err)
	}
	t.Logf("upgraded in %.0f s", time.Since(begun).Seconds())
	if e := b.loader(); e != (slot.Env{Good: slot.B}) {
		t.Errorf("the loader's state is %+v", e)
	}

	// Slots that are refused.
	changed := filepath.Join(b.dir, "changed.slot")
	data, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(changed, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := b.cli("system", "upgrade", "-f", changed, "--signature", good+".minisig"); err == nil || !strings.Contains(out, "does not belong to this slot") {
		t.Error(out, err)
	}
	older := filepath.Join(b.dir, "older.minisig")
	b.sign(good, older, slot.Release{Version: "1.0", Serial: 5})
	if out, err := b.cli("system", "upgrade", "-f", good, "--signature", older); err == nil || !strings.Contains(out, "older than the one that runs") {
		t.Error(out, err)
	}

	// The power fails while a slot is written.
	b.sending(good, 40)
	if e := b.loader(); e != (slot.Env{Good: slot.B}) {
		t.Errorf("after a loss of power during an upgrade the loader's state is %+v", e)
	}

	// By UEFI.
	b.start(UEFI, "")
	bad := b.release("9.2", serial+1, func(tree string) error {
		return errors.Join(write(tree, "usr/share/isthmus/trial-limit", "20s\n"), write(tree, "usr/sbin/isthmusd", "#!/bin/sh\nexec sleep infinity\n"))
	})
	b.serves("9.1")
	served := b.m.Since().Seconds()
	measured.Boots = append(measured.Boots, figures.Boot{Firmware: "UEFI", API: served, Tunnels: b.carries()})
	if out, err := b.cli("system", "upgrade", "-f", bad, "--later"); err != nil || !strings.Contains(out, "the next start tries it") {
		t.Error(out, err)
	}
	b.off()

	// By Secure Boot, and by a slot whose daemon hangs: the machine falls back by itself, and the
	// node says why.
	b.start(SecureBoot, "")
	b.serves("9.1")
	if text := b.m.Text(); !strings.Contains(text, "slot a (good b, trial a, tries 2") || strings.Count(text, "reboot: Restarting system") != 1 {
		t.Error("the machine has not started slot a, and then once again")
	}
	if out, err := b.cli("system", "status"); err != nil || !strings.Contains(out, "uefi, Secure Boot") || !strings.Contains(out, "last trial    given up") {
		t.Error(out, err)
	}
	if out, err := b.cli("get", "status"); err != nil || !strings.Contains(out, "SlotFailed") {
		t.Error(out, err)
	}
	b.carries()
	t.Logf("%+v", measured)
	if err := figures.Write("../../bin/image", measured); err != nil {
		t.Error(err)
	}
}

// sending sends a slot, and cuts the power when the given part of it, in per cent, was sent.
func (b *bench) sending(img string, percent int) {
	b.t.Helper()
	p, err := b.w.internet.Node.Start("upgrade", b.command("system", "upgrade", "-f", img, "--later")...)
	b.ok(err)
	b.ok(lab.Until(b.t.Context(), bootLimit/3, func() error {
		text, err := os.ReadFile(p.Log)
		for _, m := range regexp.MustCompile(`sent (\d+)`).FindAllStringSubmatch(string(text), -1) {
			if n, _ := strconv.Atoi(m[1]); n >= percent {
				return nil
			}
		}
		return fmt.Errorf("waiting for %d %% of a slot to be sent: %v: %s", percent, err, text)
	}))
	b.stop()
	p.Stop()
}

// sshKey makes a key for SSH, and returns a document that admits the operator with it.
func (b *bench) sshKey() (document string) {
	b.t.Helper()
	key := filepath.Join(b.dir, "id")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
		b.t.Fatalf("%v: %s", err, out)
	}
	own, err := os.ReadFile(key + ".pub")
	b.ok(err)
	return strings.Replace(first, "access: {", "access: {ssh: ["+operator+"/32], sshKeys: ["+strings.TrimSpace(string(own))+"], ", 1)
}

// ssh runs a command on the machine by SSH, as the operator does, with a file as standard input;
// empty: none.
func (b *bench) ssh(file, command string) (string, error) {
	ctx, cancel := context.WithTimeout(b.t.Context(), commandLimit)
	defer cancel()
	return b.w.internet.Node.Exec(ctx, "sh", "-c", `exec "$@" < "$0"`, cmp.Or(file, os.DevNull), "ssh", "-i", filepath.Join(b.dir, "id"), "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no",
		"-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=20", "root@"+public, command)
}

// login waits until the operator can log in by SSH.
func (b *bench) login() {
	b.t.Helper()
	b.ok(lab.Until(b.t.Context(), bootLimit/3, func() error {
		out, err := b.ssh("", "id -un")
		if err == nil && strings.TrimSpace(out) != "root" {
			err = fmt.Errorf("the login is of %q", out)
		}
		return err
	}))
}

// sshServer adds a key to the document, logs in with it, and removes the key again.
func (b *bench) sshServer() {
	b.t.Helper()
	document := b.sshKey()
	if out, err := b.ssh("", "id -un"); err == nil {
		b.t.Errorf("SSH answers although the document has no key: %s", out)
	}
	b.apply(document)
	b.login()
	b.apply(first)
	b.until("systemctl is-active isthmus-ssh || true", `^inactive\s*$`)
	if out, err := b.ssh("", "id -un"); err == nil {
		b.t.Errorf("SSH answers after the key was taken away: %s", out)
	}
}

// serves waits until the node answers, and runs the slot of a version; empty: of any.
func (b *bench) serves(version string) {
	b.t.Helper()
	for end := time.Now().Add(bootLimit); ; time.Sleep(time.Second) {
		out, err := b.quiet("system", "status")
		if err == nil && regexp.MustCompile(regexp.QuoteMeta(version)+`\s+running, good`).MatchString(out) {
			return
		}
		if time.Now().After(end) {
			b.t.Fatalf("the node does not run %s: %v: %s", version, err, out)
		}
	}
}
