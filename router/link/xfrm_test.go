package link

import (
	"encoding/binary"
	"testing"

	"github.com/vishvananda/netlink/nl"
)

// Ring: pure. That the kernel sends such messages is tested in the guest (tunnel/ipsec,
// TestTunnel).

// answer is a struct xfrm_usersa_info with attributes of 32-bit words.
func answer(window byte, attributes map[int][]uint32) []byte {
	info := nl.XfrmUsersaInfo{ReplayWindow: window}
	m := append([]byte(nil), info.Serialize()...)
	for kind, words := range attributes {
		var v []byte
		for _, w := range words {
			v = binary.NativeEndian.AppendUint32(v, w)
		}
		m = append(m, nl.NewRtAttr(kind, v).Serialize()...)
	}
	return m
}

func TestInbound(t *testing.T) {
	const esn, plain = nl.XFRMA_REPLAY_ESN_VAL, nl.XFRMA_REPLAY_VAL
	key := make([]uint32, 20)
	wide := func(top, window uint32, bits ...uint32) []uint32 {
		return append([]uint32{uint32(len(bits)), 0, top, 0, 0, window}, bits...)
	}
	for _, tt := range []struct {
		name      string
		window    byte
		attribute map[int][]uint32
		keyed     bool
		took, not []uint32
	}{
		{"larval", 0, map[int][]uint32{plain: {0, 0, 0}}, false, []uint32{1}, nil},
		{"nothing taken", 0, map[int][]uint32{nl.XFRMA_ALG_AEAD: key, esn: wide(0, 64, 0, 0)}, true, nil, []uint32{1, 2, 64, 65}},
		// 3, 4 and 6 were received: bit 0 is for 1 and 65.
		{"first ones missing", 0, map[int][]uint32{nl.XFRMA_ALG_CRYPT: key, esn: wide(6, 64, 1<<2|1<<3|1<<5, 0)}, true, []uint32{3, 4, 6}, []uint32{1, 2, 5, 7}},
		// All up to 70 except 66, so 65 is in bit 0, and 7 is the first in the window.
		{"window moved", 0, map[int][]uint32{nl.XFRMA_ALG_AEAD: key, esn: wide(70, 64, ^uint32(2), ^uint32(0))}, true, []uint32{1, 2, 6, 7, 65, 67, 70}, []uint32{66, 71}},
		{"short window", 32, map[int][]uint32{nl.XFRMA_ALG_AEAD: key, plain: {0, 40, 1 | 1<<2}}, true, []uint32{40, 38, 8}, []uint32{41, 39, 9}},
		{"no window", 0, map[int][]uint32{nl.XFRMA_ALG_AEAD: key, plain: {0, 0, 0}}, true, []uint32{1}, nil},
	} {
		in, err := decodeInbound(answer(tt.window, tt.attribute))
		if err != nil || in.Keyed != tt.keyed {
			t.Errorf("%s: %+v, %v", tt.name, in, err)
			continue
		}
		for _, s := range tt.took {
			if !in.Took(s) {
				t.Errorf("%s: %d is not taken", tt.name, s)
			}
		}
		for _, s := range tt.not {
			if in.Took(s) {
				t.Errorf("%s: %d is taken", tt.name, s)
			}
		}
	}
	for name, m := range map[string][]byte{
		"nothing":       nil,
		"short replay":  answer(0, map[int][]uint32{plain: {0}}),
		"short replays": answer(0, map[int][]uint32{esn: {0}}),
		"short window":  answer(0, map[int][]uint32{esn: wide(70, 65, 0, 0)}),
		"large window":  answer(0, map[int][]uint32{esn: wide(70, 1<<32-1, 0)}),
	} {
		if in, err := decodeInbound(m); err == nil {
			t.Errorf("%s: %+v", name, in)
		}
	}
}
