package main

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// completions returns the words that complete a command line, and the directive for the shell.
func (w *world) completions(line string) (words []string, directive string) {
	out, _, _ := w.run(w.t.Context(), "", append([]string{cobra.ShellCompNoDescRequestCmd}, strings.Split(line, " ")...)...)
	words = strings.Fields(out)
	if len(words) == 0 {
		w.t.Fatalf("%s: no answer", line)
	}
	return words[:len(words)-1], words[len(words)-1]
}

// TestCompletion: names come from the node, those that are given already do not come again, and
// files are offered only where a file is expected.
func TestCompletion(t *testing.T) {
	w := newWorld(t)
	for _, line := range []string{"secret set psk-a", "apply -f testdata/first.yaml", "apply -f testdata/second.yaml"} {
		if _, stderr, code := w.run(t.Context(), "0123456789", strings.Fields(line)...); code != 0 {
			t.Fatalf("%s: exit %d, %s", line, code, stderr)
		}
	}
	const none, file, ordered, byExtension = ":4", ":0", ":36", ":8"
	for line, want := range map[string]string{
		"get tunnels ":                 "aws-0 site-0 vwan-1 " + none,
		"get tunnel aws-0 ":            "site-0 vwan-1 " + none,
		"describe tunnel ":             "aws-0 site-0 vwan-1 " + none,
		"describe peers az":            "azure-0 " + none,
		"describe route ":              "10.0.0.0/8 172.16.0.0/16 " + none,
		"get routes --peer ":           "aws-0 azure-0 " + none,
		"get routes --rejected ":       "aws-0 azure-0 " + none,
		"ping 10.1.2.3 --tunnel ":      "aws-0 site-0 vwan-1 " + none,
		"ping ":                        none,
		"ping 10.1.2.3 -o ":            "table json " + none,
		"capture --tunnel ":            "aws-0 site-0 vwan-1 " + none,
		"capture --protocol ":          "tcp udp icmp esp " + none,
		"get events --tunnel ":         "aws-0 site-0 vwan-1 " + none,
		"get event --pool ":            "main " + none,
		"get events --severity ":       "info warning error " + none,
		"get logs --level ":            "debug info warn error " + none,
		"get logs --room ":             "bgp fib ipsec " + none,
		"get log --room i":             "ipsec " + none,
		"reset peer ":                  "aws-0 azure-0 " + none,
		"reset peer aws-0 ":            none,
		"policy delete ":               "partner " + none,
		"secret set ":                  "psk-a " + none,
		"secret delete ":               "psk-a " + none,
		"describe generation ":         "1 2 " + none,
		"confirm ":                     "2 1 " + ordered,
		"rollback --to ":               "2 1 " + ordered,
		"get spec --generation ":       "2 1 " + ordered,
		"get peers -o ":                "table wide name json yaml " + none,
		"client issue a --role ":       "reader operator admin " + none,
		"secret set a --generate ":     "psk wireguard " + none,
		"nat who 1.2.3.4:5 --to ":      none,
		"version ":                     none,
		"client issue ":                "--out -o --role " + none,
		"apply -f ":                    "yaml yml json " + byExtension,
		"context import ":              file,
		"egress verify ":               file,
		"cloud import ":                "aws azure gcp oci " + none,
		"cloud import aws ":            file,
		"describe condition CharonUnr": "CharonUnreachable " + none,
		"topology render --as ":        "cli terraform " + none,
		"secret set a --from-file ":    file,
		"--context " + w.home + "/no":  file,
	} {
		words, directive := w.completions(line)
		if got := strings.TrimSpace(strings.Join(words, " ") + " " + directive); got != want {
			t.Errorf("%s: %s, want %s", line, got, want)
		}
	}
}

// TestCompletionIsSilent: a node that does not answer delays a key press by two seconds at most,
// and leaves no text in the command line.
func TestCompletionIsSilent(t *testing.T) {
	w := newWorld(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for _, line := range []string{"--address " + silent.Addr().String() + " get tunnels ", "--context /none get tunnels ", "--address x get tunnels "} {
		began := time.Now()
		if words, directive := w.completions(line); len(words) > 0 || directive != ":4" {
			t.Errorf("%s: %v, %s", line, words, directive)
		}
		if d := time.Since(began); d > 10*time.Second {
			t.Errorf("%s took %v", line, d)
		}
	}
}

// TestFlagsComplete: the value of each flag that is a text completes, or is one that only the user
// knows.
func TestFlagsComplete(t *testing.T) {
	free := map[string]bool{
		"address": true, "within": true, "to": true, "from": true, "expect": true, "canary": true, "canary-from": true,
		"at": true, "name": true, "endpoint": true, "set": true, "file": true, "out": true, "secrets-dir": true, "for": true,
		"since": true, "who": true, "method": true, "host": true,
	}
	a := &app{stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard, now: time.Now, wall: time.Now, getenv: func(string) string { return "" }}
	var visit func(c *cobra.Command)
	visit = func(c *cobra.Command) {
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			switch f.Value.Type() {
			case "string", "stringSlice", "stringArray", "format":
			default:
				return
			}
			if _, ok := c.GetFlagCompletionFunc(f.Name); !ok && !free[f.Name] && len(f.Annotations) == 0 {
				t.Errorf("%s --%s has no completion", c.CommandPath(), f.Name)
			}
		})
		for _, sub := range c.Commands() {
			visit(sub)
		}
	}
	visit(a.command())
}
