package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/spec"
)

var actionSigns = map[isthmusv1.Change_Action]string{
	isthmusv1.Change_ACTION_ADD:     "+ add",
	isthmusv1.Change_ACTION_CHANGE:  "~ change",
	isthmusv1.Change_ACTION_REMOVE:  "- remove",
	isthmusv1.Change_ACTION_REPLACE: "! replace",
}

var revisionColumns = []column[*isthmusv1.Revision]{
	{header: "GENERATION", style: number, value: func(_ *app, r *isthmusv1.Revision) string { return count(r.Generation) }},
	{header: "AGE", style: age, value: func(a *app, r *isthmusv1.Revision) string { return a.since(r.Time) }},
	{header: "AUTHOR", value: func(_ *app, r *isthmusv1.Revision) string { return r.Author }},
	{header: "REASON", value: func(_ *app, r *isthmusv1.Revision) string { return r.Reason }},
	{header: "CHANGES", style: number, value: func(_ *app, r *isthmusv1.Revision) string { return count(uint64(r.Changes)) }},
	{header: "MESSAGE", value: func(_ *app, r *isthmusv1.Revision) string { return r.Message }},
}

// document is the -f flag of the commands that send one.
type document struct{ file string }

func (d *document) flag(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&d.file, "file", "f", "", "the document as YAML or JSON; - for standard input")
	cmd.MarkFlagRequired("file")
	cmd.MarkFlagFilename("file", documents...)
}

// maxDocument is the size in bytes of the largest document that a node reads.
const maxDocument = 16 << 20

// read returns the text of a document.
func (a *app) read(d *document) (*isthmusv1.Source, error) {
	a.document = d.name()
	data, err := a.readInput(d.file, maxDocument)
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading %s: %w", d.name(), err)
	case len(data) > maxDocument:
		return nil, fmt.Errorf("reading %s: is larger than %d bytes", d.name(), maxDocument)
	case !utf8.Valid(data):
		return nil, fmt.Errorf("reading %s: is not valid UTF-8 text", d.name())
	case len(bytes.TrimSpace(data)) == 0:
		return nil, fmt.Errorf("reading %s: is empty: give a document in YAML or JSON", d.name())
	}
	return &isthmusv1.Source{Source: &isthmusv1.Source_Text{Text: string(data)}}, nil
}

func (d *document) name() string {
	if d.file == "-" {
		return "standard input"
	}
	return d.file
}

func (a *app) addSpec(root, get, describe, _ *cobra.Command) {
	root.AddCommand(a.validateCommand(), a.planCommand(), a.diffCommand(), a.applyCommand(), a.confirmCommand(), a.rollbackCommand())

	var generation uint64
	var effective bool
	spec := &cobra.Command{Use: "spec", Short: "Show the text of an accepted document; with -o json or yaml, its parsed form", Args: cobra.NoArgs,
		Long: `Show the text of an accepted document; with -o json or yaml, its parsed form.

With --effective, show the present document with what it leaves out: defaults, presets of clouds, allocated inside
addresses, and addresses of the platform. Applying the result changes nothing.`,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
			s, err := getSpec(ctx, conn, generation, effective)
			if err != nil {
				return err
			}
			if !a.tables() {
				return a.showDocument(s.Spec)
			}
			_, err = io.WriteString(a.stdout, s.Text)
			return err
		})}
	spec.Flags().Uint64Var(&generation, "generation", 0, "generation to show (default: the present one)")
	completeFlag(spec, "generation", a.generations())
	spec.Flags().BoolVar(&effective, "effective", false, "show the present document with its defaults")
	spec.MarkFlagsMutuallyExclusive("generation", "effective")
	a.outputFlag(spec)
	get.AddCommand(spec)
	nounCommands[*isthmusv1.Revision]{
		singular: "generation", plural: "history", aliases: []string{"generations", "revisions", "revision"}, columns: revisionColumns,
		what:     "GENERATION",
		samples:  [2]string{"7", "8"},
		list:     "List the accepted documents, newest first",
		describe: "Show time, author and reason of accepted documents",
		names:    func(r *isthmusv1.Revision) []string { return []string{count(r.Generation)} },
	}.add(a, get, describe, nil)
}

