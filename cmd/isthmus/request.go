package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// keyDir returns the directory of keys that wait for their certificates.
func (a *app) keyDir() string { return filepath.Join(a.getenv("HOME"), ".config", "isthmus", "keys") }

var requestName = regexp.MustCompile(`^[A-Za-z0-9.@-]{1,63}$`)

func (a *app) clientRequest() *cobra.Command {
	var name string
	cmd := &cobra.Command{Use: "request --name NAME", Short: "Make a key on this machine, and print a certificate request for the user-data of a new node", Args: cobra.NoArgs,
		Long: `Make a key, which stays in ~/.config/isthmus/keys, and print a certificate request.

Put the request into the user-data of a new node, as admin.request. It contains no secret. The node signs it at its first boot and
prints the answer on its console; isthmus client accept makes a context from it. One request may go to several nodes: each answers
with a certificate of its own.`}
	cmd.RunE = runs(func(*cobra.Command, []string) error {
		if !requestName.MatchString(name) || strings.Trim(name, ".") == "" {
			return usageError{fmt.Errorf("--name %q: must be 1 to 63 letters, digits, hyphens, dots, at signs", name)}
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
		if err != nil {
			return err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(a.keyDir(), 0o700); err != nil {
			return err
		}
		path := filepath.Join(a.keyDir(), name+".pem")
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%s exists already: choose another name, or remove the file if its request is no longer in use", path)
		}
		if err != nil {
			return err
		}
		err = pem.Encode(f, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
		if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
			return err
		}
		a.note("the key is in %s; put the request into the node's user-data", path)
		return pem.Encode(a.stdout, &pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})
	})
	cmd.Flags().StringVar(&name, "name", "", "name of the admin: letters, digits, hyphens, dots, at signs")
	cmd.MarkFlagRequired("name")
	return cmd
}

// maxConsoleText bounds in bytes what is read of a console.
const maxConsoleText = 16 << 20

func (a *app) clientAccept() *cobra.Command {
	var to contextTarget
	cmd := &cobra.Command{Use: "accept [FILE]", Short: "Make a context from the text of a new node's console", Args: cobra.MaximumNArgs(1), ValidArgsFunction: files,
		Long: `Make a context from the text of a new node's console, which has the answer to a request of isthmus client request. The text is
read from standard input or FILE.

Other text is ignored. If the text has several answers, the last one that fits a key in ~/.config/isthmus/keys counts. The command
saves the context as isthmus context import does. --address sets the address if the node does not know its own, as behind address
translation.`}
	cmd.RunE = runs(func(cmd *cobra.Command, args []string) error {
		in := a.stdin
		if len(args) > 0 && args[0] != "-" {
			f, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			in = f
		}
		text, err := io.ReadAll(io.LimitReader(in, maxConsoleText+1))
		if err != nil {
			return err
		}
		if len(text) > maxConsoleText {
			return fmt.Errorf("the text is larger than %d MiB: give only its end", maxConsoleText>>20)
		}
		keys, err := a.waitingKeys()
		if err != nil {
			return err
		}
		c, cert, err := acceptConsole(string(text), keys, a.now())
		if err != nil {
			return err
		}
		if a.address != "" {
			if err := hostPort("--address", a.address); err != nil {
				return err
			}
			c.Address = a.address
		}
		if c.Address == "" {
			return usageError{errors.New("--address is missing: the node does not know its public address: give --address HOST:PORT")}
		}
		if _, err := a.saveContext(cmd.Context(), c, to); err != nil {
			return err
		}
		a.note("%s at %s, expires %s", clean(cert.Subject.CommonName), clean(c.Address), cert.NotAfter.UTC().Format(time.RFC3339))
		return nil
	})
	to.flags(cmd)
	return cmd
}

// waitingKeys returns the keys of requests, in PEM.
func (a *app) waitingKeys() (out []string, err error) {
	entries, err := os.ReadDir(a.keyDir())
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil, fmt.Errorf("%s has no key: accept on the machine on which isthmus client request made one", a.keyDir())
	}
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".pem" {
			continue
		}
		text, err := readBounded(filepath.Join(a.keyDir(), e.Name()), 64<<10)
		if err != nil {
			return nil, err
		}
		out = append(out, string(text))
	}
	return out, err
}

const (
	beginContext = "-----BEGIN ISTHMUS CONTEXT-----"
	endContext   = "-----END ISTHMUS CONTEXT-----"
)

