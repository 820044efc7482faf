package spec

import (
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// layout is where the policies are in a text, so that one of them can be edited without reading the others. Only texts with the policies
// in block style, each beginning on a line of its own, have one.
type layout struct {
	items  []int // byte offsets of the lines on which policies begin
	end    int   // of the line behind the last one
	indent int   // of the dashes
	added  int   // lines since the text was read
}

// layoutOf returns where the policies are in a text without aliases, nil where that is not certain.
func layoutOf(text string, root *yaml.Node) *layout {
	list := value(value(root, "egress"), "policies")
	if list == nil || list.Kind != yaml.SequenceNode || list.Style&yaml.FlowStyle != 0 || len(list.Content) == 0 {
		return nil
	}
	l := &layout{indent: list.Column - 1}
	// Where the text has line breaks that YAML counts and that are no line feeds, the last policy is not found.
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
	// What follows is less indented, or a key beside the dashes.
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

// begins says whether a policy begins on the line.
func (l *layout) begins(line string) bool {
	body := strings.TrimLeft(line, " ")
	return len(line)-len(body) == l.indent && len(body) > 1 && body[0] == '-' && (body[1] == ' ' || body[1] == '\t')
}

// blank says whether a line has nothing but a comment.
func blank(line string) bool {
	body := strings.TrimLeft(line, " \t")
	return body == "" || body[0] == '#' || body[0] == '\n' || strings.HasPrefix(body, "\r\n")
}

// item returns the text of a policy, from its dash to the last line of it or of the comments that follow at once and are further
// in than the dash.
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

// splice puts a text in the place of another one that ends before policy next.
func (l *layout) splice(text string, from, to, next int, put string) string {
	by := len(put) - (to - from)
	for i := range l.items[next:] {
		l.items[next+i] += by
	}
	l.end += by
	l.added += strings.Count(put, "\n") - strings.Count(text[from:to], "\n")
	return text[:from] + put + text[to:]
}

// remove takes a policy out.
func (l *layout) remove(text string, i int) string {
	from, to := l.item(text, i)
	text = l.splice(text, from, to, i+1, "")
	l.items = slices.Delete(l.items, i, i+1)
	return text
}

// replace puts a policy in the place of another one.
func (l *layout) replace(text string, i int, put string) string {
	from, to := l.item(text, i)
	return l.splice(text, from, to, i+1, l.indented(put))
}

// add puts a policy behind the last one.
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

// indented makes an item of the lines of a policy.
func (l *layout) indented(put string) string {
	var b strings.Builder
	dash := "- "
	for line := range strings.Lines(put) {
		b.WriteString(strings.Repeat(" ", l.indent) + dash + line)
		dash = "  "
	}
	return b.String()
}

// value returns what a mapping has under a key, nil when there is nothing.
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
