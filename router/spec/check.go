package spec

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

// Secrets returns the reference for a stored secret, and false when there is none of that name.
type Secrets func(name string) (secret.Ref, bool)

// Check resolves a document. The Spec may be used only when neither Decode nor Check has found a problem.
func Check(d Document, secrets Secrets) (*Spec, Problems) {
	c := newChecker(d, secrets)
	c.document(d)
	return &c.s, c.Problems()
}

func newChecker(d Document, secrets Secrets) *checker {
	return &checker{Fields: Fields{lines: d.lines, unread: d.unread}, s: Spec{lines: d.lines.outside(policiesField), layout: d.layout}, secrets: secrets, tunnels: map[string]Tunnel{}, platform: d.platform}
}

func (c *checker) document(d Document) {
	if d.unread[""] {
		return // nothing would be told
	}
	m := d.Message
	if m == nil {
		m = &isthmusv1.Spec{}
	}
	c.s.Secrets = SecretUses(m)
	c.node(m)
	c.underlay(m.GetUnderlay())
	if len(m.GetPeers()) > 0 && !c.s.Node.RouterID.IsValid() && c.s.Underlay.Address.Is6() {
		c.Missing("node.routerId", "give an IPv4 address, which an IPv6 underlay does not tell; it need not exist (RFC 6286)")
	}
	for i, t := range m.GetTunnels()[:c.limited("tunnels", len(m.GetTunnels()), maxTunnels)] {
		c.tunnel(fmt.Sprintf("tunnels[%d]", i), t)
	}
	c.insideOverlaps()
	c.outside()
	for i, p := range m.GetPeers()[:c.limited("peers", len(m.GetPeers()), maxPeers)] {
		if !c.spend(1) {
			return
		}
		c.peer(fmt.Sprintf("peers[%d]", i), p)
	}
	c.announce = make(map[netip.Prefix]bool, len(m.GetAnnounce()))
	for i, text := range m.GetAnnounce() {
		at := fmt.Sprintf("announce[%d]", i)
		if p, ok := c.Prefix(at, text); ok {
			if c.announce[p] {
				c.Problem(at, text, "is announced twice", "keep one of them")
			}
			c.announce[p] = true
			c.s.Announce = append(c.s.Announce, p)
		}
	}
	for i, r := range m.GetStaticRoutes() {
		c.route(fmt.Sprintf("staticRoutes[%d]", i), r)
	}
	for i, a := range m.GetAttachments() {
		c.attachment(fmt.Sprintf("attachments[%d]", i), a)
	}
	c.access(m.GetAccess())
	if !c.spend(1) {
		return
	}
	c.zones(m.GetEgress().GetZones())
	c.resolution(m.GetEgress())
	addresses := 0
	for i, p := range m.GetEgress().GetPools() {
		if addresses += len(p.GetAddresses()); addresses > maxPoolAddresses {
			c.Problem(fmt.Sprintf("egress.pools[%d].addresses", i), p.GetName(), fmt.Sprintf("has with the pools before more than %d addresses", maxPoolAddresses), "use fewer, or another node")
			break
		}
		c.pool(fmt.Sprintf("egress.pools[%d]", i), p)
	}
	c.listenersAndPools()
	c.takeover(m.GetEgress())
	for i, p := range m.GetEgress().GetMaps()[:c.limited("egress.maps", len(m.GetEgress().GetMaps()), maxMaps)] {
		c.prefixMap(fmt.Sprintf("egress.maps[%d]", i), p)
	}
	for i, p := range m.GetEgress().GetPolicies() {
		if !c.spend(1) {
			return
		}
		c.policy(fmt.Sprintf("egress.policies[%d]", i), p)
	}
	if c.bounded(c.s.Policies, c.paths, 0) {
		c.ties()
		c.loops()
	}
	c.announced()
	c.translationLog("egress.log", m.GetEgress().GetLog())
}

