package main

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

func (a *app) addCloud(root, _, _, _ *cobra.Command) {
	group := a.group("cloud", "What the clouds' own VPN gateways need; works without a node")
	group.AddCommand(a.cloudShow())
	root.AddCommand(group)
}

// preset is what "cloud show" prints as JSON and YAML.
type preset struct {
	Cloud    string          `json:"cloud"`
	Title    string          `json:"title"`
	Settings []cloud.Setting `json:"settings"`
}

func (a *app) cloudShow() *cobra.Command {
	cmd := &cobra.Command{Use: "show " + strings.Join(cloud.Names(), "|"), Short: "Show what `cloud:` in a tunnel means, with reasons and sources",
		Args: cobra.ExactArgs(1), ValidArgs: cloud.Names(),
		Long: `Show what the field cloud of a tunnel means: the defaults that it gives to the tunnel and to the peers in it, the rules of
the gateway that documents are checked against, and what to see to on the cloud's side. Each with its reason and source.`}
	cmd.RunE = runs(func(_ *cobra.Command, args []string) error {
		p, ok := cloud.Lookup(args[0])
		if !ok {
			return usageError{fmt.Errorf("cloud %q: must be one of %s", args[0], strings.Join(cloud.Names(), ", "))}
		}
		if a.output == "json" || a.output == "yaml" {
			return a.showValue(preset{p.Name, p.Title, p.Settings()})
		}
		return a.showPreset(p)
	})
	a.outputFlag(cmd)
	return cmd
}

// showPreset prints one setting a line, and below it why it is so.
func (a *app) showPreset(p cloud.Preset) error {
	var b strings.Builder
	b.WriteString(p.Title + "\n")
	kinds := map[string]string{"default": "What a document may leave out", "rule": "What the gateway takes", "advice": "On the cloud's side"}
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

// showValue prints a value that is no message as JSON or YAML.
func (a *app) showValue(v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
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
