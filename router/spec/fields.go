package spec

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Fields collects the problems of a document's fields. Its methods take the path and the text of a
// field, and return its value.
type Fields struct {
	problems collector
	lines    Lines
	unread   map[string]bool              // paths that were not decoded; "": the whole text
	names    map[string]map[string]string // kind -> name -> path
}

// NewFields returns the Fields of a decoded message.
func NewFields(lines Lines, problems Problems) *Fields {
	f := &Fields{lines: lines, unread: problems.paths()}
	f.take(problems)
	return f
}

// take adds problems that were found before.
func (f *Fields) take(problems Problems) {
	for _, p := range problems {
		f.problems.more += p.More
		if p.More == 0 {
			f.problems.add(p)
		}
	}
}

// Problems returns the problems in the order of lines: at most MaxProblems, and one that counts the
// others.
func (f *Fields) Problems() Problems { return f.problems.problems() }

// Problem records a problem on the line of its field. It ignores fields that could not be decoded,
// and those within them: they already have a problem, and only seem to be missing.
func (f *Fields) Problem(path, value, rule, remedy string) {
	if f.lost(path) {
		return
	}
	f.problems.add(Problem{Path: path, Value: value, Rule: rule, Remedy: remedy, Line: f.lines.line(path)})
}

// lost reports whether a value, or one that contains it, could not be decoded.
func (f *Fields) lost(path string) bool {
	for at := path; at != ""; at = parent(at) {
		if f.unread[at] {
			return true
		}
	}
	return f.unread[""]
}

// within reports whether a path is that of a value, or of a part of it.
func within(path, value string) bool {
	rest, is := strings.CutPrefix(path, value)
	return is && (rest == "" || rest[0] == '.' || rest[0] == '[')
}

// faulty reports whether a value, or a part of it, could not be decoded or has a problem. Checks
// that depend on all of it would only report consequences of that.
func (f *Fields) faulty(value string) bool {
	if f.lost(value) || slices.ContainsFunc(f.problems.found, func(p Problem) bool { return within(p.Path, value) }) {
		return true
	}
	for p := range f.unread {
		if within(p, value) {
			return true
		}
	}
	return false
}

var itemName = regexp.MustCompile(`^\[\d+\](\.name)?$`)

// unnamed reports whether the name of an item of a list could not be decoded.
func (f *Fields) unnamed(list string) bool {
	for p := range f.unread {
		if rest, is := strings.CutPrefix(p, list); is && itemName.MatchString(rest) {
			return true
		}
	}
	return f.lost(list)
}

// Reference records that a field names something that a list of the document does not have, unless
// not all of its names are known.
func (f *Fields) Reference(path, name, list, what string) {
	if !f.unnamed(list) {
		f.Problem(path, name, "is not a "+what+" of this document", "give the name of one of `"+list+"`")
	}
}

// line returns the line of a field, or of the nearest enclosing one of the text; 0: none.
func (l Lines) line(path string) int {
	for at := path; at != ""; at = parent(at) {
		if line, ok := l[at]; ok {
			return line
		}
	}
	return 0
}

// outside returns the lines without those of the items of a list.
func (l Lines) outside(list string) Lines {
	out := Lines{}
	for path, line := range l {
		if !strings.HasPrefix(path, list+"[") {
			out[path] = line
		}
	}
	return out
}

func parent(path string) string {
	return path[:max(0, strings.LastIndexAny(path, ".["))]
}

// Missing records that a required field is missing.
func (f *Fields) Missing(path, remedy string) {
	f.Problem(path, "", "is required", remedy)
}

var nameRule = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// Name checks a name, which must be unique within its kind.
func (f *Fields) Name(kind, path, name string) bool {
	switch {
	case name == "":
		f.Missing(path, "give the "+kind+" a name")
		return false
	case !nameRule.MatchString(name):
		f.Problem(path, name, "is not a valid name", "take 1 to 63 lower case letters, digits and hyphens, with a letter or digit at both ends")
		return false
	}
	if f.names == nil {
		f.names = map[string]map[string]string{}
	}
	if f.names[kind] == nil {
		f.names[kind] = map[string]string{}
	}
	if at, ok := f.names[kind][name]; ok {
		f.Problem(path, name, "is the name of "+at+" too", "choose another")
		return false
	}
	f.names[kind][name] = path
	return true
}

// Address reads the address of a host.
func (f *Fields) Address(path, text string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(text)
	switch {
	case err != nil || a.Zone() != "" || a.Is4In6():
		f.Problem(path, text, "is not an IP address", `write it as "203.0.113.7" or "2001:db8::7"`)
	case a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		f.Problem(path, text, "is not a unicast address of a host", "give the address of an interface")
	default:
		return a, true
	}
	return netip.Addr{}, false
}

// Prefix reads a unicast prefix without host bits.
func (f *Fields) Prefix(path, text string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil || p.Addr().Is4In6():
		f.Problem(path, text, "is not a valid prefix", `write it as "10.0.0.0/8" or "2001:db8::/32"`)
	case p != p.Masked():
		f.Problem(path, text, "has host bits set", "write "+p.Masked().String())
	case p.Addr().IsMulticast():
		f.Problem(path, text, "is a multicast prefix", "give a unicast prefix")
	default:
		return p, true
	}
	return netip.Prefix{}, false
}

// Number returns a number between min and max, or the default when it is zero, which means not
// given.
func (f *Fields) Number(path string, v, def, min, max uint32) uint32 {
	if v == 0 {
		return def
	}
	if v < min || v > max {
		f.Problem(path, strconv.FormatUint(uint64(v), 10), fmt.Sprintf("is not from %d to %d", min, max), "choose one in this range")
		return def
	}
	return v
}

// ASN checks the number of an autonomous system, which is required (RFC 6793).
func (f *Fields) ASN(path string, v uint32) uint32 {
	switch v {
	case 0:
		f.Missing(path, "give the number of the autonomous system, such as 64620")
	case 23456, 65535, 4294967295:
		f.Problem(path, strconv.FormatUint(uint64(v), 10), "is a reserved AS number (RFC 7607, RFC 6793, RFC 7300)", "choose another, such as 64620")
	}
	return v
}
