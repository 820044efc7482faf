package build

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// secrets matches content that no file of an image may have.
var secrets = regexp.MustCompile(`-----BEGIN ([A-Z]+ )?PRIVATE KEY-----|minisign encrypted secret key|rsign encrypted secret key`)

// scanned bounds the part of a file that is searched for secrets. A key is in a small file.
const scanned = 1 << 20

// Audit returns what must not be in a public image: passwords, keys, files that a machine or a
// shell has left, and files that grant privileges. It checks what the clouds' marketplaces check,
// and more.
func Audit(tree string) (problems []string) {
	problem := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	shadow, err := os.ReadFile(filepath.Join(tree, "etc/shadow"))
	if err != nil {
		problem("etc/shadow: %v", err)
	}
	for line := range strings.Lines(string(shadow)) {
		fields := strings.Split(line, ":")
		if len(fields) > 1 && !strings.HasPrefix(fields[1], "*") && !strings.HasPrefix(fields[1], "!") {
			problem("etc/shadow: %s has a password, or needs none; lock it", fields[0])
		}
	}
	err = walk(tree, func(f file) error {
		rel, err := filepath.Rel(tree, f.path)
		if err != nil {
			return err
		}
		mode := f.info.Mode()
		switch base := filepath.Base(rel); {
		case mode.IsRegular() && mode&(fs.ModeSetuid|fs.ModeSetgid) != 0:
			problem("%s: it is setuid or setgid", rel)
		case mode&fs.ModeSymlink == 0 && mode.Perm()&0o002 != 0 && mode&fs.ModeSticky == 0 && !mode.IsDir():
			problem("%s: everyone may write it", rel)
		case mode&(fs.ModeDevice|fs.ModeNamedPipe|fs.ModeSocket) != 0:
			problem("%s: it is a device, a pipe or a socket", rel)
		case base == "authorized_keys", strings.HasPrefix(base, "ssh_host_") && strings.HasSuffix(base, "key"), strings.HasSuffix(base, "_history"), base == "random-seed",
			base == "credential.secret", base == ".netrc", base == ".git-credentials":
			problem("%s: it belongs to one machine or one person", rel)
		}
		if !mode.IsRegular() || f.info.Size() == 0 {
			return nil
		}
		text, err := head(f.path)
		if err != nil {
			return err
		}
		// A program may contain the headers by which it recognizes a key.
		if !bytes.HasPrefix(text, []byte("\x7fELF")) && secrets.Match(text) {
			problem("%s: it has a private key", rel)
		}
		return nil
	})
	if err != nil {
		problem("reading the tree: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(tree, "etc/machine-id")); err != nil || len(bytes.TrimSpace(b)) > 0 {
		problem("etc/machine-id: it must exist and be empty, so that each machine gets its own")
	}
	for _, dir := range []string{"root", "home", "tmp", "var"} {
		if left, _ := os.ReadDir(filepath.Join(tree, dir)); len(left) > 0 {
			problem("%s: it must be empty, and has %s", dir, left[0].Name())
		}
	}
	return problems
}

func head(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, scanned))
}
