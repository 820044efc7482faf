package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSupport checks that the archive has the state of the node and says which parts are missing,
// that only its owner can read it, and that it replaces no file.
func TestSupport(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "node.tar.gz")
	var out, errs bytes.Buffer
	if code := w.app(nil, &out, &errs).run(t.Context(), []string{"support", "-f", file}); code != exitOK {
		t.Fatalf("exit %d: %s", code, errs.String())
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	has := untar(t, file)
	for name, text := range map[string]string{
		"status.txt":                "tunnels",
		"tunnels.json":              `"name": "aws-0"`,
		"peers.txt":                 "established",
		"events.txt":                "TunnelDown",
		"history.txt":               "GENERATION",
		"routes/aws-0-rejected.txt": "no rule of import.allow contains it",
		"commands":                  "tunnels.txt: isthmus get tunnels -o wide\n",
	} {
		if !strings.Contains(has[name], text) {
			t.Errorf("%s: %q, want %q in it", name, has[name], text)
		}
	}
	for _, l := range supportLines {
		if has[l.file] == "" && !strings.Contains(has["errors"], "isthmus "+l.line+": ") {
			t.Errorf("%s is missing, and errors does not say why: %q", l.file, has["errors"])
		}
	}
	errs.Reset()
	if code := w.app(nil, &out, &errs).run(t.Context(), []string{"support", "-f", file}); code != exitFailed || !strings.Contains(errs.String(), "file exists") {
		t.Errorf("again: exit %d: %s", code, errs.String())
	}
	if len(untar(t, file)) != len(has) {
		t.Error("the first archive is not whole any more")
	}
}

func untar(t *testing.T, file string) map[string]string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	packed, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	has := map[string]string{}
	for archive := tar.NewReader(packed); ; {
		h, err := archive.Next()
		if err == io.EOF {
			return has
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		if !filepath.IsLocal(h.Name) {
			t.Errorf("the file name %q", h.Name)
		}
		has[h.Name] = string(data)
	}
}

// TestSupportNames checks that names of a node make no path, and that a large output is cut.
func TestSupportNames(t *testing.T) {
	if got := fileName("../../etc/x\ny"); got != "______etc_x_y" {
		t.Errorf("%q", got)
	}
	var c capped
	for range 3 {
		c.Write(make([]byte, maxSupportFile/2))
	}
	if c.Len() != maxSupportFile || !c.more {
		t.Errorf("%d bytes, more %v", c.Len(), c.more)
	}
}
