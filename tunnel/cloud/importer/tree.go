package importer

import (
	"bytes"
	"encoding/binary"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf16"

	"go.yaml.in/yaml/v3"
)

// Bounds on the cost of a file: real ones are nested about ten levels deep, and a thousand
// connections have less than half a million values. A value takes up to 250 bytes, so a hostile
// file costs some hundred megabytes at most.
const (
	maxDepth = 100
	maxNodes = 1 << 20
	maxYAML  = 4 << 20 // bytes; the YAML reader has no bound of its own
)

var errNodes = fmt.Errorf("has more than %d values", maxNodes)

// node is a value of a file in any syntax: an object with keys, a list, or a text. XML elements are
// objects whose repeated children are repeated keys; an attribute is a child.
type node struct {
	keys   []string // as norm returns them; as many as values, or none
	values []*node
	list   bool
	text   string // empty when it is null
	line   int
}

// norm maps the spellings of a name to one: TunnelOptions, tunnelOptions, tunnel_options,
// tunnel-options.
func norm(key string) string { return strings.ToLower(unspelled.Replace(key)) }

var unspelled = strings.NewReplacer("_", "", "-", "")

// get follows names into objects, and looks below "properties" of Azure's REST API without being
// asked. It returns an empty node if a name is missing.
func (n *node) get(path ...string) *node {
	for _, name := range path {
		next := n.child(norm(name))
		if next == nil {
			if p := n.child("properties"); p != nil {
				next = p.child(norm(name))
			}
		}
		if next == nil {
			return &node{line: n.line}
		}
		n = next
	}
	return n
}

func (n *node) child(name string) *node {
	for i, k := range n.keys {
		if k == name {
			return n.values[i]
		}
	}
	return nil
}

// add adds a child.
func (n *node) add(name string, child *node) *node {
	n.keys, n.values = append(n.keys, norm(name)), append(n.values, child)
	return child
}

// set sets the text of the node at a path from an object, and creates missing nodes on the way.
func (n *node) set(text string, line int, path ...string) {
	for _, name := range path {
		next := n.child(norm(name))
		if next == nil {
			next = n.add(name, &node{line: line})
		}
		n = next
	}
	n.text, n.line = text, line
}

// all returns the children of a name.
func (n *node) all(name string) (out []*node) {
	for i, k := range n.keys {
		if k == norm(name) {
			out = append(out, n.values[i])
		}
	}
	return out
}

// items returns the elements of a list, below "item" in EC2's XML.
func (n *node) items() []*node {
	if n.list {
		return n.values
	}
	return n.all("item")
}

// has reports whether an object has a name.
func (n *node) has(name string) bool { return !n.get(name).empty() }

func (n *node) empty() bool { return len(n.values) == 0 && n.text == "" && !n.list }

// string returns the text of a name; empty when it is missing or null.
func (n *node) string(path ...string) string { return strings.TrimSpace(n.get(path...).text) }

// walk calls f for a node and, while f returns true, for its children.
func (n *node) walk(f func(*node) bool) {
	if !f(n) {
		return
	}
	for _, v := range n.values {
		v.walk(f)
	}
}

// utf8Text returns the text of a file: without a byte order mark, and converted from UTF-16, which
// PowerShell writes.
func utf8Text(data []byte) []byte {
	order := binary.ByteOrder(binary.LittleEndian)
	switch {
	case bytes.HasPrefix(data, []byte{0xef, 0xbb, 0xbf}):
		return data[3:]
	case bytes.HasPrefix(data, []byte{0xfe, 0xff}):
		order = binary.BigEndian
	case !bytes.HasPrefix(data, []byte{0xff, 0xfe}):
		return data
	}
	var units []uint16
	for i := 2; i+1 < len(data); i += 2 {
		units = append(units, order.Uint16(data[i:]))
	}
	return []byte(string(utf16.Decode(units)))
}

// errTwice means that an object has a name twice: two descriptions were joined without a separator.
func errTwice(name string) error {
	return fmt.Errorf("has %q twice in one object; where descriptions follow each other, put --- between them, or give a file for each", short(name))
}

