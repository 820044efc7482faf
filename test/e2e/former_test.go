//go:build former

package e2e

import (
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The programs of the former revision are in a directory of this name, next to those of this one.
const formerDir = "former"

func init() { payload = append(payload, "../../.cache/former/programs") }

// TestFormer has this revision take over the state directory and the kernel's state of a former
// one, as at the upgrade of a package: every spoke sends 100 packets a second to the next one, and
// none is lost. `make test-former FORMER=REVISION` builds the former revision and runs this test.
func TestFormer(t *testing.T) {
	b := build(t, filepath.Join(programs(), formerDir))
	t.Cleanup(b.close)
	b.ready()
	b.step("former revision: %s", b.cli("version"))
	before, _ := b.baseline()
	sessions := b.sessions()
	b.lossless("stop of the former isthmusd and start of this one", func() {
		b.r.Daemon.Signal(unix.SIGTERM)
		<-b.r.Daemon.Done()
		b.r.bin = programs()
		b.ok(b.r.StartDaemon(b.Context()))
		b.dial()
		b.up()
		time.Sleep(5 * time.Second) // a wrong change of the first passes would show by then
	})
	b.step("this revision: %s", b.cli("version"))
	b.survived(before, sessions)
	b.oneAddress()
	b.noLeak()
	b.sameDocument()
}
