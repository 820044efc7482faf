package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// completeWithin is how long a completion waits for the node: a key press must not take longer.
const completeWithin = 2 * time.Second

// names completes with the names of objects of the node, except those that are given already.
// Errors are silent, because they would be in the middle of the command line. With one, only the
// first argument has a completion.
func names[T proto.Message](a *app, one bool, words func(T) []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		if one && len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), completeWithin)
		defer cancel()
		silent := *a
		silent.stderr, silent.timeout = io.Discard, completeWithin
		conn, err := silent.connect()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer conn.Close()
		_, items, err := listAll[T](ctx, conn, nil)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var out []string
		for _, o := range items {
			for _, w := range words(o) {
				if w != "" && strings.HasPrefix(w, word) && !slices.Contains(args, w) {
					out = append(out, w)
				}
			}
		}
		slices.Sort(out)
		return slices.Compact(out), cobra.ShellCompDirectiveNoFileComp
	}
}

// named is what names has for objects with one name.
func named[T proto.Message](name func(T) string) func(T) []string {
	return func(o T) []string { return []string{name(o)} }
}

// generations completes with the generations of the node, newest first, each with its origin.
func (a *app) generations() cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		var all []*isthmusv1.Revision
		_, directive := names(a, true, func(r *isthmusv1.Revision) []string {
			all = append(all, r) // newest first
			return nil
		})(cmd, args, toComplete)
		var out []string
		for _, r := range all {
			out = append(out, fmt.Sprintf("%d\t%s by %s, %s ago", r.Generation, clean(r.Reason), clean(r.Author), a.age(r.Time)))
		}
		return out, directive | cobra.ShellCompDirectiveKeepOrder
	}
}

// files completes with the names of files.
func files(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

// completeFlag sets the completion of a flag.
func completeFlag(cmd *cobra.Command, flag string, f cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, f); err != nil {
		panic(err) // cannot happen: the command has the flag, and no other completion of it
	}
}

// oneOf completes with fixed words.
func oneOf(words ...string) cobra.CompletionFunc {
	return cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)
}

// documents are the extensions of files with documents.
var documents = []string{"yaml", "yml", "json"}
