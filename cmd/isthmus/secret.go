package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"strings"
	"unicode"
	"unicode/utf16"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

var secretColumns = []column[*isthmusv1.SecretInfo]{
	{header: "SECRET", value: func(_ *app, s *isthmusv1.SecretInfo) string { return s.Name }},
	{header: "FINGERPRINT", value: func(_ *app, s *isthmusv1.SecretInfo) string {
		if s.Sealed {
			return "sealed"
		}
		return s.Fingerprint
	}},
	{header: "CHANGED", style: age, value: func(a *app, s *isthmusv1.SecretInfo) string { return a.since(s.Changed) }},
	{header: "USED-BY", value: func(_ *app, s *isthmusv1.SecretInfo) string { return strings.Join(s.UsedBy, ",") }, brief: func(s *isthmusv1.SecretInfo) string { return many(len(s.UsedBy), "fields") }},
}

func (a *app) addSecrets(root, get, describe, _ *cobra.Command) {
	secrets := nounCommands[*isthmusv1.SecretInfo]{
		singular: "secret", plural: "secrets", columns: secretColumns,
		samples:  [2]string{"psk-aws-0", "wg-branch"},
		list:     "List names and fingerprints of the secrets",
		describe: "Show the fingerprints of secrets, and the fields that use them",
	}
	secrets.add(a, get, describe, nil)
	group := a.group("secret", "Set, list and delete secrets, whose values cannot be read back")
	known := names(a, true, named((*isthmusv1.SecretInfo).GetName))
	group.AddCommand(a.secretSet(), secrets.get(a, "list"), secrets.describeAs(a, "show"), &cobra.Command{Use: "rollback NAME", Short: "Restore the previous value of a secret", Args: cobra.ExactArgs(1), ValidArgsFunction: known,
		Long: `Restore the value that a secret had before it was last set. Tunnels and peers that use it change at once. The previous value is
kept until the next document is applied and confirmed; rolling back twice restores the later value.`,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
			i, err := isthmusv1.NewSecretServiceClient(conn).RollbackSecret(ctx, &isthmusv1.RollbackSecretRequest{Name: args[0]})
			if err != nil {
				return err
			}
			a.note("rolled back %s, fingerprint %s", i.Name, i.Fingerprint)
			return nil
		})}, &cobra.Command{Use: "delete NAME", Short: "Remove a secret that nothing uses", Args: cobra.ExactArgs(1), ValidArgsFunction: known,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
			_, err := isthmusv1.NewSecretServiceClient(conn).DeleteSecret(ctx, &isthmusv1.DeleteSecretRequest{Name: args[0]})
			return err
		})})
	root.AddCommand(group)
}

func (a *app) secretSet() *cobra.Command {
	var file, generate string
	cmd := &cobra.Command{Use: "set NAME", Short: "Store or replace a secret", Args: cobra.ExactArgs(1), ValidArgsFunction: names(a, true, named((*isthmusv1.SecretInfo).GetName)),
		Long: `Store or replace a secret. The value comes from standard input (a terminal does not show it), from a file, or is generated.
One line break at its end is not part of it. Of a file, byte order marks, blanks and line ends around the value are cut off with
a note, and UTF-16 with a byte order mark is read as text.

--generate psk makes a pre-shared key of 48 letters and digits, which every cloud accepts, and prints it: the other side
needs it, and it cannot be read back. --generate wireguard makes a private key and prints its public key.`}
	cmd.RunE = runs(func(c *cobra.Command, args []string) error {
		var value []byte
		var answer string
		var err error
		switch {
		case generate == "psk":
			answer, err = generatePSK()
			value = []byte(answer)
		case generate == "wireguard":
			value, answer, err = generateWireGuard()
		case generate != "":
			return usageError{fmt.Errorf("--generate %q: must be psk or wireguard", generate)}
		case file != "":
			value, err = readKey(file)
		default:
			value, err = a.readSecret(c.Context(), args[0])
		}
		if err != nil {
			return fmt.Errorf("reading secret: %w", err)
		}
		if file != "" {
			value = a.trimmed(args[0], value)
		}
		value = bytes.TrimSuffix(bytes.TrimSuffix(value, []byte("\n")), []byte("\r"))
		return a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
			i, err := isthmusv1.NewSecretServiceClient(conn).SetSecret(ctx, &isthmusv1.SetSecretRequest{Name: args[0], Value: value})
			if err != nil {
				return fmt.Errorf("storing secret %s: %w", args[0], err)
			}
			a.note("stored %s, fingerprint %s", i.Name, i.Fingerprint)
			if answer != "" {
				_, err = fmt.Fprintln(a.stdout, answer)
			}
			return err
		})(c, args)
	})
	cmd.Flags().StringVar(&file, "from-file", "", "read the value from this file")
	cmd.Flags().StringVar(&generate, "generate", "", "generate the value: psk or wireguard")
	cmd.MarkFlagsMutuallyExclusive("from-file", "generate")
	completeFlag(cmd, "from-file", files)
	completeFlag(cmd, "generate", oneOf("psk", "wireguard"))
	return cmd
}

const pskLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

// generatePSK makes a key that AWS, Azure and Google Cloud all take: letters and digits, no zero in
// front. 48 of them have 285 bits.
func generatePSK() (string, error) {
	out := make([]byte, 48)
	for i := range out {
		letters := pskLetters
		if i == 0 {
			letters = pskLetters[:52]
		}
		n, err := rand.Int(rand.Reader, big.NewInt(int64(len(letters))))
		if err != nil {
			return "", err
		}
		out[i] = letters[n.Int64()]
	}
	return string(out), nil
}

// generateWireGuard returns a Curve25519 private key in base64, and its public key. The key is
// clamped (RFC 7748 section 5) because other tools expect to see it so.
func generateWireGuard() (private []byte, public string, err error) {
	raw := make([]byte, 32)
	rand.Read(raw)
	raw[0] &= 248
	raw[31] = raw[31]&127 | 64
	key, err := ecdh.X25519().NewPrivateKey(raw)
	if err != nil {
		return nil, "", err
	}
	return []byte(base64.StdEncoding.EncodeToString(raw)), base64.StdEncoding.EncodeToString(key.PublicKey().Bytes()), nil
}

// trimmed returns a value without what editors, shells and copying put around it. A line end, which
// most files have, is cut off without a note.
func (a *app) trimmed(name string, value []byte) []byte {
	line := bytes.TrimSuffix(bytes.TrimSuffix(value, []byte("\n")), []byte("\r"))
	out := value
	if bytes.HasPrefix(value, []byte{0xff, 0xfe}) || bytes.HasPrefix(value, []byte{0xfe, 0xff}) {
		order := binary.ByteOrder(binary.LittleEndian)
		if value[0] == 0xfe {
			order = binary.BigEndian
		}
		var units []uint16
		for i := 2; i+1 < len(value); i += 2 {
			units = append(units, order.Uint16(value[i:]))
		}
		out = []byte(string(utf16.Decode(units)))
	}
	out = bytes.TrimFunc(out, func(r rune) bool { return unicode.IsSpace(r) || r == 0 || r == '\ufeff' })
	if !bytes.Equal(out, line) {
		a.note("the value of %s had a byte order mark, blanks or line ends around it, which were cut off", name)
	}
	return out
}

// maxSecret bounds what is read; the node refuses more than 4096 bytes.
const maxSecret = 8192

// readSecret reads standard input to its end, or one line from a terminal, which does not show it.
func (a *app) readSecret(ctx context.Context, name string) ([]byte, error) {
	f, ok := a.stdin.(*os.File)
	if !ok {
		return io.ReadAll(io.LimitReader(a.stdin, maxSecret))
	}
	was, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil { // not a terminal
		return io.ReadAll(io.LimitReader(f, maxSecret))
	}
	hidden := *was
	hidden.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, &hidden); err != nil {
		return nil, err
	}
	show := func() {
		unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, was)
		fmt.Fprintln(a.stderr)
	}
	defer show()
	fmt.Fprintf(a.stderr, "Value of %s (not shown): ", name)
	type answer struct {
		line []byte
		err  error
	}
	read := make(chan answer, 1)
	go func() {
		line, err := bufio.NewReader(io.LimitReader(f, maxSecret)).ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			err = nil
		}
		read <- answer{line, err}
	}()
	select {
	case r := <-read:
		return r.line, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
