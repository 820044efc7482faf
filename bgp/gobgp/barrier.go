package gobgp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"

	api "github.com/osrg/gobgp/v3/api"
	packet "github.com/osrg/gobgp/v3/pkg/packet/bgp"
	"github.com/osrg/gobgp/v3/pkg/server"
)

const (
	// barrierAddress is the address of the barrier; all of 127.0.0.0/8 is local to the host.
	barrierAddress = "127.47.24.1"
	barrierASN     = 65535 // reserved (RFC 7300), so that no network uses it
	barrierWait    = 2 * time.Second
)

// barrier is a peer of GoBGP on the loopback interface that this package implements. After a
// restart, GoBGP sends its End-of-RIB as soon as no established session owes one, even while most
// sessions are still down, and the peers then withdraw all routes of the others. RFC 4724 section
// 4.1 requires it to wait for all peers. The barrier is established before any of them, and owes
// an End-of-RIB until the daemon has seen all expected peers.
type barrier struct {
	conn net.Conn
}

func raiseBarrier(ctx context.Context, s *server.BgpServer, asn uint32) (*barrier, error) {
	const hold = 65535 // longer than any restart
	err := s.AddPeer(ctx, &api.AddPeerRequest{Peer: &api.Peer{
		Conf:      &api.PeerConf{NeighborAddress: barrierAddress, PeerAsn: barrierASN, LocalAsn: asn},
		Transport: &api.Transport{PassiveMode: true, LocalAddress: "127.0.0.1"},
		Timers:    &api.Timers{Config: &api.TimersConfig{HoldTime: hold, KeepaliveInterval: hold / 3}},
		GracefulRestart: &api.GracefulRestart{
			Enabled: true, RestartTime: 1, DeferralTime: hold, LocalRestarting: true,
		},
		AfiSafis: []*api.AfiSafi{{
			Config:            &api.AfiSafiConfig{Family: ipv4, Enabled: true},
			MpGracefulRestart: &api.MpGracefulRestart{Config: &api.MpGracefulRestartConfig{Enabled: true}},
		}},
	}})
	if err != nil {
		return nil, err
	}
	b := &barrier{}
	if err := b.open(ctx, hold); err != nil {
		return nil, errors.Join(err, s.DeletePeer(ctx, &api.DeletePeerRequest{Address: barrierAddress}))
	}
	// GoBGP has our KEEPALIVE, but may not have changed the state yet.
	for end := time.Now().Add(barrierWait); ; time.Sleep(5 * time.Millisecond) {
		up := false
		if err := s.ListPeer(ctx, &api.ListPeerRequest{Address: barrierAddress}, func(p *api.Peer) {
			up = p.GetState().GetSessionState() == api.PeerState_ESTABLISHED
		}); err != nil {
			return nil, err
		}
		if up {
			return b, nil
		}
		if time.Now().After(end) {
			b.conn.Close()
			return nil, errors.Join(fmt.Errorf("no session within %v", barrierWait), s.DeletePeer(ctx, &api.DeletePeerRequest{Address: barrierAddress}))
		}
	}
}

// open opens the session as the active side, up to the KEEPALIVE that makes GoBGP's side
// Established.
func (b *barrier) open(ctx context.Context, hold int) error {
	d := net.Dialer{Timeout: barrierWait, LocalAddr: &net.TCPAddr{IP: net.ParseIP(barrierAddress)}}
	// A passive GoBGP peer leaves Idle only some milliseconds after it was added, and closes
	// connections until then.
	end := time.Now().Add(barrierWait)
	for {
		conn, err := d.DialContext(ctx, "tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(childPort)))
		if err == nil {
			if err = handshake(conn, hold, end); err == nil {
				b.conn = conn
				return nil
			}
			conn.Close()
		}
		if time.Now().After(end) {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func handshake(conn net.Conn, hold int, end time.Time) error {
	if err := conn.SetDeadline(end); err != nil {
		return err
	}
	open := packet.NewBGPOpenMessage(barrierASN, uint16(hold), barrierAddress, []packet.OptionParameterInterface{
		packet.NewOptionParameterCapability([]packet.ParameterCapabilityInterface{
			packet.NewCapMultiProtocol(packet.RF_IPv4_UC),
			packet.NewCapGracefulRestart(false, false, 1, []*packet.CapGracefulRestartTuple{
				packet.NewCapGracefulRestartTuple(packet.RF_IPv4_UC, false),
			}),
		}),
	})
	if err := send(conn, open); err != nil {
		return err
	}
	// GoBGP's OPEN, then its KEEPALIVE.
	for _, want := range []uint8{packet.BGP_MSG_OPEN, packet.BGP_MSG_KEEPALIVE} {
		if err := receive(conn, want); err != nil {
			return err
		}
	}
	if err := send(conn, packet.NewBGPKeepAliveMessage()); err != nil {
		return err
	}
	return conn.SetDeadline(time.Time{}) // a restart may take long
}

func send(conn net.Conn, m *packet.BGPMessage) error {
	b, err := m.Serialize()
	if err != nil {
		return err
	}
	_, err = conn.Write(b)
	return err
}

func receive(conn net.Conn, want uint8) error {
	head := make([]byte, packet.BGP_HEADER_LENGTH)
	if _, err := io.ReadFull(conn, head); err != nil {
		return err
	}
	n := int(head[16])<<8 | int(head[17])
	if n < len(head) || n > packet.BGP_MAX_MESSAGE_LENGTH {
		return fmt.Errorf("message of length %d", n)
	}
	if _, err := io.ReadFull(conn, make([]byte, n-len(head))); err != nil {
		return err
	}
	if head[18] != want {
		return fmt.Errorf("message of type %d instead of %d", head[18], want)
	}
	return nil
}

// release sends the End-of-RIB and removes the barrier. ended receives when GoBGP begins to
// process the barrier's End-of-RIB. Requests to GoBGP after that are served when this is done.
func (b *barrier) release(ctx context.Context, s *server.BgpServer, ended <-chan struct{}) error {
	defer b.conn.Close()
	err := send(b.conn, packet.NewEndOfRib(packet.RF_IPv4_UC))
	if err == nil {
		select {
		case <-ended:
		case <-time.After(barrierWait):
			err = fmt.Errorf("no End-of-RIB seen within %v", barrierWait)
		}
	}
	return errors.Join(err, s.DeletePeer(ctx, &api.DeletePeerRequest{Address: barrierAddress}))
}
