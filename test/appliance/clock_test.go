package appliance

import (
	"encoding/binary"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
)

// serveTime answers SNTP (RFC 4330) at an address of a node, until the function that it returns is
// called.
func serveTime(n *lab.Node, at string) (stop func() error, err error) {
	var c net.PacketConn
	if err := n.Do(func() (err error) { c, err = net.ListenPacket("udp4", at); return err }); err != nil {
		return nil, fmt.Errorf("serving the time in %s: %w", n.Name, err)
	}
	go func() {
		for q := make([]byte, 512); ; {
			k, from, err := c.ReadFrom(q)
			if err != nil {
				return
			}
			if k < 48 {
				continue
			}
			now := time.Now()
			// since 1900
			stamp := uint64(now.Unix()+2208988800)<<32 | uint64(now.Nanosecond())<<32/1e9
			a := make([]byte, 48)
			// version 4, server, stratum 1
			copy(a, []byte{4<<3 | 4, 1, q[2], 0xec, 12: 'L', 'O', 'C', 'L'})
			binary.BigEndian.PutUint64(a[16:], stamp)
			copy(a[24:32], q[40:48])
			binary.BigEndian.PutUint64(a[32:], stamp)
			binary.BigEndian.PutUint64(a[40:], stamp)
			c.WriteTo(a, from)
		}
	}()
	return c.Close, nil
}

// TestClock starts the machine with wrong clocks: at the first boot, and later. The operator is
// never locked out.
func TestClock(t *testing.T) {
	b := newBench(t)
	clock := func() time.Time {
		t.Helper()
		s, err := strconv.ParseInt(b.run("date +%s"), 10, 64)
		b.ok(err)
		return time.Unix(s, 0)
	}
	right := func(c time.Time) bool { return time.Since(c).Abs() < time.Minute }
	boot := func(base, seed string) {
		t.Helper()
		b.extra = []string{"-rtc", "base=" + base}
		b.start(BIOS, seed)
		b.ok(b.m.Rescue(bootLimit))
	}

	boot("2020-01-01T00:00:00", b.seed())
	b.enrol()
	b.serves("")
	b.shell()
	began := clock()
	t.Logf("first boot with a clock of 2020: the machine takes it to be %s", began.UTC().Format(time.DateOnly))
	if began.Year() < 2026 {
		t.Errorf("the node was made at %s", began)
	}
	b.status()
	stop, err := serveTime(b.w.cloud.NAT, b.w.cloud.Gateway().Addr().String()+":123")
	b.ok(err)
	b.ok(lab.Until(t.Context(), bootLimit/3, func() error {
		if c := clock(); !right(c) {
			return fmt.Errorf("the clock says %s", c)
		}
		return nil
	}))
	b.status()
	if out, err := b.cli("client", "issue", "later", "--role", "reader", "-o", filepath.Join(b.dir, "later.yaml")); err != nil {
		t.Error(out, err)
	}
	b.ok(stop())
	b.stop()

	// systemd treats a clock that is 15 years ahead of the build as unset, like one that is behind
	// it, and begins with the build's time. All but the node accept a clock that is less ahead as
	// right.
	for _, c := range []struct {
		base  string
		wrong bool
	}{{"2045-01-01T00:00:00", false}, {"2039-01-01T00:00:00", true}} {
		boot(c.base, "")
		b.serves("")
		b.shell()
		if got := clock(); right(got) || got.Year() < 2026 {
			t.Errorf("%s: the clock says %s", c.base, got)
		}
		if c.wrong {
			s := b.status("ClockWrong")
			t.Log(s.Conditions[0].Message)
			if text := s.Conditions[0].Message; !strings.Contains(text, "more than 10 years after the newest certificate") {
				t.Error(text)
			}
			if out, err := b.cli("client", "issue", "wrong", "--role", "reader", "-o", filepath.Join(b.dir, "wrong.yaml")); err == nil || !strings.Contains(out, "no certificate is issued while the clock is wrong") {
				t.Errorf("%v: %s", err, out)
			}
		}
		// As an operator does it on the console.
		b.run(fmt.Sprintf("date -s @%d", time.Now().Unix()))
		b.status()
		b.stop()
	}
}
