package figures

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestKnown(t *testing.T) {
	for socket, want := range map[string]bool{
		"udp 0.0.0.0:500": true, "udp [::]:4500": true, "tcp *:7443": true, "udp 10.0.2.15:68": true, "udp [fe80::1]:546": true,
		"tcp 0.0.0.0:22": false, "tcp *:500": false, "udp *:7443": false, "udp 127.0.0.53:53": false, "tcp": false, "": false, "udp *:*": false,
	} {
		if Known(socket) != want {
			t.Errorf("%q: %v", socket, !want)
		}
	}
}

func TestMeasured(t *testing.T) {
	dir := t.TempDir()
	if m, err := Read(dir, "aa"); m != nil || err != nil {
		t.Errorf("nothing was measured: %+v, %v", m, err)
	}
	m := Measured{Slot: "aa", Machine: "2 processors", Boots: []Boot{{Firmware: "BIOS", API: 33.4}}}
	if err := Write(dir, m); err != nil {
		t.Fatal(err)
	}
	if got, err := Read(dir, "aa"); err != nil || len(got.Boots) != 1 || got.Boots[0] != m.Boots[0] {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := Read(dir, "ab"); got != nil || err != nil {
		t.Errorf("another slot: %+v, %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(dir, "aa"); err == nil || !strings.Contains(err.Error(), name) {
		t.Error(err)
	}
}

func TestPrint(t *testing.T) {
	b := Built{Download: 88 << 20, Slot: 85 << 20, Disk: 2 << 30, Root: 172 << 20, Packages: 133, Programs: 400, Took: 156 * time.Second}
	text := func(b Built, m *Measured) string {
		var out strings.Builder
		Print(&out, b, m)
		return out.String()
	}
	has := func(text string, words ...string) {
		t.Helper()
		for _, w := range words {
			if !strings.Contains(text, w) {
				t.Errorf("no %q in\n%s", w, text)
			}
		}
	}
	plain := text(b, nil)
	has(plain, "88 MiB (qcow2)", "2048 MiB", "133 of Debian", "156 s", "machine: make test-image", "TCP 7443 (API)", "not published")
	if strings.Contains(plain, "Measured on") {
		t.Errorf("nothing was measured:\n%s", plain)
	}
	// Each source is used, and each number in the table has a source.
	used := map[string]bool{}
	table, _, _ := strings.Cut(plain, "Sources for the other systems")
	for _, m := range regexp.MustCompile(`\[(\d+)\]`).FindAllStringSubmatch(table, -1) {
		used[m[1]] = true
	}
	for i := range sources {
		if !used[fmt.Sprint(i+1)] {
			t.Errorf("source %d is not used", i+1)
		}
	}
	if len(used) != len(sources) {
		t.Errorf("%v are used, and there are %d sources", used, len(sources))
	}
	b.Download = 0
	has(text(b, &Measured{Machine: "2 processors, QEMU's emulation", Time: time.Date(2026, 11, 30, 0, 0, 0, 0, time.UTC), Boots: []Boot{
		{Firmware: "BIOS, first start", API: 33.4, Loader: 4, Kernel: 15.2, Services: 12, Own: 2.2}, {Firmware: "UEFI", API: 60, Tunnels: 64}}}),
		"not made", "BIOS, first start: 33 s ", "firmware, loader 4.0\n", "kernel, its RAM disk 15.2\n", "before isthmusd 12.0\n", "isthmusd 2.2\n", "UEFI: 60 s\n", "until the tunnels are up: 64 s\n", "Measured on 2026-11-30: 2 processors, QEMU's emulation.")
}
