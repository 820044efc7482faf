package ipsec

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/strongswan/govici/vici"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/tunnel"
)

// compileLink returns the xfrm interface of a tunnel.
func compileLink(c tunnel.Config) link.Wanted {
	w := link.Wanted{
		Name: c.Interface, Kind: link.Xfrm, Alias: tunnel.Mark + c.Name, IfID: c.ID, Underlay: c.Underlay, MTU: c.MTU,
		Sysctls: map[string]string{
			"ipv4/conf/%s/rp_filter":        "2", // the return path may be another tunnel
			"ipv4/conf/%s/accept_redirects": "0",
			"ipv4/conf/%s/send_redirects":   "0",
			"ipv6/conf/%s/accept_redirects": "0",
			"ipv6/conf/%s/accept_ra":        "0",
			// The interface itself has checked that a packet came through an SA with our if_id.
			// Checking each forwarded packet against the forward policies again costs time and has
			// no effect.
			"ipv4/conf/%s/disable_policy": "1",
			"ipv6/conf/%s/disable_policy": "1",
		},
	}
	for _, in := range c.Inside {
		w.Addresses = append(w.Addresses, link.Address{Local: in.Local, Peer: in.Remote})
	}
	return w
}

// connection returns the name of a tunnel's connection, child and key in charon.
func connection(name string) string { return tunnel.Mark + name }

// compile returns the load-conn message of a tunnel. It contains no secret.
//
// charon must not start, restart or close anything by itself (start_action, dpd_action and
// close_action none, keyingtries 1). Only the driver initiates, so that two initiators cannot
// create two SAs. unique is never, so that after a restart of charon no INITIAL_CONTACT makes the
// peer delete the SAs that still carry traffic. reqid is the if_id, so that the policies of a new
// charon accept packets of SAs that its predecessor installed.
func compile(c tunnel.Config) (*vici.Message, error) {
	i := c.IPsec
	name := connection(c.Name)
	m := messenger{}
	child := m.section(
		"mode", "tunnel",
		"local_ts", selectors(c),
		"remote_ts", selectors(c),
		"esp_proposals", i.ESPProposals,
		"rekey_time", seconds(i.ChildRekey),
		"life_time", seconds(i.ChildRekey+max(i.ChildRekey/10, time.Minute)),
		"rand_time", seconds(i.ChildRekey/10),
		"if_id_in", strconv.FormatUint(uint64(c.ID), 10),
		"if_id_out", strconv.FormatUint(uint64(c.ID), 10),
		"reqid", strconv.FormatUint(uint64(c.ID), 10),
		"start_action", "none",
		"dpd_action", "none",
		"close_action", "none",
	)
	if b := i.ChildRekeyBytes; b != 0 {
		m.set(child, "rekey_bytes", strconv.FormatUint(b, 10))
		m.set(child, "life_bytes", strconv.FormatUint(b+b/10, 10))
		m.set(child, "rand_bytes", strconv.FormatUint(b/10, 10))
	}
	if i.ReplayWindow != 0 {
		m.set(child, "replay_window", strconv.FormatUint(uint64(i.ReplayWindow), 10))
	}
	encapsulation := "no"
	if i.ForceUDP {
		encapsulation = "yes"
	}
	remote := "%any"
	if i.RemoteAddress.IsValid() {
		remote = i.RemoteAddress.String()
	}
	conn := m.section(
		"version", "2",
		"local_addrs", []string{i.LocalAddress.String()},
		"remote_addrs", []string{remote},
		"proposals", i.IKEProposals,
		"mobike", "no",
		"fragmentation", "yes",
		"encap", encapsulation, // "no": only if a NAT is detected
		"unique", "never",
		"keyingtries", "1",
		"dpd_delay", seconds(i.DPDDelay),
		"reauth_time", "0s",
		"rekey_time", seconds(i.IKERekey),
		"over_time", seconds(max(i.IKERekey/10, time.Minute)),
		"rand_time", seconds(i.IKERekey/10),
		"local", m.section("auth", "psk", "id", i.LocalIdentity),
		"remote", m.section("auth", "psk", "id", i.RemoteIdentity),
		"children", m.section(name, child),
	)
	msg := m.section(name, conn)
	return msg, m.err
}

