package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/tunnel/cloud"
	"github.com/isthmus-net/isthmus/tunnel/cloud/importer"
)

func (a *app) addCloud(root, _, _, _ *cobra.Command) {
	group := a.group("cloud", "Show what the clouds' own VPN gateways need, and import their files (works without a node)")
	group.AddCommand(a.cloudShow(), a.cloudImport())
	root.AddCommand(group)
}

// preset is what "cloud show" prints as JSON and YAML.
type preset struct {
	Cloud    string          `json:"cloud"`
	Title    string          `json:"title"`
	Settings []cloud.Setting `json:"settings"`
}

func (a *app) cloudShow() *cobra.Command {
	cmd := &cobra.Command{Use: "show " + strings.Join(cloud.Names(), "|"), Short: "Show the meaning of `cloud:` in a tunnel, with reasons and sources",
		Args: cobra.ExactArgs(1), ValidArgs: cloud.Names(),
		Long: `Show the meaning of the field cloud of a tunnel: the defaults for the tunnel and its peers, the gateway's rules that documents
are checked against, and advice for the cloud's side. Each has its reason and source.`}
	cmd.RunE = runs(func(_ *cobra.Command, args []string) error {
		p, ok := cloud.Lookup(args[0])
		if !ok {
			return usageError{fmt.Errorf("cloud %q: must be one of %s", args[0], strings.Join(cloud.Names(), ", "))}
		}
		if !a.tables() {
			return a.showValue(preset{p.Name, p.Title, p.Settings()})
		}
		return a.showPreset(p)
	})
	a.outputFlag(cmd)
	return cmd
}

// showPreset prints one setting a line, with its reason below it.
func (a *app) showPreset(p cloud.Preset) error {
	var b strings.Builder
	b.WriteString(p.Title + "\n")
	kinds := map[string]string{"default": "Defaults for the document", "rule": "Rules of the gateway", "advice": "On the cloud's side"}
	width := 0
	for _, s := range p.Settings() {
		width = max(width, len(s.Name))
	}
	kind := ""
	for _, s := range p.Settings() {
		if s.Kind != kind {
			kind = s.Kind
			b.WriteString("\n" + kinds[kind] + "\n")
		}
		fmt.Fprintf(&b, "  %-*s  %s\n      %s [%s]\n", width, s.Name, s.Value, s.Why, s.Source)
	}
	_, err := fmt.Fprint(a.stdout, b.String())
	return err
}

// showValue prints a value that is not a protobuf message as JSON or YAML.
func (a *app) showValue(v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if a.template != "" {
		return a.showTemplate(data)
	}
	data = append(data, '\n')
	if a.output == "yaml" {
		var n yaml.Node
		if err := yaml.Unmarshal(data, &n); err != nil {
			return err
		}
		blockStyle(&n)
		if data, err = marshalYAML(&n); err != nil {
			return err
		}
	}
	_, err = a.stdout.Write(data)
	return err
}

func (a *app) cloudImport() *cobra.Command {
	var public, dir string
	var set, replace bool
	cmd := &cobra.Command{Use: "import aws|azure|gcp|oci FILE...", Short: "Make tunnels and peers from a cloud's configuration files", Args: cobra.MinimumNArgs(2),
		Long: `Make the tunnels and peers of a document from a cloud's files about its VPN gateway, and print them with comments that name
the source of each value. Skipped, missing and doubtful values are reported on standard error. - is standard input.

aws: the configuration in XML, or the console's text for a generic device, strongSwan, Cisco (IOS and ASA) or Junos; the output of
aws ec2 describe-vpn-connections, and of describe-customer-gateways when the connections are without XML; an answer of the Query
API.
azure: az network vnet-gateway show, vpn-connection show and local-gateway show (or list) together, and public-ip show for a
gateway without BGP; the same of PowerShell with ConvertTo-Json; for a hub of a virtual WAN, vpn-gateway show and vpn-site show,
or its file for VPN sites.
gcp: gcloud compute vpn-gateways, vpn-tunnels and routers describe (or list) together, as YAML or JSON.
oci: oci network ip-sec-tunnel list or get.
Each: Terraform's state, and what terraform show -json, terraform show and terraform state show print. The last two hide keys.

Keys are never printed. --set-secrets stores the keys in the files as secrets of the node, --secrets-dir writes each into a
file of its own. A stored key with another value is not replaced without --replace.`}
	cmd.RunE = runs(func(c *cobra.Command, args []string) error {
		var router netip.Addr
		if public != "" {
			var err error
			if router, err = netip.ParseAddr(public); err != nil {
				return usageError{fmt.Errorf("--for %q: must be an address", public)}
			}
		}
		var files []importer.File
		for _, name := range args[1:] {
			data, err := a.readInput(name, importer.MaxFile)
			if err != nil {
				return fmt.Errorf("reading %s: %w", name, err)
			}
			files = append(files, importer.File{Name: filepath.Base(name), Data: data})
		}
		r, err := importer.Import(args[0], files)
		if err != nil {
			return fmt.Errorf("importing from %s: %w", args[0], err)
		}
		if router.IsValid() {
			if r.Only(router); len(r.Tunnels) == 0 {
				return fmt.Errorf("importing from %s: no tunnel is for %s", args[0], router)
			}
		}
		if routers := r.Routers(); len(routers) > 1 {
			fmt.Fprintf(a.stderr, "isthmus: the tunnels are for several nodes (%s): choose one with --for\n", strings.Trim(fmt.Sprint(routers), "[]"))
		}
		for _, n := range r.Notes {
			fmt.Fprintf(a.stderr, "isthmus: %s\n", clean(n))
		}
		if err := a.storeKeys(c.Context(), r, set, dir, replace); err != nil {
			return err
		}
		_, err = io.WriteString(a.stdout, r.YAML())
		return err
	})
	f := cmd.Flags()
	f.StringVar(&public, "for", "", "only the tunnels for the node with this public address")
	f.BoolVar(&set, "set-secrets", false, "store the keys on the node")
	f.StringVar(&dir, "secrets-dir", "", "directory to write each key to, as a file that only its owner can read")
	f.BoolVar(&replace, "replace", false, "let --set-secrets and --secrets-dir replace keys that have another value")
	cmd.MarkFlagsMutuallyExclusive("set-secrets", "secrets-dir")
	cmd.MarkFlagDirname("secrets-dir")
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return files(cmd, args, word)
		}
		return []string{"aws", "azure", "gcp", "oci"}, cobra.ShellCompDirectiveNoFileComp
	}
	return cmd
}

