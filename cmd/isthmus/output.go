package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// outputFormat is a pflag.Value: one of some formats, or jsonpath= with a template.
type outputFormat struct {
	a       *app
	formats []string
}

func (o outputFormat) String() string {
	if o.a == nil {
		return ""
	}
	return o.a.output
}
func (o outputFormat) Type() string { return "format" }
func (o outputFormat) Set(s string) error {
	o.a.template = ""
	if template, ok := strings.CutPrefix(s, jsonPath); ok && slices.Contains(o.formats, "json") {
		o.a.output = "json"
		return o.a.useTemplate(template)
	}
	if !slices.Contains(o.formats, s) {
		return errors.New("must be " + formatList(o.formats))
	}
	o.a.output = s
	return nil
}

// orList joins words as "a, b or c".
func orList(words []string) string {
	last := len(words) - 1
	if last < 1 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// outputFlag adds -o to a command that prints objects or messages.
func (a *app) outputFlag(cmd *cobra.Command) { a.formatFlag(cmd, "table", "wide", "json", "yaml") }

// listFlags adds -o and --no-headers to a command that prints a list of objects.
func (a *app) listFlags(cmd *cobra.Command) {
	a.formatFlag(cmd, "table", "wide", "name", "json", "yaml")
	a.headersFlag(cmd)
}

func (a *app) headersFlag(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&a.noHeaders, "no-headers", false, "print tables without their headers")
}

// formatFlag adds -o. A command that prints JSON also takes templates for it.
func (a *app) formatFlag(cmd *cobra.Command, formats ...string) {
	a.output = formats[0]
	cmd.Flags().VarP(outputFormat{a, formats}, "output", "o", "output format: "+formatList(formats))
	completeFlag(cmd, "output", oneOf(formats...))
}

// formatList names formats, with templates where there is JSON.
func formatList(formats []string) string {
	if slices.Contains(formats, "json") {
		formats = append(slices.Clone(formats), jsonPath+"TEMPLATE")
	}
	return orList(formats)
}

// tables reports whether the output is for people, as tables.
func (a *app) tables() bool { return a.output == "table" || a.output == "wide" }

// column is one column of a noun's table. The other formats print the whole message.
type column[T any] struct {
	header string
	wide   bool // only with -o wide
	style  style
	value  func(a *app, o T) string
	// brief returns a shorter form of a list for a narrow terminal, "" if there is none. Nil: as
	// brief that returns "".
	brief func(o T) string
}

// many returns a number of things as the brief form of a list, "" if there are less than two.
func many(n int, things string) string {
	if n < 2 {
		return ""
	}
	return fmt.Sprintf("%d %s", n, things)
}

// clean replaces control characters, which could move a terminal's cursor: some texts come from a
// peer.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// looks returns the heads of the columns that are shown.
func looks[T any](a *app, columns []column[T]) []look {
	var out []look
	for _, c := range columns {
		if !c.wide || a.output == "wide" {
			out = append(out, look{c.header, c.style})
		}
	}
	return out
}

func cells[T any](a *app, columns []column[T], o T) []cell {
	var out []cell
	for _, c := range columns {
		if c.wide && a.output != "wide" {
			continue
		}
		v := cell{text: c.value(a, o)}
		if v.text == "" {
			v.text = "-"
		}
		if c.brief != nil {
			v.brief = c.brief(o)
		}
		out = append(out, v)
	}
	return out
}

// rowsOf returns a table of items.
func rowsOf[T any](a *app, columns []column[T], items []T) ([]look, [][]cell) {
	var rows [][]cell
	for _, o := range items {
		rows = append(rows, cells(a, columns, o))
	}
	return looks(a, columns), rows
}

// show prints items as a table, their names, which are in the first column, or their message as
// JSON or YAML.
func show[T any](a *app, columns []column[T], items []T, message proto.Message) error {
	heads, rows := rowsOf(a, columns, items)
	return a.print(a.newTable(heads...), rows, message)
}

