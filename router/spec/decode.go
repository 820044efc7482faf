package spec

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// MaxText is the largest size of a text in bytes, and maxSeparators the largest number of its lines
// and commas: decoding takes half a KiB for each value of YAML.
const (
	MaxText       = 16 << 20
	maxSeparators = 1 << 19
)

// Fits returns why a text is too large to decode.
func Fits(text string) Problems {
	if len(text) > MaxText {
		return Problems{{Rule: fmt.Sprintf("is larger than %d bytes", MaxText), Remedy: "write a smaller document"}}
	}
	n := 0
	for _, r := range text {
		switch r {
		case '\n', '\r', ',', '\u0085', '\u2028', '\u2029': // may end a value in YAML
			n++
		}
	}
	if n > maxSeparators {
		return Problems{{Rule: fmt.Sprintf("has more than %d lines and commas", maxSeparators), Remedy: "write a smaller document"}}
	}
	return nil
}

// maxNodes bounds the values of a text with its aliases expanded. Without aliases, a text that Fits
// has fewer.
const maxNodes = 1 << 20

// Document is a decoded document, not yet checked.
type Document struct {
	Message *isthmusv1.Spec
	lines   Lines
	unread  map[string]bool // paths of values that Decode could not read
	layout  *layout

	platform Platform
	mtu      func(iface string) int // nil: unknown
	// processors is 0 when it is unknown.
	processors int
}

// Lines has the line of each field of a text, by field path.
type Lines map[string]int

// FromMessage returns a document that has no text.
func FromMessage(m *isthmusv1.Spec) Document {
	return Document{Message: proto.CloneOf(m)}
}

// Decode reads a document from YAML or JSON, which is a subset of it. The text holds the fields of
// the protobuf message Spec; unknown fields, doubled ones and wrong types are problems. Decode
// returns the valid fields even when there are problems, so that Check can find the others; Check
// does not repeat these.
func Decode(text []byte) (Document, Problems) {
	doc := Document{Message: &isthmusv1.Spec{}}
	d := decode(text, doc.Message)
	problems := d.problems.problems()
	doc.lines, doc.unread = d.lines, problems.paths()
	if d.problems.more > 0 {
		doc.unread[""] = true // not every path is known
	}
	if len(problems) == 0 && !d.aliases {
		doc.layout = layoutOf(string(text), d.root)
	}
	return doc, problems
}

// DecodeMessage is like Decode for another message m.
func DecodeMessage(text []byte, m proto.Message) (Lines, Problems) {
	d := decode(text, m)
	return d.lines, d.problems.problems()
}

func decode(text []byte, m proto.Message) *decoder {
	d := &decoder{lines: Lines{}}
	for _, p := range Fits(string(text)) {
		d.problems.add(p)
		return d
	}
	dec := yaml.NewDecoder(strings.NewReader(string(text)))
	var root yaml.Node
	if err := dec.Decode(&root); err != nil {
		d.problems.add(syntax(err, m))
		return d
	}
	var second yaml.Node
	switch err := dec.Decode(&second); {
	case err == nil:
		d.problem(&second, "", "", "is a second document in one text", "apply one document at a time")
	case !errors.Is(err, io.EOF):
		// The parser stops behind a document and does not read what follows its closing bracket.
		d.problems = collector{}
		d.problems.add(syntax(err, m))
	}
	if len(root.Content) == 1 {
		d.root = root.Content[0]
		d.message(d.root, "", m.ProtoReflect())
	}
	return d
}

// syntax turns a YAML error, which begins with "yaml: line N: ", into a problem.
func syntax(err error, m proto.Message) Problem {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	p := Problem{Rule: "is not valid YAML: " + text, Remedy: "fix the syntax"}
	if text == "EOF" {
		var first []string
		for fields, i := m.ProtoReflect().Descriptor().Fields(), 0; i < min(2, fields.Len()); i++ {
			first = append(first, "`"+fields.Get(i).JSONName()+"`")
		}
		p.Rule, p.Remedy = "is empty", "write at least "+strings.Join(first, " and ")
	}
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if n, after, ok := strings.Cut(rest, ":"); ok {
			if line, err := strconv.Atoi(n); err == nil {
				p.Line, p.Rule = line, "is not valid YAML:"+after
			}
			// The library counts lines from 0 in errors of its parser, and from 1 in those of its
			// scanner.
			if strings.HasPrefix(after, " did not find expected ") {
				p.Line++
			}
		}
	}
	return p
}

