//go:build unix

package spec

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/root"
)

func TestAliasBombEnds(t *testing.T) {
	root.NeedTime(t)
	text := "tunnels: [&l {inside: [" + strings.Repeat("{local: a}, ", 2000) + "]}, " + strings.Repeat("*l, ", 5000) + "]"
	spent := func() time.Duration { // CPU time, because other processes may use the processor
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			t.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := spent()
	_, problems := Decode([]byte(text))
	if !strings.Contains(problems.Error(), "aliases counted") {
		t.Errorf("got %.200v", problems)
	}
	if d := spent() - before; d > 20*time.Second {
		t.Errorf("took %v of CPU time", d)
	}
}
