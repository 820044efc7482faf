package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"k8s.io/client-go/util/jsonpath"
)

// jsonPath begins an output format that is a template, in kubectl's language.
const jsonPath = "jsonpath="

// useTemplate sets the template of the output. One without braces is an expression.
func (a *app) useTemplate(text string) error {
	if text == "" {
		return fmt.Errorf("has no template: give one as %s{.field}; -o json shows the fields", jsonPath)
	}
	if !strings.Contains(text, "{") {
		text = "{" + text + "}"
	}
	a.template = text
	_, err := a.parsedTemplate()
	return err
}

// parsedTemplate returns the template. It is for one use: an execution changes it.
func (a *app) parsedTemplate() (*jsonpath.JSONPath, error) {
	t := jsonpath.New("template")
	if err := t.Parse(a.template); err != nil {
		return nil, fmt.Errorf("is not a valid template: %w", err)
	}
	return t, nil
}

// showTemplate prints what the template selects of JSON, with a line end. A field that is missing
// is an error if nothing is selected: the fields of a message that is not set are missing too.
func (a *app) showTemplate(data []byte) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	var value any
	if err := d.Decode(&value); err != nil {
		return err
	}
	value = printable(value)
	out, err := a.selected(value, false)
	if err != nil {
		some, failed := a.selected(value, true)
		if failed != nil || len(bytes.TrimSpace(some)) == 0 {
			return fmt.Errorf("-o %s%s: %w; -o json shows the fields", jsonPath, a.template, err)
		}
		out = some
	}
	if len(out) > 0 && !bytes.HasSuffix(out, []byte("\n")) {
		out = append(out, '\n')
	}
	_, err = a.stdout.Write(out)
	return err
}

// selected returns what the template selects of a value.
func (a *app) selected(value any, missing bool) ([]byte, error) {
	t, err := a.parsedTemplate()
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = t.AllowMissingKeys(missing).Execute(&out, value)
	return out.Bytes(), err
}

// printable returns JSON without control characters in its texts, which may come from a peer, and
// with whole numbers as integers: the library prints large ones of floating point with an exponent.
func printable(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for name, field := range v {
			v[name] = printable(field)
		}
	case []any:
		for i, item := range v {
			v[i] = printable(item)
		}
	case string:
		return clean(v)
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n
		}
		if f, err := v.Float64(); err == nil {
			return f
		}
		return v.String()
	}
	return v
}
