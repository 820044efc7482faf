package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"google.golang.org/protobuf/proto"
)

// nodeAnswer is the answer of one node to a command for all nodes.
type nodeAnswer[T proto.Message] struct {
	name    string
	items   []T
	all     proto.Message
	missing []missing
	err     error
	said    bytes.Buffer // warnings
}

// everywhere prints the objects of all nodes that there is a context of, with the node in the first
// column. A node that does not answer is an error, and the others are shown.
func (n nounCommands[T]) everywhere(ctx context.Context, a *app, names []string) error {
	if a.nodeName != "" || a.contextFile != "" || a.address != "" || a.socket != "" {
		return usageError{errors.New("--all-nodes cannot be used together with --node, --context, --address or --socket")}
	}
	contexts, err := a.contextNames()
	if err != nil {
		return err
	}
	if len(contexts) == 0 {
		return errors.New("there are no contexts: see isthmus context import")
	}
	answers := make([]*nodeAnswer[T], len(contexts))
	var wait sync.WaitGroup
	for i, name := range contexts {
		wait.Go(func() { answers[i] = n.ask(ctx, a, name, names) })
	}
	wait.Wait()
	var failed []error
	lacking := map[string]int{}
	reached := 0
	for _, r := range answers {
		r.said.WriteTo(a.stderr)
		if r.err != nil {
			failed = append(failed, r.err)
			continue
		}
		reached++
		for _, m := range r.missing {
			lacking[m.name]++
		}
	}
	for _, name := range names {
		if reached > 0 && lacking[name] == reached {
			failed = append(failed, fmt.Errorf("%s %q: not found on any node", n.singular, name))
		}
	}
	return errors.Join(append([]error{n.printNodes(a, answers)}, failed...)...)
}

// ask asks the node of one context. Its error has the name, and the words for the user.
func (n nounCommands[T]) ask(ctx context.Context, a *app, name string, names []string) *nodeAnswer[T] {
	r := &nodeAnswer[T]{name: name}
	own := *a
	own.nodeName, own.stderr = name, &r.said
	conn, err := own.connect()
	if err == nil {
		defer conn.Close()
		if len(names) > 0 {
			r.items, r.missing, err = n.pick(ctx, conn, names)
			r.all = response(r.items)
		} else {
			r.all, r.items, err = n.readAll(ctx, conn)
		}
	}
	if err != nil {
		r.err = fmt.Errorf("%s: %s", name, own.words(err))
	}
	return r
}

// printNodes prints the answers of nodes as one table, or as a list with one entry for each node.
func (n nounCommands[T]) printNodes(a *app, answers []*nodeAnswer[T]) error {
	if a.output == "json" || a.output == "yaml" {
		type entry struct {
			Node   string          `json:"node"`
			Error  string          `json:"error,omitempty"`
			Answer json.RawMessage `json:"answer,omitempty"`
		}
		out := []entry{}
		for _, r := range answers {
			e := entry{Node: r.name}
			if r.err != nil {
				e.Error = r.err.Error()
			} else {
				data, err := everyField.Marshal(r.all)
				if err != nil {
					return err
				}
				e.Answer = data
			}
			out = append(out, e)
		}
		return a.showValue(out)
	}
	var t *table
	for _, r := range answers {
		heads, rows := n.rowsOf(a, r.items)
		if t == nil {
			t = a.newTable(slices.Concat([]look{{header: "NODE"}}, heads)...).fitting()
		}
		var last string
		for _, row := range rows {
			if a.output != "name" {
				t.add(slices.Concat([]cell{{text: r.name}}, row)...)
			} else if row[0].text != last {
				last = row[0].text
				fmt.Fprintf(a.stdout, "%s/%s\n", r.name, clean(last))
			}
		}
	}
	if a.output == "name" {
		return nil
	}
	return t.flush()
}
