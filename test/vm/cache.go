package vm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// CacheDir is where images are kept: $ISTHMUS_CACHE, else
// $XDG_CACHE_HOME/isthmus, else ~/.cache/isthmus.
func CacheDir() (string, error) {
	if d := os.Getenv("ISTHMUS_CACHE"); d != "" {
		return filepath.Abs(d)
	}
	d, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("finding the cache directory: %w", err)
	}
	return filepath.Join(d, "isthmus"), nil
}

// Digest returns 12 hexadecimal digits for the name of a directory whose content description
// decides.
func Digest(description []byte) string {
	sum := sha256.Sum256(description)
	return hex.EncodeToString(sum[:])[:12]
}

// Kept returns the directory with that name in the cache, which must not be changed. If it is
// missing, fill gets an empty directory, which gets the name once fill has returned. Only one
// process makes directories, others wait for it. Kept removes what an interrupted one has left.
// Progress receives the steps that fill reports, as short lines.
func Kept(ctx context.Context, name string, progress io.Writer, fill func(dir string, step func(string)) error) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, name)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", fmt.Errorf("making the cache directory: %w", err)
	}
	unlock, err := Lock(ctx, filepath.Join(cache, "build.lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	stale, _ := filepath.Glob(filepath.Join(cache, "build-*"))
	for _, d := range stale { // of a process that was killed, since this one holds the lock
		if fi, err := os.Stat(d); err == nil && fi.IsDir() {
			os.RemoveAll(d)
		}
	}
	tmp, err := os.MkdirTemp(cache, "build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	start := time.Now()
	step := func(s string) { fmt.Fprintf(progress, "vm: %4.0f s  %s\n", time.Since(start).Seconds(), s) }
	if err := fill(tmp, step); err != nil {
		return "", err
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return "", err
	}
	step("ready in " + dir)
	return dir, nil
}

// Debian makes a root of a Debian release in a directory that is empty or missing, by mmdebstrap
// with these options.
func Debian(ctx context.Context, suite, dir string, options ...string) error {
	args := append(append([]string{"--quiet"}, options...), suite, dir)
	if m := Mirror(ctx); m != "" {
		args = append(args, m)
	}
	return run(ctx, "mmdebstrap", args...)
}

// Mirror is the Debian mirror that this machine's apt is configured with, or
// "" where there is none (mmdebstrap then uses its own default).
func Mirror(ctx context.Context) string { return mirror(ctx, "Debian") }

// SecurityMirror is that of Debian's security updates, or "".
func SecurityMirror(ctx context.Context) string { return mirror(ctx, "Debian-Security") }

func mirror(ctx context.Context, of string) string {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages").Output()
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(out)) {
		if label, uri, _ := strings.Cut(strings.TrimSpace(line), " "); label == of {
			return uri
		}
	}
	return ""
}

// run starts a program of this machine and puts its output into the error.
func run(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGTERM}
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) } // lets mmdebstrap unmount
	cmd.WaitDelay = 20 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("running %s: %w", name, ctx.Err())
		}
		return fmt.Errorf("running %s: %w: %s", name, err, tail(out))
	}
	return nil
}

// tail is the last few lines of a program's output.
func tail(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// Lock takes an exclusive lock on path and waits for it until ctx ends. The
// kernel drops the lock of a process that dies.
func Lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("locking: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for %s: %w", path, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}
