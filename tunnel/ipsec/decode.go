package ipsec

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/strongswan/govici/vici"

	"github.com/isthmus-net/isthmus/tunnel"
)

// ikeSA is an IKE SA as in list-sas and events. Values that charon omits are zero.
type ikeSA struct {
	ID          uint32 // uniqueid
	State       string // ESTABLISHED, CONNECTING, …
	SPI         string // the initiator's, in hex: the same at both ends
	Remote      netip.AddrPort
	NAT         bool
	Established time.Time
	Algorithms  string
	Children    []childSA
}

// childSA is a CHILD SA.
type childSA struct {
	ID         uint32
	State      string // INSTALLED, REKEYING, …
	In, Out    uint32 // SPIs
	Installed  time.Time
	Encap      bool
	Selectors  string // the peer's, as "0.0.0.0/0, ::/0"
	Algorithms string
}

// live reports whether the SA carries traffic.
func (c childSA) live() bool {
	switch c.State {
	case "INSTALLED", "REKEYING", "UPDATING":
		return true
	}
	return false
}

// pending reports whether the SA is being negotiated.
func (c childSA) pending() bool {
	switch c.State {
	case "CREATED", "INSTALLING", "ROUTED", "RETRYING":
		return true
	}
	return false
}

func (s ikeSA) established() bool { return s.State == "ESTABLISHED" || s.State == "REKEYING" }

func (s ikeSA) pending() bool { return s.State == "CREATED" || s.State == "CONNECTING" }

// decodeSAs returns the IKE SAs in a list-sa event or an updown event, by connection.
func decodeSAs(m *vici.Message, now time.Time) map[string][]ikeSA {
	sas := map[string][]ikeSA{}
	for _, name := range m.Keys() {
		if s := section(m, name); s != nil {
			sas[name] = append(sas[name], decodeSA(s, now))
		}
	}
	return sas
}

func decodeSA(m *vici.Message, now time.Time) ikeSA {
	s := ikeSA{
		ID:         uint32(number(m, "uniqueid", 10)),
		State:      text(m, "state"),
		SPI:        text(m, "initiator-spi"),
		NAT:        text(m, "nat-any") == "yes",
		Algorithms: algorithms(m, "encr-alg", "integ-alg", "prf-alg", "dh-group"),
	}
	if a, err := netip.ParseAddr(text(m, "remote-host")); err == nil {
		s.Remote = netip.AddrPortFrom(a, uint16(number(m, "remote-port", 10)))
	}
	s.Established = ago(m, "established", now)
	children := section(m, "child-sas")
	if children == nil {
		return s
	}
	for _, key := range children.Keys() {
		c := section(children, key)
		if c == nil {
			continue
		}
		s.Children = append(s.Children, childSA{
			ID:         uint32(number(c, "uniqueid", 10)),
			State:      text(c, "state"),
			In:         uint32(number(c, "spi-in", 16)),
			Out:        uint32(number(c, "spi-out", 16)),
			Installed:  ago(c, "install-time", now),
			Encap:      text(c, "encap") == "yes",
			Selectors:  strings.Join(texts(c, "remote-ts"), ", "),
			Algorithms: algorithms(c, "encr-alg", "integ-alg", "dh-group"),
		})
	}
	return s
}

// algorithms joins the negotiated algorithms, in the order of the keys, as
// "AES_GCM_16-256/PRF_HMAC_SHA2_384/ECP_384".
func algorithms(m *vici.Message, keys ...string) string {
	var parts []string
	for _, k := range keys {
		a := text(m, k)
		if a == "" {
			continue
		}
		if size := text(m, strings.TrimSuffix(k, "-alg")+"-keysize"); size != "" {
			a += "-" + size
		}
		parts = append(parts, a)
	}
	return strings.Join(parts, "/")
}

// decodeEvent returns the names of the connections in an updown event.
func decodeEvent(e vici.Event) (names []string) {
	for _, k := range e.Message.Keys() {
		if section(e.Message, k) != nil {
			names = append(names, k)
		}
	}
	return names
}

func decodeLine(m *vici.Message) line {
	return line{sa: text(m, "ikesa-uniqueid"), name: text(m, "ikesa-name"), words: text(m, "msg")}
}

