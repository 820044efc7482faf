package main

import (
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/codes"

	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/router/reason"
	"github.com/isthmus-net/isthmus/test/golden"
)

// TestDocs keeps docs/cli.md, docs/conditions.md, docs/events.md, docs/spec.md and the references
// in docs/api.md, docs/topology.md and docs/install/first-boot.md what commands and contract say.
// With -update it writes them.
func TestDocs(t *testing.T) {
	read := func(file string) string {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	spec, err := specPage("spec.proto", read("../../proto/isthmus/v1/spec.proto"), nil)
	if err != nil {
		t.Fatal(err)
	}
	topology, err := specPage("topology.proto", read("../../proto/isthmus/v1/topology.proto"), map[string]string{"Egress": "spec.md#egress", "Access": "spec.md#access"})
	if err != nil {
		t.Fatal(err)
	}
	userData, err := specPage("firstboot.proto", read("../../proto/isthmus/v1/firstboot.proto"), nil)
	if err != nil {
		t.Fatal(err)
	}
	api, err := apiPage(read("../../docs/api.md"), read("../../proto/isthmus/v1/services.proto"))
	if err != nil {
		t.Fatal(err)
	}
	// The part before the reference is written by hand.
	guide, _, _ := strings.Cut(read("../../docs/topology.md"), "# The schema\n")
	boot, _, _ := strings.Cut(read("../../docs/install/first-boot.md"), "# The fields\n")
	spec, err = withExamples(spec)
	if err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		"../../docs/cli.md": cliPage(), "../../docs/conditions.md": conditionsPage(), "../../docs/events.md": eventsPage(), "../../docs/spec.md": "# The document\n" + strings.Replace(spec, "\n## ", "\n"+wishesSection()+"## ", 1), "../../docs/topology.md": guide + "# The schema\n" + topology,
		"../../docs/api.md":                api,
		"../../docs/install/first-boot.md": boot + "# The fields\n" + userData,
	} {
		golden.Check(t, file, want)
	}
}

// TestSpecPageIsStrict: what the generator does not understand is an error and not a gap in the
// page.
func TestSpecPageIsStrict(t *testing.T) {
	for what, text := range map[string]string{
		"no comment":      "message A {\n  string b = 1;\n}\n",
		"unknown line":    "// A is.\nmessage A {\n  map<string, string> b = 1;\n}\n",
		"unknown message": "// A is.\nmessage A {\n  // B is.\n  B b = 1;\n}\n",
	} {
		if page, err := specPage("x.proto", text, nil); err == nil {
			t.Errorf("%s: no error, page is\n%s", what, page)
		}
	}
}

func conditionsPage() string {
	var b strings.Builder
	b.WriteString("# Conditions\n\nWhat a node reports when something is not as it should be, in `isthmus get status`, in the lists of tunnels, peers and routes, " +
		"and over the API.\nWith an **error** something does not work, or will stop working without help. With a **warning** everything works.\n" +
		"`isthmus describe condition TYPE` prints one entry. This page is made from router/condition by `go test ./cmd/isthmus -run TestDocs -update`.\n")
	for _, k := range condition.All {
		var severities []string
		for _, s := range k.Severities {
			severities = append(severities, string(s))
		}
		fmt.Fprintf(&b, "\n## %s\n\n%s, of a %s. %s\n\n- Cause: %s\n- Remedy: %s\n", k.Name, strings.ToUpper(severities[0][:1])+strings.Join(severities, " or ")[1:], k.Of, k.Meaning, k.Cause, k.Remedy)
	}
	return b.String()
}

