package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/isthmus-net/isthmus/router/noun"
)

// nounCommands describes the commands that read one noun: "get PLURAL", "describe SINGULAR NAME",
// and "watch PLURAL". They use the calls that the API has for messages of type T. Each of them
// takes the noun in both numbers.
type nounCommands[T proto.Message] struct {
	singular, plural string
	aliases          []string // former and other names
	// Short texts. An empty watch: the noun has no such command.
	list, describe, watch string
	// what stands for the name in usage lines, as PREFIX. Empty: NAME.
	what    string
	samples [2]string // names, for examples
	columns []column[T]
	// request of "get", to which flags are bound. Nil: without fields.
	request proto.Message
	// names returns the words that select an object; the first is its name. Nil: its field name.
	names func(T) []string
	// key returns what no other object has. Nil: the first of the names.
	key func(T) string
	// match reports whether a name selects an object of a watch. Nil: it is one of the names.
	match func(o T, name string) bool
	// read returns the objects, and the answer of the API. Nil: by a List call.
	read func(ctx context.Context, conn *grpc.ClientConn) (proto.Message, []T, error)
	// find returns the object with a name, and none if there is none. Nil: a Get call of the API,
	// or one of the list.
	find func(ctx context.Context, conn *grpc.ClientConn, name string) ([]T, error)
	// tell returns what "describe" shows for names. Nil: the objects.
	tell func(ctx context.Context, conn *grpc.ClientConn, names []string) ([]proto.Message, error)
	// rows returns the table of objects. Nil: a row of columns for each.
	rows func(items []T) ([]look, [][]cell)
	// more prints the rest of a List response below the table of all objects. Nil: there is none.
	more func(all proto.Message) error
}

// add adds the commands, and returns that of "get".
func (n nounCommands[T]) add(a *app, get, describe, watch *cobra.Command) *cobra.Command {
	list := n.get(a, n.plural)
	list.Aliases = append([]string{n.singular}, n.aliases...)
	get.AddCommand(list)
	one := n.describeAs(a, n.singular)
	list.Example, one.Example = nounExamples("get", n.singular, n.plural, n.samples), nounExamples("describe", n.singular, n.plural, n.samples)
	one.Aliases = append([]string{n.plural}, n.aliases...)
	describe.AddCommand(one)
	if n.watch != "" {
		follow := n.watchCommand(a)
		follow.Aliases, follow.ValidArgsFunction = list.Aliases, list.ValidArgsFunction
		follow.Example = nounExamples("watch", n.singular, n.plural, n.samples)
		watch.AddCommand(follow)
	}
	return list
}

// describeAs returns the command that shows everything about objects.
func (n nounCommands[T]) describeAs(a *app, use string) *cobra.Command {
	use += " " + n.word() + "..."
	if n.tell != nil {
		cmd := describeCommand(a, use, n.describe, n.tell)
		cmd.ValidArgsFunction = names(a, false, n.words)
		return cmd
	}
	cmd := describeCommand(a, use, n.describe, func(ctx context.Context, conn *grpc.ClientConn, names []string) ([]T, error) {
		items, lacks, err := n.pick(ctx, conn, names)
		return items, errors.Join(err, notFound(lacks))
	})
	cmd.ValidArgsFunction = names(a, false, n.words)
	return cmd
}

// word stands for a name in usage lines.
func (n nounCommands[T]) word() string { return cmp.Or(n.what, "NAME") }