type checker struct {
	Fields
	s        Spec
	secrets  Secrets
	platform Platform
	tunnels  map[string]Tunnel
	inside   []placed
	ports    map[uint16]string
	gateways map[string]string // IPsec identities and addresses -> path
	peerings map[netip.Addr]string
	sources  map[netip.Addr]string // addresses of pools
	publics  map[netip.Addr]string // and what the world sees for them
	dests    map[netip.Prefix]string
	attached map[string]string // interfaces of attachments -> path
	paths    []string          // of the policies

	ctx   context.Context // nil: the caller does not give up
	steps int
	tired bool

	insideAt map[netip.Prefix]string
	pools    map[string]*poolFacts
	zoneList map[string]bool
	announce map[netip.Prefix]bool // prefixes of the document's own
	peersOf  map[string][]int      // by tunnel

	announcing  map[netip.Prefix]string // prefixes that pools announce
	domainNames map[string]bool
	proxy       bool // there is one
}

type placed struct {
	prefix netip.Prefix
	path   string
}

// policiesField is where the policies are.
const policiesField = "egress.policies"

// Line returns the line of a field in the document's text, or of the nearest enclosing one that the text has, from 1; 0
// when there is none or the document was not text. Policies have no lines of their own: there may be ten thousand, and they are edited.
func (s *Spec) Line(path string) int {
	line := s.lines.line(path)
	if s.layout != nil && line > s.lines.line(policiesField) {
		line += s.layout.added
	}
	return line
}

// duration returns a whole number of seconds between min and max, or the default when it is not given.
func (c *checker) duration(path string, d *durationpb.Duration, def, min, max time.Duration) time.Duration {
	if d == nil {
		return def
	}
	v, step, kind := d.AsDuration(), time.Second, "a whole number of seconds "
	if min%time.Second != 0 {
		step, kind = time.Millisecond, ""
	}
	if v < min || v > max || v%step != 0 {
		c.Problem(path, v.String(), fmt.Sprintf("is not %sfrom %v to %v", kind, min, max), "choose one in this range")
		return def
	}
	return v
}

func (c *checker) secret(path, name string) secret.Ref {
	if name == "" {
		c.Missing(path, "store the secret with `isthmus secret set NAME` and give its NAME")
		return secret.Ref{}
	}
	ref, ok := c.secrets(name)
	if !ok {
		// The text may hold the secret itself by mistake: only what looks like a name is repeated.
		shown, remedy := name, "store it with `isthmus secret set "+name+"`"
		if !nameRule.MatchString(name) {
			shown, remedy = "", "store the secret with `isthmus secret set NAME` and give its NAME, not the secret"
		}
		c.Problem(path, shown, "is no stored secret", remedy)
	}
	return ref
}

func (c *checker) node(m *isthmusv1.Spec) {
	n := m.GetNode()
	if n == nil {
		c.Missing("node", "name the node, as `node: {name: hub-1, asn: 64620}`")
		return
	}
	c.Name("node", "node.name", n.GetName())
	c.s.Node.Name = n.GetName()
	if n.GetAsn() != 0 || len(m.GetPeers()) > 0 {
		c.s.Node.ASN = c.ASN("node.asn", n.GetAsn())
	}
	if text := n.GetRouterId(); text != "" {
		if a, ok := c.Address("node.routerId", text); ok {
			if !a.Is4() {
				c.Problem("node.routerId", text, "is no IPv4 address", "give an IPv4 address; it need not exist (RFC 6286)")
			}
			c.s.Node.RouterID = a
		}
	}
}

var interfaceRule = regexp.MustCompile(`^[^\s/:]{1,15}$`)

func (c *checker) underlay(u *isthmusv1.Underlay) {
	if u == nil {
		c.Missing("underlay", "describe it, as `underlay: {interface: eth0, address: 10.0.0.4, publicAddress: 203.0.113.9}`")
		return
	}
	s := &c.s.Underlay
	s.Interface = u.GetInterface()
	switch {
	case s.Interface == "":
		c.Missing("underlay.interface", "give the name of the interface toward the Internet, such as eth0")
	case !interfaceRule.MatchString(s.Interface) || s.Interface == "." || s.Interface == ".." || s.Interface == "lo":
		c.Problem("underlay.interface", s.Interface, "is no name of an interface toward the Internet", "`ip link` shows the names")
	}
	if u.GetAddress() == "" {
		c.Missing("underlay.address", "give the address that the interface has; `ip address` shows it")
	} else if a, ok := c.underlayAddress(u); ok {
		s.Address, s.PublicAddress = a, a
		if !c.s.Node.RouterID.IsValid() && a.Is4() {
			c.s.Node.RouterID = a
		}
	}
	if u.GetPublicAddress() == Auto {
		s.PublicAddress, _ = c.autoPublic("underlay.publicAddress", s.Address)
	} else if u.GetPublicAddress() != "" {
		if a, ok := c.Address("underlay.publicAddress", u.GetPublicAddress()); ok {
			s.PublicAddress = a
			if s.Address.IsValid() && s.Address.Is4() != a.Is4() {
				c.Problem("underlay.publicAddress", a.String(), "is of another address family than underlay.address", "give both in the same family")
			}
		}
	}
	s.MTU = int(c.Number("underlay.mtu", u.GetMtu(), 1500, 1280, 9216))
}

