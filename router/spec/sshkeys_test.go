package spec

import (
	"crypto/rand"
	"crypto/rsa"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

const (
	goodKey   = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
	securityK = "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAAIJjzc2a20RjCvN/0ibH6UpGuN9F9hDvD7x182bOesNhHAAAABHNzaDo="
)

// rsaKey returns the authorized_keys line of a new key.
func rsaKey(t *testing.T, bits int) string {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	public, err := ssh.NewPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return string(ssh.MarshalAuthorizedKey(public))
}

func TestSSHKeys(t *testing.T) {
	check := func(lines ...string) ([]string, string) {
		var c checker
		out := c.sshKeys("access.sshKeys", lines)
		var text []string
		for _, p := range c.Problems() {
			text = append(text, p.Path+": "+p.Rule)
		}
		return out, strings.Join(text, "\n")
	}
	got, problems := check("  "+goodKey+"  ann @ example\t", securityK)
	if problems != "" || !slices.Equal(got, []string{goodKey + " ann @ example", securityK}) {
		t.Errorf("%q, %s", got, problems)
	}
	for line, want := range map[string]string{
		"":                          "is not the line of a public key",
		"ssh-ed25519 AAAA":          "is not the line of a public key",
		"command=\"sh\" " + goodKey: "has options",
		goodKey + "\n" + securityK:  "is not the line of a public key",
		"# a comment":               "is not the line of a public key",
		goodKey + " " + strings.Repeat("x", maxSSHKey): "has more than 8192 bytes",
		rsaKey(t, 2048): "is shorter than 3072 bits",
	} {
		out, problems := check(line)
		if len(out) > 0 || !strings.Contains(problems, want) || problems == "" {
			t.Errorf("%.40q: %q, %q; want %q", line, out, problems, want)
		}
	}
	if _, problems := check(goodKey, goodKey+" again"); problems != "" {
		t.Error(problems) // another comment makes another line, which is valid
	}
	if _, problems := check(goodKey, goodKey); !strings.Contains(problems, "access.sshKeys[1]: is given twice") {
		t.Error(problems)
	}
	if _, problems := check(slices.Repeat([]string{goodKey}, maxSSHKeys+1)...); !strings.Contains(problems, "are more than 64 keys") {
		t.Error(problems)
	}
}
