//go:build unix

package takeover

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestCommand(t *testing.T) {
	file := filepath.Join(t.TempDir(), "mover")
	script := func(text string) Command {
		if err := os.WriteFile(file, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
		return Command(file)
	}
	if err := script(`[ "$*" = "take 10.0.0.5=203.0.113.5" ]`).Take(t.Context(), addresses); err != nil {
		t.Error(err)
	}
	if err := script("echo no quota; exit 3").Take(t.Context(), addresses); err == nil || !strings.Contains(err.Error(), "no quota") {
		t.Error(err)
	}
	// A program may leave another one behind that has its output.
	if err := script("sleep 3 & exit 0").Take(t.Context(), addresses); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := script("sleep 30 & wait").Take(ctx, addresses); err == nil {
		t.Error("a program that hangs succeeded")
	}
}
