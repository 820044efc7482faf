package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/noun"
)

// watchPace is the interval in which a watch tries to reach a node that has gone.
var watchPace = 2 * time.Second

// watchCommand returns "watch NOUN".
func (n nounCommands[T]) watchCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: n.plural + " [" + n.word() + "...]", Short: n.watch, Args: cobra.ArbitraryArgs,
		Long: n.watch + `: print all of them or those with some names, and then each change on a line of its own, until interrupted.

If the node restarts, the command connects again and prints only the changes since. It ends with an error when the node refuses
the client.`,
		RunE: runs(func(cmd *cobra.Command, args []string) error { return n.follow(cmd.Context(), a, args) })}
	a.outputFlag(cmd)
	a.headersFlag(cmd)
	return cmd
}

// follower prints the events of a watch. It keeps the objects, so that after a loss of the
// connection it prints only what has changed since.
type follower[T proto.Message] struct {
	n      nounCommands[T]
	a      *app
	names  []string
	table  *table
	known  map[string]T
	marked bool // all objects that were there at first have been printed
	lost   bool // the connection was lost, and is not back yet
}

// follow prints the objects, and then each change on a line of its own, until ctx ends. It connects
// again when the node restarts. A node that refuses the client ends it.
func (n nounCommands[T]) follow(ctx context.Context, a *app, names []string) error {
	heads := []look{{header: "TIME"}, {header: "EVENT", style: change}}
	f := &follower[T]{n: n, a: a, names: names, table: a.newTable(append(heads, looks(a, n.columns)...)...).fitting(), known: map[string]T{}}
	f.table.steady = true
	return a.keep(ctx, &f.lost, func() bool { return f.marked }, f.connection)
}

// keep follows something over one connection after the other, until ctx ends, or until connecting
// again does not help. begun says whether anything was received, lost that the connection was lost
// and is not back yet.
func (a *app) keep(ctx context.Context, lost *bool, begun func() bool, connection func(context.Context) error) error {
	for {
		err := connection(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case !begun() || status.Code(err) != codes.Unavailable || refusal.MatchString(err.Error()):
			return err
		}
		if !*lost {
			*lost = true
			a.note("%s the connection to %s is lost; connecting again", a.clock(), a.node)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(watchPace):
		}
	}
}

// back says that the connection is back if it was lost.
func (a *app) back(lost *bool) {
	if *lost {
		*lost = false
		a.note("%s connected again", a.clock())
	}
}

// ended returns the error of a stream, whose end is that of the connection too.
func ended(err error) error {
	if err == io.EOF {
		return status.Error(codes.Unavailable, "the node has ended the watch")
	}
	return err
}

// refusal matches errors of a connection that do not go away by themselves: one side refuses the
// certificate of the other.
var refusal = regexp.MustCompile(`tls: |x509: |certificate`)

// clock returns the time of day.
func (a *app) clock() string { return a.now().Format("15:04:05") }

// connection follows the objects over one connection, until it ends.
func (f *follower[T]) connection(ctx context.Context) error {
	conn, err := f.a.connect()
	if err != nil {
		return err
	}
	defer conn.Close()
	call := noun.Of(*new(T)).Watch
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, call.Path)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(call.Request()); err != nil && err != io.EOF {
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	listed := map[string]bool{} // nil after the mark
	for {
		e := call.Response()
		if err := stream.RecvMsg(e); err != nil {
			return ended(err)
		}
		f.a.back(&f.lost)
		m := e.ProtoReflect()
		kind := isthmusv1.EventType(m.Get(noun.Field(e, "type")).Enum())
		if kind == isthmusv1.EventType_EVENT_TYPE_MARK {
			err = f.mark(e, listed)
			listed = nil
		} else {
			o := m.Get(call.Field).Message().Interface().(T)
			if listed != nil {
				listed[f.n.id(o)] = true
			}
			err = f.event(kind, o)
		}
		if err == nil && f.marked && f.a.tables() {
			err = f.table.flush()
		}
		if err != nil {
			return err
		}
	}
}

// mark ends the list of objects with which a connection begins: those that are not in it have gone
// since the last connection. Programs get the mark of the first connection only.
func (f *follower[T]) mark(e proto.Message, listed map[string]bool) error {
	for _, id := range slices.Sorted(maps.Keys(f.known)) {
		if !listed[id] {
			if err := f.event(isthmusv1.EventType_EVENT_TYPE_REMOVED, f.known[id]); err != nil {
				return err
			}
		}
	}
	first := !f.marked
	f.marked = true
	if first && !f.a.tables() {
		return f.a.showEvent(e)
	}
	return nil
}

// event prints a change of an object, unless it is the object as it was known.
func (f *follower[T]) event(kind isthmusv1.EventType, o T) error {
	id := f.n.id(o)
	was, known := f.known[id]
	if !known && len(f.names) > 0 && !slices.ContainsFunc(f.names, func(name string) bool { return f.n.matches(o, name) }) {
		return nil
	}
	switch {
	case kind == isthmusv1.EventType_EVENT_TYPE_REMOVED:
		delete(f.known, id)
	case kind == isthmusv1.EventType_EVENT_TYPE_ADDED && known && proto.Equal(still(was), still(o)):
		f.known[id] = o
		return nil
	case known:
		kind, f.known[id] = isthmusv1.EventType_EVENT_TYPE_UPDATED, o
	default:
		f.known[id] = o
	}
	if !f.a.tables() {
		call := noun.Of(o).Watch
		e := call.Response()
		m := e.ProtoReflect()
		m.Set(noun.Field(e, "type"), protoreflect.ValueOfEnum(kind.Number()))
		m.Set(call.Field, protoreflect.ValueOfMessage(o.ProtoReflect()))
		return f.a.showEvent(e)
	}
	name := strings.ToLower(strings.TrimPrefix(kind.String(), "EVENT_TYPE_"))
	f.table.add(append([]cell{{text: f.a.clock()}, {text: name}}, cells(f.a, f.n.columns, o)...)...)
	return nil
}

// counters are fields that change all the time, whose change alone is not worth a line.
var counters = []protoreflect.Name{
	"rx_bytes", "tx_bytes", "rx_packets", "tx_packets", "messages_received", "messages_sent", "flows", "bytes", "growth", "exhausted_in", "next",
	"heard", "data_received",
}

// still returns an object without its counters.
func still(m proto.Message) proto.Message {
	c := proto.Clone(m)
	fields := c.ProtoReflect().Descriptor().Fields()
	for _, name := range counters {
		if f := fields.ByName(name); f != nil {
			c.ProtoReflect().Clear(f)
		}
	}
	return c
}

// showEvent prints an event as one line of JSON, or as one YAML document.
func (a *app) showEvent(e proto.Message) error {
	if a.output == "yaml" {
		fmt.Fprintln(a.stdout, "---")
		return a.showMessage(e)
	}
	data, err := everyField.Marshal(e)
	if err != nil {
		return err
	}
	if a.template != "" {
		return a.showTemplate(data)
	}
	var line bytes.Buffer // protojson does not promise its white space
	if err := json.Compact(&line, data); err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.stdout, "%s\n", line.Bytes())
	return err
}
