package spec

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// maxSources is how many prefixes a list of sources, or of routes behind an attachment, may have.
const maxSources = 1000

// sourceList checks a list of prefixes that may be sources.
func (c *checker) sourceList(path string, texts []string) (out []netip.Prefix) {
	if len(texts) > maxSources {
		c.Problem(path, strconv.Itoa(len(texts)), fmt.Sprintf("are more than %d prefixes", maxSources), "give shorter prefixes that cover them")
		return nil
	}
	had := map[netip.Prefix]bool{}
	for i, text := range texts {
		at := fmt.Sprintf("%s[%d]", path, i)
		p, ok := c.Prefix(at, text)
		switch {
		case !ok:
		case had[p]:
			c.Problem(at, text, "is given twice", "keep one of them")
		default:
			had[p] = true
			out = append(out, p)
		}
	}
	return out
}

// Sources checks a list of prefixes that may be sources, as one of a document. path names the list in problems.
func Sources(path string, texts []string) ([]netip.Prefix, Problems) {
	var c checker
	return c.sourceList(path, texts), c.Problems()
}

// AccessOf returns who may reach a node by a document that may be wrong, as far as it can be read.
func AccessOf(m *isthmusv1.Spec) Access {
	var c checker
	c.access(m.GetAccess())
	return c.s.Access
}

func (c *checker) access(a *isthmusv1.Access) {
	c.s.Access.API, c.s.Access.SSH = c.sourceList("access.api", a.GetApi()), c.sourceList("access.ssh", a.GetSsh())
	c.s.Access.SSHKeys = c.sshKeys("access.sshKeys", a.GetSshKeys())
	if len(a.GetSshKeys()) > 0 && len(a.GetSsh()) == 0 {
		c.Missing("access.ssh", "name the prefixes from which these keys log in, such as 198.51.100.0/28")
	}
	switch a.GetInput() {
	case "", "drop", "keep":
		c.s.Access.Input = a.GetInput()
	default:
		c.Problem("access.input", a.GetInput(), "is nothing that can become of packets", `give "drop" or "keep", or leave it out`)
	}
}

// attachment checks a plain interface that leads to a network.
func (c *checker) attachment(path string, a *isthmusv1.Attachment) {
	out := Attachment{Name: a.GetName(), Interface: a.GetInterface(), path: path}
	c.Name("tunnel", path+".name", a.GetName())
	switch {
	case out.Interface == "":
		c.Missing(path+".interface", "give the name of the interface; `ip link` shows the names")
	case !interfaceRule.MatchString(out.Interface) || out.Interface == "." || out.Interface == ".." || out.Interface == "lo":
		c.Problem(path+".interface", out.Interface, "is no name of an interface that leads to a network", "`ip link` shows the names")
	}
	if c.attached == nil {
		c.attached = map[string]string{}
	}
	underlay := out.Interface == c.s.Underlay.Interface
	if at, ok := c.attached[out.Interface]; ok && !underlay {
		c.Problem(path+".interface", out.Interface, "is the interface of "+at+" too", "write one attachment with the sources and routes of both")
	}
	c.attached[out.Interface] = path
	out.Sources = c.sourceList(path+".sources", a.GetSources())
	if len(a.GetRoutes()) > maxSources {
		c.Problem(path+".routes", strconv.Itoa(len(a.GetRoutes())), fmt.Sprintf("are more than %d routes", maxSources), "give shorter prefixes that cover them")
		return
	}
	for i, r := range a.GetRoutes() {
		at := fmt.Sprintf("%s.routes[%d]", path, i)
		if r.GetPrefix() == "" {
			c.Missing(at+".prefix", "give the destination")
			continue
		}
		p, ok := c.Prefix(at+".prefix", r.GetPrefix())
		if !ok {
			continue
		}
		if c.dests == nil {
			c.dests = map[netip.Prefix]string{}
		}
		if other, ok := c.dests[p]; ok {
			c.Problem(at+".prefix", p.String(), "is the destination of "+other+" too", "keep one of them")
		}
		c.dests[p] = at
		c.routable(at+".prefix", p)
		route := AttachmentRoute{Prefix: p}
		if r.GetVia() != "" {
			if via, ok := c.Address(at+".via", r.GetVia()); ok {
				if via.Is4() != p.Addr().Is4() {
					c.Problem(at+".via", via.String(), "is of another address family than prefix", "give both in the same family")
				}
				if p.Contains(via) && !p.IsSingleIP() && p.Bits() > 0 {
					c.Problem(at+".via", via.String(), "is in the prefix that it is to lead to", "give a router on the network of the interface")
				}
				route.Via = via
			}
		}
		out.Routes = append(out.Routes, route)
	}
	if len(a.GetSources()) == 0 {
		for _, r := range out.Routes {
			out.Sources = append(out.Sources, r.Prefix)
		}
	}
	if len(a.GetSources())+len(a.GetRoutes()) == 0 {
		c.Missing(path+".sources", "give the prefixes of the network behind the interface, such as 10.50.0.0/24; nothing else may come from there")
	}
	for i, p := range out.Sources {
		least := 8
		if p.Addr().Is6() {
			least = 16
		}
		if underlay && p.Bits() < least {
			c.Problem(fmt.Sprintf("%s.sources[%d]", path, i), p.String(), "would make the Internet behind the underlay an inside network", fmt.Sprintf("give the prefixes of the network itself, /%d or longer", least))
		}
	}
	c.s.Attachments = append(c.s.Attachments, out)
}

