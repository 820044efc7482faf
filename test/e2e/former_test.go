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

func init() { payload = append(payload, "../../.cache/former/bin") }

// TestFormer has this revision take over the state directory and the kernel's state of a former
// one, as at the upgrade of a package: every spoke sends 100 packets a second to the next one, and
// none is lost. `make test-former FORMER=REVISION` builds the former revision and runs it.
func TestFormer(t *testing.T) {
	b := beginWith(t, filepath.Join(programs(), formerDir))
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
	for name, t := range b.tunnels() {
		// charon reports ages in whole seconds.
		if d := t.GetEstablished().AsTime().Sub(before[name].GetEstablished().AsTime()); d > 2*time.Second {
			b.Errorf("tunnel %s was established again: %v, %v later than before", name, t.GetEstablished(), d)
		}
	}
	for name, s := range b.sessions() {
		if n := s.Withdrawals - sessions[name].Withdrawals; n != 0 {
			b.Errorf("session %s has seen %d withdrawals", name, n)
		}
	}
	b.oneAddress()
	b.noLeak()
	b.sameDocument()
}