func (c *checker) underlayAddress(u *isthmusv1.Underlay) (netip.Addr, bool) {
	if u.GetAddress() == Auto {
		return c.autoAddress("underlay.address", u.GetInterface())
	}
	return c.Address("underlay.address", u.GetAddress())
}

func (c *checker) tunnel(path string, t *isthmusv1.Tunnel) {
	ok := c.Name("tunnel", path+".name", t.GetName())
	preset := c.cloud(path+".cloud", t)
	out := Tunnel{Config: tunnel.Config{Name: t.GetName()}, Cloud: preset.Name}
	for i, in := range t.GetInside() {
		c.insidePair(fmt.Sprintf("%s.inside[%d]", path, i), in, &out)
	}
	v6 := slices.ContainsFunc(out.Inside, func(in tunnel.Inside) bool { return in.Local.Addr().Is6() })
	least := uint32(576)
	if v6 {
		least = 1280 // RFC 8200 section 5
	}
	out.MTU = int(c.Number(path+".mtu", t.GetMtu(), 0, least, 9216))
	out.MSS = uint16(c.Number(path+".mss", t.GetMss(), uint32(preset.MSS.Is), 536, 9176))
	switch e := t.GetEncryption().(type) {
	case *isthmusv1.Tunnel_Ipsec:
		out.IPsec = c.ipsec(path+".ipsec", e.Ipsec, preset)
	case *isthmusv1.Tunnel_Wireguard:
		out.WireGuard = c.wireguard(path+".wireguard", e.Wireguard)
	default:
		c.Missing(path+".ipsec", "say how it is encrypted, with `ipsec` or `wireguard`")
	}
	if out.MTU == 0 {
		out.MTU = out.LargestMTU(c.s.Underlay.MTU)
		if preset.MTU.Is != 0 {
			out.MTU = min(out.MTU, preset.MTU.Is)
		}
	}
	c.cloudTunnel(path, t, out, preset)
	if t.GetMss() == 0 {
		out.MSS = min(out.MSS, uint16(out.MTU-40))
	}
	if int(out.MSS) > out.MTU-40 {
		c.Problem(path+".mss", strconv.Itoa(int(out.MSS)), fmt.Sprintf("does not fit the MTU of %d", out.MTU), fmt.Sprintf("give at most %d, or leave it out", out.MTU-40))
	}
	out.Sources = c.sourceList(path+".sources", t.GetSources())
	c.s.Tunnels = append(c.s.Tunnels, out)
	if ok {
		c.tunnels[out.Name] = out
	}
}

// metadata is where every cloud's virtual machines find their metadata service.
var metadata = netip.MustParseAddr("169.254.169.254")

