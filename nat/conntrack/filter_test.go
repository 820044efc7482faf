package conntrack

import (
	"encoding/binary"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/sockfilter/sockfiltertest"
)

// TestTranslated applies the filter for ends of flows to messages, and to truncated ones.
func TestTranslated(t *testing.T) {
	status := func(s Status) []byte {
		a := binary.NativeEndian.AppendUint16(nil, 8)
		a = binary.NativeEndian.AppendUint16(a, attrStatus)
		return binary.BigEndian.AppendUint32(a, uint32(s))
	}
	mark := binary.NativeEndian.AppendUint16(nil, 8)
	mark = binary.NativeEndian.AppendUint16(mark, attrMark)
	mark = binary.BigEndian.AppendUint32(mark, uint32(SourceNAT))
	passes := func(attributes ...[]byte) bool {
		t.Helper()
		m := make([]byte, headerSize)
		place := 0 // offset of the status, which the kernel finds; 0: none
		for _, a := range attributes {
			if binary.NativeEndian.Uint16(a[2:]) == attrStatus {
				place = len(m)
			}
			m = append(m, a...)
		}
		return sockfiltertest.Passes(t, translated(), m, map[bpf.Extension]uint32{bpf.ExtNetlinkAttr: uint32(place)})
	}
	if !passes(mark, status(SourceNAT|SeenReply)) || !passes(status(SourceNAT)) {
		t.Error("a flow with source NAT does not pass")
	}
	if !passes(mark) || !passes() {
		t.Error("a flow without status does not pass")
	}
	if passes(mark, status(SeenReply|DestinationNAT)) || passes(status(0)) {
		t.Error("a flow without source NAT passes")
	}
	for n := unix.SizeofNlAttr; n < 8; n++ {
		if passes(mark, status(SourceNAT)[:n]) {
			t.Errorf("a status of %d bytes passes", n)
		}
	}
	// The start of the search, and the attribute.
	p := translated()
	if p[0] != (bpf.LoadConstant{Dst: bpf.RegA, Val: 20}) || p[1] != (bpf.LoadConstant{Dst: bpf.RegX, Val: 3}) || p[2] != (bpf.LoadExtension{Num: bpf.ExtNetlinkAttr}) {
		t.Errorf("begins with %v", p[:3])
	}
}
