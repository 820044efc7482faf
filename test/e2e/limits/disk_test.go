package limits

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/lab"
)

// TestDisk makes the node's disk unusable: full, and read-only. The router goes on, comes back
// after kill -9, and rolls an unconfirmed document back; changes are refused until there is room.
func TestDisk(t *testing.T) {
	t.Parallel()
	w := begin(t)
	w.hub.Kill()

	// The disk is a file system of a mount namespace that ends with this process.
	dir, err := w.hub.Dir()
	w.ok(err)
	disk := filepath.Join(dir, "disk")
	w.ok(os.Mkdir(disk, 0o700))
	holder, err := w.hub.Node.Start("disk", "unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=32m disk "+disk+" && exec sleep 600")
	w.ok(err)
	w.hub.Under = []string{"nsenter", "--mount", "--target", fmt.Sprint(holder.Pid())}
	w.hub.Args = []string{"-state", disk}
	on := func(script string) error {
		_, err := w.hub.Exec(t.Context(), slices.Concat(w.hub.Under, []string{"sh", "-c", script})...)
		return err
	}
	w.ok(lab.Until(t.Context(), patience, func() error { return on("mountpoint -q " + disk) }))
	w.hub.Start(t)

	pooled := func(pool string) string {
		return document("  pools: [{name: partner, addresses: [{address: " + pool + "}]}]\n  policies: [{name: all, sources: [10.0.0.0/16], pool: partner}]\n")
	}
	w.echo(crowded)
	port := 1024
	seen := func(when, want string) {
		t.Helper()
		port++ // a flow keeps its address
		w.ask(when, 1, ends(1, 1, port))
		if got := w.seenAs(); len(got) != 1 || got[0] != want {
			t.Errorf("%s: seen as %v, want %s", when, got, want)
		}
	}
	refused := func(when, why string) {
		t.Helper()
		if _, err := w.hub.CLI(t.Context(), pooled(second), "apply", "-f", "-"); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v, want %q", when, err, why)
		}
	}
	generation := func(present, applied uint64) {
		t.Helper()
		w.hub.Status(t, patience, func(s *isthmusv1.SystemStatus) bool { return s.Generation == present && s.AppliedGeneration == applied })
	}
	w.hub.Apply(t, pooled(first))
	w.conditions(patience)

	within := lab.Limit(func() { w.conditions(patience) })
	_, err = w.hub.CLI(t.Context(), pooled(second), "apply", "-f", "-", "--confirm-within", within.String())
	w.ok(err)
	w.hub.Settled(t)
	seen("a document that is to be confirmed", second)
	if err := on("cat /dev/zero > " + disk + "/filler"); err == nil || !strings.Contains(err.Error(), "No space left") {
		t.Fatalf("filling the disk: %v", err)
	}
	// The last page of the event log may have room for the events.
	w.conditions(within+patience, maybe+"EventsNotStored warning", "StateFull error", "NotConfirmed error")
	generation(2, 1)
	seen("not confirmed, and no room", first)
	if out, err := w.hub.CLI(t.Context(), "", "get", "spec"); err != nil || out != pooled(first) {
		t.Errorf("%v\n%s", err, out)
	}
	for range 20 { // more lines than the page at the end of the audit log takes
		refused("no room", "no space left on device")
	}

	w.hub.Kill()
	w.hub.Start(t)
	generation(2, 1)
	seen("started without room", first)
	w.ok(on("rm " + disk + "/filler"))
	generation(3, 3)
	w.conditions(patience)

	w.hub.Kill()
	w.ok(on("mount -o remount,ro " + disk))
	w.hub.Start(t)
	w.hub.Settled(t)
	w.conditions(patience, "EventsNotStored warning", "StateNotWritable error")
	seen("started on a read-only disk", first)
	refused("started on a read-only disk", "read-only file system")
	w.ok(on("mount -o remount,rw " + disk))
	w.hub.Apply(t, pooled(second))
	seen("with a disk again", second)
	w.conditions(patience)
	w.ok(on("! grep -v '^{.*}$' " + disk + "/audit.log"))
}
