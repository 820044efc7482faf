package appliance

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRestore loses the node's file system after a copy of its state was made over SSH, as
// docs/operations.md says. A new file system makes a new node, with another authority; the copy
// brings the former one back, with its document, its secrets and its clients.
func TestRestore(t *testing.T) {
	b := newBench(t)
	seed := b.seed()
	b.start(BIOS, seed)
	b.enrol()
	b.serves("")
	b.given("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEA=", "secret", "set", "lane-key")
	document := b.sshKey()
	was := strings.Replace(lane, first, document, 1)
	b.apply(was)
	b.login()
	saved := filepath.Join(b.dir, "isthmus-hub-1.tar.gz")
	text, err := b.ssh("", "tar -C /var/lib -cz --exclude=isthmus/flows isthmus")
	b.ok(errors.Join(err, os.WriteFile(saved, []byte(text), 0o600)))
	b.stop()

	disk, err := os.OpenFile(b.disk, os.O_WRONLY, 0)
	b.ok(err)
	_, err = disk.WriteAt(make([]byte, 64<<20), b.partition(b.disk, "data"))
	b.ok(errors.Join(err, disk.Close()))
	b.start(BIOS, seed)
	b.ok(b.m.Rescue(bootLimit))
	b.ok(b.m.Shown("isthmus: /data cannot be mounted", bootLimit))
	b.shell()
	b.ok(b.m.Send("mkfs.ext4 -q -F -L data /dev/isthmus/data && systemctl reboot\n"))

	// The user-data of the first boot is still there, so that the node takes its first document
	// again.
	former, err := os.ReadFile(b.context)
	b.ok(err)
	b.ok(os.Remove(b.context))
	b.enrol()
	b.serves("")
	if out, err := b.cli("get", "spec"); err != nil || out != first {
		t.Errorf("the document of the new node is %s, %v", out, err)
	}
	b.apply(document)
	b.login()
	// As when the power fails before a file is on the disk.
	if out, err := b.ssh("", "systemctl stop isthmusd && : > /var/lib/isthmus/key && systemctl start --no-block isthmusd"); err != nil {
		t.Fatal(out, err)
	}
	b.ok(b.m.Shown("isthmus: isthmusd has ended (exit-code)", bootLimit))
	b.ok(b.m.Shown("damaged file: key", commandLimit))
	if out, err := b.ssh(saved, "systemctl stop isthmusd && rm -rf /var/lib/isthmus/* && tar -C /var/lib -xz && chown -R isthmus: /var/lib/isthmus && sync && systemctl start isthmusd"); err != nil {
		t.Fatal(out, err)
	}
	if n := strings.Count(b.m.Text(), "isthmus: isthmusd has ended"); n != 1 {
		t.Errorf("the console reported %d times that the daemon has ended, want once", n)
	}
	if out, err := b.cli("get", "status"); err == nil || !strings.Contains(out, "certificate") {
		t.Errorf("the restored node accepts a client of the other one: %v: %s", err, out)
	}
	b.ok(os.WriteFile(b.context, former, 0o600))
	b.serves("")
	b.status()
	if out, err := b.cli("get", "spec"); err != nil || out != was {
		t.Errorf("the document of the restored node is %s, %v", out, err)
	}
	b.says("lane-0", "get", "tunnels")
	// And after a loss of power.
	b.stop()
	b.start(UEFI, seed)
	b.serves("")
	b.status()
}
