package explain

import (
	"cmp"
	"encoding/base64"
	"fmt"

	"github.com/isthmus-net/isthmus/tunnel"
)

// silent explains a tunnel whose keys are negotiated and which does not carry data both ways.
func (e *explainer) silent() {
	since := clock(e.s.Silence.Since)
	var remote string
	if len(e.t.Inside) > 0 {
		remote = e.t.Inside[0].Remote.String()
	}
	if e.s.Failure.Reason == tunnel.OneWay {
		e.out.What = fmt.Sprintf("the peer's data comes, but %d echo requests to %s were not answered since %s", e.s.Silence.Sent, remote, since)
		e.out.Cause = "this node's data does not reach the peer, or the peer stopped answering echo requests"
	} else {
		e.out.What = fmt.Sprintf("the keys are negotiated, %d packets were sent, and no data has come since %s", e.s.Silence.Sent, since)
		e.out.Cause = "data is dropped on the path, in one direction or in both"
	}
	switch {
	case e.t.WireGuard != nil:
		e.out.Remedy = fmt.Sprintf("let UDP pass in both directions between port %d of this node and %s, and compare the MTU of the tunnel with that of the path", e.port(), e.s.Remote)
		e.there("the peer's AllowedIPs must include the sources behind this node and its inside address")
		if e.s.Silence.Inbound && e.s.Silence.Ever && !e.s.Keyed.After(e.s.Silence.Since) {
			// The device tries a handshake after 15 s without an answer (WireGuard paper, section
			// 6.5), and whether it succeeds distinguishes the causes.
			e.out.What = fmt.Sprintf("%d packets were sent, and nothing has come since %s", e.s.Silence.Sent, since)
			e.out.Cause = "the peer is down, UDP is filtered on the path, or the keys of the two sides do not match any more; the next handshake, after 15 s of silence, shows more"
			e.out.Remedy += "; compare the keys with those of the peer"
			e.keys()
		} else {
			e.out.Cause += ": a firewall lets handshakes pass and drops larger or later UDP packets"
		}
	case e.s.NATTraversal:
		e.out.Cause += ": ESP in UDP (port 4500) is filtered on the path while IKE on the same port passes, or the mapping of a NAT was lost in one direction"
		e.out.Remedy = "let UDP port 4500 pass in both directions (security group, network security group, firewall rule)"
	default:
		e.out.Cause += ": ESP, IP protocol 50, is filtered on the path while IKE (UDP port 500) passes"
		e.out.Remedy = "let IP protocol 50 pass in both directions (security group, network security group, firewall rule), or force UDP encapsulation with `udpEncapsulation: always`"
		e.field("ipsec.udpEncapsulation")
		e.out.Value = "always"
	}
	e.there("the peer must route %s into the tunnel", e.local())
	if e.s.Answers == "unanswered" && e.t.Probe != tunnel.ProbeOff {
		e.out.Remedy += "; if the peer never answers echo requests, set `probe: false`"
	}
}

// local returns this node's inside address.
func (e *explainer) local() string {
	if len(e.t.Inside) == 0 {
		return "the inside address of this node"
	}
	return e.t.Inside[0].Local.Addr().String()
}

// wireguard explains why a WireGuard tunnel has no session. A device answers nothing to wrong keys
// (WireGuard paper, section 5.1), so that a wrong key and a filter look the same from here, unless
// the peer calls as well.
func (e *explainer) wireguard() {
	dev := e.s.Device
	own, port := base64.StdEncoding.EncodeToString(dev.PublicKey[:]), e.port()
	if e.s.Failure.Reason == tunnel.NoEndpoint {
		e.out.What = fmt.Sprintf("the peer has not called UDP port %d, and the document does not say where it is", port)
		e.out.Cause = "the peer is down, its endpoint is not this node, or the port is filtered"
		e.out.Remedy = fmt.Sprintf("let UDP port %d reach this node, or give the peer's address", port)
		e.field("wireguard.endpoint")
	} else {
		e.out.What = e.s.LastError
		e.out.Cause = "the endpoint is wrong or the peer is down, UDP is filtered on the path, or the keys of the two sides do not match"
		e.out.Remedy = fmt.Sprintf("compare the endpoint with the peer's address and port, and let UDP pass in both directions between port %d of this node and %s", port, e.s.Remote)
		e.field("wireguard.endpoint")
	}
	switch {
	case dev.StrangerAt.IsZero():
	case dev.OtherKey:
		e.out.What += fmt.Sprintf("; a handshake for another public key than this node's came at %s", clock(dev.StrangerAt))
		e.out.Cause = "the peer has another public key of this node"
		e.out.Remedy = "set this node's public key at the peer: " + own
		e.out.Field = ""
	default:
		e.out.What += fmt.Sprintf("; a handshake with another key than the peer's came from %s at %s", dev.Stranger, clock(dev.StrangerAt))
		e.out.Cause = "the peer has another private key than the document expects, or another host calls"
		e.out.Remedy = "set the public key of the peer's private key"
		e.field("wireguard.peerPublicKey")
	}
	e.keys()
}

// port returns the port of the device, or the one that it shall have.
func (e *explainer) port() uint16 { return cmp.Or(e.s.Device.Port, e.t.WireGuard.ListenPort) }

// keys says which keys the peer must have.
func (e *explainer) keys() {
	w := e.t.WireGuard
	own, theirs := base64.StdEncoding.EncodeToString(e.s.Device.PublicKey[:]), base64.StdEncoding.EncodeToString(w.PeerPublicKey[:])
	e.there("its peer must have the public key %s and UDP port %d of %s; its own public key must be %s", own, e.port(), e.d.Public, theirs)
	if w.PresharedKey.Name != "" {
		e.there("its pre-shared key must be that of secret %s", w.PresharedKey.Name)
	} else {
		e.there("it must have no pre-shared key")
	}
}
