package explain

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/tunnel"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func ipsecTunnel(name, cloud string, change func(*Tunnel)) Tunnel {
	t := Tunnel{Cloud: cloud, Config: tunnel.Config{
		Name:   name,
		Inside: []tunnel.Inside{{Local: netip.MustParsePrefix("169.254.10.2/30"), Remote: netip.MustParseAddr("169.254.10.1")}},
		IPsec: &tunnel.IPsec{
			RemoteAddress: netip.MustParseAddr("203.0.113.7"), RemoteIdentity: "203.0.113.7", LocalIdentity: "198.51.100.9",
			PSK: secret.Ref{Name: name}, IKEProposals: []string{"aes256gcm16-prfsha384-ecp384"}, ESPProposals: []string{"aes256gcm16-ecp384"},
		},
	}}
	if change != nil {
		change(&t)
	}
	return t
}

func document(tunnels ...Tunnel) Document {
	return Document{Public: netip.MustParseAddr("198.51.100.9"), Tunnels: tunnels}
}

// TestTunnel has a row for each reason: the field, its value, and words that the texts must
// contain.
func TestTunnel(t *testing.T) {
	for name, tt := range map[string]struct {
		cloud    string
		reason   tunnel.Reason
		evidence tunnel.Evidence
		heard    bool
		change   func(*Tunnel)
		field    string
		value    string
		words    []string
	}{
		"silence": {reason: tunnel.NoAnswer, field: "ipsec.remoteAddress",
			words: []string{"no IKE packet at all has come from that address since 2026-03-01T11:00:00Z", "the address of this node at the peer must be 198.51.100.9"}},
		"silence of AWS": {cloud: "aws", reason: tunnel.NoAnswer, field: "ipsec.remoteAddress",
			words: []string{"aws: IP address of the customer gateway must be 198.51.100.9", "only with the startup action Start"}},
		"unreachable":                   {reason: tunnel.NoAnswer, heard: true, words: []string{"although it sends to this node", "came at 2026-03-01T11:59:00Z"}},
		"unreachable, half open":        {reason: tunnel.NoAnswer, heard: true, evidence: tunnel.Evidence{HalfOpen: true}, words: []string{"do not reach the peer"}},
		"IKE_AUTH":                      {reason: tunnel.NoAnswerAuth, heard: true, words: []string{"4500", "fragments"}},
		"lost":                          {reason: tunnel.PeerLost, field: "ipsec.remoteAddress", words: []string{"stopped answering"}},
		"IKE, no offer":                 {reason: tunnel.IKERefused, field: "ipsec.ikeProposals", words: []string{"has not called by itself", "or it has no connection for this node's address 198.51.100.9"}},
		"IKE, no offer, Azure":          {cloud: "azure", reason: tunnel.IKERefused, field: "ipsec.ikeProposals", words: []string{"azure: IPsec / IKE policy of the connection must include aes256gcm16-prfsha384-ecp384", "IP address of the local network gateway"}},
		"IKE, other than preset":        {cloud: "azure", reason: tunnel.IKERefused, change: func(t *Tunnel) { t.IPsec.IKEProposals = []string{"aes128-sha1-modp1024"} }, field: "ipsec.ikeProposals", value: "[aes256gcm16-prfsha384-ecp384]"},
		"IKE, offered before":           {reason: tunnel.IKERefused, evidence: tunnel.Evidence{IKEOffer: "AES_CBC_256/HMAC_SHA2_256_128/PRF_HMAC_SHA2_256/MODP_2048"}, field: "ipsec.ikeProposals", value: "[aes256-sha256-modp2048]"},
		"IKE, offer":                    {reason: tunnel.IKEUnacceptable, evidence: tunnel.Evidence{IKEOffer: "AES_CBC_128/HMAC_SHA1_96/PRF_HMAC_SHA1/MODP_2048"}, field: "ipsec.ikeProposals", value: "[aes128-sha1-modp2048]", words: []string{"the peer proposed"}},
		"IKE, weak offer":               {reason: tunnel.IKEUnacceptable, evidence: tunnel.Evidence{IKEOffer: "AES_CBC_256/HMAC_SHA1_96/PRF_HMAC_SHA1/MODP_1024"}, field: "ipsec.ikeProposals", value: "[aes256-sha1-modp1024]", words: []string{"which are weak"}},
		"IKE, strange offer":            {reason: tunnel.IKEUnacceptable, evidence: tunnel.Evidence{IKEOffer: "CAMELLIA_CBC_128/HMAC_SHA1_96"}, field: "ipsec.ikeProposals", words: []string{"does not support"}},
		"IKEv1":                         {reason: tunnel.IKEVersion, words: []string{"IKEv2 only", "set the IKE version to 2"}},
		"ESP":                           {reason: tunnel.ESPUnacceptable, evidence: tunnel.Evidence{ESPOffer: "AES_GCM_16_128"}, field: "ipsec.espProposals", value: "[aes128gcm16]"},
		"rekey, nothing known":          {reason: tunnel.RekeyRefused, field: "ipsec.espProposals", value: "[aes256gcm16]", words: []string{"another group than ecp384", "goes down"}},
		"rekey, no PFS":                 {reason: tunnel.RekeyRefused, evidence: tunnel.Evidence{ESPOffer: "AES_GCM_16_256"}, field: "ipsec.espProposals", value: "[aes256gcm16]", words: []string{"no perfect forward secrecy;"}},
		"rekey, another group":          {reason: tunnel.RekeyRefused, evidence: tunnel.Evidence{ESPOffer: "AES_GCM_16_256/MODP_2048"}, field: "ipsec.espProposals", value: "[aes256gcm16-modp2048]"},
		"rekey, we have none":           {cloud: "gcp", reason: tunnel.RekeyRefused, change: func(t *Tunnel) { t.IPsec.ESPProposals = []string{"aes256gcm16"} }, field: "ipsec.espProposals", value: "[aes256gcm16-ecp384]", words: []string{"wants perfect forward secrecy"}},
		"authentication":                {reason: tunnel.AuthRefused, field: "ipsec.psk", words: []string{"isthmus secret set x", "does not expect this node as 198.51.100.9"}},
		"authentication, AWS":           {cloud: "aws", reason: tunnel.AuthRefused, field: "ipsec.psk", words: []string{"aws: pre-shared key in the options of that VPN tunnel", "aws: IP address of the customer gateway must be 198.51.100.9"}},
		"authentication, odd name":      {reason: tunnel.AuthRefused, change: func(t *Tunnel) { t.IPsec.LocalIdentity = "10.0.0.4" }, field: "ipsec.psk", words: []string{"or set ipsec.localIdentity to 198.51.100.9"}},
		"authentication, identity seen": {reason: tunnel.AuthRefused, evidence: tunnel.Evidence{Identity: "192.168.0.4"}, field: "ipsec.remoteIdentity", value: "192.168.0.4", words: []string{"behind a NAT"}},
		"certificate":                   {cloud: "azure", reason: tunnel.Certificate, words: []string{"authenticates with a certificate", "azure: shared key of the connection must be that of secret"}},
		"post-quantum, refused": {reason: tunnel.IKERefused, change: func(t *Tunnel) { t.IPsec.IKEProposals = []string{"aes256gcm16-prfsha384-ecp384-ke1_mlkem768"} }, field: "ipsec.ikeProposals", value: "[aes256gcm16-prfsha384-ecp384]",
			words: []string{"does not support the additional key exchanges", "leave the additional key exchanges out"}},
		"post-quantum, offered": {reason: tunnel.IKEUnacceptable, evidence: tunnel.Evidence{IKEOffer: "AES_GCM_16_256/PRF_HMAC_SHA2_384/ECP_384/KE1_ML_KEM_768"}, field: "ipsec.ikeProposals", value: "[aes256gcm16-prfsha384-ecp384-ke1_mlkem768]",
			words: []string{"with an additional key exchange (RFC 9370)", "charon must be 6.0 or later"}},
		"post-quantum, unknown": {reason: tunnel.IKEUnacceptable, evidence: tunnel.Evidence{IKEOffer: "AES_GCM_16_256/PRF_HMAC_SHA2_384/ECP_384/KE1_FRODO_AES_L3"}, field: "ipsec.ikeProposals", words: []string{"wants algorithms that this node does not support"}},
		"key":                   {reason: tunnel.KeyDiffers, evidence: tunnel.Evidence{OtherKey: true}, field: "ipsec.psk", words: []string{"newline"}},
		"peer's identity":       {reason: tunnel.Identity, evidence: tunnel.Evidence{Identity: "gw.example.net", CalledUs: "198.51.100.9"}, field: "ipsec.remoteIdentity", value: "gw.example.net"},
		"our identity":          {reason: tunnel.Identity, evidence: tunnel.Evidence{Identity: "203.0.113.7", CalledUs: "10.0.0.4"}, field: "ipsec.localIdentity", value: "10.0.0.4"},
		"identity, unknown":     {reason: tunnel.Identity, field: "ipsec.remoteIdentity"},
		"selectors":             {reason: tunnel.TSRefused, words: []string{"0.0.0.0/0", "policy-based", "make the peer route-based"}},
		"selectors, Azure":      {cloud: "azure", reason: tunnel.TSRefused, words: []string{"policy based traffic selectors"}},
		"selectors of two families": {reason: tunnel.TSRefused, change: func(t *Tunnel) {
			t.Inside = append(t.Inside, tunnel.Inside{Local: netip.MustParsePrefix("fd00::2/126"), Remote: netip.MustParseAddr("fd00::1")})
		}, field: "inside", words: []string{"0.0.0.0/0 and ::/0"}},
		"narrowed":        {reason: tunnel.TSNarrowed, evidence: tunnel.Evidence{Selectors: "10.0.0.0/8"}, words: []string{"has the traffic selectors 10.0.0.0/8", "the rest is dropped"}},
		"waiting":         {cloud: "azure", reason: tunnel.Waiting, field: "ipsec.respondOnly", value: "false", words: []string{"azure opens the tunnel from each instance"}},
		"closed":          {reason: tunnel.ClosedByPeer, words: []string{"opens it again"}},
		"closed, we wait": {reason: tunnel.ClosedByPeer, change: func(t *Tunnel) { t.IPsec.RespondOnly = true }, field: "ipsec.respondOnly", value: "false"},
		"here":            {reason: tunnel.Local, words: []string{"what charon said"}},
	} {
		d := document(ipsecTunnel("first", "", nil), ipsecTunnel("x", tt.cloud, tt.change))
		s := tunnel.State{Failure: tunnel.Failure{Reason: tt.reason, Since: now}, Evidence: tt.evidence, Listening: now.Add(-time.Hour), LastError: "what charon said"}
		if tt.heard {
			s.Heard = now.Add(-time.Minute)
		}
		e, ok := d.Tunnel(1, s)
		want := ""
		if tt.field != "" {
			want = "tunnels[1]." + tt.field
		}
		if !ok || e.Reason != tt.reason || e.Since != now || e.Field != want || e.Value != tt.value || e.What == "" || e.Cause == "" {
			t.Errorf("%s: %+v", name, e)
		}
		all := strings.Join([]string{e.What, e.Cause, e.Remedy, e.There}, "\n")
		for _, w := range tt.words {
			if !strings.Contains(all, w) {
				t.Errorf("%s: %q is missing in\n%s", name, w, all)
			}
		}
	}
	if _, ok := document(ipsecTunnel("x", "", nil)).Tunnel(0, tunnel.State{Status: tunnel.Up}); ok {
		t.Error("a tunnel that is up is explained")
	}
}

