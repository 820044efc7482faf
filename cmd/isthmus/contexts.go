package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/disk"
)

// The contexts of a user are the files contexts/NAME.yaml in ~/.config/isthmus, and the file
// current has the name of the one in use. The single file context.yaml of former versions is one
// as well, called default.
const oldContext = "default"

func (a *app) configDir() string { return filepath.Join(a.getenv("HOME"), ".config", "isthmus") }

// namedContext returns the file of the context with a name.
func (a *app) namedContext(name string) string {
	if name == oldContext {
		return filepath.Join(a.configDir(), "context.yaml")
	}
	return filepath.Join(a.configDir(), "contexts", name+".yaml")
}

// currentContext returns the name of the context in use.
func (a *app) currentContext() string {
	data, err := os.ReadFile(filepath.Join(a.configDir(), "current"))
	if name := strings.TrimSpace(string(data)); err == nil && contextName.MatchString(name) {
		return name
	}
	return oldContext
}

func (a *app) setCurrentContext(name string) error {
	return disk.Replace(filepath.Join(a.configDir(), "current"), []byte(name+"\n"), 0o600)
}

var contextName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// contextNames returns the names of all contexts, in order.
func (a *app) contextNames() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(a.configDir(), "contexts"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading contexts: %w", err)
	}
	var all []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".yaml"); ok && contextName.MatchString(name) && name != oldContext {
			all = append(all, name)
		}
	}
	if _, err := os.Stat(a.namedContext(oldContext)); err == nil {
		all = append(all, oldContext)
	}
	slices.Sort(all)
	return all, nil
}

// knownContext returns an error unless there is a context with a name.
func (a *app) knownContext(name string) error {
	all, err := a.contextNames()
	if err != nil || slices.Contains(all, name) {
		return err
	}
	return fmt.Errorf("context %q: not found%s: see isthmus context list", name, didYouMean(similar(name, all)))
}

func (a *app) completeContexts(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	all, _ := a.contextNames()
	return all, cobra.ShellCompDirectiveNoFileComp
}

// contextRow is a context in a list.
type contextRow struct {
	Current bool      `json:"current"`
	Name    string    `json:"name"`
	Address string    `json:"address"`
	Client  string    `json:"client"`
	Role    string    `json:"role"`
	Expires time.Time `json:"expires"`
	File    string    `json:"file"`
}

var contextColumns = []column[contextRow]{
	{header: "CONTEXT", value: func(_ *app, c contextRow) string { return c.Name }},
	{header: "CURRENT", value: func(_ *app, c contextRow) string {
		if c.Current {
			return "*"
		}
		return ""
	}},
	{header: "ADDRESS", value: func(_ *app, c contextRow) string { return c.Address }},
	{header: "CLIENT", value: func(_ *app, c contextRow) string { return c.Client }},
	{header: "ROLE", value: func(_ *app, c contextRow) string { return c.Role }},
	{header: "EXPIRES", value: func(a *app, c contextRow) string {
		if left := c.Expires.Sub(a.wall()); left > 0 {
			return short(left)
		}
		return "expired"
	}, style: state},
	{header: "FILE", wide: true, value: func(_ *app, c contextRow) string { return c.File }},
}

