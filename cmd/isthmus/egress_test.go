package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestProofIsVerified(t *testing.T) {
	w := newWorld(t)
	signed, stderr, code := w.run(t.Context(), "", "egress", "prove", "--to", "198.51.100.0/24", "-o", "json")
	if code != exitOK {
		t.Fatalf("proving: %d: %s", code, stderr)
	}
	if out, stderr, code := w.run(t.Context(), signed, "egress", "verify", "-"); code != exitOK || !strings.Contains(out, "HOLDS") {
		t.Fatalf("verifying: %d: %s%s", code, out, stderr)
	}

	var parts map[string]any
	if err := json.Unmarshal([]byte(signed), &parts); err != nil {
		t.Fatal(err)
	}
	other := newWorld(t)
	foreign, _, _ := other.run(t.Context(), "", "egress", "prove", "--to", "198.51.100.0/24", "-o", "json")
	var foreignParts map[string]any
	if err := json.Unmarshal([]byte(foreign), &foreignParts); err != nil {
		t.Fatal(err)
	}
	for part, want := range map[string]string{"statement": "not of this statement", "signature": "not of this statement", "certificate": "not of this authority"} {
		mixed := map[string]any{}
		for k, v := range parts {
			mixed[k] = v
		}
		mixed[part] = foreignParts[part]
		if part == "statement" { // the same but for a word
			denied, _, _ := w.run(t.Context(), "", "egress", "prove", "--to", "198.51.101.0/24", "-o", "json")
			var d map[string]any
			if err := json.Unmarshal([]byte(denied), &d); err != nil {
				t.Fatal(err)
			}
			mixed[part] = d[part]
		}
		data, err := json.Marshal(mixed)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(w.home, "proof.json")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, stderr, code := w.run(t.Context(), "", "egress", "verify", file); code != exitFailed || out != "" || !strings.Contains(stderr, want) {
			t.Errorf("with another %s: %d: %s%s", part, code, out, stderr)
		}
	}
}
