package spec

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// disabledField is the field of tunnels and peers that shuts them down.
const disabledField = "disabled"

// Disabling is a change of the field `disabled` of tunnels and peers.
type Disabling struct {
	Tunnels, Peers []string // names
	Disabled       bool
}

// maxDisablingNames bounds the objects that String names.
const maxDisablingNames = 3

// String describes the change, as "disable tunnel aws-0, peer site".
func (e Disabling) String() string {
	verb := "enable "
	if e.Disabled {
		verb = "disable "
	}
	var names []string
	for _, name := range e.Tunnels {
		names = append(names, "tunnel "+name)
	}
	for _, name := range e.Peers {
		names = append(names, "peer "+name)
	}
	if n := len(names); n > maxDisablingNames {
		return fmt.Sprintf("%s%s and %d more", verb, strings.Join(names[:maxDisablingNames], ", "), n-maxDisablingNames)
	}
	return verb + strings.Join(names, ", ")
}

// disableable is a tunnel or peer of a message.
type disableable interface {
	proto.Message
	GetName() string
	GetDisabled() bool
}

// Apply edits the text of a valid document, all objects or none. The text keeps its comments. If an
// object shares its text with others by an alias, the whole text is rewritten.
func (e Disabling) Apply(text string) (string, Problems, error) {
	was, problems := Decode([]byte(text))
	var root yaml.Node
	if err := yaml.Unmarshal([]byte(text), &root); err != nil || len(problems) > 0 || len(root.Content) != 1 {
		return "", nil, errEdit
	}
	want := was.Message
	var edits []insertion
	var changed []*yaml.Node
	inPlace := true
	lines := lineOffsets(text)
	list := func(kind string, names []string, all []disableable) {
		items := value(root.Content[0], kind+"s")
		for i, name := range names {
			at := slices.IndexFunc(all, func(o disableable) bool { return o.GetName() == name })
			if at < 0 {
				problems = append(problems, Problem{Path: fmt.Sprintf("%ss[%d]", kind, i), Value: name, Rule: "is not a " + kind + " of the present document", Remedy: "see `isthmus get " + kind + "s` for those that are"})
				continue
			}
			if all[at].GetDisabled() == e.Disabled {
				continue
			}
			switch o := all[at].(type) {
			case *isthmusv1.Tunnel:
				o.Disabled = e.Disabled
			case *isthmusv1.Peer:
				o.Disabled = e.Disabled
			}
			if items == nil || items.Kind != yaml.SequenceNode || at >= len(items.Content) {
				inPlace, changed = false, append(changed, nil)
				continue
			}
			changed = append(changed, items.Content[at])
			edit, ok := e.edit(text, lines, items.Content[at])
			inPlace = inPlace && ok
			edits = append(edits, edit)
		}
	}
	list("tunnel", e.Tunnels, asDisableable(want.GetTunnels()))
	list("peer", e.Peers, asDisableable(want.GetPeers()))
	if len(problems) > 0 {
		return "", problems, nil
	}
	as := func(out string) bool {
		d, problems := Decode([]byte(out))
		return len(problems) == 0 && proto.Equal(d.Message, want)
	}
	if inPlace {
		slices.SortFunc(edits, func(a, b insertion) int { return b.from - a.from })
		out := text
		for _, i := range edits {
			out = out[:i.from] + i.put + out[i.to:]
		}
		if as(out) {
			return out, nil, nil
		}
	}
	for _, n := range changed {
		for n != nil && n.Kind == yaml.AliasNode {
			return "", nil, errEdit // the other object would change too
		}
		if n == nil {
			return "", nil, errEdit
		}
		child(n, disabledField, yaml.ScalarNode).SetString(fmt.Sprint(e.Disabled))
		value(n, disabledField).Tag, value(n, disabledField).Style = "!!bool", 0
	}
	out, err := encodeNode(&root)
	if err != nil || !as(out) {
		return "", nil, errEdit
	}
	return out, nil, nil
}

func asDisableable[T disableable](all []T) []disableable {
	out := make([]disableable, len(all))
	for i, o := range all {
		out[i] = o
	}
	return out
}

// insertion replaces a part of a text.
type insertion struct {
	from, to int
	put      string
}

// edit returns the edit of one object in the text, and false when its places are not certain. Apply
// decodes the outcome, so that a wrong place changes nothing.
func (e Disabling) edit(text string, lines []int, item *yaml.Node) (insertion, bool) {
	if item.Kind != yaml.MappingNode {
		return insertion{}, false
	}
	flow := item.Style&yaml.FlowStyle != 0
	if field, v := entry(item, disabledField); field != nil {
		return e.replace(text, lines, flow, field, v)
	}
	key, name := entry(item, "name")
	if key == nil || !e.Disabled {
		return insertion{}, false
	}
	_, end, ok := scalar(text, lines, name)
	switch {
	case !ok:
		return insertion{}, false
	case flow && key.Style&yaml.DoubleQuotedStyle != 0: // JSON
		return insertion{end, end, `, "disabled": true`}, true
	case flow:
		return insertion{end, end, ", disabled: true"}, true
	}
	put := strings.Repeat(" ", item.Content[0].Column-1) + "disabled: true"
	if n := strings.IndexByte(text[end:], '\n'); n >= 0 {
		return insertion{end + n + 1, end + n + 1, put + "\n"}, true
	}
	return insertion{len(text), len(text), "\n" + put + "\n"}, true
}

// replace edits a field that is there. Nothing stays of what edit adds; a field with a comment, or
// one at a place of its own, stays with another value.
func (e Disabling) replace(text string, lines []int, flow bool, field, v *yaml.Node) (insertion, bool) {
	from, _, found := scalar(text, lines, field)
	begin, end, ok := scalar(text, lines, v)
	switch {
	case !ok || !found:
		return insertion{}, false
	case e.Disabled:
		return insertion{begin, end, "true"}, true
	case flow && strings.HasSuffix(text[:from], ", "):
		return insertion{from - 2, end, ""}, true
	}
	first := lines[field.Line-1]
	last := first + strings.IndexByte(text[first:]+"\n", '\n') + 1
	if !flow && strings.TrimSpace(text[first:min(last, len(text))]) == text[from:end] {
		return insertion{first, min(last, len(text)), ""}, true
	}
	return insertion{begin, end, "false"}, true
}

// entry returns the key and the value of a field of a mapping.
func entry(n *yaml.Node, key string) (field, v *yaml.Node) {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i], n.Content[i+1]
		}
	}
	return nil, nil
}

// lineOffsets returns the offsets of the lines of a text. YAML counts other line breaks than line
// feeds too; scalar then does not find what it expects.
func lineOffsets(text string) []int {
	out := []int{0}
	for i := range len(text) {
		if text[i] == '\n' {
			out = append(out, i+1)
		}
	}
	return out
}

// scalar returns the extent of a scalar in the text, and false when its place is not certain.
func scalar(text string, lines []int, n *yaml.Node) (from, to int, ok bool) {
	if n.Kind != yaml.ScalarNode || n.Line < 1 || n.Line > len(lines) || n.Anchor != "" {
		return 0, 0, false
	}
	from = lines[n.Line-1]
	for range n.Column - 1 { // columns count characters
		_, size := utf8.DecodeRuneInString(text[from:])
		from += size
	}
	raw := n.Value
	switch {
	case n.Style&yaml.DoubleQuotedStyle != 0:
		raw = `"` + raw + `"`
	case n.Style&yaml.SingleQuotedStyle != 0:
		raw = "'" + raw + "'"
	}
	return from, from + len(raw), strings.HasPrefix(text[min(from, len(text)):], raw)
}
