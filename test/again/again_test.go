// Package again tests the script that runs failed tests once more.
package again

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestRun: the run passes when what failed passes the second time, and only then.
func TestRun(t *testing.T) {
	const head = "package p\nimport (\"os\"; \"strings\"; \"testing\")\nvar _ = strings.ToUpper(os.Args[0])\nfunc TestGood(*testing.T) {}\n"
	const flaky = "(t *testing.T) { file := strings.ReplaceAll(t.Name(), \"/\", \"-\"); if _, err := os.Stat(file); err != nil { os.WriteFile(file, nil, 0o600); t.Fatal(\"too early\") } }\n"
	for _, test := range []struct {
		name, body string
		fails      bool
		flaky      string
	}{
		{"all pass", "", false, ""},
		{"passes the second time", "func TestA" + flaky + "func TestB" + flaky, false, "FLAKY: TestA|TestB of example.org/p failed at first"},
		{"a subtest", "func TestA(t *testing.T) { t.Run(\"sub\", func" + strings.TrimSpace(flaky) + ") }\n", false, "FLAKY: TestA of example.org/p failed at first"},
		{"fails twice", "func TestA" + flaky + "func TestB(t *testing.T) { t.Fatal(\"always\") }\n", true, ""},
		{"four fail", "func TestA" + flaky + "func TestB" + flaky + "func TestC" + flaky + "func TestD" + flaky, true, ""},
		{"a panic hides the tests after it", "func TestA" + flaky + "func TestB(*testing.T) { if _, err := os.Stat(\"B\"); err != nil { os.WriteFile(\"B\", nil, 0o600); panic(\"B\") } }\n", true, ""},
		{"the process ends", "func TestA" + flaky + "func TestB(*testing.T) { os.Exit(3) }\n", true, ""},
		{"does not compile", "func TestA(", true, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for file, text := range map[string]string{"go.mod": "module example.org\n\ngo 1.26\n", "p/p_test.go": head + test.body, "q/q_test.go": strings.Replace(head, "package p", "package q", 1)} {
				if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, file)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			script, err := filepath.Abs("run")
			if err != nil {
				t.Fatal(err)
			}
			c := exec.CommandContext(t.Context(), script, "./...")
			c.Dir = dir
			out, err := c.CombinedOutput()
			if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			if (err != nil) != test.fails || test.flaky == "" && strings.Contains(string(out), "FLAKY") || !strings.Contains(string(out), test.flaky) {
				t.Errorf("%v, want a failure: %v\n%s", err, test.fails, out)
			}
		})
	}
}
