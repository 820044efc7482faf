package spec

import (
	"bytes"
	"encoding/json"
	"fmt"
	"sync"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// Encode writes a document as YAML, with the fields in the order of the schema.
func Encode(m *isthmusv1.Spec) (string, error) { return encode(m) }

func encode(m proto.Message) (string, error) {
	n, err := nodeOf(m)
	if err != nil {
		return "", err
	}
	return encodeNode(n)
}

// nodeOf returns a message in block style.
func nodeOf(m proto.Message) (*yaml.Node, error) {
	text, err := protojson.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encoding document: %w", err)
	}
	// JSON is YAML: decoding it as nodes keeps the order, and only its flow style must be removed.
	var compact bytes.Buffer
	if err := json.Compact(&compact, text); err != nil {
		return nil, fmt.Errorf("encoding document: %w", err)
	}
	var n yaml.Node
	if err := yaml.Unmarshal(compact.Bytes(), &n); err != nil {
		return nil, fmt.Errorf("encoding document: %w", err)
	}
	block(&n)
	return n.Content[0], nil
}

func encodeNode(n *yaml.Node) (string, error) {
	var out bytes.Buffer
	enc := yaml.NewEncoder(&out)
	enc.SetIndent(2)
	if err := enc.Encode(n); err != nil {
		return "", fmt.Errorf("encoding document: %w", err)
	}
	return out.String(), nil
}

// block removes the flow style of JSON, and its quotes where the plain form is the same text.
func block(n *yaml.Node) {
	n.Style &^= yaml.FlowStyle | yaml.DoubleQuotedStyle
	for i, c := range n.Content {
		if n.Kind == yaml.MappingNode && i%2 == 1 && c.Kind == yaml.ScalarNode && wide()[n.Content[i-1].Value] {
			c.Tag = "!!int"
		}
		block(c)
	}
}

// wide has the names of the fields with 64 bits, which are strings in JSON and numbers in YAML.
var wide = sync.OnceValue(func() map[string]bool {
	names, seen := map[string]bool{}, map[protoreflect.FullName]bool{}
	var walk func(protoreflect.MessageDescriptor)
	walk = func(m protoreflect.MessageDescriptor) {
		if seen[m.FullName()] || m.ParentFile().Package() != "isthmus.v1" {
			return
		}
		seen[m.FullName()] = true
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			switch f.Kind() {
			case protoreflect.Uint64Kind, protoreflect.Int64Kind:
				names[f.JSONName()] = true
			case protoreflect.MessageKind:
				walk(f.Message())
			}
		}
	}
	walk((&isthmusv1.Spec{}).ProtoReflect().Descriptor())
	return names
})
