package gobgp

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"

	packet "github.com/osrg/gobgp/v3/pkg/packet/bgp"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/bgp/filter"
	"github.com/isthmus-net/isthmus/bgp/relay"
)

// inner returns the addresses of a peer and of this node in the child's network namespace. They
// are the same as outside, except for link-local addresses, which GoBGP cannot match with a peer
// and which several tunnels may share. Those are replaced by addresses from the discard-only
// prefix (RFC 6666).
func inner(id uint32, p bgp.Peer) (peer, local netip.Addr) {
	if !p.Address.IsLinkLocalUnicast() || p.Address.Is4() {
		return p.Address, p.LocalAddress
	}
	a := netip.MustParseAddr("100::").As16()
	binary.BigEndian.PutUint32(a[8:], id)
	a[15] = 1
	local = netip.AddrFrom16(a)
	a[15] = 2
	return netip.AddrFrom16(a), local
}

// relayPeerLocked returns the relay's configuration for a peer.
func (d *Driver) relayPeerLocked(p bgp.Peer) relay.Peer {
	name := p.Name
	if d.counters[name] == nil {
		d.counters[name] = new(filter.Counters)
	}
	r := relay.Peer{
		Name: name, Address: p.Address, Local: p.LocalAddress, Interface: p.Interface, Passive: p.Passive,
		OtherLocal: p.OtherLocal, Key: d.keys[name], Internal: p.ASN == d.want.ASN, Counters: d.counters[name],
	}
	r.Inner, r.InnerLocal = inner(d.ids[name], p)
	if r.Inner != r.Address && p.Interface != "" {
		r.Address, r.Local = p.Address.WithZone(p.Interface), p.LocalAddress.WithZone(p.Interface)
	}
	if p.ASN != d.want.ASN {
		r.TTL = max(p.TTL, 1)
	}
	return r
}

// openRelay returns the relay of a child; nil for a child without a network.
func (d *Driver) openRelay(p *process) *relay.Relay {
	if p.dial == nil {
		return nil
	}
	d.mu.Lock()
	id := d.want.RouterID
	d.mu.Unlock()
	return relay.New(relay.Options{
		Port: d.o.ListenPort, Identifier: id, Inner: p.dial, Log: d.o.Log,
		Failed: func(name string, err error) { d.note(name, fmt.Sprintf("connecting: %v", err), false) },
		Ended:  func(name, reason string) { d.note(name, reason, true) },
		Notified: func(name string, n relay.Notice) {
			d.mu.Lock()
			i := slices.IndexFunc(d.want.Peers, func(p bgp.Peer) bool { return p.Name == name })
			var expected, own uint32
			if own = d.want.ASN; i >= 0 {
				expected = d.want.Peers[i].ASN
			}
			d.mu.Unlock()
			d.note(name, refusal(n, own, expected), false)
		},
	})
}

// refusal explains a NOTIFICATION on a connection on which no session came up. own is the AS of
// this node, expected that which the document gives the peer.
func refusal(n relay.Notice, own, expected uint32) string {
	what := fmt.Sprintf("NOTIFICATION %v", packet.NewNotificationErrorCode(n.Code, n.Subcode))
	badAS := n.Code == packet.BGP_ERROR_OPEN_MESSAGE_ERROR && n.Subcode == packet.BGP_ERROR_SUB_BAD_PEER_AS
	switch {
	case n.Sent && badAS:
		return fmt.Sprintf("this node refused the peer (%s): the peer has AS %d, and the document says %d; set the peer's asn, or correct the peer", what, n.AS, expected)
	case badAS:
		return fmt.Sprintf("the peer refused this node (%s): it expects another AS than %d (node.asn); correct the AS of this node at the peer, or node.asn", what, own)
	case n.Sent:
		return fmt.Sprintf("this node refused the peer (%s)", what)
	case n.Code == packet.BGP_ERROR_CEASE:
		return fmt.Sprintf("the peer ended the connection (%s): an operator has shut the session down there, or its limit was exceeded", what)
	}
	return fmt.Sprintf("the peer refused this node (%s)", what)
}

// note stores the relay's error for a peer. If GoBGP has the session that ended, it gets the same
// reason from the relay, and reports it in order with the states.
func (d *Driver) note(name, text string, ended bool) {
	text = clip(text)
	d.mu.Lock()
	s := d.peers[name]
	if s != nil {
		s.LastError, s.LastErrorAt = text, time.Now()
	}
	d.mu.Unlock()
	if s != nil && ended {
		d.o.Log.Warn("BGP session ended: the peer sent a malformed message", "peer", name, "reason", text)
	}
}

// blameWindow is how long before the end of the BGP process a message may have arrived that caused
// it.
const blameWindow = time.Second

// evidence is what the relay has recorded before an end of the BGP process.
type evidence struct {
	// sent holds the peers that have sent anything but KEEPALIVE to this process, recent those
	// that did so just before it ended. Both are nil without a relay.
	sent, recent map[string]bool
}

func evidenceOf(now time.Time, passed map[string]time.Time) evidence {
	e := evidence{sent: make(map[string]bool), recent: make(map[string]bool)}
	for name, t := range passed {
		e.sent[name] = true
		if now.Sub(t) <= blameWindow {
			e.recent[name] = true
		}
	}
	return e
}

// filteredLocked returns what the filter changed in a peer's messages.
func (d *Driver) filteredLocked(name string) bgp.Filtered {
	c := d.counters[name]
	if c == nil {
		return bgp.Filtered{}
	}
	f := bgp.Filtered{Messages: c.Messages.Load(), Withdrawn: c.Withdrawn.Load(), Resets: c.Resets.Load()}
	for kind := range c.Discarded {
		if n := c.Discarded[kind].Load(); n > 0 {
			f.Discarded = append(f.Discarded, bgp.Discarded{Type: uint8(kind), Count: n})
		}
	}
	return f
}