// TestData explains tunnels whose keys are negotiated, and WireGuard tunnels without a session.
func TestData(t *testing.T) {
	wg := func(change func(*tunnel.WireGuard)) Tunnel {
		c := ipsecTunnel("w", "", nil)
		c.IPsec, c.WireGuard = nil, &tunnel.WireGuard{ListenPort: 51820, PeerPublicKey: [32]byte{1}, Endpoint: netip.MustParseAddrPort("203.0.113.7:51821")}
		if change != nil {
			change(c.WireGuard)
		}
		return c
	}
	const ownKey, peerKey = "AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	noData := tunnel.State{Failure: tunnel.Failure{Reason: tunnel.NoData}, Silence: tunnel.Silence{Since: now, Sent: 14, Inbound: true}, Answers: "unanswered"}
	oneWay := tunnel.State{Failure: tunnel.Failure{Reason: tunnel.OneWay}, Silence: tunnel.Silence{Since: now, Sent: 9, Ever: true}}
	quiet := func(keyed time.Time) tunnel.State { // data came before
		s := noData
		s.Silence.Ever, s.Keyed = true, keyed
		return s
	}
	chosen := noData
	chosen.Device.Port = 40000
	nat := noData
	nat.NATTraversal = true
	session := func(reason tunnel.Reason, change func(*tunnel.Device)) tunnel.State {
		s := tunnel.State{Failure: tunnel.Failure{Reason: reason}, LastError: "no answer", Device: tunnel.Device{PublicKey: [32]byte{2}, Port: 51820}}
		if change != nil {
			change(&s.Device)
		}
		return s
	}
	for name, tt := range map[string]struct {
		tunnel       Tunnel
		state        tunnel.State
		field, value string
		words        []string
	}{
		"ESP filtered": {ipsecTunnel("x", "", func(t *Tunnel) { t.Probe = tunnel.ProbeAuto }), noData, "ipsec.udpEncapsulation", "always",
			[]string{"14 packets were sent", "no data has come since 2026-03-01T12:00:00Z", "ESP, IP protocol 50, is filtered", "`udpEncapsulation: always`", "set `probe: false`", "must route 169.254.10.2 into the tunnel"}},
		"ESP in UDP filtered": {ipsecTunnel("x", "", nil), nat, "", "", []string{"let UDP port 4500 pass in both directions"}},
		"one way":             {ipsecTunnel("x", "", nil), oneWay, "ipsec.udpEncapsulation", "always", []string{"the peer's data comes, but 9 echo requests to 169.254.10.1", "does not reach the peer"}},
		"WireGuard's data, a handshake has passed": {wg(nil), quiet(now.Add(time.Second)), "", "", []string{"no data has come since 2026-03-01T12:00:00Z", "lets handshakes pass", "AllowedIPs", "port 51820"}},
		"WireGuard's data, from the beginning":     {wg(nil), noData, "", "", []string{"no data has come since", "lets handshakes pass"}},
		"WireGuard, nothing comes": {wg(nil), quiet(now.Add(-time.Minute)), "", "",
			[]string{"14 packets were sent, and nothing has come since 2026-03-01T12:00:00Z", "the peer is down, UDP is filtered on the path, or the keys of the two sides do not match any more", "compare the keys", "port 51820", peerKey, "must have no pre-shared key"}},
		"WireGuard, nothing comes, from the beginning of the last keys": {wg(nil), quiet(now), "", "", []string{"nothing has come since"}},
		"WireGuard, a port that the device chose":                       {wg(func(w *tunnel.WireGuard) { w.ListenPort = 0 }), chosen, "", "", []string{"between port 40000 of this node"}},
		"WireGuard, one way": {wg(nil), oneWay, "", "", []string{"the peer's data comes, but", "lets handshakes pass"}},
		"WireGuard, no session": {wg(nil), session(tunnel.NoHandshake, nil), "wireguard.endpoint", "",
			[]string{"no answer", "keys of the two sides do not match", ownKey, peerKey, "198.51.100.9", "must have no pre-shared key"}},
		"WireGuard, no call": {wg(func(w *tunnel.WireGuard) { w.Endpoint = netip.AddrPort{} }), session(tunnel.NoEndpoint, nil), "wireguard.endpoint", "", []string{"has not called UDP port 51820"}},
		"WireGuard, another key of the peer": {wg(nil), session(tunnel.NoHandshake, func(d *tunnel.Device) {
			d.StrangerAt, d.Stranger = now, netip.MustParseAddrPort("203.0.113.7:51821")
		}), "wireguard.peerPublicKey", "", []string{"with another key than the peer's came from 203.0.113.7:51821 at 2026-03-01T12:00:00Z"}},
		"WireGuard, another key of this side": {wg(nil), session(tunnel.NoHandshake, func(d *tunnel.Device) { d.StrangerAt, d.OtherKey = now, true }), "", "",
			[]string{"set this node's public key at the peer: " + ownKey}},
		"WireGuard, pre-shared key": {wg(func(w *tunnel.WireGuard) { w.PresharedKey.Name = "psk" }), session(tunnel.NoHandshake, nil), "wireguard.endpoint", "", []string{"that of secret psk"}},
	} {
		e, ok := document(ipsecTunnel("first", "", nil), tt.tunnel).Tunnel(1, tt.state)
		want := ""
		if tt.field != "" {
			want = "tunnels[1]." + tt.field
		}
		if !ok || e.Field != want || e.Value != tt.value || e.Cause == "" || e.Remedy == "" {
			t.Errorf("%s: %+v", name, e)
		}
		all := strings.Join([]string{e.What, e.Cause, e.Remedy, e.There}, "\n")
		for _, w := range tt.words {
			if !strings.Contains(all, w) {
				t.Errorf("%s: %q is missing in\n%s", name, w, all)
			}
		}
	}
}

