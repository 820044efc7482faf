package nftables

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/netns"
)

func TestDivert(t *testing.T) {
	ns := netns.New(t)
	file, err := os.Open(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var ike, standIn, sender net.PacketConn
	ns.Do(func() {
		listen := func(address string) net.PacketConn {
			c, e := net.ListenPacket("udp4", address)
			if e != nil {
				err = e
			}
			return c
		}
		ike, standIn, sender = listen("127.0.0.1:4500"), listen("127.0.0.1:0"), listen("127.0.0.1:0")
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.PacketConn{ike, standIn, sender} {
		defer c.Close()
	}
	arrives := func(what string, at net.PacketConn, packet ...byte) {
		t.Helper()
		if _, err := sender.WriteTo(packet, ike.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		at.SetReadDeadline(time.Now().Add(2 * time.Second))
		if _, _, err := at.ReadFrom(make([]byte, 100)); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	esp, marked := []byte{1, 2, 3, 4, 0, 0, 0, 1, 9, 9}, []byte{0, 0, 0, 0, 9, 9, 9, 9}
	d := Divert{NetNS: int(file.Fd())}
	port := uint16(standIn.LocalAddr().(*net.UDPAddr).Port)
	for range 2 {
		if err := d.To(port); err != nil {
			t.Fatal(err)
		}
		arrives("ESP, diverted", standIn, esp...)
		arrives("IKE", ike, marked...)
		if err := d.To(0); err != nil {
			t.Fatal(err)
		}
		arrives("ESP, no longer diverted", ike, esp...)
	}
	if err := d.To(port); err != nil {
		t.Fatal(err)
	}
	time.Sleep(divertLife + time.Second)
	arrives("ESP, kept diverted", standIn, esp...)
	d.stop() // as if the process had died
	time.Sleep(divertLife + time.Second)
	arrives("ESP, after the death of the process", ike, esp...)
	if err := new(Divert{NetNS: int(file.Fd())}).To(0); err != nil {
		t.Error(err)
	}
}
