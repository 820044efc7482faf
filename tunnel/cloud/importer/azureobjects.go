package importer

import (
	"regexp"
	"slices"
	"strings"
)

// azureObjects are the objects in Azure's files. A side is a local network gateway, or a link of a
// VPN site: this node. An address is a public one of a gateway.
type azureObjects struct {
	gateways, connections, hubConnections, sides, addresses []document
}

// maxText and maxTexts bound the texts in a file that are read as JSON again, in bytes and in
// number.
const (
	maxText  = 1 << 20
	maxTexts = 5000
)

// powerShell puts what PowerShell's objects have as JSON in a text, such as BgpSettingsText, in the
// place of the object, which ConvertTo-Json replaces by the name of its type when it is too deep.
func (r *Result) powerShell(d document) {
	size, texts, cut := 0, 0, false
	d.walk(func(n *node) bool {
		for i, key := range n.keys {
			if texts > maxTexts || size > maxText {
				return false
			}
			v := n.values[i]
			at := v
			if v.list && len(v.values) > 0 {
				at = v.values[0]
			}
			if strings.HasPrefix(at.text, "Microsoft.Azure.") && strings.Contains(at.text, ".Models.") || at.text == "System.Object[]" {
				texts++
				full := n.child(key + "text")
				cut = cut || full == nil
				at.text = ""
			}
			name, ok := strings.CutSuffix(key, "text")
			if !ok || v.text == "" || !strings.ContainsAny(v.text[:1], "{[\"") {
				continue
			}
			texts++
			if size += len(v.text); size > maxText {
				return false
			}
			values, err := parseJSON([]byte(v.text))
			if err != nil || len(values) != 1 {
				continue
			}
			values[0].walk(func(in *node) bool { in.line = v.line; return true })
			if other := n.child(name); other == nil {
				n.add(name, values[0])
			} else {
				*other = *values[0]
			}
		}
		return true
	})
	if texts > maxTexts || size > maxText {
		r.note(d, nil, "has more than %d texts or %d KiB of JSON in them, and the others are not read; give the objects of one gateway", maxTexts, maxText>>10)
	}
	if cut {
		r.note(d, nil, "has objects that PowerShell cut off; make it again with ConvertTo-Json -Depth 10")
	}
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