func eventsPage() string {
	var b strings.Builder
	b.WriteString("# Events\n\nThe node records changes of its state, and calls that change something, in `events.log` of the state directory: two files of 4 MiB.\n" +
		"`isthmus get events` and the API show the last 10,000 of them; [operations](operations.md#events-and-audit) has examples. Each event has a type, an object, a\n" +
		"severity and a message, and where one ended, how long the former state lasted. Events about access are shown to admins only.\n" +
		"This page is made from router/event by `go test ./cmd/isthmus -run TestDocs -update`.\n\n| type | object | severity | shown to | meaning |\n| --- | --- | --- | --- | --- |\n")
	for _, k := range event.All {
		of, severity, role := k.Of, string(k.Severity), "all"
		if k == event.ConditionBegan || k == event.ConditionChanged {
			severity = "that of the condition"
		}
		if strings.HasPrefix(k.Name, "Condition") {
			of = "that of the condition"
		}
		if k.Admin {
			role = "admins"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", k.Name, of, severity, role, k.Meaning)
	}
	return b.String()
}

func cliPage() string {
	a := &app{stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard, now: time.Now, wall: time.Now, getenv: func(string) string { return "" }}
	root := a.command()
	var b strings.Builder
	fmt.Fprintf(&b, "# isthmus, the command line\n\nThis page is made from the commands by `go test ./cmd/isthmus -run TestDocs -update`.\n\n%s\n", root.Long)
	commandSections(&b, root)
	b.WriteString("\n## Flags of every command\n\n")
	flagTable(&b, root.PersistentFlags())
	return b.String()
}

func commandSections(b *strings.Builder, parent *cobra.Command) {
	for _, c := range parent.Commands() {
		if c.Hidden || c.Name() == "completion" {
			continue
		}
		if c.HasSubCommands() {
			commandSections(b, c)
			continue
		}
		long := c.Long
		if long == "" {
			long = c.Short + "."
		}
		fmt.Fprintf(b, "\n## %s\n\n```\n%s\n```\n\n%s\n", c.CommandPath(), c.UseLine(), long)
		fmt.Fprintf(b, "\n```\n%s\n```\n", strings.ReplaceAll(strings.TrimPrefix(c.Example, "  "), "\n  ", "\n"))
		if c.LocalNonPersistentFlags().HasAvailableFlags() {
			b.WriteString("\n")
			flagTable(b, c.LocalNonPersistentFlags())
		}
	}
	if parent.Name() == "isthmus" {
		b.WriteString("\n## isthmus completion\n\n```\nisthmus completion bash|fish|powershell|zsh\n```\n\nPrint the completion script of a shell.\n")
	}
}

func flagTable(b *strings.Builder, flags *pflag.FlagSet) {
	b.WriteString("| flag | meaning | default |\n| --- | --- | --- |\n")
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		name := "`--" + f.Name + "`"
		if f.Shorthand != "" {
			name = "`-" + f.Shorthand + "`, " + name
		}
		def := f.DefValue
		if def == "" || def == "0" || def == "0s" || def == "false" {
			def = "-"
		}
		fmt.Fprintf(b, "| %s | %s | %s |\n", name, strings.ReplaceAll(f.Usage, "|", "\\|"), def)
	})
}

var (
	messageLine = regexp.MustCompile(`^message (\w+) \{$`)
	fieldLine   = regexp.MustCompile(`^(?:(repeated|optional) )?([\w.]+) (\w+) = \d+(?: \[json_name = "(\w+)"\])?;$`)
	oneofLine   = regexp.MustCompile(`^oneof \w+ \{$`)
)

// Scalar types and the two well-known ones, in words.
var fieldTypes = map[string]string{
	"string": "text", "bool": "true or false", "uint32": "number", "uint64": "number", "google.protobuf.Duration": "duration",
}

