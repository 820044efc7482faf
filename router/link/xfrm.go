package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// ErrNoSA means that the kernel has no state with an SPI.
var ErrNoSA = errors.New("no such IPsec state")

// SA is an IPsec state in the kernel, without its keys.
type SA struct {
	IfID     uint32
	SPI      uint32
	Src, Dst string

	raw netlink.XfrmState
}

// SAs reads every ESP state that belongs to an xfrm interface and has keys. It leaves out states
// that only hold an SPI for a pending negotiation.
func (l *Links) SAs() ([]SA, error) {
	var all []netlink.XfrmState
	err := again(func() (err error) { all, err = l.h.XfrmStateList(netlink.FAMILY_ALL); return err })
	if err != nil {
		return nil, fmt.Errorf("listing IPsec states: %w", err)
	}
	var sas []SA
	for _, s := range all {
		if keyed := s.Aead != nil || s.Crypt != nil; keyed && s.Ifid != 0 && s.Proto == netlink.XFRM_PROTO_ESP {
			id := netlink.XfrmState{Dst: s.Dst, Src: s.Src, Proto: s.Proto, Spi: s.Spi, Ifid: s.Ifid, Mark: s.Mark}
			sas = append(sas, SA{IfID: uint32(s.Ifid), SPI: uint32(s.Spi), Src: s.Src.String(), Dst: s.Dst.String(), raw: id})
		}
	}
	return sas, nil
}

// DeleteSA deletes a state that SAs returned. A missing one is not an error.
func (l *Links) DeleteSA(s SA) error {
	err := l.h.XfrmStateDel(&s.raw)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err := l.write(err); err != nil {
		return fmt.Errorf("deleting IPsec state %08x: %w", s.SPI, err)
	}
	return nil
}

// Inbound is the kernel's state for the SPI of packets to this node.
type Inbound struct {
	// false: it only holds the SPI for a pending negotiation, and packets are dropped
	Keyed  bool
	Window uint32   // size of the replay window in packets
	Top    uint32   // the greatest sequence number received
	Taken  []uint32 // bit (n - 1) % Window is set when n was received, for each n in the window
}

// Took reports whether the kernel rejects a packet with this sequence number as a replay, because
// it has received it or has moved its window past it. Without a replay window, the answer is true,
// because the state does not show it. Only the low half of an extended number counts.
func (i Inbound) Took(sequence uint32) bool {
	behind := i.Top - sequence
	if i.Window == 0 {
		return true
	}
	if sequence > i.Top {
		return false
	}
	bit := i.bit(behind)
	return behind >= i.Window || i.Taken[bit/32]>>(bit%32)&1 == 1
}

// bit returns the index in Taken of the number that lies behind before Top.
func (i Inbound) bit(behind uint32) uint32 {
	return ((i.Top-1)%i.Window + i.Window - behind%i.Window) % i.Window
}

// Inbound reads the ESP state of an SPI. The error wraps ErrNoSA when there is none.
func (l *Links) Inbound(dst netip.Addr, spi uint32) (Inbound, error) {
	req := nl.NewNetlinkRequest(nl.XFRM_MSG_GETSA, 0)
	req.Sockets = l.sockets
	id := &nl.XfrmUsersaId{Spi: nl.Swap32(spi), Family: uint16(nl.GetIPFamily(dst.AsSlice())), Proto: unix.IPPROTO_ESP}
	id.Daddr.FromIP(dst.AsSlice())
	req.AddData(id)
	msgs, err := req.Execute(unix.NETLINK_XFRM, nl.XFRM_MSG_NEWSA)
	if errors.Is(err, unix.ESRCH) {
		err = ErrNoSA
	}
	var in Inbound
	if err == nil && len(msgs) != 1 {
		err = fmt.Errorf("%d answers", len(msgs))
	}
	if err == nil {
		in, err = decodeInbound(msgs[0])
	}
	if err != nil {
		return Inbound{}, fmt.Errorf("reading the IPsec state %08x: %w", spi, err)
	}
	return in, nil
}

// decodeInbound decodes a struct xfrm_usersa_info and the attributes after it.
func decodeInbound(m []byte) (in Inbound, err error) {
	if len(m) < nl.SizeofXfrmUsersaInfo {
		return in, fmt.Errorf("%d bytes are too few", len(m))
	}
	info := nl.DeserializeXfrmUsersaInfo(m)
	attributes, err := nl.ParseRouteAttr(m[nl.SizeofXfrmUsersaInfo:])
	if err != nil {
		return in, err
	}
	word := func(b []byte, n int) uint32 { return binary.NativeEndian.Uint32(b[4*n:]) }
	for _, a := range attributes {
		switch v := a.Value; a.Attr.Type {
		case nl.XFRMA_ALG_AEAD, nl.XFRMA_ALG_CRYPT:
			in.Keyed = true
		case nl.XFRMA_REPLAY_VAL: // struct xfrm_replay_state
			if len(v) < nl.SizeofXfrmReplayState {
				return in, errors.New("a replay state is cut off")
			}
			in.Window, in.Top, in.Taken = min(uint32(info.ReplayWindow), 32), word(v, 1), []uint32{0}
			for behind := range in.Window {
				in.Taken[0] |= word(v, 2) >> behind & 1 << in.bit(behind)
			}
		case nl.XFRMA_REPLAY_ESN_VAL: // struct xfrm_replay_state_esn
			if len(v) < nl.SizeofXfrmReplayStateEsn {
				return in, errors.New("a replay state is cut off")
			}
			in.Top, in.Window = word(v, 2), word(v, 5)
			for i := nl.SizeofXfrmReplayStateEsn / 4; i < len(v)/4; i++ {
				in.Taken = append(in.Taken, word(v, i))
			}
			if uint64(len(in.Taken))*32 < uint64(in.Window) {
				return in, errors.New("a replay window is cut off")
			}
		}
	}
	return in, nil
}
