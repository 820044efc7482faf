package nftables

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/netlink"
	"golang.org/x/sys/unix"
)

const (
	// SampleGroup is the NFLOG group to which the guard sends samples of what it drops.
	SampleGroup = 0x4953
	// sampleSize is the number of bytes sampled of a packet, enough for the headers.
	sampleSize = 128
)

// Messages and attributes of NFLOG (linux/netfilter/nfnetlink_log.h).
const (
	nflogPacket  = unix.NFNL_SUBSYS_ULOG << 8
	nflogConfig  = unix.NFNL_SUBSYS_ULOG<<8 | 1
	nflogPayload = 9  // NFULA_PAYLOAD
	nflogPrefix  = 10 // NFULA_PREFIX

	configCommand   = 1 // NFULA_CFG_CMD
	configThreshold = 5 // NFULA_CFG_QTHRESH
	commandBind     = 1 // NFULNL_CFG_CMD_BIND
)

// Sample implements nat.Sampler. The kernel allows one listener of the group per network
// namespace: while another process listens, Sample returns an error.
func (d *Driver) Sample(ctx context.Context, dropped func(nat.Reason, nat.Flow)) error {
	fd, err := openSocket(d.options.NetNS, unix.SOCK_NONBLOCK)
	if err != nil {
		return err
	}
	socket := os.NewFile(uintptr(fd), "nflog")
	stop := context.AfterFunc(ctx, func() { socket.Close() })
	defer func() {
		if stop() {
			socket.Close()
		}
	}()
	if _, err := socket.Write(bindRequest()); err != nil {
		return fmt.Errorf("subscribing to samples: %w", err)
	}
	buffer := make([]byte, 1<<16)
	for {
		n, err := socket.Read(buffer)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			continue // samples were lost, which does not matter
		case err != nil:
			return fmt.Errorf("reading samples: %w", err)
		}
		samples, err := decodeSamples(buffer[:n])
		if err != nil {
			return fmt.Errorf("subscribing to samples: %w", err)
		}
		for _, s := range samples {
			dropped(s.reason, s.flow)
		}
	}
}

// bindRequest requests the packets of the group, each sent at once.
func bindRequest() []byte {
	return netlink.Request(nflogConfig, unix.NLM_F_ACK, 0, binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, 0}, SampleGroup),
		netlink.New(configCommand, commandBind), netlink.New(configThreshold, 0, 0, 0, 1))
}

// sample is a packet that was dropped.
type sample struct {
	reason nat.Reason
	flow   nat.Flow
}

// decodeSamples decodes the messages of a datagram. Messages without a packet that can be decoded
// are left out; a refusal is an error.
func decodeSamples(b []byte) (samples []sample, err error) {
	for m, rest, ok := netlink.Next(b); ok; m, rest, ok = netlink.Next(rest) {
		switch {
		case m.Kind == unix.NLMSG_ERROR:
			if errno := m.Errno(); errno != 0 {
				return nil, errno
			}
		case m.Kind == nflogPacket && len(m.Body) >= 4:
			var s sample
			known := false
			for kind, value := range netlink.Attributes(m.Body[4:]) {
				switch kind {
				case nflogPrefix:
					s.reason = nat.Reason(netlink.Text(value))
				case nflogPayload:
					s.flow, known = decodePacket(value)
				}
			}
			if known {
				samples = append(samples, s)
			}
		}
	}
	return samples, nil
}

// decodePacket decodes the fields of an IP packet that policies match. It does not follow IPv6
// extension headers.
func decodePacket(p []byte) (f nat.Flow, ok bool) {
	if len(p) == 0 {
		return f, false
	}
	var l4 []byte
	switch header := int(p[0]&0xf) * 4; {
	case p[0]>>4 == 4 && header >= 20 && len(p) >= header:
		f.Source, f.Destination, f.Protocol = netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:])), p[9]
		l4 = p[header:]
	case p[0]>>4 == 6 && len(p) >= 40:
		f.Source, f.Destination, f.Protocol = netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:])), p[6]
		l4 = p[40:]
	default:
		return f, false
	}
	if (f.Protocol == unix.IPPROTO_TCP || f.Protocol == unix.IPPROTO_UDP) && len(l4) >= 4 {
		f.Port = binary.BigEndian.Uint16(l4[2:])
	}
	f.Late = f.Protocol == unix.IPPROTO_TCP && len(l4) >= 14 && l4[13]&0x17 != 0x02
	return f, true
}
