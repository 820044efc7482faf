package main

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/topology"
)

func (a *app) addTopology(root, _, _, _ *cobra.Command) {
	group := a.group("topology", "Show and render nodes and clouds' gateways from one file (works without a node)")
	group.AddCommand(a.topologyShow(), a.topologyRender())
	root.AddCommand(group)
}

// topologyFile holds the flags of the commands that read a topology.
type topologyFile struct {
	document
	set []string
}

func (f *topologyFile) flags(cmd *cobra.Command) {
	f.document.flag(cmd)
	cmd.Flags().Lookup("file").Usage = "the topology as YAML or JSON; - for standard input"
	cmd.Flags().StringArrayVar(&f.set, "set", nil, "outside address that a cloud chose, as NAME=ADDRESS; may be repeated")
}

// topology reads and checks a topology. All problems go to standard error at once.
func (a *app) topology(f *topologyFile) (*topology.Topology, error) {
	set := map[string]netip.Addr{}
	for _, s := range f.set {
		name, text, _ := strings.Cut(s, "=")
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return nil, usageError{fmt.Errorf("--set %q: must be NAME=ADDRESS", s)}
		}
		if _, twice := set[name]; twice {
			return nil, usageError{fmt.Errorf("--set %q: %s is set twice", s, name)}
		}
		set[name] = addr
	}
	source, err := a.read(&f.document)
	if err != nil {
		return nil, err
	}
	t, problems := topology.Read([]byte(source.GetText()), set)
	return t, a.problems(problems)
}

// problems prints what is wrong with the topology that was read, and returns an error when there is
// something.
func (a *app) problems(all spec.Problems) error {
	printProblems(a.stderr, a.document, messages(all))
	if len(all) > 0 {
		return fmt.Errorf("%s: %s", a.document, plural(len(all), "problem"))
	}
	return nil
}

var pairingColumns = []column[topology.Tunnel]{
	{header: "TUNNEL", value: func(_ *app, t topology.Tunnel) string { return t.Name }},
	{header: "FROM", value: func(_ *app, t topology.Tunnel) string { return t.Ends[0].Name }},
	{header: "OUTSIDE", value: func(_ *app, t topology.Tunnel) string { return t.Ends[0].Outside.String() }},
	{header: "INSIDE", value: func(_ *app, t topology.Tunnel) string { return t.Ends[0].Inside.String() }},
	{header: "TO", value: func(_ *app, t topology.Tunnel) string { return t.Ends[1].Name }},
	{header: "OUTSIDE", value: func(_ *app, t topology.Tunnel) string { return t.Ends[1].Outside.String() }},
	{header: "INSIDE", value: func(_ *app, t topology.Tunnel) string { return t.Ends[1].Inside.String() }},
	{header: "KEY", wide: true, value: func(_ *app, t topology.Tunnel) string { return t.Key }},
	{header: "STATE", value: func(_ *app, t topology.Tunnel) string {
		if t.Dead != "" {
			return "dead by design: " + t.Dead
		}
		return "live"
	}},
}

var outsideColumns = []column[topology.OutsideAddress]{
	{header: "ADDRESS", value: func(_ *app, o topology.OutsideAddress) string { return o.Name }},
	{header: "GATEWAY", value: func(_ *app, o topology.OutsideAddress) string { return o.Gateway }},
	{header: "VALUE", value: func(_ *app, o topology.OutsideAddress) string {
		if !o.Addr.IsValid() {
			return "not known yet"
		}
		return o.Addr.String()
	}},
}

var keyColumns = []column[topology.Key]{
	{header: "KEY", value: func(_ *app, k topology.Key) string { return k.Name }},
	{header: "SOURCE", value: func(_ *app, k topology.Key) string {
		if k.File != "" {
			return "file " + k.File
		}
		return "$" + k.Environment
	}},
}

// pairing is the form of a tunnel in the JSON and YAML output of "topology show".
type pairing struct {
	Name string     `json:"name"`
	Key  string     `json:"key,omitempty"`
	Ends [2]pairEnd `json:"ends"`
	Dead string     `json:"dead,omitempty"`
}

type pairEnd struct {
	Name     string `json:"name"`
	Cloud    string `json:"cloud,omitempty"`
	Instance int    `json:"instance"`
	ASN      uint32 `json:"asn"`
	Outside  string `json:"outside"`
	Inside   string `json:"inside"`
}

