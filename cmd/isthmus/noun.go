package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
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
	// find returns the object with a name, and none if there is none. Nil: a Get call of the API,
	// or one of the list.
	find func(ctx context.Context, conn *grpc.ClientConn, name string) ([]T, error)
	// table prints objects. Nil: as rows of columns.
	table func(items []T) error
	// more prints the rest of a List response below the table of all objects. Nil: there is none.
	more func(all proto.Message) error
}

// add adds the commands, and returns that of "get".
func (n nounCommands[T]) add(a *app, get, describe, watch *cobra.Command) *cobra.Command {
	list := n.get(a, n.plural)
	list.Aliases = append([]string{n.singular}, n.aliases...)
	get.AddCommand(list)
	one := describeCommand(a, n.singular+" "+n.word()+"...", n.describe, n.pick)
	one.ValidArgsFunction = list.ValidArgsFunction
	list.Example, one.Example = nounExamples("get", n.singular, n.plural, n.samples), nounExamples("describe", n.singular, n.plural, n.samples)
	one.Aliases = append([]string{n.plural}, n.aliases...)
	describe.AddCommand(one)
	if n.watch != "" {
		follow := watchCommand(a, n.plural, n.watch, n.columns)
		follow.Aliases = list.Aliases
		follow.Example = nounExamples("watch", n.singular, n.plural, n.samples)
		watch.AddCommand(follow)
	}
	return list
}

// word stands for a name in usage lines.
func (n nounCommands[T]) word() string { return cmp.Or(n.what, "NAME") }

// get returns the command that lists the noun, or some of its objects.
func (n nounCommands[T]) get(a *app, use string) *cobra.Command {
	cmd := getCommand(a, use+" ["+n.word()+"...]", n.list, cobra.ArbitraryArgs, func(ctx context.Context, conn *grpc.ClientConn, names []string) error {
		items, missing, all := []T(nil), error(nil), proto.Message(nil)
		if len(names) > 0 {
			var err error
			if items, err = n.pick(ctx, conn, names); err != nil && len(items) == 0 {
				return err
			}
			missing, all = err, response(items)
		} else {
			var err error
			if all, items, err = listAll[T](ctx, conn, n.request); err != nil {
				return err
			}
		}
		return errors.Join(n.print(a, items, all, len(names) == 0), missing)
	})
	cmd.ValidArgsFunction = names(a, false, n.words)
	return cmd
}

// print prints objects, and with whole the rest of the response.
func (n nounCommands[T]) print(a *app, items []T, all proto.Message, whole bool) error {
	switch {
	case n.table == nil || !a.tables():
		if err := show(a, n.columns, items, all); err != nil || !a.tables() {
			return err
		}
	default:
		if err := n.table(items); err != nil {
			return err
		}
	}
	if whole && n.more != nil {
		return n.more(all)
	}
	return nil
}

// pick returns the objects with some names. The error names those that are missing; the others are
// returned as well.
func (n nounCommands[T]) pick(ctx context.Context, conn *grpc.ClientConn, names []string) (items []T, err error) {
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
	var missing []error
	for _, name := range names {
		found, err := find(ctx, conn, name)
		if err != nil {
			return nil, err
		}
		items = append(items, found...)
		if len(found) > 0 {
			continue
		}
		all, err := everything()
		if err != nil {
			return nil, err
		}
		var known []string
		for _, o := range all {
			known = append(known, n.words(o)...)
		}
		missing = append(missing, fmt.Errorf("%s %q: not found%s", n.singular, name, didYouMean(similar(name, known))))
	}
	return items, errors.Join(missing...)
}

// words returns the words that select an object.
func (n nounCommands[T]) words(o T) []string {
	if n.names != nil {
		return n.names(o)
	}
	return []string{noun.Text(o, "name")}
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

// getCommand returns "get NOUN"; list prints the objects.
func getCommand(a *app, use, short string, args cobra.PositionalArgs, list func(ctx context.Context, conn *grpc.ClientConn, names []string) error) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: args, RunE: a.call(list)}
	a.listFlags(cmd)
	return cmd
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
			}
			return missing
		})}
	a.outputFlag(cmd)
	return cmd
}

// watchCommand returns "watch NOUN". It prints what is there, and then each change on a line of its
// own.
func watchCommand[T proto.Message](a *app, use, short string, columns []column[T]) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs,
		RunE: runs(func(cmd *cobra.Command, _ []string) error {
			conn, err := a.connect()
			if err != nil {
				return err
			}
			defer conn.Close()
			var none T
			call := noun.Of(none).Watch
			stream, err := conn.NewStream(cmd.Context(), &grpc.StreamDesc{ServerStreams: true}, call.Path)
			if err != nil {
				return err
			}
			if err := stream.SendMsg(call.Request()); err != nil && err != io.EOF {
				return err
			}
			if err := stream.CloseSend(); err != nil {
				return err
			}
			t := a.newTable(append([]look{{header: "EVENT", style: event}}, looks(a, columns)...)...)
			t.steady = true
			marked := false
			for {
				e := call.Response()
				err := stream.RecvMsg(e)
				if err == io.EOF || status.Code(err) == codes.Canceled && cmd.Context().Err() != nil {
					return nil
				}
				if err != nil {
					return err
				}
				m := e.ProtoReflect()
				kind := isthmusv1.EventType(m.Get(noun.Field(e, "type")).Enum())
				marked = marked || kind == isthmusv1.EventType_EVENT_TYPE_MARK
				if !a.tables() {
					if err := a.showEvent(e); err != nil {
						return err
					}
					continue
				}
				if kind != isthmusv1.EventType_EVENT_TYPE_MARK {
					name := strings.ToLower(strings.TrimPrefix(kind.String(), "EVENT_TYPE_"))
					t.add(append([]cell{{text: name}}, cells(a, columns, m.Get(call.Field).Message().Interface().(T))...)...)
				}
				if marked {
					if err := t.flush(); err != nil {
						return err
					}
				}
			}
		})}
	a.outputFlag(cmd)
	a.headersFlag(cmd)
	return cmd
}

// showEvent prints an event as one line of JSON, or as one YAML document.
func (a *app) showEvent(e proto.Message) error {
	if a.output == "yaml" {
		data, err := encodeYAML(e)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(a.stdout, "---\n%s", data)
		return err
	}
	data, err := protojson.Marshal(e)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.stdout, "%s\n", data)
	return err
}
