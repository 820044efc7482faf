package appliance

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
)

// numbered is a document that has one number in each of many policies, so that a mixture of two
// documents would be noticed.
func numbered(n int) string {
	var b strings.Builder
	b.WriteString(first + "egress:\n  pools: [{name: partner, addresses: [{address: 10.99.0.11}]}]\n  policies:\n")
	for i := range 200 {
		fmt.Fprintf(&b, "  - {name: p-%d, sources: [172.16.0.0/16], destinations: [192.0.2.%d/32], action: deny} # n-%d\n", i, i, n)
	}
	return b.String()
}

// TestPowerCut cuts the power while documents are applied one after the other. The node comes back
// with one of them, whole: the last that was accepted, or the one that was under way.
func TestPowerCut(t *testing.T) {
	b := newBench(t)
	b.start(BIOS, b.seed())
	b.enrol()
	b.serves("")
	n := 0
	file := filepath.Join(b.dir, "numbered.yaml")
	write := func() {
		t.Helper()
		n++
		b.ok(os.WriteFile(file, []byte(numbered(n)), 0o600))
	}
	for cut := range 3 {
		write()
		if out, err := b.cli("apply", "-f", file); err != nil {
			t.Fatal(out, err)
		}
		accepted := n
		// Before, in, and after the rename that makes a document the present one: the exact point
		// is random.
		write()
		p, err := b.w.internet.Node.Start("apply", b.command("apply", "-f", file)...)
		b.ok(err)
		moment := time.Duration(rand.Int64N(int64(2 * time.Second)))
		select {
		case <-p.Done():
		case <-time.After(moment):
		}
		b.stop()
		p.Stop()
		b.start(BIOS, "")
		b.serves("")
		out, err := b.quiet("get", "spec")
		b.ok(err)
		var got []string
		for _, m := range regexp.MustCompile(`n-(\d+)`).FindAllStringSubmatch(out, -1) {
			got = append(got, m[1])
		}
		which, _ := strconv.Atoi(got[0])
		if out != numbered(which) || which != accepted && which != n {
			t.Errorf("cut %d: the document is %d, want all of %d or all of %d:\n%s", cut, which, accepted, n, out)
		}
		t.Logf("cut %d, %v after the command's start: document %d of %d and %d", cut, moment, which, accepted, n)
		b.status()
		history, err := b.cli("get", "history")
		if err != nil || len(strings.Split(strings.TrimSpace(history), "\n")) < cut+2 {
			t.Error(history, err)
		}
	}
}

// status is the output of `isthmus get status`.
type status struct {
	Generation, AppliedGeneration string
	Conditions                    []struct{ Type, Severity, Message string }
}

// status waits until the node has applied its document, and its conditions are exactly those given,
// in any order.
func (b *bench) status(want ...string) (s status) {
	b.t.Helper()
	slices.Sort(want)
	b.ok(lab.Until(b.t.Context(), bootLimit/3, func() error {
		out, err := b.quiet("get", "status", "-o", "json")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		s = status{}
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		var got []string
		for _, c := range s.Conditions {
			got = append(got, c.Type)
		}
		slices.Sort(got)
		if s.Generation != s.AppliedGeneration || !slices.Equal(got, want) {
			return fmt.Errorf("want conditions %v: %s", want, out)
		}
		return nil
	}))
	return s
}

// TestDisk takes the node's disk away: full, read-only, and without a file system.
func TestDisk(t *testing.T) {
	b := newBench(t)
	b.start(BIOS, b.seed())
	b.ok(b.m.Rescue(bootLimit))
	b.enrol()
	b.serves("")
	b.shell()
	file := filepath.Join(b.dir, "numbered.yaml")
	n := 0
	change := func() (string, error) {
		n++
		b.ok(os.WriteFile(file, []byte(numbered(n)), 0o600))
		return b.cli("apply", "-f", file)
	}
	changed := func() {
		t.Helper()
		if out, err := change(); err != nil {
			t.Fatal(out, err)
		}
		b.status()
	}
	refused := func(why string) {
		t.Helper()
		if out, err := change(); err == nil || !strings.Contains(out, why) {
			t.Errorf("%v: %s, want %q", err, out, why)
		}
	}
	// A restart of the daemon shows that it does not need to write.
	restarted := func(want ...string) status {
		t.Helper()
		b.run("systemctl restart isthmusd")
		return b.status(want...)
	}
	changed()

	b.run("fallocate -l $(df --output=avail -B1 /data | tail -1) /data/filler 2>/dev/null || true; dd if=/dev/zero of=/data/filler2 bs=64k 2>/dev/null || true; sync")
	s := restarted("StateFull")
	t.Log(s.Conditions[0].Message)
	refused("no space left on device")
	b.run("rm /data/filler /data/filler2")
	b.status()
	changed()

	// An error of the file system, after which the kernel no longer writes to it
	// (errors=remount-ro): the node serves, and the next start repairs the file system.
	b.run("echo 1 > /sys/fs/ext4/$(basename $(readlink -f /dev/isthmus/data))/trigger_fs_error")
	refused("input/output error")
	b.serves("")
	t.Log(b.status("StateNotWritable").Conditions[0].Message)
	b.stop()
	b.start(BIOS, "")
	b.ok(b.m.Rescue(bootLimit))
	b.serves("")
	b.status()
	changed()
	b.shell()

	// The disk comes late, as after its start job has timed out: only its arrival starts the
	// daemon.
	device := b.run("readlink -f /dev/isthmus/data")
	b.run("udevadm trigger --action=remove " + device)
	b.until("systemctl is-active isthmusd || true", `^inactive\s*$`)
	b.run("udevadm trigger --action=add " + device)
	b.serves("")
	b.status()

	// The superblock is lost. The console reports this and the remedy.
	b.stop()
	disk, err := os.OpenFile(b.disk, os.O_WRONLY, 0)
	b.ok(err)
	_, err = disk.WriteAt(make([]byte, 4096), b.partition(b.disk, "data"))
	b.ok(errors.Join(err, disk.Close()))
	b.start(BIOS, "")
	b.ok(b.m.Rescue(bootLimit))
	b.ok(b.m.Shown("isthmus: /data cannot be mounted", bootLimit))
	t.Logf("the console reported that /data cannot be mounted %.0f s after power on", b.m.Since().Seconds())
	b.shell()
	if got := b.run("systemctl is-active isthmusd || true"); got != "inactive" {
		t.Errorf("without its state the daemon is %s", got)
	}
	if err := b.m.Send("fsck.ext4 -y /dev/isthmus/data && systemctl reboot || systemctl reboot\n"); err != nil {
		t.Fatal(err)
	}
	b.serves("")
	b.status()
	if out, err := b.quiet("get", "spec"); err != nil || out != numbered(n) {
		t.Errorf("after the repair the document is %s, %v", out, err)
	}
}