var explanations = []struct {
	pattern *regexp.Regexp
	text    string // $1 is the first submatch of the pattern
	reason  tunnel.Reason
}{
	{regexp.MustCompile(`received AUTHENTICATION_FAILED notify`), "the peer refused our authentication (AUTHENTICATION_FAILED): PSK or identities differ", tunnel.AuthRefused},
	{regexp.MustCompile(`received NO_PROPOSAL_CHOSEN notify, no CHILD_SA`), "the peer accepted none of our ESP proposals (NO_PROPOSAL_CHOSEN)", tunnel.ESPRefused},
	{regexp.MustCompile(`received NO_PROPOSAL_CHOSEN notify`), "the peer accepted none of our IKE proposals, or does not know us (NO_PROPOSAL_CHOSEN)", tunnel.IKERefused},
	{regexp.MustCompile(`received TS_UNACCEPTABLE notify`), "the peer refused our traffic selectors (TS_UNACCEPTABLE)", tunnel.TSRefused},
	{regexp.MustCompile(`received ([A-Z_]{6,}) notify(?: error|, no CHILD_SA)`), "the peer answered with $1", tunnel.Other},
	{regexp.MustCompile(`but MAC mismatched`), "the peer's PSK is not ours (MAC mismatched)", tunnel.KeyDiffers},
	{regexp.MustCompile(`no trusted \S+ public key found for '(.*)'`), "the peer, $1, authenticates with a certificate", tunnel.Certificate},
	{regexp.MustCompile(`no shared key found for (.+)`), "no PSK for $1", tunnel.Local},
	{regexp.MustCompile(`IDir '(.*)' does not match to '(.*)'`), "the peer's identity is $1, not $2", tunnel.Identity},
	{regexp.MustCompile(`constraint check failed: identity '(.*)' required`), "the peer's identity is not $1", tunnel.Identity},
	{regexp.MustCompile(`received proposals? (?:un|in)acceptable|no acceptable proposal found`), "none of the peer's proposals is one of ours", tunnel.ESPUnacceptable},
	{regexp.MustCompile(`traffic selectors .* unacceptable`), "the peer's traffic selectors are not ours", tunnel.TSUnacceptable},
	{regexp.MustCompile(`retransmit \d+ of request with message ID [1-9]`), noAnswer, tunnel.NoAnswerAuth},
	{regexp.MustCompile(`retransmit \d+ of request|giving up after \d+ retransmits|peer not responding`), noAnswer, tunnel.NoAnswer},
	{regexp.MustCompile(`unable to install (.+)`), "the kernel refused $1", tunnel.Local},
	{regexp.MustCompile(`error writing to socket: (.+)`), "sending to the peer failed: $1", tunnel.Local},
	{regexp.MustCompile(`received DELETE for IKE_SA`), "the peer closed the IKE SA", tunnel.ClosedByPeer},
	{regexp.MustCompile(`received DELETE for ESP CHILD_SA`), peerClosed, tunnel.ClosedByPeer},
	{regexp.MustCompile(`sending DELETE for IKE_SA`), "the IKE SA was closed on this node", tunnel.Other},
	{regexp.MustCompile(`sending DELETE for ESP CHILD_SA`), closedHere, tunnel.Other},
}

const (
	noAnswer   = "no answer from the peer"
	peerClosed = "the peer closed the CHILD SA"
	closedHere = "the CHILD SA was closed on this node"
	notRenewed = "the CHILD SA cannot be renewed (NO_PROPOSAL_CHOSEN): it ends with its lifetime"
)

// reasonOf turns a line of charon's log into the reason why a tunnel is down, or returns empty
// strings.
func reasonOf(words string) (string, tunnel.Reason) {
	for _, e := range explanations {
		if m := e.pattern.FindStringSubmatchIndex(words); m != nil {
			return string(e.pattern.ExpandString(nil, e.text, words, m)), e.reason
		}
	}
	return "", ""
}

// oldest is the oldest version of charon that the tests run with, that of Debian 12. The newest is
// 6.0.1, that of Debian 13.
const oldest = "5.9.8"

// fits reports whether a version, such as "6.0.1" or "5.9.8dr1", is at least oldest.
func fits(version string) bool {
	var have, least [3]int
	if n, _ := fmt.Sscanf(version, "%d.%d.%d", &have[0], &have[1], &have[2]); n < 2 {
		return false
	}
	fmt.Sscanf(oldest, "%d.%d.%d", &least[0], &least[1], &least[2])
	return slices.Compare(have[:], least[:]) >= 0
}

// conditions returns the problems with a charon of this version, such as "6.0.1", and with these
// plugins loaded.
func conditions(version string, plugins []string) []string {
	var c []string
	if !fits(version) {
		c = append(c, fmt.Sprintf("charon is version %q: at least %s is needed: install charon-systemd of Debian 12 or newer", version, oldest))
	}
	if !slices.Contains(plugins, "kernel-netlink") {
		c = append(c, "charon has not loaded the plugin kernel-netlink: it cannot give SAs to the kernel")
	}
	if slices.Contains(plugins, "kernel-libipsec") {
		c = append(c, "charon has loaded the plugin kernel-libipsec: SAs do not reach the xfrm interfaces")
	}
	return c
}

func text(m *vici.Message, key string) string {
	s, _ := m.Get(key).(string)
	return s
}

func texts(m *vici.Message, key string) []string {
	s, _ := m.Get(key).([]string)
	return s
}

func section(m *vici.Message, key string) *vici.Message {
	s, _ := m.Get(key).(*vici.Message)
	return s
}

func number(m *vici.Message, key string, base int) uint64 {
	n, _ := strconv.ParseUint(text(m, key), base, 64)
	return n
}

// ago returns the time that is the value's number of seconds before now, or zero without a value.
func ago(m *vici.Message, key string, now time.Time) time.Time {
	n, err := strconv.ParseInt(text(m, key), 10, 32)
	if err != nil {
		return time.Time{}
	}
	return now.Add(-time.Duration(n) * time.Second).Truncate(time.Second)
}
