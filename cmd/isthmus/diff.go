package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/aymanbagabas/go-udiff"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

func (a *app) diffCommand() *cobra.Command {
	var d document
	cmd := &cobra.Command{Use: "diff [FROM [TO]]", Short: "Show the difference between the texts of two documents; exit with 3 if there is one", Args: cobra.MaximumNArgs(2), ValidArgsFunction: a.generations(),
		Long: `Show the difference between the texts of two documents; exit with 3 if there is one.

FROM and TO are generations, as "isthmus get history" lists them. Without FROM, compare the document before the present
one with the present one; without TO, compare with the present one. With -f, compare with a file instead of TO.
"isthmus plan" shows what a document changes on the node.`,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
			if d.file != "" && len(args) > 1 {
				return usageError{errors.New("TO and --file exclude each other")}
			}
			generations := make([]uint64, 2)
			for i, text := range args {
				g, err := parseGeneration(text)
				if err != nil {
					return err
				}
				generations[i] = g
			}
			to, err := a.diffTo(ctx, conn, &d, generations[1])
			if err != nil {
				return err
			}
			if len(args) == 0 && d.file == "" {
				if generations[0] = to.generation - 1; generations[0] == 0 {
					return fmt.Errorf("generation %d is the first one: there is none before it", to.generation)
				}
			}
			from, err := a.diffTo(ctx, conn, nil, generations[0])
			if err != nil {
				return err
			}
			text := udiff.Unified(from.label, to.label, from.text, to.text)
			if text == "" {
				a.note("%s and %s are the same", from.label, to.label)
				return nil
			}
			if err := a.writeDiff(text); err != nil {
				return err
			}
			return errChanges
		})}
	cmd.Flags().StringVarP(&d.file, "file", "f", "", "compare with this document as YAML or JSON; - for standard input")
	cmd.MarkFlagFilename("file", documents...)
	return cmd
}

// compared is one side of a comparison.
type compared struct {
	label, text string
	generation  uint64 // 0: a file
}

// diffTo returns the document of a file, or else that of a generation; 0 is the present one.
func (a *app) diffTo(ctx context.Context, conn *grpc.ClientConn, d *document, generation uint64) (compared, error) {
	if d != nil && d.file != "" {
		s, err := a.read(d)
		return compared{label: d.name(), text: s.GetText()}, err
	}
	s, err := isthmusv1.NewSpecServiceClient(conn).GetSpec(ctx, &isthmusv1.GetSpecRequest{Generation: generation})
	if err != nil {
		return compared{}, err
	}
	return compared{fmt.Sprintf("generation %d", s.Generation), s.Text, s.Generation}, nil
}

// writeDiff writes a unified difference, on a terminal in colours.
func (a *app) writeDiff(text string) error {
	var b strings.Builder
	for line := range strings.Lines(text) {
		// Tabs stay: they are part of the text.
		words := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		for i, w := range words {
			words[i] = clean(w)
		}
		line = strings.Join(words, "\t")
		switch {
		case a.colours() && strings.HasPrefix(line, "+"):
			line = green + line + end
		case a.colours() && strings.HasPrefix(line, "-"):
			line = red + line + end
		}
		b.WriteString(line + "\n")
	}
	_, err := io.WriteString(a.stdout, b.String())
	return err
}