func TestNotation(t *testing.T) {
	for offer, want := range map[string]string{
		"AES_CBC_128/HMAC_SHA1_96/PRF_HMAC_SHA1/MODP_2048":                                                    "aes128-sha1-modp2048",
		"AES_GCM_16_256/PRF_HMAC_SHA2_384/ECP_384":                                                            "aes256gcm16-prfsha384-ecp384",
		"AES_GCM_16_256/ECP_256/NO_EXT_SEQ":                                                                   "aes256gcm16-ecp256",
		"AES_GCM_16_256/EXT_SEQ":                                                                              "aes256gcm16-esn",
		"AES_CBC_256/AES_CBC_128/HMAC_SHA2_256_128/HMAC_SHA1_96/PRF_HMAC_SHA2_512/MODP_2048_256":              "aes256-sha256-prfsha512-modp2048s256",
		"CHACHA20_POLY1305_256/PRF_HMAC_SHA2_512/CURVE_25519":                                                 "chacha20poly1305-prfsha512-curve25519",
		"CAMELLIA_CBC_128/HMAC_SHA1_96, 3DES_CBC/HMAC_MD5_96":                                                 "3des-md5",
		"AES_CBC_128/PRF_HMAC_SHA1":                                                                           "",
		"AES_CBC_256/HMAC_SHA2_256_128/PRF_HMAC_SHA2_256/ECP_256_BP":                                          "aes256-sha256-ecp256bp",
		"AES_CCM_16_256/PRF_HMAC_SHA2_256/ML_KEM_768":                                                         "aes256ccm16-prfsha256-mlkem768",
		"AES_GCM_16_256/PRF_HMAC_SHA2_384/CURVE_25519/KE1_ML_KEM_768/KE1_ML_KEM_512/KE2_ML_KEM_1024/KE3_NONE": "aes256gcm16-prfsha384-curve25519-ke1_mlkem768-ke2_mlkem1024",
		"AES_GCM_16_256/PRF_HMAC_SHA2_384/ECP_384/KE1_OTHER":                                                  "",
		// IKE needs a group
		"AES_CBC_256/HMAC_SHA2_256_128/PRF_HMAC_SHA2_256/NEWHOPE_128": "",
		// a truncated sha256
		"AES_CBC_256/HMAC_SHA2_256_96":  "",
		"CAMELLIA_CBC_128/HMAC_SHA1_96": "",
		"":                              "",
	} {
		if got, ok := notation(offer); got != want || ok != (want != "") {
			t.Errorf("%s: got %q, %v, want %q", offer, got, ok, want)
		}
	}
}