func (a *app) print(t *table, rows [][]cell, message proto.Message) error {
	switch a.output {
	case "name":
		var last string
		for _, row := range rows {
			if name := clean(row[0].text); name != last {
				last = name
				fmt.Fprintln(a.stdout, name)
			}
		}
		return nil
	case "json", "yaml":
		return a.showMessage(message)
	}
	for _, row := range rows {
		t.add(row...)
	}
	return t.flush()
}

// showMessage prints a message as JSON or YAML, with all its fields: a program need not know which
// of them are left out when they are zero.
func (a *app) showMessage(m proto.Message) error { return a.showAs(everyField, m) }

// showDocument prints a document, which has the fields that its author has written.
func (a *app) showDocument(m proto.Message) error { return a.showAs(protojson.MarshalOptions{}, m) }

var everyField = protojson.MarshalOptions{EmitUnpopulated: true}

func (a *app) showAs(options protojson.MarshalOptions, m proto.Message) error {
	data, err := options.Marshal(m)
	switch {
	case err != nil:
	case a.template != "":
		return a.showTemplate(data)
	case a.output == "json":
		data, err = indentJSON(data)
	default:
		data, err = yamlOf(data)
	}
	if err != nil {
		return err
	}
	_, err = a.stdout.Write(data)
	return err
}