func (c *checker) insidePair(path string, in *isthmusv1.Inside, t *Tunnel) {
	if in.GetLocal() == "" {
		c.Missing(path+".local", `give this node's address with its length, such as "169.254.64.2/30"`)
		return
	}
	local, err := netip.ParsePrefix(in.GetLocal())
	if err != nil {
		c.Problem(path+".local", in.GetLocal(), "is no address with a prefix length", `write it as "169.254.64.2/30"`)
		return
	}
	if _, ok := c.Address(path+".local", local.Addr().String()); !ok {
		return
	}
	short := local.Addr().BitLen() - local.Bits() // host bits
	if short > 2 {
		c.Problem(path+".local", in.GetLocal(), "is no block for two ends", "use /30, /31 or /32 (IPv4), /126, /127 or /128 (IPv6)")
		return
	}
	var remote netip.Addr
	if text := in.GetRemote(); text != "" {
		a, ok := c.Address(path+".remote", text)
		if !ok {
			return
		}
		remote = a
	} else if short == 0 {
		c.Missing(path+".remote", "give the address of the peer, which a single address does not tell")
		return
	} else {
		remote = otherEnd(local)
	}
	hosts := func(a netip.Addr) bool { // not the network's own or the broadcast address
		return short != 2 || a.Is6() || (a != local.Masked().Addr() && local.Contains(a.Next()))
	}
	switch {
	case !hosts(local.Addr()):
		c.Problem(path+".local", in.GetLocal(), "is the network or broadcast address of its /30", "take one of the two addresses between them")
	case remote.Is4() != local.Addr().Is4():
		c.Problem(path+".remote", remote.String(), "is of another address family than local", "give both in the same family")
	case remote == local.Addr():
		c.Problem(path+".remote", remote.String(), "is this node's own address", "give the address of the peer")
	case short > 0 && !local.Contains(remote):
		c.Problem(path+".remote", remote.String(), "is not in the block of local", "use a /32 (or /128) when the two ends share no block")
	case !hosts(remote):
		c.Problem(path+".remote", remote.String(), "is the network or broadcast address of the /30", "take one of the two addresses between them")
	case local.Addr() == metadata || remote == metadata || (short > 0 && local.Contains(metadata)):
		c.Problem(path, in.GetLocal(), "takes the address of the cloud's metadata service, 169.254.169.254", "choose another block")
	case slices.ContainsFunc(t.Inside, func(o tunnel.Inside) bool { return o.Local.Addr().Is4() == local.Addr().Is4() }):
		c.Problem(path, in.GetLocal(), "is a second pair of the same address family", "keep one pair of each family")
	default:
		c.place(path+".local", local.Masked())
		if short == 0 {
			c.place(path+".remote", netip.PrefixFrom(remote, remote.BitLen()))
		}
		t.Inside = append(t.Inside, tunnel.Inside{Local: local, Remote: remote})
	}
}

// place claims inside addresses, which must be unique on the node over all tunnels: a session and a connected route
// are known by them alone. Several tunnels may share this node's own single address.
func (c *checker) place(path string, p netip.Prefix) {
	if a := c.s.Underlay.Address; a.IsValid() && p.Contains(a) {
		c.Problem(path, p.String(), "holds the underlay address", "choose another block")
	}
	c.inside = append(c.inside, placed{p, path})
}

// insideOverlaps finds inside addresses of one tunnel within those of another.
func (c *checker) insideOverlaps() {
	shared := func(p placed) bool { return p.prefix.IsSingleIP() && strings.HasSuffix(p.path, ".local") }
	overlaps(c.inside, shared, func(i, j int) {
		p, q := c.inside[i], c.inside[j]
		c.Problem(p.path, p.prefix.String(), "overlaps "+q.prefix.String()+" of "+q.path, "give each tunnel addresses of its own")
	})
}

// outside finds inside addresses that take the way to the peer of a tunnel: what is encrypted for it would enter a tunnel again.
func (c *checker) outside() {
	type peer struct {
		addr   netip.Addr
		tunnel string
	}
	byAddr := func(a, b peer) int { return a.addr.Compare(b.addr) }
	var peers []peer
	for _, t := range c.s.Tunnels {
		if a := t.Outside().Addr(); a.IsValid() {
			peers = append(peers, peer{a, t.Name})
		}
	}
	slices.SortStableFunc(peers, byAddr)
	for _, q := range c.inside {
		if !c.spend(1) {
			return
		}
		i, _ := slices.BinarySearchFunc(peers, peer{addr: q.prefix.Masked().Addr()}, byAddr)
		for ; i < len(peers) && q.prefix.Contains(peers[i].addr) && c.spend(1); i++ {
			c.Problem(q.path, q.prefix.String(), fmt.Sprintf("holds %s, where the peer of tunnel %s is reached", peers[i].addr, peers[i].tunnel), "choose another block")
		}
	}
}