func TestStrays(t *testing.T) {
	caller := func(a string) tunnel.Caller {
		return tunnel.Caller{Address: netip.MustParseAddr(a), First: now.Add(-time.Hour), Last: now, Attempts: 7}
	}
	silent := map[string]tunnel.State{"x": {Failure: tunnel.Failure{Reason: tunnel.NoAnswer}}}
	for name, tt := range map[string]struct {
		d       Document
		states  map[string]tunnel.State
		callers []tunnel.Caller
		want    string // "ADDRESS CODE NEXT-TO", "dead" when by design
	}{
		"no caller":                       {d: document(ipsecTunnel("x", "", nil))},
		"AWS's other tunnel":              {d: document(ipsecTunnel("x", "aws", nil)), want: "- second-endpoint x dead"},
		"the same, and it calls":          {d: document(ipsecTunnel("x", "aws", nil)), callers: []tunnel.Caller{caller("198.18.0.1")}, want: "198.18.0.1 second-endpoint x dead"},
		"Azure's may not be there":        {d: document(ipsecTunnel("x", "azure", nil))},
		"Azure's calls":                   {d: document(ipsecTunnel("x", "azure", nil)), callers: []tunnel.Caller{caller("198.18.0.1")}, want: "198.18.0.1 second-instance x dead"},
		"one of two":                      {d: document(ipsecTunnel("x", "azure", nil), ipsecTunnel("y", "aws", nil)), callers: []tunnel.Caller{caller("198.18.0.1")}, want: "198.18.0.1 unpaired  dead, - second-endpoint y dead"},
		"a peer has moved":                {d: document(ipsecTunnel("x", "", nil)), states: silent, callers: []tunnel.Caller{caller("198.18.0.1")}, want: "198.18.0.1 moved-peer "},
		"unknown":                         {d: document(ipsecTunnel("x", "", nil)), states: map[string]tunnel.State{"x": {Status: tunnel.Up}}, callers: []tunnel.Caller{caller("198.18.0.1"), caller("198.18.0.2")}, want: "198.18.0.1 unknown-caller , 198.18.0.2 unknown-caller "},
		"a peer that calls has not moved": {d: document(ipsecTunnel("x", "", nil)), states: map[string]tunnel.State{"x": {Failure: tunnel.Failure{Reason: tunnel.NoAnswer}, Heard: now}}, callers: []tunnel.Caller{caller("198.18.0.1")}, want: "198.18.0.1 unknown-caller "},
		"a complete pair and a call":      {d: document(ipsecTunnel("x-0", "aws", nil), ipsecTunnel("x-1", "aws", nil)), callers: []tunnel.Caller{caller("198.18.0.1")}, want: "198.18.0.1 unknown-caller "},
	} {
		var got []string
		for _, s := range tt.d.Strays(tt.states, tt.callers) {
			line := "-"
			if s.Address.IsValid() {
				line = s.Address.String()
				if s.Attempts != 7 || s.First != now.Add(-time.Hour) || s.Last != now {
					t.Errorf("%s: %+v", name, s)
				}
			}
			line += " " + s.Code + " " + s.Beside
			if s.ByDesign {
				line += " dead"
			}
			if s.Why == "" || s.Remedy == "" {
				t.Errorf("%s: %+v", name, s)
			}
			got = append(got, line)
		}
		if s := strings.Join(got, ", "); s != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", name, s, tt.want)
		}
	}
}

func TestDead(t *testing.T) {
	d := document(
		ipsecTunnel("x-0", "aws", func(t *Tunnel) { t.IPsec.RespondOnly = true }),
		ipsecTunnel("x-1", "aws", nil),
		ipsecTunnel("y", "", func(t *Tunnel) { t.IPsec.RespondOnly = true }),
	)
	waiting := tunnel.State{Status: tunnel.Down, Failure: tunnel.Failure{Reason: tunnel.Waiting}}
	heard := waiting
	heard.Heard = now
	for i, tt := range []struct {
		tunnel int
		state  tunnel.State
		want   bool
	}{{0, waiting, true}, {0, heard, false}, {0, tunnel.State{Status: tunnel.Up}, false}, {1, waiting, false}, {2, waiting, false}} {
		if p, dead := d.Dead(tt.tunnel, tt.state); dead != tt.want || dead && p.Code != "both-wait" {
			t.Errorf("%d: %+v", i, p)
		}
	}
}
