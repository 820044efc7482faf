package spec

import (
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// layout has the places of the policies in a text, so that one of them can be edited without
// decoding the others. Only texts with the policies in block style, each beginning on its own line,
// have a layout.
type layout struct {
	items  []int // byte offsets of the lines on which policies begin
	end    int   // of the line behind the last one
	indent int   // of the dashes
	added  int   // lines since the text was decoded
}

// layoutOf returns the layout of a text without aliases, and nil where the places are not certain.
func layoutOf(text string, root *yaml.Node) *layout {
	list := value(value(root, "egress"), "policies")
	if list == nil || list.Kind != yaml.SequenceNode || list.Style&yaml.FlowStyle != 0 || len(list.Content) == 0 {
		return nil
	}
	l := &layout{indent: list.Column - 1}
	// If YAML counts other line breaks than line feeds in the text, the last policy is not found.
	line, at := 1, 0
	for _, item := range list.Content {
		for ; line < item.Line; line++ {
			at += strings.IndexByte(text[at:], '\n') + 1
		}
		if item.Kind != yaml.MappingNode || item.Anchor != "" || !l.begins(text[at:]) || len(l.items) > 0 && at == l.items[len(l.items)-1] {
			return nil
		}
		l.items = append(l.items, at)
	}
	// The next line is less indented, or is a key at the indentation of the dashes.
	l.end = len(text)
	for next := at; ; {
		n := strings.IndexByte(text[next:], '\n') + 1
		if n == 0 {
			break
		}
		next += n
		rest := text[next:]
		body := strings.TrimLeft(rest, " ")
		if indent := len(rest) - len(body); body != "" && !blank(body) && (indent < l.indent || indent == l.indent && !l.begins(rest)) {
			l.end = next
			break
		}
	}
	return l
}

// begins reports whether a policy begins on the line.
func (l *layout) begins(line string) bool {
	body := strings.TrimLeft(line, " ")
	return len(line)-len(body) == l.indent && len(body) > 1 && body[0] == '-' && (body[1] == ' ' || body[1] == '\t')
}

// blank reports whether a line is empty or a comment.
func blank(line string) bool {
	body := strings.TrimLeft(line, " \t")
	return body == "" || body[0] == '#' || body[0] == '\n' || strings.HasPrefix(body, "\r\n")
}

// item returns the extent of a policy: from its dash to its last line, with the comments that
// follow directly and are indented further than the dash.
func (l *layout) item(text string, i int) (int, int) {
	from, last := l.items[i], l.end
	if i+1 < len(l.items) {
		last = l.items[i+1]
	}
	to, at := from, from
	for line := range strings.Lines(text[from:last]) {
		body := strings.TrimLeft(line, " ")
		if within := strings.HasPrefix(body, "#") && len(line)-len(body) > l.indent; !blank(line) || within && to == at {
			to = at + len(line)
		}
		at += len(line)
	}
	return from, to
}

// splice replaces a part of the text that ends before policy next.
func (l *layout) splice(text string, from, to, next int, put string) string {
	by := len(put) - (to - from)
	for i := range l.items[next:] {
		l.items[next+i] += by
	}
	l.end += by
	l.added += strings.Count(put, "\n") - strings.Count(text[from:to], "\n")
	return text[:from] + put + text[to:]
}

// remove removes a policy.
func (l *layout) remove(text string, i int) string {
	from, to := l.item(text, i)
	text = l.splice(text, from, to, i+1, "")
	l.items = slices.Delete(l.items, i, i+1)
	return text
}

// replace replaces a policy.
func (l *layout) replace(text string, i int, put string) string {
	from, to := l.item(text, i)
	return l.splice(text, from, to, i+1, l.indented(put))
}

// add adds a policy behind the last one.
func (l *layout) add(text, put string) string {
	at := l.end
	if n := len(l.items); n > 0 {
		_, at = l.item(text, n-1)
	}
	put = l.indented(put)
	begins := at
	if at > 0 && text[at-1] != '\n' {
		begins, put = at+1, "\n"+put
	}
	text = l.splice(text, at, at, len(l.items), put)
	l.items = append(l.items, begins)
	return text
}

// indented returns the text of a policy as an item of the list.
func (l *layout) indented(put string) string {
	var b strings.Builder
	dash := "- "
	for line := range strings.Lines(put) {
		b.WriteString(strings.Repeat(" ", l.indent) + dash + line)
		dash = "  "
	}
	return b.String()
}

// value returns the value of a key of a mapping, and nil when the key is missing.
func value(n *yaml.Node, key string) *yaml.Node {
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}
