// Package golden compares the output of a test with a file of the tree. "go test -update", or "make
// golden" for the whole tree, writes the files.
package golden

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files and the generated pages")

// Check fails a test when a file does not have the text got. With -update it writes the file.
func Check(t testing.TB, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v; run make golden", err)
	}
	if string(want) != got {
		t.Errorf("%s is not current; run make golden and look at the difference:\n%s", file, difference(string(want), got))
	}
}

// Updating reports whether Check writes files.
func Updating() bool { return *update }

// difference returns the first five lines of both texts from where they differ.
func difference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range max(len(w), len(g)) {
		if i >= len(w) || i >= len(g) || w[i] != g[i] {
			at := func(s []string) string { return strings.Join(s[min(i, len(s)):min(i+5, len(s))], "\n") }
			return fmt.Sprintf("line %d, want\n%s\ngot\n%s", i+1, at(w), at(g))
		}
	}
	return ""
}