type decoder struct {
	root     *yaml.Node // nil: there is none
	problems collector
	lines    Lines
	nodes    int
	aliases  bool
}

func (d *decoder) problem(n *yaml.Node, path, value, rule, remedy string) {
	d.problems.add(Problem{Path: path, Value: value, Rule: rule, Remedy: remedy, Line: n.Line})
}

// follow resolves an alias, and returns false when the text has too many values.
func (d *decoder) follow(n *yaml.Node, path string) (*yaml.Node, bool) {
	for n.Kind == yaml.AliasNode {
		n, d.aliases = n.Alias, true
	}
	d.nodes++
	if d.nodes == maxNodes {
		// Without a path, because the rest of the text was not read.
		d.problem(n, "", "", fmt.Sprintf("has more than %d values, aliases counted as what they stand for: %s is one too many", maxNodes, shorten(path)), "write a smaller document, with fewer aliases")
	}
	return n, d.nodes < maxNodes
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

func (d *decoder) message(n *yaml.Node, path string, m protoreflect.Message) {
	n, ok := d.follow(n, path)
	if !ok || isNull(n) {
		return
	}
	if n.Kind != yaml.MappingNode {
		d.problem(n, path, n.Value, "must be a group of fields", grouped(n, m.Descriptor().Fields()))
		return
	}
	fields := m.Descriptor().Fields()
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content) && d.nodes < maxNodes; i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		field := fields.ByJSONName(key.Value)
		at := join(path, key.Value)
		if field == nil {
			near, remedy := suggest(key.Value, fields)
			p := Problem{Path: at, Rule: "is an unknown field", Remedy: remedy, Line: key.Line}
			if near != "" && !hasKey(n, near) {
				p.Meant = join(path, near)
			}
			d.problems.add(p)
			continue
		}
		if seen[key.Value] {
			d.problem(key, at, "", "is given twice", "keep one of them")
			continue
		}
		seen[key.Value] = true
		if one := field.ContainingOneof(); one != nil && !one.IsSynthetic() && m.WhichOneof(one) != nil {
			d.problem(key, at, "", fmt.Sprintf("conflicts with %q, which is given as well", m.WhichOneof(one).JSONName()), "keep one of them")
			continue
		}
		d.lines[at] = key.Line
		d.field(value, at, m, field)
	}
}

func (d *decoder) field(n *yaml.Node, path string, m protoreflect.Message, field protoreflect.FieldDescriptor) {
	n, ok := d.follow(n, path)
	if !ok || isNull(n) {
		return
	}
	switch {
	case field.IsList():
		if n.Kind != yaml.SequenceNode {
			d.problem(n, path, n.Value, "must be a list", "write each item on a line of its own after \"- \"")
			return
		}
		list := m.Mutable(field).List()
		for i, item := range n.Content {
			if d.nodes >= maxNodes {
				return
			}
			at := fmt.Sprintf("%s[%d]", path, i)
			d.lines[at] = item.Line
			if field.Message() != nil {
				d.message(item, at, list.AppendMutable().Message())
				continue
			}
			// An item that cannot be decoded keeps its place, so that later field paths stay
			// correct.
			v, ok := d.scalar(item, at, field)
			if !ok {
				v = list.NewElement()
			}
			list.Append(v)
		}
	case field.Message() != nil && field.Message().FullName() == "google.protobuf.Duration":
		if v, ok := d.duration(n, path); ok {
			m.Set(field, protoreflect.ValueOfMessage(durationpb.New(v).ProtoReflect()))
		}
	case field.Message() != nil:
		d.message(n, path, m.Mutable(field).Message())
	default:
		if v, ok := d.scalar(n, path, field); ok {
			m.Set(field, v)
		}
	}
}

