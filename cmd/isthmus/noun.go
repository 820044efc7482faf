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

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// getCommand returns "get NOUN"; list returns the items and the message that contains them.
func getCommand[T any](a *app, use, short string, columns []column[T], list func(context.Context, *grpc.ClientConn) ([]T, proto.Message, error)) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
			items, message, err := list(ctx, conn)
			if err != nil {
				return err
			}
			return show(a, columns, items, message)
		})}
	a.outputFlag(cmd)
	return cmd
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

// pages calls fetch until the last page. add takes a page and returns the token of the next one, or
// "" after the last.
func pages[R any](fetch func(token string) (R, error), add func(R) (next string)) error {
	for token := ""; ; {
		r, err := fetch(token)
		if err != nil {
			return err
		}
		next := add(r)
		if next == "" {
			return nil
		}
		if next == token {
			return errors.New("the node sends the same page again and again")
		}
		token = next
	}
}

// event is the common part of the events of all nouns.
type event interface {
	proto.Message
	GetType() isthmusv1.EventType
}

// watchCommand is "watch NOUN". It prints what is there, and then each change on a line of its own.
func watchCommand[T any, E event](a *app, use, short string, columns []column[T], object func(E) T,
	open func(context.Context, *grpc.ClientConn) (interface{ Recv() (E, error) }, error)) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs,
		RunE: runs(func(cmd *cobra.Command, _ []string) error {
			conn, err := a.connect()
			if err != nil {
				return err
			}
			defer conn.Close()
			stream, err := open(cmd.Context(), conn)
			if err != nil {
				return err
			}
			t := &table{w: a.stdout}
			if a.output == "table" || a.output == "wide" {
				t.add(append([]string{"EVENT"}, headers(a, columns)...)...)
			}
			marked := false
			for {
				e, err := stream.Recv()
				if err == io.EOF || status.Code(err) == codes.Canceled && cmd.Context().Err() != nil {
					return nil
				}
				if err != nil {
					return err
				}
				marked = marked || e.GetType() == isthmusv1.EventType_EVENT_TYPE_MARK
				if a.output == "json" || a.output == "yaml" {
					if err := a.showEvent(e); err != nil {
						return err
					}
					continue
				}
				if e.GetType() != isthmusv1.EventType_EVENT_TYPE_MARK {
					name := strings.ToLower(strings.TrimPrefix(e.GetType().String(), "EVENT_TYPE_"))
					t.add(append([]string{name}, cells(a, columns, object(e))...)...)
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