// errEnd means that a file ends before it is complete.
var errEnd = errors.New("the file ends before it is complete")

// parseXML reads a document, or several one after the other. The elements that are in no other are
// children of the node.
func parseXML(data []byte) (*node, error) {
	d := xml.NewDecoder(bytes.NewReader(data))
	// utf8Text has converted it
	d.CharsetReader = func(_ string, in io.Reader) (io.Reader, error) { return in, nil }
	stack := []*node{{line: 1}}
	var texts []*strings.Builder
	fail := func(err error) error {
		line, _ := d.InputPos()
		if s, ok := errors.AsType[*xml.SyntaxError](err); ok {
			line = s.Line
			if err = errors.New("is not XML: " + s.Msg); s.Msg == "unexpected EOF" {
				err = errEnd
			}
		}
		return fmt.Errorf("line %d: %w", line, err)
	}
	for nodes := 0; ; nodes++ {
		token, err := d.Token()
		switch {
		case err == io.EOF && len(stack[0].values) == 0:
			return nil, fail(errors.New("is not XML"))
		case err == io.EOF:
			return stack[0], nil
		case err == nil && nodes > maxNodes:
			err = errNodes
		}
		if err != nil {
			return nil, fail(err)
		}
		switch t := token.(type) {
		case xml.StartElement:
			line, _ := d.InputPos()
			n := &node{line: line}
			for _, a := range t.Attr {
				n.add(a.Name.Local, &node{text: a.Value, line: line})
			}
			stack[len(stack)-1].add(t.Name.Local, n)
			texts = append(texts, &strings.Builder{})
			if stack = append(stack, n); len(stack) > maxDepth {
				return nil, fail(fmt.Errorf("is nested deeper than %d levels", maxDepth))
			}
		case xml.CharData:
			if len(texts) > 0 {
				texts[len(texts)-1].Write(t)
			}
		case xml.EndElement:
			stack[len(stack)-1].text = texts[len(texts)-1].String()
			stack, texts = stack[:len(stack)-1], texts[:len(texts)-1]
		}
	}
}

// parseYAML reads the documents of a file.
func parseYAML(data []byte) ([]*node, error) {
	if len(data) > maxYAML {
		return nil, fmt.Errorf("is YAML and larger than %d MiB; ask for --format json", maxYAML>>20)
	}
	d := yaml.NewDecoder(bytes.NewReader(data))
	var out []*node
	for {
		var y yaml.Node
		if err := d.Decode(&y); err == io.EOF {
			return out, nil
		} else if err != nil {
			text := strings.TrimPrefix(err.Error(), "yaml: ")
			if strings.HasPrefix(text, "unknown anchor") {
				text = "has an alias, which no cloud writes" // its name may be a key without quotes
			}
			return nil, errors.New(text)
		}
		for _, c := range y.Content {
			n, err := fromYAML(c, 0)
			if err != nil {
				return nil, err
			}
			out = append(out, n)
		}
	}
}

func fromYAML(y *yaml.Node, depth int) (*node, error) {
	n := &node{line: y.Line, list: y.Kind == yaml.SequenceNode}
	switch {
	case depth > maxDepth:
		return nil, fmt.Errorf("line %d: is nested deeper than %d levels", y.Line, maxDepth)
	case y.Kind == yaml.AliasNode:
		return nil, fmt.Errorf("line %d: has an alias, which no cloud writes", y.Line)
	case y.Kind == yaml.ScalarNode:
		if y.Tag != "!!null" {
			n.text = y.Value
		}
	}
	names := map[string]bool{}
	for i, c := range y.Content {
		if y.Kind == yaml.MappingNode && i%2 == 0 {
			if names[c.Value] {
				return nil, fmt.Errorf("line %d: %w", c.Line, errTwice(c.Value))
			}
			names[c.Value] = true
			n.keys = append(n.keys, norm(c.Value))
			continue
		}
		v, err := fromYAML(c, depth+1)
		if err != nil {
			return nil, err
		}
		n.values = append(n.values, v)
	}
	return n, nil
}