// specPage makes the reference of a document from the comments of its .proto file. It reads the
// style in which these files are written, one field on one line, and refuses anything else.
// elsewhere says where messages of other files are described.
func specPage(name, proto string, elsewhere map[string]string) (string, error) {
	messages := maps.Clone(elsewhere)
	if messages == nil {
		messages = map[string]string{}
	}
	for line := range strings.Lines(proto) {
		if m := messageLine.FindStringSubmatch(strings.TrimSpace(line)); m != nil {
			messages[m[1]] = "#" + strings.ToLower(m[1])
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\nThis page is made from the comments of `proto/isthmus/v1/%s` by `go test ./cmd/isthmus -run TestDocs -update`.\n", name)
	var comment, choice []string
	inMessage, inOneof := false, false
	for n, line := range strings.Split(proto, "\n") {
		line = strings.TrimSpace(line)
		fail := func(what string) (string, error) { return "", fmt.Errorf("%s:%d: %s: %q", name, n+1, what, line) }
		text := strings.Join(comment, " ")
		message, field := messageLine.FindStringSubmatch(line), fieldLine.FindStringSubmatch(line)
		switch {
		case strings.HasPrefix(line, "//"):
			comment = append(comment, strings.TrimSpace(strings.TrimPrefix(line, "//")))
			continue
		case line == "":
		case !inMessage && message != nil:
			if text == "" {
				return fail("message without a comment")
			}
			inMessage = true
			fmt.Fprintf(&b, "\n## %s\n\n%s\n\n| field | type | meaning |\n| --- | --- | --- |\n", message[1], text)
		case !inMessage && (strings.HasPrefix(line, "syntax ") || strings.HasPrefix(line, "package ") || strings.HasPrefix(line, "import ") || strings.HasPrefix(line, "option ")):
		case inMessage && oneofLine.MatchString(line):
			inOneof, choice = true, comment
		case inOneof && line == "}":
			inOneof, choice = false, nil
		case inMessage && line == "}":
			inMessage = false
		case inMessage && field != nil:
			if text == "" {
				return fail("field without a comment")
			}
			kind, ok := fieldTypes[field[2]]
			if !ok {
				if messages[field[2]] == "" {
					return fail("unknown type")
				}
				kind = fmt.Sprintf("[%s](%s)", field[2], messages[field[2]])
			}
			if field[1] == "repeated" {
				kind = "list of " + kind
			}
			if len(choice) > 0 {
				text += " *" + strings.Join(choice, " ") + "*"
			}
			name := field[4]
			if name == "" {
				name = lowerCamel(field[3])
			}
			fmt.Fprintf(&b, "| `%s` | %s | %s |\n", name, kind, strings.ReplaceAll(text, "|", "\\|"))
		default:
			return fail("not understood")
		}
		comment = nil
	}
	return b.String(), nil
}

func lowerCamel(s string) string {
	parts := strings.Split(s, "_")
	for i, p := range parts[1:] {
		parts[i+1] = strings.ToUpper(p[:1]) + p[1:]
	}
	return strings.Join(parts, "")
}

// TestPagesNameCommands: every command that the pages and the registry of conditions name is one of
// isthmus.
func TestPagesNameCommands(t *testing.T) {
	a := &app{stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard, now: time.Now, wall: time.Now, getenv: func(string) string { return "" }}
	root := a.command()
	files, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(files) < 5 {
		t.Fatal(files, err)
	}
	more, _ := filepath.Glob("../../docs/*/*.md")
	named := regexp.MustCompile("`isthmus ([a-z][^`]*)`")
	seen := 0
	for _, file := range append(append(files, more...), "../../README.md", "../../CONTRIBUTING.md") {
		page, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range named.FindAllStringSubmatch(string(page), -1) {
			words := strings.Fields(m[1])
			seen++
			c, rest, err := root.Find(words)
			if err != nil || c == root || c.HasSubCommands() && len(rest) > 0 && !strings.HasPrefix(rest[0], "-") {
				t.Errorf("%s names `isthmus %s`, which is not a command", file, m[1])
			}
		}
	}
	if seen < 50 {
		t.Errorf("only %d commands were found", seen)
	}
}

var serviceLine = regexp.MustCompile(`^service (\w+) \{$`)

// apiPage fills the lists of services and of reasons into docs/api.md.
func apiPage(page, proto string) (string, error) {
	var services, reasons strings.Builder
	var comment []string
	services.WriteString("| service | purpose |\n| --- | --- |\n")
	for line := range strings.Lines(proto) {
		line = strings.TrimSuffix(line, "\n")
		if text, ok := strings.CutPrefix(line, "// "); ok {
			comment = append(comment, text)
			continue
		}
		if m := serviceLine.FindStringSubmatch(line); m != nil {
			text, ok := strings.CutPrefix(strings.Join(comment, " "), m[1]+" ")
			if !ok {
				return "", fmt.Errorf("service %s: the comment does not begin with its name", m[1])
			}
			first, _, _ := strings.Cut(text+" ", ". ")
			fmt.Fprintf(&services, "| `%s` | %s. |\n", m[1], strings.ToUpper(first[:1])+strings.TrimSuffix(first[1:], "."))
		}
		comment = nil
	}
	reasons.WriteString("| reason | code | meaning | metadata |\n| --- | --- | --- | --- |\n")
	for _, r := range reason.All {
		fmt.Fprintf(&reasons, "| `%s` | `%s` | %s | %s |\n", r.Name, codeName(r.Code), r.Meaning, r.Metadata)
	}
	for name, text := range map[string]string{"services": services.String(), "reasons": reasons.String()} {
		before, rest, ok := strings.Cut(page, "<!-- "+name+" -->\n")
		_, after, found := strings.Cut(rest, "<!-- end of "+name+" -->")
		if !ok || !found {
			return "", fmt.Errorf("docs/api.md has no place for the %s", name)
		}
		page = before + "<!-- " + name + " -->\n" + text + "<!-- end of " + name + " -->" + after
	}
	return page, nil
}

// codeName returns a code as the contract writes it: InvalidArgument is INVALID_ARGUMENT.
func codeName(c codes.Code) string {
	return strings.ToUpper(regexp.MustCompile(`([a-z])([A-Z])`).ReplaceAllString(c.String(), "${1}_$2"))
}
