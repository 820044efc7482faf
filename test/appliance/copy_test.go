package appliance

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/image/slot"
)

// attached are arguments of QEMU for a disk with the serial number "copy".
func attached(disk string) []string {
	return []string{"-drive", "if=none,id=copy,format=raw,cache=unsafe,file=" + disk, "-device", "virtio-blk-pci,drive=copy,serial=copy"}
}

// off switches the machine off.
func (b *bench) off() {
	b.t.Helper()
	if out, err := b.cli("system", "poweroff"); err != nil {
		b.t.Fatal(out, err)
	}
	if err := b.m.Ended(commandLimit); err != nil {
		b.t.Fatal(err)
	}
	b.stop()
}

// next is the number of a disk's next start.
var next = regexp.MustCompile(`(?m)^next=(\w+)$`)

// TestCopy attaches a copy of the node's own disk, before it and after it in the order of the bus.
// The node uses only its own disk and reports the other one. It does the same when it is started
// from the copy, with the original attached.
func TestCopy(t *testing.T) {
	b := newBench(t)
	b.start(BIOS, b.seed())
	b.enrol()
	b.serves("")
	b.off()
	other := filepath.Join(b.dir, "copy.raw")
	if out, err := exec.Command("cp", "--sparse=always", b.disk, other).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	was := digest(t, other)
	alone := func(disk string) {
		t.Helper()
		if out, err := b.quiet("get", "status", "-o", "json"); err != nil || !strings.Contains(out, "DiskCopied") || !strings.Contains(out, "runs from disk "+disk+" ") {
			t.Errorf("%v: %s", err, out)
		}
		if is := digest(t, other); is != was {
			t.Errorf("the attached disk was written")
		}
	}

	b.first = attached(other)
	b.start(BIOS, "")
	if err := b.m.Rescue(bootLimit); err != nil {
		t.Fatal(err)
	}
	b.serves("")
	if err := b.m.Prompt(bootLimit); err != nil {
		t.Fatal(err)
	}
	if got := b.run("cat /sys/block/vda/serial"); got != "copy" {
		t.Fatalf("the first disk has the serial number %q: the copy should be before the node's disk", got)
	}
	for command, want := range map[string]string{
		"lsblk -no PKNAME $(readlink -f /dev/isthmus/*) | sort -u":                 "vdb",
		"ls /dev/isthmus | tr '\\n' ' '":                                           "data env slot-a slot-b",
		"findmnt -no SOURCE /data | xargs readlink -f | sed 's/.$//'":              "/dev/vdb",
		"lsblk -no PKNAME /dev/block/$(mountpoint -d / ) | sort -u":                "vdb",
		"grep -c isthmus.start= /proc/cmdline":                                     "1",
		"[ \"$(blkid -s PARTLABEL -o value /dev/vda5)\" = slot-b ] && echo copied": "copied",
	} {
		if got := b.run(command); got != want {
			t.Errorf("%s: %q, want %q", command, got, want)
		}
	}
	alone("vdb")
	good := b.release("9.1", time.Now().Unix(), func(tree string) error { return write(tree, "usr/share/isthmus/trial-limit", "10m\n") })
	if out, err := b.cli("system", "upgrade", "-f", good); err != nil || !strings.Contains(out, "slot b, version 9.1, is good") {
		t.Fatal(out, err)
	}
	if e := b.loader(); e != (slot.Env{Good: slot.B}) {
		t.Errorf("the loader's state is %+v", e)
	}
	alone("vdb")
	b.off()

	b.first, b.extra = nil, attached(other)
	b.start(UEFI, "")
	b.serves("9.1")
	alone("vda")
	b.off()

	// Started from the copy, with the original attached, which was started with the number that the
	// copy has for its next start.
	block, _ := b.block(other)
	number := next.FindSubmatch(block)
	if number == nil {
		t.Fatalf("the copy has no number for its next start: %q", block)
	}
	block, at := b.block(b.disk)
	block = regexp.MustCompile(`(?m)^started=[\w.]+$`).ReplaceAll(block, []byte("started="+string(number[1])))
	if block = append(bytes.TrimRight(block, "#"), bytes.Repeat([]byte("#"), slot.EnvSize)...)[:slot.EnvSize]; !bytes.Contains(block, []byte("started="+string(number[1])+"\n")) {
		t.Fatalf("the original was never started: %q", block)
	}
	f, err := os.OpenFile(b.disk, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(block, at); err != nil {
		t.Fatal(err)
	}
	b.disk, other = other, b.disk
	was = digest(t, other)
	b.first, b.extra = attached(other), nil
	b.start(BIOS, "")
	b.serves("")
	alone("vdb")
	if out, err := b.cli("system", "status"); err != nil || strings.Contains(out, "9.1") {
		t.Error(out, err)
	}
}
