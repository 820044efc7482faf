package topology

import (
	"fmt"
	"slices"
	"strings"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// keys sets the source of each key.
func (c *checker) keys(given []*isthmusv1.KeySource) {
	var all []string
	for _, tu := range c.t.Tunnels {
		if tu.Key != "" && !slices.Contains(all, tu.Key) {
			all = append(all, tu.Key)
		}
	}
	slices.Sort(all)
	sources := map[string]Key{}
	for i, k := range given {
		at := fmt.Sprintf("keys[%d]", i)
		if _, twice := sources[k.GetName()]; twice {
			c.Problem(at+".name", k.GetName(), "is given twice", "keep one of them")
		}
		switch {
		case k.GetName() == "":
			c.Missing(at+".name", "the topology has "+strings.Join(all, ", "))
		case !slices.Contains(all, k.GetName()):
			c.Problem(at+".name", k.GetName(), "is not a key of this topology", "the topology has "+strings.Join(all, ", "))
		}
		switch {
		case k.GetEnvironment() != "" && k.GetFile() != "":
			c.Problem(at+".file", k.GetFile(), "conflicts with `environment`", "keep one of them")
		case k.GetEnvironment() == "" && k.GetFile() == "":
			c.Missing(at+".environment", "give it or `file`, or leave the whole entry out")
		case k.GetEnvironment() != "" && !variable.MatchString(k.GetEnvironment()):
			// The text may be the key itself by mistake, so do not repeat it.
			c.Problem(at+".environment", "", "is not a valid name of a variable", "give its name, as PSK_AWS_0, not its value")
		case k.GetFile() != "" && !fileName.MatchString(k.GetFile()):
			c.Problem(at+".file", "", "has characters that are not written into commands here", "take letters, digits, and ._/@+-")
		}
		sources[k.GetName()] = Key{Name: k.GetName(), Environment: k.GetEnvironment(), File: k.GetFile()}
	}
	taken := map[string]string{}
	for _, name := range all {
		k := sources[name]
		k.Name = name
		if k.Environment == "" {
			k.Environment = "PSK_" + upper(name)
		}
		if other, ok := taken[k.Environment]; ok {
			c.Problem("keys", k.Environment, fmt.Sprintf("holds the keys of both %s and %s", other, name), "a key of its own for each keeps one that is lost from opening the other")
		}
		taken[k.Environment] = name
		c.t.Keys = append(c.t.Keys, k)
	}
}
