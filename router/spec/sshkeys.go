package spec

import (
	"crypto/rsa"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh"
)

const (
	maxSSHKeys   = 64
	maxSSHKey    = 8 << 10 // bytes
	leastRSABits = 3072
)

// sshTypes are the types of keys that may log in. RSA keys also need leastRSABits.
var sshTypes = []string{ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521, ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoRSA}

// sshKeys checks lines of authorized_keys. The returned lines have type, key and comment, and
// nothing that the server could take for an option.
func (c *checker) sshKeys(path string, lines []string) (out []string) {
	if len(lines) > maxSSHKeys {
		c.Problem(path, strconv.Itoa(len(lines)), fmt.Sprintf("are more than %d keys", maxSSHKeys), "remove some")
		return nil
	}
	for i, line := range lines {
		at := fmt.Sprintf("%s[%d]", path, i)
		shown := line[:min(len(line), 40)]
		if len(line) > maxSSHKey {
			c.Problem(at, shown, fmt.Sprintf("has more than %d bytes", maxSSHKey), "give one line as in id_ed25519.pub")
			continue
		}
		key, comment, options, rest, err := ssh.ParseAuthorizedKey([]byte(line))
		switch {
		case err != nil || len(strings.TrimSpace(string(rest))) > 0:
			c.Problem(at, shown, "is not the line of a public key", "give one line as in id_ed25519.pub")
			continue
		case len(options) > 0:
			c.Problem(at, shown, "has options, which are not accepted", "give type, key and comment alone")
			continue
		case !slices.Contains(sshTypes, key.Type()):
			c.Problem(at, key.Type(), "is of a type that may not log in", "make a key with ssh-keygen -t ed25519")
			continue
		}
		if k, ok := key.(ssh.CryptoPublicKey); ok {
			if r, ok := k.CryptoPublicKey().(*rsa.PublicKey); ok && r.N.BitLen() < leastRSABits {
				c.Problem(at, fmt.Sprintf("%d bits", r.N.BitLen()), fmt.Sprintf("is shorter than %d bits", leastRSABits), "make a key with ssh-keygen -t ed25519")
				continue
			}
		}
		clean := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
		if words := strings.Join(strings.Fields(comment), " "); words != "" {
			clean += " " + words
		}
		if slices.Contains(out, clean) {
			c.Problem(at, shown, "is given twice", "keep one of them")
			continue
		}
		out = append(out, clean)
	}
	return out
}