// otherEnd returns the other host address of a block of two or four addresses.
func otherEnd(p netip.Prefix) netip.Addr {
	first := p.Masked().Addr()
	if p.Addr().BitLen()-p.Bits() == 2 {
		first = first.Next()
	}
	if p.Addr() == first {
		return first.Next()
	}
	return first
}

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
		c.Problem(path, text, "is no identity", "give an IP address or a domain name")
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
			c.Problem(at, text, "is no proposal", "write it in strongSwan's notation, as "+strconv.Quote(def[0]))
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
	// charon finds the connection of an incoming IKE_SA by addresses and identities, and its key by identities.
	if c.gateways == nil {
		c.gateways = map[string]string{}
	}
	key := out.LocalIdentity + " " + out.RemoteIdentity
	if at, ok := c.gateways[key]; ok {
		c.Problem(path+".remoteAddress", a.String(), "has the same pair of identities as "+at, "one peer can hold one tunnel; give another address, or identities of their own to both")
	} else {
		c.gateways[key] = path
	}
	return out
}

func (c *checker) wireguard(path string, w *isthmusv1.WireGuard) *tunnel.WireGuard {
	out := &tunnel.WireGuard{
		PrivateKey: c.secret(path+".privateKey", w.GetPrivateKey()),
		ListenPort: uint16(c.Number(path+".listenPort", w.GetListenPort(), 0, 1, 65535)),
	}
	if w.GetPresharedKey() != "" {
		out.PresharedKey = c.secret(path+".presharedKey", w.GetPresharedKey())
	}
	if text := w.GetPeerPublicKey(); text == "" {
		c.Missing(path+".peerPublicKey", "give what `wg pubkey` or `isthmus secret set --generate wireguard` printed on the other side")
	} else if key, err := base64.StdEncoding.DecodeString(text); err != nil || len(key) != 32 {
		c.Problem(path+".peerPublicKey", text, "is no public key", "give 44 characters of base64, as `wg pubkey` prints")
	} else {
		copy(out.PeerPublicKey[:], key)
	}
	var keepalive time.Duration
	if text := w.GetEndpoint(); text != "" {
		ap, err := netip.ParseAddrPort(text)
		if err != nil || ap.Port() == 0 {
			c.Problem(path+".endpoint", text, "is no address with a port", `write it as "203.0.113.7:51820"`)
		} else if _, ok := c.Address(path+".endpoint", ap.Addr().String()); ok {
			out.Endpoint, keepalive = ap, 25*time.Second
		}
	}
	out.Keepalive = c.duration(path+".keepalive", w.GetKeepalive(), keepalive, time.Second, 65535*time.Second)
	if c.ports == nil {
		c.ports = map[uint16]string{500: "IKE", 4500: "IKE"}
	}
	switch at, taken := c.ports[out.ListenPort]; {
	case w.GetListenPort() == 0:
		c.Missing(path+".listenPort", "give a UDP port of this node, such as 51820")
	case taken && out.ListenPort != 0:
		c.Problem(path+".listenPort", strconv.Itoa(int(out.ListenPort)), "is the port of "+at, "give each tunnel a port of its own")
	default:
		c.ports[out.ListenPort] = path
	}
	return out
}

func (c *checker) tunnelRef(path, name string) (Tunnel, bool) {
	if name == "" {
		c.Missing(path, "give the name of a tunnel")
		return Tunnel{}, false
	}
	t, ok := c.tunnels[name]
	if !ok {
		c.Problem(path, name, "is no tunnel of this document", "give the name of one of `tunnels`")
	}
	return t, ok
}

