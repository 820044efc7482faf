package firstboot

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/isthmus-net/isthmus/router/disk"
)

// Lines around the first admin's context on a console.
const (
	Begin = "-----BEGIN ISTHMUS CONTEXT-----"
	End   = "-----END ISTHMUS CONTEXT-----"
)

// maxConsole bounds in bytes what the console shows.
const maxConsole = 32 << 10

// contextText returns the context without its key, for the owner of the request.
func contextText(address, serverName, authority, certificate string) string {
	var b strings.Builder
	if address != "" {
		fmt.Fprintf(&b, "address: %q\n", address)
	}
	fmt.Fprintf(&b, "serverName: %s\n", serverName)
	for _, f := range []struct{ name, text string }{{"authority", authority}, {"certificate", certificate}} {
		fmt.Fprintf(&b, "%s: |\n", f.name)
		for line := range strings.Lines(f.text) {
			b.WriteString("  " + strings.TrimRight(line, "\n") + "\n")
		}
	}
	return b.String()
}

// note replaces the last lines that the console shows.
func (b *Boot) note(lines ...string) {
	b.mu.Lock()
	b.notes = lines
	b.mu.Unlock()
	b.show()
}

// show writes the file with the console's text. A unit of the image prints the file when it
// changes, so that the daemon itself never waits for a console.
func (b *Boot) show() {
	b.showing.Lock() // called by the readers of facts and of user-data
	defer b.showing.Unlock()
	b.mu.Lock()
	rec, notes, f := b.rec, b.notes, b.facts
	b.mu.Unlock()
	if rec.Digest == "" && notes == nil {
		return // the file may be from an earlier daemon of this boot
	}
	var t strings.Builder
	if rec.Digest != "" {
		fmt.Fprintf(&t, "first boot at %s, user-data with SHA-256 %s\n", rec.Time.Format("2006-01-02 15:04:05Z"), rec.Digest)
	}
	if f.Instance != "" {
		fmt.Fprintf(&t, "instance %s on %s; public addresses: %s\n", f.Instance, f.Platform, strings.Join(append(publicAddresses(f), ""), " "))
	}
	if rec.Generation > 0 {
		fmt.Fprintf(&t, "the document of the user-data became generation %d\n", rec.Generation)
	}
	for _, n := range notes {
		t.WriteString(n + "\n")
	}
	var out strings.Builder
	for line := range strings.Lines(t.String()) {
		if out.Len() < maxConsole-4096 {
			out.WriteString("isthmus: " + plain(line))
		}
	}
	if rec.Context != "" {
		fmt.Fprintf(&out, "isthmus: %s: isthmus client accept < this text\n%s\n%s%s\n", plain(rec.Admin), Begin, rec.Context, End)
	}
	if err := replace(b.o.Console, []byte(out.String())); err != nil {
		b.o.Log.Warn("writing the console's text failed", "err", err)
	}
	shell := filepath.Join(b.o.Runtime, "console-shell")
	var err error
	if rec.Shell {
		err = os.WriteFile(shell, nil, 0o644)
	} else if err = os.Remove(shell); errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if err != nil {
		b.o.Log.Warn("storing whether the console has a shell failed", "err", err)
	}
}

// plain keeps only printable ASCII, because a terminal interprets other characters.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r >= ' ' && r < 0x7f {
			return r
		}
		return '?'
	}, s)
}

// replace writes a file atomically, readable for everyone, when it differs.
func replace(name string, data []byte) error {
	if old, err := os.ReadFile(name); err == nil && bytes.Equal(old, data) {
		return nil
	}
	return disk.Replace(name, data, 0o644)
}