// Unroutable are the prefixes that no route may lead to: this network, loopback, link-local, multicast and reserved addresses.
//
// Sources: RFC 1122 section 3.2.1.3, RFC 3927, RFC 1112, RFC 4291.
var Unroutable = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("::/128"), netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// routable refuses a destination that the node or its platform needs.
func (c *checker) routable(path string, p netip.Prefix) {
	if p.Bits() == 0 {
		return
	}
	for _, u := range Unroutable {
		if u.Bits() <= p.Bits() && u.Contains(p.Addr()) {
			c.Problem(path, p.String(), "is in "+u.String()+", which no router forwards", "remove the route")
			return
		}
	}
	for _, u := range nat.Platform {
		if u.IsSingleIP() && p.Contains(u.Addr()) && p.Bits() > 8 {
			c.Problem(path, p.String(), "takes "+u.Addr().String()+", at which the cloud's platform serves this node", "give prefixes without it")
			return
		}
	}
}

// notPlatform refuses an address at which the cloud serves this node as something that others are led to.
func (c *checker) notPlatform(path, text string, a netip.Addr) {
	if nat.PlatformOf(a).IsValid() {
		c.Problem(path, text, "is an address at which the cloud's platform serves this node", "give the address of a server of yours")
	}
}

// Notes returns what is not wrong with a document, and what its sides drop or let in that its writer may not expect.
func (s *Spec) Notes() (out Problems) {
	note := func(path, value, rule, remedy string) {
		out = append(out, Problem{Path: path, Value: value, Rule: rule, Remedy: remedy, Line: s.Line(path)})
	}
	if len(s.Access.API) == 0 {
		note("access.api", "", "is not given: no other machine reaches the API, but for sources that the daemon was started with",
			"name the prefixes of your operators, such as `access: {api: [198.51.100.0/28]}`")
	}
	for i, t := range s.Tunnels {
		routed := slices.ContainsFunc(s.Routes, func(r StaticRoute) bool { return slices.Contains(r.Tunnels, t.Name) }) ||
			slices.ContainsFunc(s.Maps, func(m PrefixMap) bool { return slices.Contains(m.Tunnels, t.Name) })
		accepts := slices.ContainsFunc(s.Peers, func(p Peer) bool { return p.Tunnel == t.Name && len(p.Import.Allow) > 0 })
		if len(t.Sources) == 0 && !routed && !accepts {
			note(fmt.Sprintf("tunnels[%d].sources", i), t.Name, "lets in nothing but what its peer sends itself, since neither a peer's import nor a static route names a prefix behind it",
				"give `sources`, such as [172.16.0.0/16]")
		}
	}
	for _, p := range s.Peers {
		for j, r := range p.Import.Allow {
			if !withholds(r) {
				continue
			}
			at := fmt.Sprintf("%s.import.allow[%d]", p.Path(), j)
			note(at, r.String(), "also allows what is never installed: addresses of the node, its underlay, the cloud's platform, and "+Unroutable[0].String()+", 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3 or their like",
				"allow the prefixes of the spoke alone")
		}
	}
	return out
}

// withholds says whether a rule of an import allows routes into prefixes that no route may lead to.
func withholds(r bgp.Rule) bool {
	return slices.ContainsFunc(Unroutable, func(u netip.Prefix) bool { return u.Overlaps(r.Prefix) && int(r.Max) >= u.Bits() })
}
