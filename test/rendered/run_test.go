package rendered

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// fake stands for the clouds' command lines: it prints a name, or the ASN of AWS's gateway, and
// records its words, its input and its output.
const fake = `#!/bin/sh
prints=printed-$$
stdin=
case "$*" in
*AmazonSideAsn*) prints=65002 ;;
*/dev/stdin*|*@-*) stdin=$(tr '\n' '\036') ;;
esac
printf '%s\037' "${0##*/}" "$@" "$stdin" >> "$CALLS"
echo "$prints" | tee -a "$CALLS"
`

// TestShellRuns checks that a shell runs the commands of the documentation's examples to their end,
// passes to the programs the words and the input that Parse reads, with the values of variables,
// and prints the expected text at the end. A key is never in the words.
func TestShellRuns(t *testing.T) {
	bin := t.TempDir()
	for _, name := range []string{"aws", "az", "gcloud"} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte(fake), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	keyFile := filepath.Join(bin, "key")
	if err := os.WriteFile(keyFile, []byte("key-of-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i, text := range topologies(t, 0) {
		top := read(t, strings.ReplaceAll(text, "/etc/isthmus/keys/gcp-hub-1-0", keyFile), nil)
		values := map[string]string{}
		env := []string{"PATH=" + bin + ":" + os.Getenv("PATH")}
		for _, k := range top.Keys {
			if k.File != "" {
				values[k.Environment] = "key-of-file"
				continue
			}
			values[k.Environment] = "key-of-" + k.Name
			env = append(env, k.Environment+"=key-of-"+k.Name)
		}
		for n, o := range top.Outside() {
			if !o.Addr.IsValid() {
				values[o.Name] = fmt.Sprintf("192.0.2.%d", n)
				env = append(env, o.Name+"="+values[o.Name])
			}
		}
		for _, c := range top.Clouds() {
			script := render(t, top, c, "cli", "all")
			said, calls := runScript(t, script, env)
			want, err := readCommands(script)
			if err != nil {
				t.Fatal(err)
			}
			v := maps.Clone(values)
			for _, w := range want {
				expand := func(text string) string { return os.Expand(text, func(name string) string { return v[name] }) }
				program, _, _ := strings.Cut(w.words, " ")
				switch {
				case w.words == "echo" && !strings.Contains(said, expand(w.arg())+"\n"):
					t.Errorf("topology %d: %s does not say %s:\n%s", i, c, expand(w.arg()), said)
				case program != "aws" && program != "az" && program != "gcloud":
				case len(calls) == 0:
					t.Fatalf("topology %d: %s: %s was not run", i, c, w.words)
				default:
					is := calls[0]
					calls = calls[1:]
					v[w.assign] = is.prints
					var words []string
					for option, list := range w.options {
						if option != "NAME" {
							words = append(words, option)
						}
						for _, word := range list {
							words = append(words, expand(word))
						}
					}
					words = append(words, strings.Fields(w.words)...)
					// Azure's --set comes twice
					set := func(list []string) []string { return slices.Compact(slices.Sorted(slices.Values(list))) }
					if !slices.Equal(set(words), set(is.words)) || expand(w.stdin) != is.stdin {
						t.Errorf("topology %d: %s: ran %q with\n%s\nwant %q with\n%s", i, c, is.words, is.stdin, words, expand(w.stdin))
					}
					if strings.Contains(strings.Join(is.words, " "), "key-of-") {
						t.Errorf("topology %d: a key is in the words %q", i, is.words)
					}
				}
			}
			if len(calls) > 0 {
				t.Errorf("topology %d: %s: also ran %q", i, c, calls)
			}
		}
	}
}

// call is the record that a fake made of one run.
type call struct {
	words         []string
	stdin, prints string
}

// runScript has a shell run commands, and returns their output and the records of the fakes.
func runScript(t *testing.T, script string, env []string) (said string, calls []call) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "calls")
	cmd := exec.Command("sh")
	cmd.Stdin, cmd.Env = strings.NewReader(script), append(env, "CALLS="+file)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s\n%s", err, out, script)
	}
	noted, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(noted)) {
		parts := strings.Split(strings.TrimSuffix(line, "\n"), "\037")
		n := len(parts) - 2
		calls = append(calls, call{parts[:n], strings.ReplaceAll(parts[n], "\036", "\n"), parts[n+1]})
	}
	return string(out), calls
}
