// Package run tests the script that runs the tests: the script fails on skipped tests, and runs
// failed ones once more.
package run

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestAgain checks that a run passes only if each failed test passes the second time.
func TestAgain(t *testing.T) {
	const head = "package p\nimport (\"os\"; \"strings\"; \"testing\")\nvar _ = strings.ToUpper(os.Args[0])\nfunc TestGood(*testing.T) {}\n"
	const flaky = "(t *testing.T) { file := strings.ReplaceAll(t.Name(), \"/\", \"-\"); if _, err := os.Stat(file); err != nil { os.WriteFile(file, nil, 0o600); t.Fatal(\"too early\") } }\n"
	for _, test := range []struct {
		name, body string
		fails      bool
		flaky      string
	}{
		{"all pass", "", false, ""},
		{"passes the second time", "func TestA" + flaky + "func TestB" + flaky, false, "FLAKY: example.org/p.TestB: 2 runs, 1 failures"},
		{"a subtest", "func TestA(t *testing.T) { t.Run(\"sub\", func" + strings.TrimSpace(flaky) + ") }\n", false, "FLAKY: example.org/p.TestA: 2 runs, 1 failures"},
		{"fails twice", "func TestA" + flaky + "func TestB(t *testing.T) { t.Fatal(\"always\") }\n", true, ""},
		{"four fail", "func TestA" + flaky + "func TestB" + flaky + "func TestC" + flaky + "func TestD" + flaky, true, ""},
		{"a panic hides the tests after it", "func TestA" + flaky + "func TestB(*testing.T) { if _, err := os.Stat(\"B\"); err != nil { os.WriteFile(\"B\", nil, 0o600); panic(\"B\") } }\n", true, ""},
		{"the process ends", "func TestA" + flaky + "func TestB(*testing.T) { os.Exit(3) }\n", true, ""},
		{"skips", "func TestA(t *testing.T) { t.Skip(\"for no reason\") }\n", true, ""},
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
			out, err := script(t, dir, "-again", "./...")
			if (err != nil) != test.fails || test.flaky == "" && strings.Contains(out, "FLAKY") || !strings.Contains(out, test.flaky) {
				t.Errorf("%v, want a failure: %v\n%s", err, test.fails, out)
			}
		})
	}
}

// script runs the script in a module of its own.
func script(t *testing.T, dir string, args ...string) (string, error) {
	t.Helper()
	path, err := filepath.Abs("run")
	if err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), path, args...)
	c.Dir = dir
	c.Env = append(os.Environ(), "ISTHMUS_RESULTS="+filepath.Join(dir, "results"))
	out, err := c.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), err
}

// TestSkips checks that a run without -again fails on a skipped test and names it, and that
// -slowest lists the tests of all runs.
func TestSkips(t *testing.T) {
	dir := t.TempDir()
	for file, text := range map[string]string{
		"go.mod":      "module example.org\n\ngo 1.26\n",
		"p/p_test.go": "package p\nimport (\"testing\"; \"time\")\nfunc TestSlow(t *testing.T) { time.Sleep(200 * time.Millisecond) }\n",
		"q/q_test.go": "package q\nimport (\"testing\"; \"time\")\nfunc TestSkip(t *testing.T) { time.Sleep(200 * time.Millisecond); t.Skip() }\n",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, file)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := script(t, dir, "./p"); err != nil || strings.Contains(out, "skipped") {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := script(t, dir, "./q"); err == nil || !strings.Contains(out, "skipped: TestSkip of example.org/q") {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := script(t, dir, "-slowest"); err != nil || !strings.Contains(out, "example.org/p TestSlow ") || !strings.Contains(out, "example.org/q TestSkip ") {
		t.Errorf("%v\n%s", err, out)
	}
}
