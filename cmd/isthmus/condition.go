package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-net/isthmus/router/condition"
)

func (a *app) addConditions(_, _, describe, _ *cobra.Command) {
	var names []string
	for _, k := range condition.All {
		names = append(names, k.Name)
	}
	describe.AddCommand(&cobra.Command{
		Use: "condition TYPE", Short: "Show the meaning of a condition, its cause and its remedy (works without a node)", Args: cobra.ExactArgs(1), ValidArgs: names,
		Long: "Show the meaning of a condition, its cause and its remedy. It works without a node. docs/conditions.md lists all conditions.",
		RunE: runs(func(_ *cobra.Command, args []string) error {
			k, ok := condition.Lookup(args[0])
			if !ok {
				return fmt.Errorf("condition %q: unknown: give one of %s", args[0], strings.Join(names, ", "))
			}
			var severities []string
			for _, s := range k.Severities {
				severities = append(severities, string(s))
			}
			_, err := fmt.Fprintf(a.stdout, "Condition:  %s\nSeverity:   %s\nObject:     %s\nMeaning:    %s\nCause:      %s\nRemedy:     %s\n",
				k.Name, strings.Join(severities, " or "), k.Of, k.Meaning, k.Cause, k.Remedy)
			return err
		}),
	})
}
