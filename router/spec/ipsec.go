package spec

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

var (
	identityRule = regexp.MustCompile(`^[A-Za-z0-9@._-]{1,253}$`)
	proposalRule = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)
)

func (c *checker) identity(path, text string, def netip.Addr) string {
	if text == "" {
		if !def.IsValid() {
			return ""
		}
		return def.String()
	}
	if _, err := netip.ParseAddr(text); err != nil && !identityRule.MatchString(text) {
		c.Problem(path, text, "is not a valid identity", "give an IP address or a domain name")
	}
	return text
}

func (c *checker) proposals(path string, list, def []string, esp bool, cloud string, takes cloud.Algorithms) []string {
	if len(list) == 0 {
		return def
	}
	for i, text := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		if !proposalRule.MatchString(text) {
			c.Problem(at, text, "is not a valid proposal", "write it in strongSwan's notation, as "+strconv.Quote(def[0]))
			continue
		}
		if word, why := tunnel.UnknownWord(text, esp); why != "" {
			c.Problem(at, text, fmt.Sprintf("has the word %q, which %s", word, why), "write it in strongSwan's notation, as "+strconv.Quote(def[0]))
		} else if rule, remedy := takes.Refuse(text, esp); cloud != "" && rule != "" {
			c.Problem(at, text, "is refused: "+cloud+"'s gateway "+rule, remedy)
		}
		if !c.spend(i) {
			return list
		}
		if slices.Contains(list[:i], text) {
			c.Problem(at, text, "is listed twice", "keep one of them")
		}
	}
	return list
}

func (c *checker) ipsec(path string, i *isthmusv1.IPsec, preset cloud.Preset) *tunnel.IPsec {
	out := &tunnel.IPsec{
		LocalAddress:    c.s.Underlay.Address,
		LocalIdentity:   c.identity(path+".localIdentity", i.GetLocalIdentity(), c.s.Underlay.PublicAddress),
		PSK:             c.secret(path+".psk", i.GetPsk()),
		IKEProposals:    c.proposals(path+".ikeProposals", i.GetIkeProposals(), or(preset.IKEProposals, []string{"aes256gcm16-prfsha384-ecp384"}), false, preset.Name, preset.IKE.Is),
		ESPProposals:    c.proposals(path+".espProposals", i.GetEspProposals(), or(preset.ESPProposals, []string{"aes256gcm16-ecp384"}), true, preset.Name, preset.ESP.Is),
		IKERekey:        c.duration(path+".ikeRekey", i.GetIkeRekey(), or(preset.IKERekey, 6*time.Hour), 15*time.Minute, 24*time.Hour),
		ChildRekey:      c.duration(path+".childRekey", i.GetChildRekey(), or(preset.ChildRekey, 45*time.Minute), 5*time.Minute, 24*time.Hour),
		ChildRekeyBytes: i.GetChildRekeyBytes(),
		DPDDelay:        c.duration(path+".dpdDelay", i.GetDpdDelay(), or(preset.DPDDelay, 10*time.Second), time.Second, time.Hour),
		RespondOnly:     i.GetRespondOnly(),
		ReplayWindow:    c.Number(path+".replayWindow", i.GetReplayWindow(), or(preset.ReplayWindow, 1024), 32, 4096),
	}
	if out.ChildRekeyBytes == 0 {
		out.ChildRekeyBytes = preset.ChildRekeyBytes.Is
	}
	if v := out.ChildRekeyBytes; v != 0 && v < 1<<20 {
		c.Problem(path+".childRekeyBytes", strconv.FormatUint(v, 10), "is less than 1048576", "give at least 1 MiB, or 0 for no limit")
	}
	switch v := i.GetUdpEncapsulation(); v {
	case "", "auto":
	case "always":
		out.ForceUDP = true
	default:
		c.Problem(path+".udpEncapsulation", v, "is not a valid value", `give "auto" or "always"`)
	}
	if i.GetRemoteAddress() == "" {
		c.Missing(path+".remoteAddress", "give the outside address of the peer's gateway")
		return out
	}
	a, ok := c.Address(path+".remoteAddress", i.GetRemoteAddress())
	if !ok {
		return out
	}
	switch u := c.s.Underlay; {
	case a == u.Address || a == u.PublicAddress:
		c.Problem(path+".remoteAddress", a.String(), "is this node's own address", "give the address of the peer")
	case u.Address.IsValid() && a.Is4() != u.Address.Is4():
		c.Problem(path+".remoteAddress", a.String(), "is of another address family than underlay.address", "give both in the same family")
	}
	out.RemoteAddress = a
	out.RemoteIdentity = c.identity(path+".remoteIdentity", i.GetRemoteIdentity(), a)
	// charon finds the connection of an incoming IKE_SA by addresses and identities, and its key by
	// identities.
	key := out.LocalIdentity + " " + out.RemoteIdentity
	if at, ok := c.gateways[key]; ok {
		c.Problem(path+".remoteAddress", a.String(), "has the same pair of identities as "+at, "one peer can hold one tunnel; give another address, or identities of their own to both")
	} else {
		c.gateways[key] = path
	}
	return out
}