func (a *app) topologyShow() *cobra.Command {
	var f topologyFile
	cmd := &cobra.Command{Use: "show -f FILE", Short: "Show every tunnel of a topology, and those that are dead by design", Args: cobra.NoArgs,
		Long: `Show every tunnel of a topology with both ends. A tunnel that a cloud attempts and the other side never answers is dead by
design, and is shown with the reason. Two further tables list the outside addresses that the clouds choose, by their names in
commands and Terraform, and the source of each pre-shared key.`}
	cmd.RunE = runs(func(*cobra.Command, []string) error {
		t, err := a.topology(&f)
		if err != nil {
			return err
		}
		if !a.tables() {
			out := []pairing{}
			for _, tu := range t.Tunnels {
				p := pairing{Name: tu.Name, Key: tu.Key, Dead: tu.Dead}
				for i, e := range tu.Ends {
					p.Ends[i] = pairEnd{e.Name, e.Cloud, e.Instance, e.ASN, e.Outside.String(), e.Inside.String()}
				}
				out = append(out, p)
			}
			return a.showValue(out)
		}
		if err := show(a, pairingColumns, t.Tunnels, nil); err != nil {
			return err
		}
		if len(t.Keys) == 0 {
			return nil
		}
		fmt.Fprintln(a.stdout)
		if err := show(a, outsideColumns, t.Outside(), nil); err != nil {
			return err
		}
		fmt.Fprintln(a.stdout)
		return show(a, keyColumns, t.Keys, nil)
	})
	f.flags(cmd)
	a.outputFlag(cmd)
	return cmd
}

func (a *app) topologyRender() *cobra.Command {
	var f topologyFile
	var target, form, part string
	cmd := &cobra.Command{Use: "render -f FILE --for TARGET", Short: "Write one side of a topology: a node's document, or a cloud's commands or Terraform", Args: cobra.NoArgs,
		Long: `Write one side of a topology. --for node/NAME writes the document of a node, for isthmus apply. --for aws, azure or gcp
writes the configuration of all gateways of that cloud, as commands (--as cli) or as Terraform (--as terraform).

The clouds choose outside addresses when they create a gateway or a tunnel. An address that another side needs is a variable
until it is known; a node's document needs all of them. The commands print them at the end and Terraform has them as outputs: give
them with --set or write them into the topology. Gateways of two clouds that are linked with each other need each other's addresses:
create those of Azure and Google with --part gateways, then AWS, then the others with --part tunnels.

The output never contains pre-shared keys: commands read environment variables, Terraform has sensitive variables, and a document
has the names of secrets.`}
	cmd.RunE = runs(func(*cobra.Command, []string) error {
		name, node := strings.CutPrefix(target, "node/")
		for _, flag := range []string{"as", "part"} {
			if node && cmd.Flags().Changed(flag) {
				return usageError{fmt.Errorf("--%s: cannot be used with --for %s", flag, target)}
			}
		}
		for _, c := range []struct {
			flag, value string
			of          []string
		}{{"as", form, topology.Forms}, {"part", part, topology.Parts}} {
			if !slices.Contains(c.of, c.value) {
				return usageError{fmt.Errorf("--%s %q: must be one of %s", c.flag, c.value, strings.Join(c.of, ", "))}
			}
		}
		t, err := a.topology(&f)
		if err != nil {
			return err
		}
		text, problems := "", spec.Problems(nil)
		if node {
			text, problems = t.Document(name)
		} else {
			text, problems = t.Cloud(target, form, part)
		}
		if err := a.problems(problems); err != nil {
			return err
		}
		_, err = io.WriteString(a.stdout, text)
		return err
	})
	f.flags(cmd)
	cmd.Flags().StringVar(&target, "for", "", "side to write: node/NAME, aws, azure or gcp")
	cmd.MarkFlagRequired("for")
	completeFlag(cmd, "for", oneOf("aws", "azure", "gcp", "node/"))
	cmd.Flags().StringVar(&part, "part", "all", "part of a cloud's side: all, gateways or tunnels")
	cmd.Flags().StringVar(&form, "as", "cli", "form of a cloud's side: cli or terraform")
	completeFlag(cmd, "part", oneOf(topology.Parts...))
	completeFlag(cmd, "as", oneOf(topology.Forms...))
	return cmd
}