// selectors returns the traffic selectors for the address families inside the tunnel. A gateway
// that supports one family may refuse a proposal with both instead of narrowing it.
func selectors(c tunnel.Config) []string {
	four, six := len(c.Inside) == 0, len(c.Inside) == 0
	for _, in := range c.Inside {
		four = four || in.Local.Addr().Is4()
		six = six || in.Local.Addr().Is6()
	}
	var ts []string
	if four {
		ts = append(ts, "0.0.0.0/0")
	}
	if six {
		ts = append(ts, "::/0")
	}
	return ts
}

// compileKey returns the load-shared message of a tunnel. The caller must not print it.
func compileKey(c tunnel.Config, value []byte) (*vici.Message, error) {
	m := messenger{}
	msg := m.section(
		"id", connection(c.Name),
		"type", "IKE",
		"data", string(value),
		"owners", []string{c.IPsec.LocalIdentity, c.IPsec.RemoteIdentity},
	)
	return msg, m.err
}

// loaded describes by digests what was loaded for a tunnel, because charon shows no keys, and only
// parts of a connection.
type loaded struct {
	Name string `json:"name"`
	Conn string `json:"conn,omitempty"` // empty: unloaded
	Key  string `json:"key,omitempty"`
	Ends string `json:"ends,omitempty"` // addresses and identities; a change needs a new IKE SA
}

func digests(c tunnel.Config, conn *vici.Message) loaded {
	return loaded{
		Name: c.Name,
		Conn: digest(string(content(nil, conn))),
		Key:  digest(c.IPsec.PSK.String(), c.IPsec.LocalIdentity, c.IPsec.RemoteIdentity),
		Ends: ends(c),
	}
}

// content appends everything in a message. Message.String is too slow for thousands of messages.
func content(b []byte, m *vici.Message) []byte {
	for _, key := range m.Keys() {
		b = strconv.AppendQuote(b, key)
		switch v := m.Get(key).(type) {
		case *vici.Message:
			b = append(content(append(b, '{'), v), '}')
		case []string:
			b = append(b, '[')
			for _, s := range v {
				b = strconv.AppendQuote(b, s)
			}
			b = append(b, ']')
		case string:
			b = strconv.AppendQuote(b, v)
		}
	}
	return b
}

func ends(c tunnel.Config) string {
	i := c.IPsec
	parts := []string{i.LocalAddress.String(), i.RemoteAddress.String(), i.LocalIdentity, i.RemoteIdentity, strings.Join(selectors(c), ",")}
	if i.ForceUDP { // only then, so that the digests of a former version stay the same
		parts = append(parts, "udp")
	}
	return digest(parts...)
}

func digest(s ...string) string {
	sum := sha256.Sum256([]byte(fmt.Sprintf("%q", s)))
	return hex.EncodeToString(sum[:12])
}

func seconds(d time.Duration) string { return strconv.FormatInt(int64(d/time.Second), 10) + "s" }

// messenger keeps the first error of setting values.
type messenger struct{ err error }

func (m *messenger) set(msg *vici.Message, key string, value any) {
	if err := msg.Set(key, value); err != nil && m.err == nil {
		m.err = fmt.Errorf("encoding %s: %w", key, err)
	}
}

func (m *messenger) section(pairs ...any) *vici.Message {
	msg := vici.NewMessage()
	for i := 0; i+1 < len(pairs); i += 2 {
		m.set(msg, pairs[i].(string), pairs[i+1])
	}
	return msg
}

// build makes a message of strings and lists of strings only, whose encoding cannot fail.
func build(pairs ...any) *vici.Message {
	m := messenger{}
	msg := m.section(pairs...)
	if m.err != nil {
		panic(m.err)
	}
	return msg
}
