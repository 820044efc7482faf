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
		Use: "condition TYPE", Short: "Show what a condition means and what to do about it", Args: cobra.ExactArgs(1), ValidArgs: names,
		Long: "Show what a condition means, why it may be there, and what to do about it. No node is asked. docs/conditions.md lists all of them.",
		RunE: runs(func(_ *cobra.Command, args []string) error {
			k, ok := condition.Lookup(args[0])
			if !ok {
				return fmt.Errorf("condition %q: not known; the conditions are %s", args[0], strings.Join(names, ", "))
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
