package importer

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// parseJSON reads values one after the other. It accepts deviations from the standard that real
// files have: several values, with or without commas between them, and commas before closing
// brackets.
func parseJSON(data []byte) ([]*node, error) {
	p := jsonParser{data: data, line: 1}
	var out []*node
	for {
		p.space()
		if len(out) > 0 && p.take(',') {
			p.space()
		}
		if p.at == len(p.data) {
			return out, nil
		}
		n, err := p.value(0)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", p.line, err)
		}
		out = append(out, n)
	}
}

type jsonParser struct {
	data  []byte
	at    int
	line  int
	nodes int
}

func (p *jsonParser) space() {
	for ; p.at < len(p.data); p.at++ {
		switch p.data[p.at] {
		case '\n':
			p.line++
		case ' ', '\t', '\r':
		default:
			return
		}
	}
}

func (p *jsonParser) take(c byte) bool {
	if p.at < len(p.data) && p.data[p.at] == c {
		p.at++
		return true
	}
	return false
}

func (p *jsonParser) value(depth int) (*node, error) {
	p.space()
	n := &node{line: p.line}
	p.nodes++
	switch {
	case p.nodes > maxNodes:
		return nil, errNodes
	case depth > maxDepth:
		return nil, fmt.Errorf("is nested deeper than %d levels", maxDepth)
	case p.at == len(p.data):
		return nil, errEnd
	case p.take('{'):
		names := map[string]bool{}
		for {
			p.space()
			if p.take('}') {
				return n, nil
			}
			key, err := p.text()
			if err != nil {
				return nil, err
			}
			if names[key] {
				return nil, errTwice(key)
			}
			names[key] = true
			p.space()
			if !p.take(':') {
				return nil, p.expected("a colon after a name")
			}
			v, err := p.value(depth + 1)
			if err != nil {
				return nil, err
			}
			n.add(key, v)
			if p.space(); !p.take(',') && !p.next('}') {
				return nil, p.expected("a comma or a closing brace")
			}
		}
	case p.take('['):
		n.list = true
		for {
			p.space()
			if p.take(']') {
				return n, nil
			}
			v, err := p.value(depth + 1)
			if err != nil {
				return nil, err
			}
			n.values = append(n.values, v)
			if p.space(); !p.take(',') && !p.next(']') {
				return nil, p.expected("a comma or a closing bracket")
			}
		}
	case p.next('"'):
		var err error
		n.text, err = p.text()
		return n, err
	}
	start := p.at
	for p.at < len(p.data) && strings.IndexByte("+-.0123456789abcdefghijklmnopqrstuvwxyzE", p.data[p.at]) >= 0 {
		p.at++
	}
	if !json.Valid(p.data[start:p.at]) {
		return nil, p.expected("a value")
	}
	if n.text = string(p.data[start:p.at]); n.text == "null" {
		n.text = ""
	}
	return n, nil
}

func (p *jsonParser) next(c byte) bool { return p.at < len(p.data) && p.data[p.at] == c }

func (p *jsonParser) expected(what string) error {
	if p.at == len(p.data) {
		return errEnd
	}
	return fmt.Errorf("has no %s, where it has %q", strings.TrimPrefix(what, "a "), p.data[p.at])
}

func (p *jsonParser) text() (string, error) {
	start := p.at
	if !p.take('"') {
		return "", p.expected("a name in quotes")
	}
	for ; p.at < len(p.data); p.at++ {
		switch p.data[p.at] {
		case '\\':
			p.at++
		case '"':
			p.at++
			var s string
			if err := json.Unmarshal(p.data[start:p.at], &s); err != nil {
				return "", errors.New("has a text with a line break or an unknown escape")
			}
			return s, nil
		}
	}
	p.at = len(p.data) // an escape may have moved past the end
	return "", errEnd
}