var (
	escapes   = regexp.MustCompile("\x1b(\\[[0-9;?]*[ -/]*[@-~]|[()][0-9A-B]|[=>])")
	fieldOf   = regexp.MustCompile(`^\s*(address|serverName): "?([^"\s]+)"?\s*$`)
	blockOf   = regexp.MustCompile(`^\s*(authority|certificate): \|\s*$`)
	pemMarker = regexp.MustCompile(`^\s*(-----(?:BEGIN|END) CERTIFICATE-----)\s*$`)
	pemBody   = regexp.MustCompile(`^\s*([A-Za-z0-9+/]{1,64}={0,2})\s*$`)
)

// acceptConsole finds the last answer in a console's text that fits one of the keys.
func acceptConsole(text string, keys []string, now time.Time) (*isthmusv1.ClientContext, *x509.Certificate, error) {
	// The aws command line prints the text as JSON by default.
	text = strings.NewReplacer(`\r\n`, "\n", `\n`, "\n", `\"`, `"`, "\r", "").Replace(text)
	text = escapes.ReplaceAllString(text, "")
	var blocks []string
	for {
		_, after, ok := strings.Cut(text, beginContext)
		if !ok {
			break
		}
		text = after
		if block, _, ok := strings.Cut(text, endContext); ok {
			// The start of the next answer cut this one short: the rest belongs to the next.
			if !strings.Contains(block, beginContext) {
				blocks = append(blocks, block)
			}
		}
	}
	if len(blocks) == 0 {
		return nil, nil, fmt.Errorf("this text has no answer between %s and %s: the node may still be booting; get the console's text again", beginContext, endContext)
	}
	slices.Reverse(blocks)
	var why error
	for _, block := range blocks {
		c, cert, err := acceptBlock(block, keys, now)
		if err == nil {
			return c, cert, nil
		}
		if why == nil {
			why = err
		}
	}
	return nil, nil, why
}

func acceptBlock(block string, keys []string, now time.Time) (*isthmusv1.ClientContext, *x509.Certificate, error) {
	c := &isthmusv1.ClientContext{}
	var into *string
	open := false // between the markers of a certificate
	for line := range strings.Lines(block) {
		line = strings.TrimRight(line, "\n")
		// Other lines are from the kernel or a service.
		if m := fieldOf.FindStringSubmatch(line); m != nil && !open {
			if m[1] == "address" {
				c.Address = m[2]
			} else {
				c.ServerName = m[2]
			}
		} else if m := blockOf.FindStringSubmatch(line); m != nil {
			if into = &c.Authority; m[1] == "certificate" {
				into = &c.Certificate
			}
		} else if m := pemMarker.FindStringSubmatch(line); m != nil && into != nil {
			*into += m[1] + "\n"
			open = strings.Contains(m[1], "BEGIN")
		} else if m := pemBody.FindStringSubmatch(line); m != nil && open {
			*into += m[1] + "\n"
		}
	}
	const again = "; the console's text is damaged: get it again"
	cert, err := onlyCertificate(c.Certificate)
	if err != nil {
		return nil, nil, fmt.Errorf("reading the certificate of the answer: %w%s", err, again)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(c.Authority)) {
		return nil, nil, errors.New("reading the authority of the answer: it is not a certificate" + again)
	}
	at := now
	if at.Before(cert.NotBefore) {
		at = cert.NotBefore // the handshake compares the clocks of both machines
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return nil, nil, fmt.Errorf("checking the certificate of the answer against its authority: %w", err)
	}
	if c.Address != "" {
		if err := hostPort("address", c.Address); err != nil {
			c.Address = ""
		}
	}
	if c.ServerName == "" {
		c.ServerName = defaultServerName
	}
	public, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	for _, k := range keys {
		block, _ := pem.Decode([]byte(k))
		if block == nil || !ok {
			continue
		}
		parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			continue
		}
		if s, ok := parsed.(crypto.Signer); ok && public.Equal(s.Public()) {
			c.Key = string(pem.EncodeToMemory(block))
			return c, cert, nil
		}
	}
	return nil, nil, fmt.Errorf("the answer is for a key of %q that is not here: accept on the machine on which isthmus client request made it", cert.Subject.CommonName)
}

func onlyCertificate(text string) (*x509.Certificate, error) {
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("it is not one certificate in PEM")
	}
	return x509.ParseCertificate(block.Bytes)
}