func getSpec(ctx context.Context, conn *grpc.ClientConn, generation uint64, effective bool) (*isthmusv1.GetSpecResponse, error) {
	c := isthmusv1.NewSpecServiceClient(conn)
	if effective {
		return c.GetEffectiveSpec(ctx, &isthmusv1.GetEffectiveSpecRequest{})
	}
	return c.GetSpec(ctx, &isthmusv1.GetSpecRequest{Generation: generation})
}

func (a *app) validateCommand() *cobra.Command {
	var d document
	var offline bool
	show := func(r *isthmusv1.ValidateResponse) (err error) {
		if !a.tables() {
			err = a.showMessage(r)
		} else {
			printProblems(a.stdout, a.document, r.Problems)
			a.printNotes(r.Notes)
		}
		if err == nil && len(r.Problems) > 0 {
			err = fmt.Errorf("%s: %s", d.name(), plural(len(r.Problems), "problem"))
		}
		return err
	}
	onNode := a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
		source, err := a.read(&d)
		if err != nil {
			return err
		}
		r, err := isthmusv1.NewSpecServiceClient(conn).Validate(ctx, &isthmusv1.ValidateRequest{Source: source})
		if err != nil {
			return err
		}
		return show(r)
	})
	cmd := &cobra.Command{Use: "validate -f FILE", Short: "Check a document and change nothing", Args: cobra.NoArgs,
		Long: `Check a document and change nothing.

With --offline, check it without a node, as on a laptop or in a pipeline: all but the secrets, the addresses that a
platform reports, and the features of the kernel.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !offline {
				return onNode(cmd, args)
			}
			return runs(func(*cobra.Command, []string) error {
				source, err := a.read(&d)
				if err != nil {
					return err
				}
				problems, notes := spec.Offline([]byte(source.GetText()))
				return show(&isthmusv1.ValidateResponse{Problems: messages(problems), Notes: messages(notes)})
			})(cmd, args)
		}}
	d.flag(cmd)
	cmd.Flags().BoolVar(&offline, "offline", false, "check without a node")
	a.outputFlag(cmd)
	return cmd
}

// messages returns problems in the form of the API.
func messages(all spec.Problems) (out []*isthmusv1.Problem) {
	for _, p := range all {
		out = append(out, &isthmusv1.Problem{Path: p.Path, Value: p.Value, Rule: p.Rule, Remedy: p.Remedy, Line: uint32(p.Line)})
	}
	return out
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func (a *app) planCommand() *cobra.Command {
	var d document
	cmd := &cobra.Command{Use: "plan -f FILE", Short: "Show what applying a document would change; exit with 3 if there are changes", Args: cobra.NoArgs,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
			source, err := a.read(&d)
			if err != nil {
				return err
			}
			r, err := isthmusv1.NewSpecServiceClient(conn).Plan(ctx, &isthmusv1.PlanRequest{Source: source})
			if err != nil {
				return fmt.Errorf("planning %s: %w", d.name(), err)
			}
			if err := a.showChanges(r.Changes, r); err != nil {
				return err
			}
			a.printNotes(r.Notes)
			return a.planned(r.Changes, r.Generation)
		})}
	d.flag(cmd)
	a.outputFlag(cmd)
	return cmd
}

// planned reports the number of changes of a plan, and returns errChanges if there are any.
func (a *app) planned(changes []*isthmusv1.Change, generation uint64) error {
	a.note("%s to generation %d", plural(len(changes), "change"), generation)
	if len(changes) > 0 {
		return errChanges
	}
	return nil
}

// showChanges prints the changes: each object on a line, and below it its fields and what is
// interrupted.
func (a *app) showChanges(changes []*isthmusv1.Change, m proto.Message) error {
	if !a.tables() {
		return a.showMessage(m)
	}
	var b strings.Builder
	for _, c := range changes {
		fmt.Fprintf(&b, "%s %s %s\n", actionSigns[c.Action], clean(c.Kind), clean(c.Name))
		for _, f := range c.Fields {
			fmt.Fprintf(&b, "    %s\n", clean(f))
		}
		if c.Interrupts != "" {
			fmt.Fprintf(&b, "    interrupts: %s\n", clean(c.Interrupts))
		}
	}
	_, err := io.WriteString(a.stdout, b.String())
	return err
}

// expectedFlag adds --expected-generation and returns what gives its value, nil when it was not
// used.
func expectedFlag(cmd *cobra.Command) func() *uint64 {
	v := cmd.Flags().Uint64("expected-generation", 0, "refuse unless this is the present generation")
	return func() *uint64 {
		if cmd.Flags().Changed("expected-generation") {
			return v
		}
		return nil
	}
}

// confirmFlag adds --confirm-within and returns what gives its value, nil when it was not used.
func confirmFlag(cmd *cobra.Command) func() *durationpb.Duration {
	v := cmd.Flags().Duration("confirm-within", 0, "revert unless confirmed within this time, 10s to 1h")
	return func() *durationpb.Duration {
		if cmd.Flags().Changed("confirm-within") {
			return durationpb.New(*v)
		}
		return nil
	}
}

// messageFlag adds --message.
func messageFlag(cmd *cobra.Command) *string {
	v := cmd.Flags().StringP("message", "m", "", "why the change is made, for the history and the audit log, such as NET-1234")
	completeFlag(cmd, "message", oneOf())
	return v
}

// waitDefault is how long a change on a terminal waits until it is applied.
const waitDefault = time.Minute

// waitFlag adds --wait, and returns what gives its value: 0 does not wait.
func (a *app) waitFlag(cmd *cobra.Command) func() time.Duration {
	v := cmd.Flags().Duration("wait", waitDefault, "wait until the change is applied, at most this long; 0s does not wait (default 1m on a terminal, else 0s)")
	cmd.Flags().Lookup("wait").DefValue = "0s" // the text has it
	return func() time.Duration {
		if !cmd.Flags().Changed("wait") && (a.terminal == nil || a.terminal() == 0) {
			return 0
		}
		return *v
	}
}

// await waits until a generation is applied. If it is not in time, the error has the objects that
// are not applied, and why.
func (a *app) await(ctx context.Context, conn *grpc.ClientConn, generation uint64, limit time.Duration) error {
	if limit <= 0 {
		return nil
	}
	specs := isthmusv1.NewSpecServiceClient(conn)
	for end := time.Now().Add(limit); ; {
		// A call must end before --timeout does.
		left := max(time.Until(end), time.Millisecond)
		part := min(left, max(a.timeout/2, time.Millisecond))
		r, err := specs.WaitApplied(ctx, &isthmusv1.WaitAppliedRequest{Generation: generation, MaxWait: durationpb.New(part)})
		switch {
		case status.Code(err) == codes.PermissionDenied || status.Code(err) == codes.Unimplemented:
			// Every role may call the method, so that the node does not have it.
			return fmt.Errorf("generation %d is accepted; the node has an older version, with which --wait does not work: run isthmus status to see whether it is applied", generation)
		case err != nil:
			return fmt.Errorf("waiting until generation %d is applied: %w", generation, err)
		case r.AppliedGeneration == generation:
			a.note("generation %d is applied", generation)
			return nil
		case r.PresentGeneration != generation:
			return fmt.Errorf("generation %d is not the present one any more, which is %d", generation, r.PresentGeneration)
		case part == left:
			return notApplied(generation, limit, r.Conditions)
		}
	}
}

// notApplied lists the objects of a generation that are not applied.
func notApplied(generation uint64, limit time.Duration, all []*isthmusv1.Condition) error {
	text := fmt.Sprintf("generation %d is not applied after %v; the node goes on trying", generation, limit)
	for _, c := range all {
		if c.Type == condition.NotApplied.Name {
			text += "; " + c.Message
		}
	}
	return errors.New(text)
}

func (a *app) applyCommand() *cobra.Command {
	var d document
	cmd := &cobra.Command{Use: "apply -f FILE", Short: "Apply a document to the node", Args: cobra.NoArgs,
		Long: `Apply a document to the node, as a whole or not at all.

With --confirm-within the node reverts to the former document by itself unless "isthmus confirm" reaches it in time:
a change that cuts the connection to the node reverts itself.`}
	expected, confirm, message, wait := expectedFlag(cmd), confirmFlag(cmd), messageFlag(cmd), a.waitFlag(cmd)
	cmd.RunE = a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
		source, err := a.read(&d)
		if err != nil {
			return err
		}
		r, err := isthmusv1.NewSpecServiceClient(conn).Apply(ctx, &isthmusv1.ApplyRequest{Source: source, ExpectedGeneration: expected(), ConfirmWithin: confirm(), Message: *message})
		if err != nil {
			return fmt.Errorf("applying %s: %w", d.name(), err)
		}
		return a.outcome(ctx, conn, r, false, wait())
	})
	d.flag(cmd)
	a.outputFlag(cmd)
	return cmd
}

// outcome shows the answer to a change, or to the plan of one, and waits until a change is applied.
func (a *app) outcome(ctx context.Context, conn *grpc.ClientConn, r *isthmusv1.ApplyResponse, plan bool, wait time.Duration) error {
	if plan {
		if err := a.showChanges(r.Changes, r); err != nil {
			return err
		}
		return a.planned(r.Changes, r.Generation)
	}
	if left := r.GoesBackIn; left != nil {
		fmt.Fprintf(a.stderr, "isthmus: the node reverts in %s unless you run: isthmus confirm %d\n", short(left.AsDuration().Round(time.Second)), r.Generation)
	}
	a.printNotes(r.Notes)
	a.note("generation %d, %s", r.Generation, plural(len(r.Changes), "change"))
	if err := a.showChanges(r.Changes, r); err != nil {
		return err
	}
	return a.await(ctx, conn, r.Generation, wait)
}

func parseGeneration(s string) (uint64, error) {
	g, err := strconv.ParseUint(s, 10, 64)
	if err != nil || g == 0 {
		return 0, usageError{fmt.Errorf("generation %q: must be a number of at least 1", s)}
	}
	return g, nil
}

func (a *app) confirmCommand() *cobra.Command {
	return &cobra.Command{Use: "confirm GENERATION", Short: "Keep a generation that was applied with --confirm-within", Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.generations(),
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
			if len(args) == 0 {
				return a.waiting(ctx, conn)
			}
			g, err := parseGeneration(args[0])
			if err != nil {
				return err
			}
			_, err = isthmusv1.NewSpecServiceClient(conn).Confirm(ctx, &isthmusv1.ConfirmRequest{Generation: g})
			return err
		})}
}

// waiting returns the error of a confirmation without a generation: it names the one that waits.
func (a *app) waiting(ctx context.Context, conn *grpc.ClientConn) error {
	s, err := getStatus(ctx, conn)
	if err != nil {
		return err
	}
	if s.ConfirmUntil == nil {
		return usageError{errors.New("GENERATION is missing, and no generation waits for a confirmation")}
	}
	when := a.left(s.ConfirmUntil)
	if when != "now" {
		when = "in " + when
	}
	return usageError{fmt.Errorf("GENERATION is missing: generation %d waits, and reverts %s: run isthmus confirm %d", s.Generation, when, s.Generation)}
}

func (a *app) rollbackCommand() *cobra.Command {
	var to uint64
	cmd := &cobra.Command{Use: "rollback", Short: "Apply an earlier document again, as a new generation", Args: cobra.NoArgs}
	var dry bool
	expected, confirm, message, wait := expectedFlag(cmd), confirmFlag(cmd), messageFlag(cmd), a.waitFlag(cmd)
	cmd.RunE = a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
		r, err := isthmusv1.NewSpecServiceClient(conn).Rollback(ctx, &isthmusv1.RollbackRequest{
			ToGeneration: to, ExpectedGeneration: expected(), ConfirmWithin: confirm(), DryRun: dry, Message: *message,
		})
		if err != nil {
			return fmt.Errorf("rolling back: %w", err)
		}
		return a.outcome(ctx, conn, r, dry, wait())
	})
	cmd.Flags().BoolVar(&dry, "plan", false, "only show what would change; exit with 3 if there are changes")
	cmd.Flags().Uint64Var(&to, "to", 0, "generation to revert to (default: the one before the present one)")
	completeFlag(cmd, "to", a.generations())
	a.outputFlag(cmd)
	return cmd
}
