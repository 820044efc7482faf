package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDiff compares texts of documents.
func TestDiff(t *testing.T) {
	w := newWorld(t)
	for _, file := range []string{"testdata/first.yaml", "testdata/second.yaml"} {
		if _, errs, code := w.run(t.Context(), "", "apply", "-f", file); code != exitOK {
			t.Fatal(errs)
		}
	}
	file := filepath.Join(t.TempDir(), "hub.yaml")
	if err := os.WriteFile(file, []byte("aws-0\n\tazure-0 # \x1b[31m\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, k := range []struct {
		args string
		code int
		out  string // "!" first: not in it
		errs string
	}{
		{"diff", exitChanges, "--- generation 1\n+++ generation 2\n@@", ""},
		{"diff", exitChanges, "\n+gcp-0\n", ""},
		{"diff 1", exitChanges, "--- generation 1\n+++ generation 2\n@@", ""},
		{"diff 2 1", exitChanges, "\n-gcp-0\n", ""},
		{"diff 2", exitOK, "", "generation 2 and generation 2 are the same"},
		{"diff -f " + file, exitChanges, "--- generation 2\n+++ " + file + "\n@@", ""},
		{"diff -f " + file, exitChanges, "\n+\tazure-0 # ?[31m\n", ""},
		{"diff 1 -f " + file, exitChanges, "--- generation 1\n+++ " + file, ""},
		{"diff 1 2 -f " + file, exitUsage, "", "exclude each other"},
		{"diff x", exitUsage, "", "must be a number"},
		{"diff 9", exitFailed, "", "generation 9"},
	} {
		out, errs, code := w.run(t.Context(), "", strings.Fields(k.args)...)
		if code != k.code || !strings.Contains(out, k.out) || !strings.Contains(errs, k.errs) || strings.Contains(out, "\x1b") {
			t.Errorf("%s: exit %d, want %d\n%s%s", k.args, code, k.code, out, errs)
		}
	}
	out, errs, code := w.run(t.Context(), "", "get", "spec", "--effective")
	if code != exitOK || !strings.Contains(out, "mtu: 1500") {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
	if _, _, code := w.run(t.Context(), "", "get", "spec", "--effective", "--generation", "1"); code != exitUsage {
		t.Errorf("exit %d", code)
	}
	alone := newWorld(t)
	if _, _, code := alone.run(t.Context(), "", "apply", "-f", "testdata/first.yaml"); code != exitOK {
		t.Fatal(code)
	}
	if _, errs, code := alone.run(t.Context(), "", "diff"); code != exitFailed || !strings.Contains(errs, "generation 1 is the first one") {
		t.Errorf("exit %d: %s", code, errs)
	}
}
