package nftables

import (
	"testing"

	"github.com/isthmus-net/isthmus/nat"
)

func TestComment(t *testing.T) {
	for _, before := range []nat.Counter{{}, {Packets: 7}, {Packets: 1 << 63, Bytes: 1<<64 - 1}} {
		if name, got := decodeComment(encodeComment("p-1", before)); name != "p-1" || got != before {
			t.Errorf("%q, %+v", name, got)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{8, 0, 1, 0, 0xff, 0xff, 0xff, 0xfc, 10, 0, 2, 0, 'p', 'o', 'o', 'l', '4', 0, 0, 0}, "name 1 2")
	f.Fuzz(func(t *testing.T, b []byte, comment string) {
		decodeVerdict(b)
		decodeGeneration(b)
		decodeAnswer(b, shape{isMap: true, isVerdict: true, isInterval: true, isConcat: true})
		decodeComment(comment)
	})
}
