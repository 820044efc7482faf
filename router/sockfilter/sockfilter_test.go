package sockfilter_test

import (
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/bpf"

	. "github.com/isthmus-net/isthmus/router/sockfilter"
	"github.com/isthmus-net/isthmus/router/sockfilter/sockfiltertest"
)

// TestIf tries each test with values below, at and above the limit.
func TestIf(t *testing.T) {
	for test, want := range map[bpf.JumpTest]string{
		bpf.JumpEqual: "010", bpf.JumpNotEqual: "101", bpf.JumpGreaterThan: "001", bpf.JumpLessThan: "100",
		bpf.JumpGreaterOrEqual: "011", bpf.JumpLessOrEqual: "110", bpf.JumpBitsSet: "010", bpf.JumpBitsNotSet: "101",
	} {
		var one, both, long Program
		long.Add(bpf.LoadAbsolute{Size: 1})
		long.If(test, 8, append(slices.Repeat(Program{bpf.LoadConstant{Val: 1}}, 300), Pass)...)
		long.Add(Drop)
		one.Add(bpf.LoadAbsolute{Size: 1})
		one.If(test, 8, bpf.LoadConstant{Val: 1}, Pass)
		one.Add(Drop)
		both.Add(bpf.LoadAbsolute{Size: 1})
		both.IfElse(test, 8, Program{bpf.LoadConstant{Val: 1}, bpf.LoadConstant{Val: 2}}, Program{bpf.LoadConstant{Val: 3}})
		both.If(bpf.JumpEqual, 2, Pass)
		both.Add(Drop)
		for i, value := range []byte{7, 8, 16} {
			for name, p := range map[string]Program{"If": one, "IfElse": both, "long": long} {
				if got := sockfiltertest.Passes(t, p, []byte{value}, nil); got != (want[i] == '1') {
					t.Errorf("%s: test %d of %d with 8 is %v", name, test, value, got)
				}
			}
		}
	}
}

// TestAttach checks that the kernel filters by the program, and refuses one without an end.
func TestAttach(t *testing.T) {
	in, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	raw, err := in.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	attach := func(p Program) (err error) {
		if failed := raw.Control(func(fd uintptr) { err = Attach(int(fd), p) }); failed != nil {
			t.Fatal(failed)
		}
		return err
	}
	var p Program
	p.Add(bpf.LoadAbsolute{Off: 8, Size: 1}) // after the UDP header
	p.If(bpf.JumpEqual, 'a', Drop)
	p.Add(Pass)
	if err := attach(p); err != nil {
		t.Fatal(err)
	}
	out, err := net.Dial("udp", in.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	for _, text := range []string{"a", "b"} {
		if _, err := out.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	in.SetReadDeadline(time.Now().Add(time.Minute))
	b := make([]byte, 10)
	if n, _, err := in.ReadFrom(b); err != nil || string(b[:n]) != "b" {
		t.Errorf("%q, %v", b[:n], err)
	}
	if err := attach(Program{bpf.LoadConstant{}}); err == nil {
		t.Error("a program without an end was attached")
	}
	if err := attach(Program{bpf.LoadAbsolute{Size: 3}}); err == nil {
		t.Error("a load of three bytes was attached")
	}
}