// get returns the command that lists the noun, or some of its objects.
func (n nounCommands[T]) get(a *app, use string) *cobra.Command {
	var watch, everywhere bool
	cmd := &cobra.Command{Use: use + " [" + n.word() + "...]", Short: n.list, Args: cobra.ArbitraryArgs, ValidArgsFunction: names(a, false, n.words)}
	here := a.call(func(ctx context.Context, conn *grpc.ClientConn, names []string) error {
		if len(names) == 0 {
			all, items, err := n.readAll(ctx, conn)
			if err != nil {
				return err
			}
			return n.print(a, items, all, true)
		}
		items, missing, err := n.pick(ctx, conn, names)
		if err != nil {
			return err
		}
		if len(items) > 0 {
			err = n.print(a, items, response(items), false)
		}
		return errors.Join(err, notFound(missing))
	})
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case watch && a.output == "name":
			return errors.New("--watch cannot be used together with -o name")
		case watch:
			return runs(func(cmd *cobra.Command, args []string) error { return n.follow(cmd.Context(), a, args) })(cmd, args)
		case everywhere:
			return runs(func(cmd *cobra.Command, args []string) error { return n.everywhere(cmd.Context(), a, args) })(cmd, args)
		}
		return here(cmd, args)
	}
	a.listFlags(cmd)
	cmd.Flags().BoolVarP(&everywhere, "all-nodes", "A", false, "ask the nodes of all contexts (see isthmus context list)")
	if n.watch != "" {
		cmd.Flags().BoolVarP(&watch, "watch", "w", false, "then follow the changes, as isthmus watch")
		cmd.MarkFlagsMutuallyExclusive("watch", "all-nodes")
	}
	return cmd
}

// readAll returns all objects, and the answer of the API.
func (n nounCommands[T]) readAll(ctx context.Context, conn *grpc.ClientConn) (proto.Message, []T, error) {
	if n.read != nil {
		return n.read(ctx, conn)
	}
	return listAll[T](ctx, conn, n.request)
}

// rowsOf returns the table of objects.
func (n nounCommands[T]) rowsOf(a *app, items []T) ([]look, [][]cell) {
	if n.rows != nil {
		return n.rows(items)
	}
	return rowsOf(a, n.columns, items)
}

// print prints objects, and with whole the rest of the answer.
func (n nounCommands[T]) print(a *app, items []T, all proto.Message, whole bool) error {
	heads, rows := n.rowsOf(a, items)
	if err := a.print(a.newTable(heads...).fitting(), rows, all); err != nil || !whole || n.more == nil || !a.tables() {
		return err
	}
	return n.more(all)
}

// missing is a name that no object has, with the error for the user.
type missing struct {
	name string
	err  error
}

func notFound(all []missing) error {
	var errs []error
	for _, m := range all {
		errs = append(errs, m.err)
	}
	return errors.Join(errs...)
}

// pick returns the objects with some names, and the names that are missing.
func (n nounCommands[T]) pick(ctx context.Context, conn *grpc.ClientConn, names []string) (items []T, lacks []missing, err error) {
	var none T
	var all []T
	var read bool
	everything := func() ([]T, error) {
		var err error
		if !read {
			_, all, err = listAll[T](ctx, conn, nil)
			read = err == nil
		}
		return all, err
	}
	find := n.find
	switch {
	case find != nil:
	case noun.Of(none).Get != nil:
		find = getNamed[T]
	default:
		find = func(_ context.Context, _ *grpc.ClientConn, name string) (found []T, err error) {
			all, err := everything()
			for _, o := range all {
				if slices.Contains(n.words(o), name) {
					found = append(found, o)
				}
			}
			return found, err
		}
	}
	for _, name := range names {
		found, err := find(ctx, conn, name)
		if err != nil {
			return nil, nil, err
		}
		items = append(items, found...)
		if len(found) > 0 {
			continue
		}
		all, err := everything()
		if err != nil {
			return nil, nil, err
		}
		var known []string
		for _, o := range all {
			known = append(known, n.words(o)...)
		}
		lacks = append(lacks, missing{name, fmt.Errorf("%s %q: not found%s", n.singular, name, didYouMean(similar(name, known)))})
	}
	return items, lacks, nil
}

// words returns the words that select an object.
func (n nounCommands[T]) words(o T) []string {
	if n.names != nil {
		return n.names(o)
	}
	return []string{noun.Text(o, "name")}
}

// id returns the key of an object.
func (n nounCommands[T]) id(o T) string {
	if n.key != nil {
		return n.key(o)
	}
	return n.words(o)[0]
}

