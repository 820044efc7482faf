package vm

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestQuote(t *testing.T) {
	for _, s := range []string{"", "a b", "it's", `$(x) "y" \`, "a\nb"} {
		out, err := exec.Command("sh", "-c", "printf %s "+quote(s)).Output()
		if err != nil || string(out) != s {
			t.Errorf("quote(%q): a shell reads %q, %v", s, out, err)
		}
	}
}

func TestPackages(t *testing.T) {
	for suite, want := range map[string]string{Trixie: "libldns3t64", Bookworm: "libldns3"} {
		var of []string
		for _, p := range packages(suite) {
			if strings.HasPrefix(p, "libldns3") || p == "charon-systemd" {
				of = append(of, p)
			}
			if strings.ContainsAny(p, " #\t") {
				t.Errorf("%s: package %q", suite, p)
			}
		}
		if got := strings.Join(of, " "); got != "charon-systemd "+want {
			t.Errorf("%s: %s", suite, got)
		}
	}
	if _, err := buildSuite(t.Context(), "sid", io.Discard); err == nil || !strings.Contains(err.Error(), "bookworm") {
		t.Errorf("an unknown suite: %v", err)
	}
}

func TestLoadOrder(t *testing.T) {
	tree := t.TempDir()
	dir := filepath.Join(tree, "usr/lib/modules/1")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("modules.dep", "kernel/a-b.ko: kernel/mid.ko kernel/low.ko\nkernel/mid.ko: kernel/low.ko\nkernel/low.ko:\n")
	write("modules.builtin", "kernel/x/inside.ko\n")
	got, err := loadOrder(tree, "1", []string{"inside", "mid", "a_b"})
	if want := "kernel/low.ko kernel/mid.ko kernel/a-b.ko"; err != nil || strings.Join(got, " ") != want {
		t.Errorf("loadOrder = %v, %v; want %s", got, err, want)
	}
	if _, err := loadOrder(tree, "1", []string{"gone"}); err == nil {
		t.Error("loadOrder accepts a module that is not there")
	}
}

// A guest is trusted less than this machine: the files that it packs must stay in the directory.
func TestUnpackStaysInside(t *testing.T) {
	for _, name := range []string{"../escaped", "/../escaped", "a/../../escaped"} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: 1, Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		w.Write([]byte("x"))
		w.Close()
		top := t.TempDir()
		archive := filepath.Join(top, "a.tar")
		if err := os.WriteFile(archive, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		err := unpack(archive, filepath.Join(top, "in"))
		if _, statErr := os.Stat(filepath.Join(top, "escaped")); statErr == nil {
			t.Errorf("unpack wrote %q outside of its directory (%v)", name, err)
		}
	}
}

// TestRun boots one guest, whose first boot fails, and checks everything that Run promises.
func TestRun(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("needs root")
	}
	qemu, err := FindQEMU(t.Context(), t.Output())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	// dies returns a QEMU whose guest dies so many times while it boots.
	dies := func(times int) (_ *QEMU, count func() int) {
		log := filepath.Join(t.TempDir(), "boots")
		script := `echo >> "$0"; [ $(wc -l < "$0") -gt $1 ] || exit 1; shift; exec "$@"`
		return &QEMU{append([]string{"sh", "-c", script, log, strconv.Itoa(times)}, qemu.command...), qemu.env}, func() int {
			b, _ := os.ReadFile(log)
			return len(b)
		}
	}
	never, boots := dies(100)
	if _, err := Run(context.Background(), Config{Command: []string{"true"}, qemu: never}); !errors.Is(err, ErrGuest) || boots() != maxBoots {
		t.Errorf("a guest that never boots: %v after %d boots", err, boots())
	}
	second, boots := dies(1)
	file := filepath.Join(dir, "hello")
	if err := os.WriteFile(file, []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	script := `cat hello; echo "$GREETING" >&2; echo left > /out/file
		ip link add x type xfrm dev lo if_id 7 && ip link add w type wireguard && ip link add v type vrf table 9 || exit 9
		trap '' TERM; sleep 100 & wait; wait`
	var stdout, stderr bytes.Buffer
	out := filepath.Join(dir, "out")
	status, err := Run(context.Background(), Config{
		Command: []string{"sh", "-c", script}, Payload: []string{file}, Env: []string{"GREETING=it's me"}, Out: out,
		Stdout: &stdout, Stderr: &stderr, Limit: 3 * time.Second, Progress: t.Output(), qemu: second,
	})
	if err != nil {
		t.Fatal(err)
	}
	if stdout.String() != "from the host" || !strings.HasPrefix(stderr.String(), "it's me\n") {
		t.Errorf("stdout %q, stderr %q", stdout.String(), stderr.String())
	}
	if boots() != 2 {
		t.Errorf("%d boots, want two", boots())
	}
	if status != 124 && status != 137 {
		t.Errorf("status %d, want that of a command stopped at the limit", status)
	}
	if b, err := os.ReadFile(filepath.Join(out, "file")); err != nil || string(b) != "left\n" {
		t.Errorf("file from /out: %q, %v", b, err)
	}
}