// certificateOf returns the certificate of a context, and its role.
func certificateOf(c *isthmusv1.ClientContext) (*x509.Certificate, string, error) {
	block, _ := pem.Decode([]byte(c.Certificate))
	if block == nil {
		return nil, "", errors.New("certificate is not in PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, "", err
	}
	role := ""
	for _, u := range cert.URIs {
		role = strings.TrimPrefix(u.String(), "isthmus:role/")
	}
	return cert, role, nil
}

func (a *app) addContext(root, _, _, _ *cobra.Command) {
	group := a.group("context", "List, choose and import the contexts by which this machine reaches nodes")
	group.AddCommand(a.contextList(), a.contextShow(), a.contextUse(), a.contextRename(), a.contextImport())
	root.AddCommand(group)
}

func (a *app) contextList() *cobra.Command {
	cmd := &cobra.Command{Use: "list", Short: "List the contexts", Args: cobra.NoArgs,
		RunE: runs(func(*cobra.Command, []string) error {
			all, err := a.contextNames()
			if err != nil {
				return err
			}
			rows, broken := []contextRow{}, []error(nil)
			for _, name := range all {
				c, err := readContext(a.namedContext(name))
				if err != nil {
					broken = append(broken, fmt.Errorf("reading context %s: %w", name, err))
					continue
				}
				cert, role, err := certificateOf(c)
				if err != nil {
					broken = append(broken, fmt.Errorf("reading context %s: %w", name, err))
					continue
				}
				rows = append(rows, contextRow{name == a.currentContext(), name, c.Address, clean(cert.Subject.CommonName), clean(role), cert.NotAfter, a.namedContext(name)})
			}
			if len(all) == 0 {
				a.note("there are no contexts: see isthmus context import")
			}
			if a.output == "json" || a.output == "yaml" {
				return errors.Join(append([]error{a.showValue(rows)}, broken...)...)
			}
			if len(rows) > 0 {
				err = show(a, contextColumns, rows, nil)
			}
			return errors.Join(append([]error{err}, broken...)...)
		})}
	a.listFlags(cmd)
	return cmd
}

func (a *app) contextShow() *cobra.Command {
	return &cobra.Command{Use: "show [NAME]", Short: "Show the context or socket that reaches the node", Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.completeContexts,
		RunE: runs(func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				a.nodeName = args[0]
			}
			if p := a.socketPath(); p != "" {
				fmt.Fprintf(a.stdout, "socket: %s\n", p)
				return nil
			}
			path := a.contextPath()
			c, err := a.loadContext(path)
			if err != nil {
				return err
			}
			cert, role, err := certificateOf(c)
			if err != nil {
				return fmt.Errorf("reading context %s: %w", path, err)
			}
			_, err = fmt.Fprintf(a.stdout, "file: %s\naddress: %s\nname: %s\nrole: %s\nexpires: %s\n",
				path, c.Address, clean(cert.Subject.CommonName), clean(role), cert.NotAfter.UTC().Format(time.RFC3339))
			return err
		}),
	}
}

func (a *app) contextUse() *cobra.Command {
	return &cobra.Command{Use: "use NAME", Short: "Choose the context that commands use", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeContexts,
		Long: `Choose the context that commands use from now on. --node uses another one for a single command. $ISTHMUS_CONTEXT and, for root on
a node itself, the unix socket go before it.`,
		RunE: runs(func(_ *cobra.Command, args []string) error {
			if err := a.knownContext(args[0]); err != nil {
				return err
			}
			if err := a.setCurrentContext(args[0]); err != nil {
				return fmt.Errorf("choosing the context: %w", err)
			}
			for _, other := range []string{a.getenv("ISTHMUS_CONTEXT"), a.socketPath()} {
				if other != "" {
					a.note("%s still goes before it", other)
					break
				}
			}
			return nil
		}),
	}
}

func (a *app) contextRename() *cobra.Command {
	return &cobra.Command{Use: "rename NAME NEW-NAME", Short: "Rename a context", Args: cobra.ExactArgs(2), ValidArgsFunction: a.completeContexts,
		RunE: runs(func(_ *cobra.Command, args []string) error {
			from, to := args[0], args[1]
			if err := a.knownContext(from); err != nil {
				return err
			}
			if err := newContextName(to); err != nil {
				return err
			}
			path := a.namedContext(to)
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("renaming %s: there is a context called %s already", from, to)
			}
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				return fmt.Errorf("renaming %s: %w", from, err)
			}
			current := a.currentContext() == from
			if err := os.Rename(a.namedContext(from), path); err != nil {
				return fmt.Errorf("renaming %s: %w", from, err)
			}
			if !current {
				return nil
			}
			if err := a.setCurrentContext(to); err != nil {
				return fmt.Errorf("choosing the context %s: %w", to, err)
			}
			return nil
		}),
	}
}