// readInput reads a file, or standard input with "-", and one byte more than limit at most.
func (a *app) readInput(name string, limit int64) ([]byte, error) {
	in := a.stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, errors.Unwrap(err) // without the name, which callers add
		}
		defer f.Close()
		in = f
	}
	return io.ReadAll(io.LimitReader(in, limit+1))
}

// storeKeys stores or writes the keys of the tunnels and sessions, and reports the missing ones. It
// goes on after a key that would replace another one, so that one run names all of them.
func (a *app) storeKeys(ctx context.Context, r *importer.Result, set bool, dir string, replace bool) error {
	store := func(string, []byte) error { return nil }
	switch {
	case set:
		conn, err := a.connect()
		if err != nil {
			return err
		}
		defer conn.Close()
		put := isthmusv1.NewSecretServiceClient(conn).AddSecret
		if replace {
			put = isthmusv1.NewSecretServiceClient(conn).SetSecret
		}
		store = func(name string, key []byte) error {
			_, err := put(ctx, &isthmusv1.SetSecretRequest{Name: name, Value: key})
			if !replace && status.Code(err) == codes.FailedPrecondition {
				return taken{errors.New(status.Convert(err).Message())}
			}
			return err
		}
	case dir != "":
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("storing keys: %w", err)
		}
		store = func(name string, key []byte) error { return writeKey(dir, name, key, replace) }
	}
	known, kept := 0, 0
	for _, t := range r.Tunnels {
		for _, k := range t.Keys() {
			if !k.Key.Known() {
				fmt.Fprintf(a.stderr, "isthmus: the %s of %s is not in the files; store it with isthmus secret set %s\n", k.What, t.Name, k.Name)
				continue
			}
			var other taken
			switch err := store(k.Name, k.Key.Bytes()); {
			case errors.As(err, &other):
				kept++
				fmt.Fprintf(a.stderr, "isthmus: storing secret %s: %s\n", k.Name, clean(other.Error()))
			case err != nil:
				return fmt.Errorf("storing secret %s: %w", k.Name, err)
			default:
				known++
			}
		}
	}
	switch {
	case known == 0:
	case set:
		a.note("keys stored: %d", known)
	case dir != "":
		a.note("keys written: %d; store each with isthmus secret set NAME --from-file FILE", known)
	default:
		a.note("keys read and not stored: %d; run the command again with --set-secrets or --secrets-dir DIR", known)
	}
	if kept > 0 {
		return fmt.Errorf("storing keys: %d would replace other ones: find out which are right, then run the command again with --replace", kept)
	}
	return nil
}

// taken means that another key has the name.
type taken struct{ error }

// writeKey writes a file, and replaces one with another key only when told to.
func writeKey(dir, name string, key []byte, replace bool) error {
	path := filepath.Join(dir, name)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	switch {
	case errors.Is(err, fs.ErrExist) && replace:
		if f, err = os.CreateTemp(dir, ".key-"); err != nil {
			return err
		}
		_, err = f.Write(key)
		if err = errors.Join(err, f.Close()); err == nil {
			err = os.Rename(f.Name(), path)
		}
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
		return err
	case errors.Is(err, fs.ErrExist):
		// No fingerprints: without the key of a node they would let a reader test guesses.
		if was, err := readKey(path); err != nil {
			return err
		} else if !bytes.Equal(was, key) {
			return taken{errors.New("its file has another key")}
		}
		return nil
	case err != nil:
		return err
	}
	_, err = f.Write(key)
	return errors.Join(err, f.Close())
}

func readKey(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxSecret))
}
