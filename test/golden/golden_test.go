package golden

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// failures records the errors that Check reports to a test.
type failures struct {
	testing.TB
	errors []string
}

func (f *failures) Helper() {}

func (f *failures) Errorf(format string, args ...any) {
	f.errors = append(f.errors, args[1].(string))
}

func TestCheck(t *testing.T) {
	if *update {
		t.Log("-update is given: Check writes instead of comparing")
		return
	}
	file := filepath.Join(t.TempDir(), "x.golden")
	if err := os.WriteFile(file, []byte("a\nb\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	f := &failures{TB: t}
	if Check(f, file, "a\nb\n"); len(f.errors) != 0 {
		t.Errorf("the same text differs: %v", f.errors)
	}
	if Check(f, file, "a\nc\n"); len(f.errors) != 1 || !strings.HasPrefix(f.errors[0], "line 2, want\nb\n") {
		t.Errorf("another text: %q, want the difference from line 2", f.errors)
	}
	*update = true
	defer func() { *update = false }()
	Check(f, file, "new\n")
	if text, err := os.ReadFile(file); err != nil || string(text) != "new\n" {
		t.Errorf("-update left %q, %v", text, err)
	}
}
