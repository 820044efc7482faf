package importer

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// nothing notes that a file has no object of a kind.
func (r *Result) nothing(d document, what string) {
	if d.from != "" && d.from != r.Cloud {
		r.note(d, nil, "is a file of another cloud; use isthmus cloud import %s", d.from)
		return
	}
	what, step, _ := strings.Cut(what, ";")
	if step != "" {
		step = ";" + step
	}
	r.missing(d, nil, "has no %s in it%s", what, step)
}

// maxObjects bounds the objects that refer to each other, because each is searched for in all of
// them. A project has some hundred.
const maxObjects = 2000

// maxInstances bounds the instances of a gateway: Azure has at most three, Google two.
const maxInstances = 16

// few returns the first elements of a list.
func few(list []*node, most int) []*node { return list[:min(len(list), most)] }

// room reports whether there is room for another object, and notes once that there is not.
func (r *Result) room(d document) bool {
	if r.objects++; r.objects == maxObjects+1 {
		r.note(d, d.node, "is object %d; the others are left out, so give the files in parts", r.objects)
	}
	return r.objects <= maxObjects
}

// missing notes that something is not among the files, and what they have besides.
func (r *Result) missing(d document, at *node, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if r.unread != "" {
		text += " (the files also have " + r.unread + ", which are not read)"
	}
	r.note(d, at, "%s", text)
}

func (r *Result) note(d document, at *node, format string, args ...any) {
	if len(r.Notes) >= maxNotes {
		if len(r.Notes) == maxNotes {
			r.Notes = append(r.Notes, "and more")
		}
		return
	}
	where := d.file
	if at != nil && at.line > 0 {
		where += ":" + strconv.Itoa(at.line)
	}
	r.Notes = append(r.Notes, printable(where+": "+fmt.Sprintf(format, args...)))
}

// add adds a tunnel under a free name, and returns the name. A duplicate is omitted and noted.
func (r *Result) add(d document, at *node, t Tunnel) (name string, added bool) {
	if r.names == nil {
		r.names, r.ends = map[string]bool{}, map[[2]netip.Addr]string{}
	}
	ends := [2]netip.Addr{t.RouterPublic.Is, t.Remote.Is}
	if other, ok := r.ends[ends]; ok {
		r.note(d, at, "%s leads from the same node to the same gateway, %s, as %s; left out", t.Name, t.Remote.Is, other)
		return "", false
	}
	base := t.Name
	for i := 2; r.names[t.Name]; i++ {
		t.Name = fit(base, fmt.Sprintf("-%d", i))
	}
	r.names[t.Name], r.ends[ends] = true, t.Name
	r.Tunnels = append(r.Tunnels, t)
	return t.Name, true
}

// route adds a static route, or adds tunnels to the existing one for the prefix.
func (r *Result) route(p Value[netip.Prefix], tunnels []string) {
	i := slices.IndexFunc(r.Routes, func(o Route) bool { return o.Prefix.Is == p.Is })
	if i < 0 {
		i = len(r.Routes)
		r.Routes = append(r.Routes, Route{Prefix: p})
	}
	r.Routes[i].Tunnels = slices.Sorted(slices.Values(append(r.Routes[i].Tunnels, tunnels...)))
}

// Routers returns the public addresses of the nodes that the tunnels are for.
func (r *Result) Routers() (out []netip.Addr) {
	for _, t := range r.Tunnels {
		if a := t.RouterPublic; a.known() && !slices.Contains(out, a.Is) {
			out = append(out, a.Is)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// Only keeps the tunnels for one node.
func (r *Result) Only(public netip.Addr) {
	r.Tunnels = slices.DeleteFunc(r.Tunnels, func(t Tunnel) bool { return t.RouterPublic.Is != public })
	var routes []Route
	for _, route := range r.Routes {
		route.Tunnels = slices.DeleteFunc(slices.Clone(route.Tunnels), func(name string) bool {
			return !slices.ContainsFunc(r.Tunnels, func(t Tunnel) bool { return t.Name == name })
		})
		if len(route.Tunnels) > 0 {
			routes = append(routes, route)
		}
	}
	r.Routes = routes
}

var notInNames = regexp.MustCompile(`[^a-z0-9]+`)

// nameOf makes the name of a document's object from the cloud's names.
func nameOf(parts ...string) string {
	s := strings.Trim(notInNames.ReplaceAllString(strings.ToLower(strings.Join(parts, "-")), "-"), "-")
	if s == "" {
		return "tunnel"
	}
	return fit(s, "")
}

// fit cuts a name so that it has at most 63 characters with its suffix.
func fit(name, suffix string) string {
	return strings.TrimRight(name[:min(len(name), 63-len(suffix))], "-") + suffix
}

func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// address parses an address; an invalid one is noted.
func (r *Result) address(d document, n *node, what string) (a Value[netip.Addr]) {
	text := n.string()
	if text == "" {
		return a
	}
	v, err := netip.ParseAddr(text)
	if err != nil || v.Zone() != "" {
		r.note(d, n, "%s: %q is not an address", what, short(text))
		return a
	}
	return Value[netip.Addr]{v, what}
}

// asn parses an autonomous system number.
func (r *Result) asn(d document, n *node, what string) (a Value[uint32]) {
	text := n.string()
	if text == "" {
		return a
	}
	v, err := strconv.ParseUint(text, 10, 32)
	if err != nil || v == 0 {
		r.note(d, n, "%s: %q is not an AS number", what, short(text))
		return a
	}
	return Value[uint32]{uint32(v), what}
}

// seconds parses a number of seconds from 1 to a year; 0 is Terraform's form of unset.
func (r *Result) seconds(d document, n *node, what string) (v Value[time.Duration]) {
	text := n.string()
	if text == "" || text == "0" {
		return v
	}
	s, err := strconv.ParseUint(text, 10, 32)
	if err != nil || s > 365*86400 {
		r.note(d, n, "%s: %q is not a number of seconds", what, short(text))
		return v
	}
	return Value[time.Duration]{time.Duration(s) * time.Second, what}
}

// short bounds a text of unknown length.
func short(s string) string {
	if len(s) > 40 {
		return s[:40] + "..."
	}
	return s
}

// earlier returns a lifetime for this node that is shorter than the gateway's, if the preset's is
// not.
func (r *Result) earlier(d document, at *node, theirs Value[time.Duration], preset, least time.Duration) (v Value[time.Duration]) {
	if !theirs.known() || theirs.Is > preset {
		return v
	}
	ours := (theirs.Is - time.Minute).Truncate(time.Minute)
	if ours < least {
		r.note(d, at, "%s: the gateway renews after %v, which is sooner than this node can, %v", theirs.From, theirs.Is, least)
		ours = least
	}
	return Value[time.Duration]{ours, "before the gateway's " + theirs.Is.String() + ", " + theirs.From}
}