func (d *decoder) duration(n *yaml.Node, path string) (time.Duration, bool) {
	if n.Kind == yaml.ScalarNode {
		if v, err := time.ParseDuration(n.Value); err == nil {
			return v, true
		}
	}
	d.problem(n, path, n.Value, "must be a duration", `write a number with its unit, such as "90s", "45m" or "1h30m"`)
	return 0, false
}

func (d *decoder) scalar(n *yaml.Node, path string, field protoreflect.FieldDescriptor) (protoreflect.Value, bool) {
	n, ok := d.follow(n, path)
	if !ok {
		return protoreflect.Value{}, false
	}
	tag := n.ShortTag()
	if n.Kind != yaml.ScalarNode {
		tag = ""
	}
	number := func(bits int) (uint64, bool) {
		v, err := strconv.ParseUint(n.Value, 10, bits)
		octal := len(n.Value) > 1 && n.Value[0] == '0' // in YAML 1.1
		if tag == "!!int" && err == nil && !octal {
			return v, true
		}
		// Each field has a range of its own, which the check of a number that is read names.
		d.problem(n, path, n.Value, "must be a whole number", "write it in decimal digits, without quotes and leading zeros")
		return 0, false
	}
	switch field.Kind() {
	case protoreflect.StringKind:
		if tag == "!!str" {
			return protoreflect.ValueOfString(n.Value), true
		}
		if tag == "" {
			d.problem(n, path, "", "must be text", "write the text itself, not a list or a group of fields")
		} else {
			d.problem(n, path, n.Value, "must be text", "put it in quotes")
		}
	case protoreflect.BoolKind:
		if tag == "!!bool" {
			return protoreflect.ValueOfBool(strings.EqualFold(n.Value, "true")), true
		}
		d.problem(n, path, n.Value, "must be true or false", "write true or false without quotes")
	case protoreflect.Uint32Kind:
		v, ok := number(32)
		return protoreflect.ValueOfUint32(uint32(v)), ok
	case protoreflect.Uint64Kind:
		v, ok := number(64)
		return protoreflect.ValueOfUint64(v), ok
	default:
		// The schema has no other kinds: see TestSchemaKinds.
		d.problem(n, path, n.Value, "is of a kind that documents do not have", "leave it out")
	}
	return protoreflect.Value{}, false
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// hasKey reports whether a group of fields has a key.
func hasKey(n *yaml.Node, key string) bool {
	for i := 0; i < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return true
		}
	}
	return false
}

// grouped returns the remedy for a value in the place of a group of fields. If it can be that of
// the first field, which is the main one, it is shown there.
func grouped(n *yaml.Node, fields protoreflect.FieldDescriptors) string {
	if first := fields.Get(0); n.Kind == yaml.ScalarNode && first.Kind() == protoreflect.StringKind && !first.IsList() {
		return fmt.Sprintf("write `{%s: %s}`", first.JSONName(), shorten(n.Value))
	}
	return fmt.Sprintf("write `field: value` lines below it, such as `%s: ...`", fields.Get(0).JSONName())
}

// suggest returns the most similar field, if one is similar, and the remedy, which names it or all
// fields.
func suggest(name string, fields protoreflect.FieldDescriptors) (near, remedy string) {
	best, distance := "", 4
	name = name[:min(len(name), 64)] // longer than the name of any field
	var all []string
	for i := range fields.Len() {
		f := fields.Get(i).JSONName()
		all = append(all, f)
		if n := edits(strings.ToLower(strings.ReplaceAll(name, "_", "")), strings.ToLower(f)); n < distance {
			best, distance = f, n
		}
	}
	if best != "" {
		return best, fmt.Sprintf("did you mean %q?", best)
	}
	return "", "take one of " + strings.Join(all, ", ")
}

// edits returns the Levenshtein distance of two short words.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		left := row[0]
		row[0] = i + 1
		for j := range len(b) {
			substitute := left
			if a[i] != b[j] {
				substitute++
			}
			left = row[j+1]
			row[j+1] = min(substitute, left+1, row[j]+1)
		}
	}
	return row[len(b)]
}