func (c *checker) peer(path string, p *isthmusv1.Peer) {
	c.Name("peer", path+".name", p.GetName())
	t, known := c.tunnelRef(path+".tunnel", p.GetTunnel())
	preset, _ := cloud.Lookup(t.Cloud)
	ttl := uint32(0)
	if preset.TTL.Is > 1 {
		ttl = uint32(preset.TTL.Is)
	}
	out := Peer{path: path, EitherOpens: p.Passive == nil, Peer: bgp.Peer{
		Name:        p.GetName(),
		Tunnel:      p.GetTunnel(),
		ASN:         c.ASN(path+".asn", p.GetAsn()),
		HoldTime:    c.duration(path+".holdTime", p.GetHoldTime(), or(preset.HoldTime, 30*time.Second), 3*time.Second, 65535*time.Second),
		TTL:         uint8(c.Number(path+".ttl", p.GetTtl(), ttl, 1, 255)),
		Passive:     p.GetPassive(),
		MaxPrefixes: c.Number(path+".maxPrefixes", p.GetMaxPrefixes(), or(preset.MaxPrefixes, 1000), 1, 1_000_000),
		ASOverride:  p.GetAsOverride(),
		AllowOwnAS:  uint8(c.Number(path+".allowOwnAs", p.GetAllowOwnAs(), 0, 0, 10)),
	}}
	third := out.HoldTime / 3 / time.Second * time.Second
	out.Keepalive = c.duration(path+".keepalive", p.GetKeepalive(), min(third, or(preset.Keepalive, third)), time.Second, out.HoldTime/3)
	if !p.GetDisableGracefulRestart() {
		out.GracefulRestart = gracefulRestart
	}
	if c.s.Node.ASN != 0 && out.ASN == c.s.Node.ASN {
		c.Problem(path+".asn", strconv.FormatUint(uint64(out.ASN), 10), "is this node's own number", "sessions between nodes with one number (iBGP) are not supported; give each side its own")
	}
	if p.GetPassword() != "" {
		out.Password = c.secret(path+".password", p.GetPassword())
	}
	if text := p.GetAddress(); text != "" {
		out.Address, _ = c.Address(path+".address", text)
	} else if len(t.Inside) > 0 {
		out.Address = t.Inside[0].Remote
	}
	if text := p.GetLocalAddress(); text != "" {
		out.LocalAddress, _ = c.Address(path+".localAddress", text)
	}
	if known && out.Address.IsValid() {
		var inside *tunnel.Inside
		for i := range t.Inside {
			if t.Inside[i].Local.Addr().Is4() == out.Address.Is4() {
				inside = &t.Inside[i]
			}
		}
		switch {
		case inside == nil && len(t.Inside) > 0:
			c.Problem(path+".address", out.Address.String(), "is of a family that the tunnel has no inside address of", "give the tunnel a pair of that family")
		case inside != nil:
			if !out.LocalAddress.IsValid() && p.GetLocalAddress() == "" {
				out.LocalAddress = inside.Local.Addr()
			} else if out.LocalAddress.IsValid() && out.LocalAddress != inside.Local.Addr() {
				c.Problem(path+".localAddress", out.LocalAddress.String(), "is not this node's inside address of the tunnel, "+inside.Local.Addr().String(), "leave it out")
			}
			if out.TTL == 0 && out.Address == inside.Remote {
				out.TTL = 1
			} else if out.TTL == 0 {
				out.TTL = 2
			}
			if out.Address == inside.Local.Addr() {
				c.Problem(path+".address", out.Address.String(), "is this node's own address", "give the address of the peer")
			}
		}
	}
	if out.Address.IsValid() {
		if c.peerings == nil {
			c.peerings = map[netip.Addr]string{}
		}
		if at, ok := c.peerings[out.Address]; ok {
			c.Problem(path+".address", out.Address.String(), "is the address of "+at+" too", "one session for one address")
		}
		c.peerings[out.Address] = path
	}
	c.cloudPeer(path, p, out, preset)
	out.Import = bgp.Import{
		Allow:           c.rules(path+".import.allow", p.GetImport().GetAllow()),
		LocalPreference: 100,
	}
	if v := p.GetImport().GetLocalPreference(); v != 0 {
		out.Import.LocalPreference = v
	}
	out.Export = bgp.Export{
		Allow:       c.rules(path+".export.allow", p.GetExport().GetAllow()),
		Prepend:     uint8(c.Number(path+".export.prepend", p.GetExport().GetPrepend(), 0, 0, 10)),
		MaxPrefixes: c.Number(path+".export.maxPrefixes", p.GetExport().GetMaxPrefixes(), preset.ExportLimit.Is, 1, 1_000_000),
	}
	if v := preset.MostAnnounced; v.Why != "" && out.Export.MaxPrefixes > v.Is {
		c.Problem(path+".export.maxPrefixes", strconv.FormatUint(uint64(out.Export.MaxPrefixes), 10), fmt.Sprintf("is more than %s's gateway takes: %s", preset.Name, v.Why), fmt.Sprintf("give less than %d, or leave it out", v.Is))
	}
	if e := p.GetExport(); e != nil && e.Med != nil {
		med := e.GetMed()
		out.Export.MED = &med
	}
	c.s.Peers = append(c.s.Peers, out)
}

