package nl

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// SA is an IPsec state in the kernel, without its keys.
type SA struct {
	IfID     uint32
	SPI      uint32
	Src, Dst string

	raw netlink.XfrmState
}

// SAs reads every ESP state that belongs to an xfrm interface and has keys; a state that only holds an SPI for a
// negotiation under way is left out.
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

// DeleteSA deletes a state that SAs returned. One that is gone is not an error.
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
