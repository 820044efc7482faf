package spec

import (
	"fmt"
	"net/netip"
	"strconv"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// maxSources bounds a list of sources, and the routes of an attachment.
const maxSources = 1000

// sourceList checks a list of source prefixes.
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

// Sources checks a list of source prefixes like one of a document. path names the list in problems.
func Sources(path string, texts []string) ([]netip.Prefix, Problems) {
	c := newChecker(Document{}, nil)
	return c.sourceList(path, texts), c.Problems()
}

// AccessOf returns the valid parts of access of a document that may have problems.
func AccessOf(m *isthmusv1.Spec) Access {
	c := newChecker(Document{}, nil)
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
		c.Problem("access.input", a.GetInput(), "is not a valid value", `give "drop" or "keep", or leave it out`)
	}
}