// gracefulRestart is the restart time that peers are asked to wait: a restart of the daemon takes about a second and
// one of the machine about a minute.
const gracefulRestart = 120 * time.Second

func (c *checker) rules(path string, list []*isthmusv1.PrefixRule) []bgp.Rule {
	var out []bgp.Rule
	for i, r := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		if r.GetPrefix() == "" {
			c.Missing(at+".prefix", "give the enclosing prefix")
			continue
		}
		p, ok := c.Prefix(at+".prefix", r.GetPrefix())
		if !ok {
			continue
		}
		bits, most := uint32(p.Bits()), uint32(p.Addr().BitLen())
		low, high := bits, bits
		if r.GetGe() != 0 {
			low = c.Number(at+".ge", r.GetGe(), bits, bits, most)
			high = low
		}
		if r.GetLe() != 0 {
			high = c.Number(at+".le", r.GetLe(), high, low, most)
		}
		out = append(out, bgp.Rule{Prefix: p, Min: uint8(low), Max: uint8(high)})
	}
	return out
}

func (c *checker) route(path string, r *isthmusv1.StaticRoute) {
	if r.GetPrefix() == "" {
		c.Missing(path+".prefix", "give the destination")
		return
	}
	p, ok := c.Prefix(path+".prefix", r.GetPrefix())
	if !ok {
		return
	}
	if c.dests == nil {
		c.dests = map[netip.Prefix]string{}
	}
	if at, ok := c.dests[p]; ok {
		c.Problem(path+".prefix", p.String(), "is the destination of "+at+" too", "write one route with both tunnels")
	}
	c.dests[p] = path
	c.routable(path+".prefix", p)
	switch {
	case r.GetBlackhole() && len(r.GetTunnels()) > 0:
		c.Problem(path+".blackhole", "true", "excludes `tunnels`", "keep one of them")
	case !r.GetBlackhole() && len(r.GetTunnels()) == 0:
		c.Missing(path+".tunnels", "name the tunnels to use, or say `blackhole: true`")
	}
	for i, name := range r.GetTunnels() {
		at := fmt.Sprintf("%s.tunnels[%d]", path, i)
		if !c.spend(i) {
			return
		}
		c.tunnelRef(at, name)
		if slices.Contains(r.GetTunnels()[:i], name) {
			c.Problem(at, name, "is named twice", "keep one of them")
		}
	}
	c.s.Routes = append(c.s.Routes, StaticRoute{Prefix: p, Tunnels: r.GetTunnels(), Blackhole: r.GetBlackhole()})
}

func (c *checker) pool(path string, p *isthmusv1.Pool) {
	c.Name("pool", path+".name", p.GetName())
	out := nat.Pool{Name: p.GetName()}
	switch p.GetExhausted() {
	case "", "reject":
	case "drop":
		out.Silent = true
	default:
		c.Problem(path+".exhausted", p.GetExhausted(), "is nothing that can become of a flow", `give "reject" or "drop", or leave it out`)
	}
	if len(p.GetAddresses()) == 0 {
		c.Missing(path+".addresses", "give at least one address")
	}
	for i, a := range p.GetAddresses() {
		at := fmt.Sprintf("%s.addresses[%d]", path, i)
		if a.GetAddress() == "" {
			c.Missing(at+".address", "give an address of the underlay interface")
			continue
		}
		addr, ok := c.Address(at+".address", a.GetAddress())
		if !ok {
			continue
		}
		if c.sources == nil {
			c.sources, c.publics = map[netip.Addr]string{}, map[netip.Addr]string{}
		}
		if other, ok := c.sources[addr]; ok {
			c.Problem(at+".address", addr.String(), "is the address of "+other+" too", "an address belongs to one pool")
		}
		if in, ok := c.insideOf(addr); ok {
			c.Problem(at+".address", addr.String(), "is an inside address, of "+in.path, "give an address that partners can answer to")
		}
		if addr.IsLinkLocalUnicast() {
			c.Problem(at+".address", addr.String(), "is link-local, which no router forwards", "give an address that partners can answer to")
		}
		public := addr
		if a.GetPublicAddress() == Auto {
			public, _ = c.autoPublic(at+".publicAddress", addr)
		} else if a.GetPublicAddress() != "" {
			public, _ = c.Address(at+".publicAddress", a.GetPublicAddress())
			if public.IsValid() && public.Is4() != addr.Is4() {
				c.Problem(at+".publicAddress", public.String(), "is of another address family than address", "give both in the same family")
			}
		}
		other, twice := c.publics[public]
		if u := c.s.Underlay; !twice && public == u.PublicAddress && addr != u.Address {
			other, twice = "underlay", true
		}
		if _, same := c.sources[addr]; twice && public.IsValid() && !same {
			c.Problem(at+".publicAddress", public.String(), "is the public address of "+other+" too", "the platform translates one to one, and who had a port of it could not be told: give each its own")
		}
		c.sources[addr], c.publics[public] = at, at
		if z := a.GetZone(); z != "" && !c.zoneList[z] {
			c.Problem(at+".zone", z, "is no zone of this document", "give the name of one of `egress.zones`")
		}
		weight := c.Number(at+".weight", a.GetWeight(), 1, 1, 100)
		out.Addresses = append(out.Addresses, nat.PoolAddress{Address: addr, Public: public, Zone: a.GetZone(), Weight: weight})
	}
	if p.GetBlocks() != nil {
		out.Blocks = c.blocks(path+".blocks", p.GetBlocks(), out)
	}
	c.s.Pools = append(c.s.Pools, out)
	c.health(path, p, out)
}