// indentJSON gives JSON of protojson stable white space, which protojson does not promise.
func indentJSON(data []byte) ([]byte, error) {
	var b bytes.Buffer
	if err := json.Indent(&b, data, "", "  "); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

// encodeYAML returns a message as YAML, without the fields that are not set.
func encodeYAML(m proto.Message) ([]byte, error) {
	data, err := protojson.Marshal(m)
	if err != nil {
		return nil, err
	}
	return yamlOf(data)
}

// yamlOf returns JSON of protojson as YAML.
func yamlOf(data []byte) ([]byte, error) {
	n, err := yamlNode(data)
	if err != nil {
		return nil, err
	}
	return marshalYAML(n)
}

// unfit are the characters that protojson writes as they are, and that YAML refuses or takes for
// line breaks. They may come from a peer.
var unfit = regexp.MustCompile(`[\x7f-\x{9f}\x{2028}\x{2029}\x{fffe}\x{ffff}]`)

// yamlNode returns JSON as a tree in block style, fields in the same order.
func yamlNode(data []byte) (*yaml.Node, error) {
	data = unfit.ReplaceAllFunc(data, func(c []byte) []byte {
		r, _ := utf8.DecodeRune(c)
		return fmt.Appendf(nil, `\u%04x`, r)
	})
	var n yaml.Node
	if err := yaml.Unmarshal(data, &n); err != nil {
		return nil, err
	}
	blockStyle(&n)
	return &n, nil
}

func blockStyle(n *yaml.Node) {
	n.Style = 0
	if n.Kind == yaml.ScalarNode && strings.Contains(n.Value, "\n") {
		n.Style = yaml.LiteralStyle
	}
	for _, c := range n.Content {
		blockStyle(c)
	}
}

func marshalYAML(n *yaml.Node) ([]byte, error) {
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(n); err != nil {
		return nil, err
	}
	return b.Bytes(), e.Close()
}

// describeMessage prints everything about one object. For people, fields that are not set are left
// out, and each time is one of their time zone, with its age in a comment.
func (a *app) describeMessage(m proto.Message) error {
	if !a.tables() {
		return a.showMessage(m)
	}
	data, err := protojson.Marshal(m)
	if err != nil {
		return err
	}
	n, err := yamlNode(data)
	if err != nil {
		return err
	}
	a.addAges(n)
	data, err = marshalYAML(n)
	if err != nil {
		return err
	}
	_, err = a.stdout.Write(data)
	return err
}

func (a *app) addAges(n *yaml.Node) {
	for i, c := range n.Content {
		if c.Kind == yaml.ScalarNode && n.Kind == yaml.MappingNode && i%2 == 1 {
			a.annotate(n.Content[i-1].Value, c)
		}
		a.addAges(c)
	}
}

// annotate writes the value of a field for people: a time in their zone with its age, a number
// without the quotes that JSON has around those of 64 bits, and a number of bytes with its unit.
func (a *app) annotate(field string, n *yaml.Node) {
	if t, err := time.Parse(time.RFC3339Nano, n.Value); err == nil {
		n.Style, n.Tag, n.LineComment = 0, "!!timestamp", relative(t.Sub(a.now()))
		n.Value = t.In(a.now().Location()).Format(time.RFC3339)
	}
	number, err := strconv.ParseUint(n.Value, 10, 64)
	if err != nil || n.Value != strconv.FormatUint(number, 10) {
		return
	}
	n.Style, n.Tag = 0, "!!int"
	if number >= 1024 && (field == "bytes" || strings.HasSuffix(field, "Bytes") || strings.HasPrefix(field, "bytes")) {
		n.LineComment = bytesText(number)
	}
}

func relative(d time.Duration) string {
	if d > 0 {
		return "in " + short(d)
	}
	return short(-d) + " ago"
}

// age returns the age of a time, as "3h12m".
func (a *app) age(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return short(a.now().Sub(t.AsTime()))
}

// since is age for a column: with -o wide it has the time as well.
func (a *app) since(t *timestamppb.Timestamp) string {
	if t != nil && a.output == "wide" {
		return a.age(t) + ", " + a.localTime(t)
	}
	return a.age(t)
}

// until is left for a column: with -o wide it has the time as well.
func (a *app) until(t *timestamppb.Timestamp) string {
	if t != nil && a.output == "wide" {
		return a.left(t) + ", " + a.localTime(t)
	}
	return a.left(t)
}

// left returns the time left until t, or "now" when it has passed.
func (a *app) left(t *timestamppb.Timestamp) string {
	switch {
	case t == nil:
		return ""
	case !t.AsTime().After(a.now()):
		return "now"
	}
	return short(t.AsTime().Sub(a.now()))
}

// short formats a duration with its two largest units.
func short(d time.Duration) string {
	d = max(d, 0).Truncate(time.Second)
	s := int(d / time.Second)
	switch {
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%02ds", s/60, s%60)
	case s < 86400:
		return fmt.Sprintf("%dh%02dm", s/3600, s/60%60)
	}
	return fmt.Sprintf("%dd%02dh", s/86400, s/3600%24)
}

// bytesText formats a number of bytes with a binary unit.
func bytesText(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n), 0
	for f >= 1024 && unit < 6 {
		f /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", f, "KMGTPE"[unit-1])
}

func conditions(all []*isthmusv1.Condition) string {
	var out []string
	for _, c := range all {
		out = append(out, c.Type)
	}
	return strings.Join(out, ",")
}

// printProblems writes each problem in the form of a compiler's message, with the remedy below.
func printProblems(w io.Writer, file string, problems []*isthmusv1.Problem) {
	for _, p := range problems {
		var parts []string
		switch {
		case file != "" && p.Line > 0:
			parts = append(parts, fmt.Sprintf("%s:%d", file, p.Line))
		case p.Line > 0:
			parts = append(parts, fmt.Sprintf("line %d", p.Line))
		}
		for _, s := range []string{p.Path, quoted(p.Value), p.Rule} {
			if s != "" {
				parts = append(parts, clean(s))
			}
		}
		fmt.Fprintln(w, strings.Join(parts, ": "))
		if p.Remedy != "" {
			fmt.Fprintf(w, "    %s\n", clean(p.Remedy))
		}
	}
}

// printNotes writes the notes about a valid document.
func (a *app) printNotes(notes []*isthmusv1.Problem) {
	if a.quiet {
		return
	}
	var b strings.Builder
	printProblems(&b, a.document, notes)
	for line := range strings.Lines(b.String()) {
		if !strings.HasPrefix(line, " ") {
			line = "note: " + line
		}
		io.WriteString(a.stderr, line)
	}
}

func quoted(s string) string {
	if s == "" {
		return ""
	}
	return fmt.Sprintf("%q", s)
}