// matches reports whether a name selects an object.
func (n nounCommands[T]) matches(o T, name string) bool {
	if n.match != nil {
		return n.match(o, name)
	}
	return slices.Contains(n.words(o), name)
}

// similar returns the words that are like a given one.
func similar(word string, words []string) []string {
	c := &cobra.Command{SuggestionsMinimumDistance: 2}
	slices.Sort(words)
	for _, w := range slices.Compact(words) {
		c.AddCommand(&cobra.Command{Use: w, Run: func(*cobra.Command, []string) {}})
	}
	return c.SuggestionsFor(word)
}

// didYouMean returns "; did you mean x?", and "" without words.
func didYouMean(near []string) string {
	if len(near) == 0 {
		return ""
	}
	return "; did you mean " + strings.Join(near[:min(len(near), 3)], " or ") + "?"
}

// response returns the List response that has some objects.
func response[T proto.Message](items []T) proto.Message {
	var none T
	call := noun.Of(none).List
	all := call.Response()
	objects := all.ProtoReflect().Mutable(call.Field).List()
	for _, o := range items {
		objects.Append(protoreflect.ValueOfMessage(o.ProtoReflect()))
	}
	return all
}

// listAll reads all pages of a List call into one response.
func listAll[T proto.Message](ctx context.Context, conn *grpc.ClientConn, request proto.Message) (all proto.Message, items []T, err error) {
	var none T
	call := noun.Of(none).List
	if request == nil {
		request = call.Request()
	}
	request = proto.Clone(request) // several nodes are asked at once, each for pages of its own
	all = call.Response()
	whole, q := all.ProtoReflect(), request.ProtoReflect()
	fields := func(m proto.Message) protoreflect.FieldDescriptors { return m.ProtoReflect().Descriptor().Fields() }
	// Both are nil of a list without pages.
	token, next := fields(request).ByName("page_token"), fields(all).ByName("next_page_token")
	for {
		page := call.Response()
		if err := conn.Invoke(ctx, call.Path, request, page); err != nil {
			return nil, nil, err
		}
		p := page.ProtoReflect()
		objects := p.Get(call.Field).List()
		for i := range objects.Len() {
			items = append(items, objects.Get(i).Message().Interface().(T))
		}
		after := noun.Text(page, "next_page_token")
		// The first page may have fields that the others lack; the last one has the latest
		// counters.
		p.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			if f != call.Field && f != next {
				whole.Set(f, v)
			}
			return true
		})
		if after == "" {
			break
		}
		if after == q.Get(token).String() {
			return nil, nil, errors.New("the node sends the same page again and again")
		}
		q.Set(token, protoreflect.ValueOfString(after))
	}
	objects := whole.Mutable(call.Field).List()
	for _, o := range items {
		objects.Append(protoreflect.ValueOfMessage(o.ProtoReflect()))
	}
	return all, items, nil
}

// getNamed returns the object with a name, by a Get call.
func getNamed[T proto.Message](ctx context.Context, conn *grpc.ClientConn, name string) ([]T, error) {
	var none T
	call := noun.Of(none).Get
	request, response := call.Request(), call.Response()
	request.ProtoReflect().Set(noun.Field(request, "name"), protoreflect.ValueOfString(name))
	switch err := conn.Invoke(ctx, call.Path, request, response); {
	case status.Code(err) == codes.NotFound:
		return nil, nil
	case err != nil:
		return nil, err
	}
	return []T{response.(T)}, nil
}

// describeCommand returns "describe NOUN NAME...".
func describeCommand[T proto.Message](a *app, use, short string, pick func(context.Context, *grpc.ClientConn, []string) ([]T, error)) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.MinimumNArgs(1),
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
			items, missing := pick(ctx, conn, args)
			for i, m := range items {
				if i > 0 && a.output != "json" {
					fmt.Fprintln(a.stdout, "---")
				}
				if err := a.describeMessage(m); err != nil {
					return err
				}
				if !a.tables() {
					continue
				}
				if err := a.showRelated(ctx, conn, m); err != nil {
					return err
				}
			}
			return missing
		})}
	a.outputFlag(cmd)
	return cmd
}