func newContextName(name string) error {
	if !contextName.MatchString(name) || name == oldContext {
		return usageError{fmt.Errorf("context name %q: must be 1 to 63 letters, digits, hyphens, dots, underscores, and not %q", name, oldContext)}
	}
	return nil
}

func (a *app) contextImport() *cobra.Command {
	var to contextTarget
	cmd := &cobra.Command{Use: "import FILE", Short: "Import a context file from a node or an admin", Args: cobra.ExactArgs(1), ValidArgsFunction: files,
		Long: `Import a context file from a node or an admin. The context gets the name of the node, which is asked for it, or the one given with
--name. The first context that is imported becomes the one in use; choose others with isthmus context use, or with --node.

--address replaces the address in the file, as when the node does not know its public one. --context or $ISTHMUS_CONTEXT write that
file instead of a named context.`}
	cmd.RunE = runs(func(cmd *cobra.Command, args []string) error {
		source := *a
		source.contextFile, source.nodeName = args[0], ""
		c, err := source.loadContext(args[0])
		if err != nil {
			return err
		}
		if _, err := tlsConfig(c); err != nil {
			return fmt.Errorf("using context %s: %w", args[0], err)
		}
		_, err = a.saveContext(cmd.Context(), c, to)
		return err
	})
	to.flags(cmd)
	return cmd
}

// contextTarget says where a context is saved.
type contextTarget struct {
	name      string
	overwrite bool
}

func (t *contextTarget) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&t.name, "name", "", "name of the context (default: the name of the node)")
	cmd.Flags().BoolVar(&t.overwrite, "overwrite", false, "replace the context if there is one")
}

// saveContext writes a context, and returns its file.
func (a *app) saveContext(ctx context.Context, c *isthmusv1.ClientContext, to contextTarget) (string, error) {
	path, name := a.contextPath(), ""
	if a.contextFile == "" && a.getenv("ISTHMUS_CONTEXT") == "" {
		if name = to.name; name == "" {
			name = a.askName(ctx, c)
		}
		if err := newContextName(name); err != nil {
			return "", err
		}
		path = a.namedContext(name)
	} else if to.name != "" {
		return "", usageError{fmt.Errorf("--name cannot be used together with the file %s of --context or $ISTHMUS_CONTEXT", path)}
	}
	known, err := a.contextNames()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return "", fmt.Errorf("writing context: %w", err)
	}
	if to.overwrite {
		data, err := encodeYAML(c)
		if err == nil {
			err = disk.Replace(path, data, 0o600)
		}
		if err != nil {
			return "", fmt.Errorf("writing context: %w", err)
		}
	} else if err := writeContext(path, c); errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("%s exists already: replace it with --overwrite, or choose another %s", path, map[bool]string{true: "file with --context", false: "name with --name"}[name == ""])
	} else if err != nil {
		return "", fmt.Errorf("writing context: %w", err)
	}
	a.note("wrote %s", path)
	switch {
	case name == "" || name == a.currentContext():
	case len(known) == 0:
		if err := a.setCurrentContext(name); err != nil {
			return "", fmt.Errorf("choosing the context %s: %w", name, err)
		}
	default:
		a.note("to use it, run: isthmus context use %s, or give --node %s", name, name)
	}
	return path, nil
}

// askWithin is how long an import waits for the name of the node.
const askWithin = 5 * time.Second

// askName returns the name of the node of a context, or its host if the node does not answer or has
// no name yet.
func (a *app) askName(ctx context.Context, c *isthmusv1.ClientContext) string {
	host, _, err := net.SplitHostPort(c.Address)
	if err != nil {
		host = c.Address
	}
	host = strings.Trim(strings.NewReplacer(":", "-", "%", "-").Replace(host), "-")
	silent := *a
	silent.timeout = min(a.timeout, askWithin)
	conn, err := silent.dial(c)
	if err != nil {
		return host
	}
	defer conn.Close()
	s, err := getStatus(ctx, conn)
	if err != nil {
		a.note("%s does not answer, so that the context is called by its address: see isthmus context rename", c.Address)
		return host
	}
	if !contextName.MatchString(s.Node) || s.Node == oldContext {
		return host
	}
	return s.Node
}
