package importer

import (
	"regexp"
	"slices"
	"strings"
)

// azureObjects are the objects in Azure's files. A side is a local network gateway, or a link of a
// VPN site: this node.
type azureObjects struct {
	gateways, connections, hubConnections, sides []document
}

func called(n *node) string {
	if name := n.string("name"); name != "" {
		return printable(name)
	}
	if id := n.string("id"); id != "" {
		return lastOf(id)
	}
	return "one without a name"
}

func lastOf(id string) string { return printable(id[strings.LastIndexByte(id, '/')+1:]) }

// find returns the object with an id, or the only one if there is just one. Objects in a template
// have no ids.
func find(all []document, id string) (document, bool) {
	i := slices.IndexFunc(all, func(d document) bool {
		own := d.string("id")
		return id != "" && (strings.EqualFold(own, id) || own == "" && strings.EqualFold(d.string("name"), lastOf(id)))
	})
	if i < 0 && id == "" && len(all) == 1 {
		i = 0
	}
	if i < 0 {
		return document{}, false
	}
	return all[i], true
}

// In the texts of a template, [in brackets] is an expression.
var (
	reference = regexp.MustCompile(`(parameters|variables)\('([^']*)'\)`)
	literal   = regexp.MustCompile(`'([^']*)'`)
)

// evaluate replaces a template's expressions by their values, as far as an export uses them:
// parameters with default values, and the ids of other resources. Other expressions stay.
func evaluate(template *node) {
	value := func(kind, name string) string {
		v := template.get(kind, name)
		if kind == "parameters" {
			v = v.get("defaultValue")
		}
		return v.string()
	}
	template.get("resources").walk(func(n *node) bool {
		if !strings.HasPrefix(n.text, "[") || !strings.HasSuffix(n.text, "]") || strings.HasPrefix(n.text, "[[") {
			return true
		}
		known := true
		expression := reference.ReplaceAllStringFunc(n.text[1:len(n.text)-1], func(s string) string {
			m := reference.FindStringSubmatch(s)
			v := value(m[1], m[2])
			known = known && v != ""
			return "'" + v + "'"
		})
		var parts []string
		for _, m := range literal.FindAllStringSubmatch(expression, -1) {
			parts = append(parts, m[1])
		}
		switch {
		case !known:
		case strings.HasPrefix(expression, "resourceId("):
			n.text = strings.Join(parts, "/")
		case strings.HasPrefix(expression, "concat("):
			n.text = strings.Join(parts, "")
		case len(parts) == 1 && len(expression) == len(parts[0])+2:
			n.text = parts[0]
		}
		return true
	})
}
