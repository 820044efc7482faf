package spec

import (
	"fmt"
	"strconv"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// attachment checks a plain interface that leads to a network.
func (c *checker) attachment(path string, a *isthmusv1.Attachment) {
	out := Attachment{Name: a.GetName(), Interface: a.GetInterface(), path: path}
	c.Name("tunnel", path+".name", a.GetName())
	switch {
	case out.Interface == "":
		c.Missing(path+".interface", "give the name of the interface; `ip link` shows the names")
	case !interfaceRule.MatchString(out.Interface) || out.Interface == "." || out.Interface == ".." || out.Interface == "lo":
		c.Problem(path+".interface", out.Interface, "is not the name of an interface that leads to a network", "`ip link` shows the names")
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
					c.Problem(at+".via", via.String(), "is in the prefix that it leads to", "give a router on the network of the interface")
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
