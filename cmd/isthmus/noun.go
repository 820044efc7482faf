package main

import (
	"context"
	"errors"
	"fmt"
	"io"
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
// and "watch PLURAL". They use the calls that the API has for messages of type T.
type nounCommands[T proto.Message] struct {
	plural  string
	aliases []string // former names
	list    string   // short text of "get"
	// use and short text of "describe", as "pool NAME: Show a pool"; empty: it does not exist
	describe string
	watch    string // short text of "watch"; empty: it does not exist
	columns  []column[T]
	// request of "get", to which flags are bound. Nil: without fields.
	request proto.Message
	// show prints a list. Nil: as a table of columns, with one row for each object.
	show func(all proto.Message, items []T) error
}

// add adds the commands, and returns that of "get".
func (n nounCommands[T]) add(a *app, get, describe, watch *cobra.Command) *cobra.Command {
	list := n.get(a, n.plural)
	get.AddCommand(list)
	if use, short, ok := strings.Cut(n.describe, ": "); ok {
		describe.AddCommand(describeCommand(a, use, short, getNamed[T]))
	}
	if n.watch != "" {
		follow := watchCommand(a, n.plural, n.watch, n.columns)
		follow.Aliases = n.aliases
		watch.AddCommand(follow)
	}
	return list
}

// get returns the command that lists the noun.
func (n nounCommands[T]) get(a *app, use string) *cobra.Command {
	cmd := getCommand(a, use, n.list, func(ctx context.Context, conn *grpc.ClientConn) error {
		all, items, err := listAll[T](ctx, conn, n.request)
		if err != nil {
			return err
		}
		if n.show != nil {
			return n.show(all, items)
		}
		return show(a, n.columns, items, all)
	})
	cmd.Aliases = n.aliases
	return cmd
}

// getCommand returns "get NOUN"; list prints the objects.
func getCommand(a *app, use, short string, list func(context.Context, *grpc.ClientConn) error) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error { return list(ctx, conn) })}
	a.outputFlag(cmd)
	return cmd
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
	token, next := noun.Field(request, "page_token"), noun.Field(all, "next_page_token")
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
		after := p.Get(next).String()
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

// getNamed returns the object with a name.
func getNamed[T proto.Message](ctx context.Context, conn *grpc.ClientConn, name string) (proto.Message, error) {
	var none T
	call := noun.Of(none).Get
	request, response := call.Request(), call.Response()
	request.ProtoReflect().Set(noun.Field(request, "name"), protoreflect.ValueOfString(name))
	return response, conn.Invoke(ctx, call.Path, request, response)
}

// describeCommand returns "describe NOUN NAME".
func describeCommand(a *app, use, short string, get func(context.Context, *grpc.ClientConn, string) (proto.Message, error)) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(1),
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
			m, err := get(ctx, conn, args[0])
			if err != nil {
				return err
			}
			return a.describeMessage(m)
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
			t := &table{w: a.stdout}
			if a.output == "table" || a.output == "wide" {
				t.add(append([]string{"EVENT"}, headers(a, columns)...)...)
			}
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
				if a.output == "json" || a.output == "yaml" {
					if err := a.showEvent(e); err != nil {
						return err
					}
					continue
				}
				if kind != isthmusv1.EventType_EVENT_TYPE_MARK {
					name := strings.ToLower(strings.TrimPrefix(kind.String(), "EVENT_TYPE_"))
					t.add(append([]string{name}, cells(a, columns, m.Get(call.Field).Message().Interface().(T))...)...)
				}
				if marked {
					if err := t.flush(); err != nil {
						return err
					}
				}
			}
		})}
	a.outputFlag(cmd)
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
