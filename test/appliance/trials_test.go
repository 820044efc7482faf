package appliance

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/image/slot"
	"github.com/isthmus-net/isthmus/test/lab"
)

// TestTrials upgrades to slots that fail, each in another way, and cuts the power during a trial.
// Each time the node comes back by itself and reports why.
func TestTrials(t *testing.T) {
	b := newBench(t)
	b.start(BIOS, b.seed())
	b.enrol()
	b.serves("")
	limit := func(d time.Duration) func(string) error {
		return func(tree string) error { return write(tree, "usr/share/isthmus/trial-limit", d.String()+"\n") }
	}
	daemon := func(script string) func(string) error {
		return func(tree string) error { return write(tree, "usr/sbin/isthmusd", "#!/bin/sh\n"+script+"\n") }
	}
	// A unit of the slot itself reports on the console how its trial goes: without a daemon nothing
	// else does.
	told := func(command string) func(string) error {
		return func(tree string) error { return unit(tree, "tell", command) }
	}
	for i, c := range []struct {
		name   string
		change []func(tree string) error
		shown  string // on the console, at least once
		times  int
		why    string
	}{
		{"the daemon ends", []func(string) error{limit(20 * time.Second), daemon("exit 1")}, `Esc within`, 2, "its daemon did not report why"},
		{"the kernel panics", []func(string) error{func(tree string) error { return unit(tree, "panic", "echo c > /proc/sysrq-trigger") }}, `Kernel panic - not syncing: sysrq triggered crash`, slot.Tries, "its daemon did not report why"},
		{"the daemon says that it is ready, and is silent then", []func(string) error{limit(4 * time.Minute), daemon("exec systemd-notify --exec --ready \\; sleep infinity"),
			told("until journalctl -b -u isthmusd | grep -o \"Watchdog timeout.*\" > /dev/ttyS0; do sleep 1; done")}, `Watchdog timeout \(limit 1min 30s\)`, 1, "its daemon did not report why"},
	} {
		before := len(b.m.Text())
		img := b.release(fmt.Sprintf("9.%d", i), time.Now().Unix(), func(tree string) (err error) {
			for _, f := range c.change {
				err = errors.Join(err, f(tree))
			}
			return err
		})
		begun := time.Now()
		if out, err := b.cli("system", "upgrade", "-f", img); err == nil || !strings.Contains(out, "slot b was given up, and slot a runs: "+c.why) {
			t.Fatal(c.name, out, err)
		}
		t.Logf("%s: back after %.0f s", c.name, time.Since(begun).Seconds())
		if n := len(regexp.MustCompile(c.shown).FindAllString(b.m.Text()[before:], -1)); n < c.times {
			t.Errorf("%s: %q was %d times on the console, want %d", c.name, c.shown, n, c.times)
		}
		if out, err := b.quiet("get", "status", "-o", "json"); err != nil || !strings.Contains(out, "SlotFailed") || !strings.Contains(out, fmt.Sprintf("version 9.%d", i)) {
			t.Error(c.name, out, err)
		}
		b.ok(os.Remove(img))
	}

	// The power fails after the switch was written, then when the trial has received an address,
	// then while its daemon serves and the trial is checked. The third try succeeds.
	good := b.release("9.9", time.Now().Unix(), func(string) error { return nil })
	if out, err := b.cli("system", "upgrade", "-f", good, "--later"); err != nil {
		t.Fatal(out, err)
	}
	env := func(want slot.Env) {
		t.Helper()
		if e := b.loader(); e != want {
			t.Errorf("the loader's state is %+v, want %+v", e, want)
		}
	}
	b.stop()
	env(slot.Env{Good: slot.A, Trial: slot.B, Tries: 3})
	b.start(BIOS, "")
	if _, err := b.m.Expect(`slot b \(good a, trial b, tries 2`, bootLimit); err != nil {
		t.Fatal(err)
	}
	had := b.w.leases()
	b.ok(lab.Until(t.Context(), bootLimit/3, func() error {
		if n := b.w.leases(); n == had {
			return errors.New("the trial has not requested an address")
		}
		return nil
	}))
	b.stop()
	env(slot.Env{Good: slot.A, Trial: slot.B, Tries: 2})
	b.start(BIOS, "")
	b.says("on trial", "system", "status")
	b.stop()
	env(slot.Env{Good: slot.A, Trial: slot.B, Tries: 1})
	b.start(BIOS, "")
	b.serves("9.9")
	env(slot.Env{Good: slot.B})
	b.status()
}
