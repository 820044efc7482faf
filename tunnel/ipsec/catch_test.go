package ipsec

import (
	"bytes"
	"encoding/hex"
	"net"
	"os/exec"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/nl/nltest"
)

// Ring: namespace. ESP in UDP comes from another namespace; a socket on port 4500 stands for the kernel's ESP.

func TestCatcher(t *testing.T) {
	nltest.Namespace(t, "ist-catch")
	nltest.Run(t, "ip", "link", "add", "ist-c", "type", "veth", "peer", "ist-c", "netns", "ist-catch")
	t.Cleanup(func() { nltest.Run(t, "ip", "link", "del", "ist-c") })
	nltest.Run(t, "ip", "addr", "add", "192.0.2.1/24", "dev", "ist-c")
	nltest.Run(t, "ip", "link", "set", "ist-c", "up")
	nltest.Run(t, "ip", "-n", "ist-catch", "addr", "add", "192.0.2.2/24", "dev", "ist-c")
	nltest.Run(t, "ip", "-n", "ist-catch", "link", "set", "ist-c", "up")
	esp, err := net.ListenUDP("udp4", &net.UDPAddr{Port: 4500})
	if err != nil {
		t.Fatal(err)
	}
	defer esp.Close()
	c, err := newCatcher(map[uint32]bool{0xc0000001: true})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	send := func(payload string) {
		t.Helper()
		raw, _ := hex.DecodeString(payload)
		// bash, since neither netcat nor socat is on every machine
		script := "printf '" + `\x` + hexEscape(raw) + "' > /dev/udp/192.0.2.1/4500"
		if out, err := exec.Command("ip", "netns", "exec", "ist-catch", "bash", "-c", script).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	arrives := func(want string) {
		t.Helper()
		buf := make([]byte, 100)
		_ = esp.SetReadDeadline(time.Now().Add(5 * time.Second))
		n, from, err := esp.ReadFromUDP(buf)
		raw, _ := hex.DecodeString(want)
		if err != nil || !bytes.Equal(buf[:n], raw) || !from.IP.Equal(net.IPv4(192, 0, 2, 2)) {
			t.Errorf("got % x from %v, %v; want %s", buf[:n], from, err, want)
		}
	}
	const early, known, ike, other = "c000000200000001aa", "c000000100000001bb", "0000000000000001cc", "c000000300000001dd"
	for _, p := range []string{early, known, ike, other} {
		send(p)
		arrives(p)
	}
	until(t, 5*time.Second, "two packets caught", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.caught) == 2
	})
	if n := c.release(0xc0000002); n != 1 {
		t.Errorf("%d packets released, want 1", n)
	}
	arrives(early)
	if n := c.release(0xc0000002) + c.release(0xc0000001); n != 0 {
		t.Errorf("%d packets released twice", n)
	}
	c.keep(0xc0000004, []byte{0x45}, time.Now().Add(2*caughtFor))
	if len(c.caught) != 1 {
		t.Errorf("%d packets kept, old ones among them", len(c.caught))
	}
	for range caughtPackets + 10 {
		c.keep(0xc0000005, []byte{0x45}, time.Now().Add(2*caughtFor))
	}
	if len(c.caught) != caughtPackets {
		t.Errorf("%d packets kept, want at most %d", len(c.caught), caughtPackets)
	}
}

func hexEscape(b []byte) string {
	s := hex.EncodeToString(b)
	var out []byte
	for i := 0; i < len(s); i += 2 {
		if i > 0 {
			out = append(out, '\\', 'x')
		}
		out = append(out, s[i], s[i+1])
	}
	return string(out)
}
