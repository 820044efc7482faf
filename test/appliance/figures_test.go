package appliance

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/image/figures"
	"github.com/isthmus-net/isthmus/test/vm"
)

// host describes the properties of this machine that affect a time measured on it.
func host() string {
	how := "QEMU's emulation of a processor"
	if vm.KVM() {
		how = "KVM"
	}
	load, _ := os.ReadFile("/proc/loadavg")
	before, _, _ := strings.Cut(string(load), " ")
	return fmt.Sprintf("%s, a machine of 2 processors on %d, whose load was %s before", how, runtime.NumCPU(), before)
}

// parts splits the time of the present boot, by the clock that the kernel started. The time before
// is that of firmware and loader.
func (b *bench) parts(firmware string) figures.Boot {
	b.t.Helper()
	seconds := func(text string, unit float64) float64 {
		b.t.Helper()
		v, err := strconv.ParseFloat(text, 64)
		if err != nil || v <= 0 {
			b.t.Errorf("%q is not a time: %v", text, err)
		}
		return v / unit
	}
	up := seconds(strings.Fields(b.run("cat /proc/uptime"))[0], 1)
	before := b.m.Since().Seconds() - up
	userspace := seconds(b.run("systemctl show -p UserspaceTimestampMonotonic --value"), 1e6)
	started := seconds(b.run("systemctl show -p ExecMainStartTimestampMonotonic --value isthmusd"), 1e6)
	line := b.run("journalctl -b -u isthmusd -o short-monotonic --no-hostname | grep -m1 'msg=serving'")
	m := regexp.MustCompile(`^\[ *([0-9.]+)\]`).FindStringSubmatch(line)
	if m == nil {
		b.t.Fatalf("%q has no time", line)
	}
	serves := seconds(m[1], 1)
	boot := figures.Boot{Firmware: firmware, API: before + serves, Loader: before, Kernel: userspace, Services: started - userspace, Own: serves - started}
	if boot.Loader <= 0 || boot.Kernel <= 0 || boot.Services <= 0 || boot.Own <= 0 {
		b.t.Errorf("the parts of the boot are %+v", boot)
	}
	return boot
}

// digest returns the SHA-256 of a file.
func digest(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}