func (c *checker) policy(path string, p *isthmusv1.EgressPolicy) {
	c.Name("policy", path+".name", p.GetName())
	c.paths = append(c.paths, path)
	out := nat.Policy{Name: p.GetName(), Action: nat.Action(p.GetAction()), Protocol: p.GetProtocol(), Pool: p.GetPool()}
	if out.Action == "" {
		out.Action = nat.SNAT
	}
	list := func(field string, texts []string) (prefixes []netip.Prefix) {
		listed := make(map[netip.Prefix]bool, len(texts))
		for i, text := range texts {
			at := fmt.Sprintf("%s.%s[%d]", path, field, i)
			if pfx, ok := c.Prefix(at, text); ok {
				if listed[pfx] {
					c.Problem(at, text, "is listed twice", "keep one of them")
					continue
				}
				listed[pfx] = true
				prefixes = append(prefixes, pfx)
			}
		}
		return prefixes
	}
	if len(p.GetSources()) == 0 {
		c.Missing(path+".sources", "give the prefixes of those for whom it is")
	}
	out.Sources = list("sources", p.GetSources())
	out.Destinations = list("destinations", p.GetDestinations())
	out.Names = c.domains(path+".names", p.GetNames())
	if _, known := nat.PolicyProtocol(out.Protocol, false); !known {
		c.Problem(path+".protocol", out.Protocol, "is no protocol that policies know", `give "tcp", "udp" or "icmp", or leave it out`)
	}
	var places []int // of the ranges, in the list
	for i, text := range p.GetPorts() {
		at := fmt.Sprintf("%s.ports[%d]", path, i)
		first, last, ranged := strings.Cut(text, "-")
		if !ranged {
			last = first
		}
		a, errA := strconv.ParseUint(first, 10, 16)
		b, errB := strconv.ParseUint(last, 10, 16)
		if errA != nil || errB != nil || a == 0 || a > b {
			c.Problem(at, text, "is no port or range of ports", `write it as "443" or "8000-8099"`)
			continue
		}
		r := nat.PortRange{First: uint16(a), Last: uint16(b)}
		out.Ports, places = append(out.Ports, r), append(places, i)
	}
	for _, i := range portOverlaps(out.Ports) {
		c.Problem(fmt.Sprintf("%s.ports[%d]", path, places[i]), p.GetPorts()[places[i]], "overlaps another range of the list", "write each port once")
	}
	if len(out.Ports) > 0 && !nat.TakesPorts(out.Protocol) {
		c.Problem(path+".ports", strings.Join(p.GetPorts()[:min(len(p.GetPorts()), maxShown)], ","), "needs a protocol with ports", `set protocol to "tcp" or "udp"`)
	}
	c.action(path, p, &out)
	c.s.Policies = append(c.s.Policies, out)
}
