// Command isthmus is the command line client of the isthmus daemon of one node.
//
// Answers go to standard output, all other messages to standard error. Exit codes: 0 done,
// 1 failed, 2 wrong usage, 3 the plan has changes.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// Exit codes.
const (
	exitOK      = 0
	exitFailed  = 1
	exitUsage   = 2
	exitChanges = 3
)

// app holds the state that the commands share: the outside world and the common flags.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	now            func() time.Time
	wall           func() time.Time // for certificates
	getenv         func(string) string
	terminal       func() int // columns of standard output if it is a terminal, otherwise 0
	uid            int

	contextFile, address, socket string
	nodeName                     string // context to use instead of the current one
	quiet                        bool
	timeout                      time.Duration
	output                       string
	template                     string // of -o jsonpath, "" without one
	noHeaders                    bool

	renewing bool   // the command renews the certificate, so its end needs no warning
	warned   bool   // of the end of the certificate
	path     string // of the command, as "isthmus get tunnels"
	document string // name of the file sent to the node, for problems
	node     string // socket or address of the daemon, for errors
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, now: time.Now, wall: time.Now, getenv: os.Getenv, uid: os.Geteuid(), terminal: columns}
	code := a.run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

// columns returns the width of the terminal that standard output is, 0 if it is not one.
func columns() int {
	width, _, err := term.GetSize(int(os.Stdout.Fd()))
	if err != nil {
		return 0
	}
	return width
}

// failure is an error of a command whose usage was correct.
type failure struct{ error }

func (f failure) Unwrap() error { return f.error }

// errChanges makes plan exit with 3.
var errChanges = errors.New("the plan has changes")

// errUnwell makes status --check exit with 1. The reason is in its output.
var errUnwell = errors.New("the node has errors")

// usageError is an error in the arguments or flags of a command.
type usageError struct{ error }

// run executes one command line and returns the exit code.
func (a *app) run(ctx context.Context, args []string) int {
	root := a.command()
	root.SetArgs(args)
	command, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	if errors.Is(err, errChanges) {
		return exitChanges
	}
	if errors.Is(err, errUnwell) || errors.Is(err, errNoAnswer) {
		return exitFailed
	}
	if f, ok := errors.AsType[failure](err); ok {
		for _, err := range joined(f.error) {
			a.printError(err)
		}
		return exitFailed
	}
	fmt.Fprintf(a.stderr, "isthmus: %v\nRun '%s --help' for usage.\n", err, command.CommandPath())
	return exitUsage
}

// joined returns the errors that errors.Join put together.
func joined(err error) []error {
	several, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	var all []error
	for _, err := range several.Unwrap() {
		all = append(all, joined(err)...)
	}
	return all
}

// Messages of grpc about the connection; the first group of unreachable is the cause.
var (
	unreachable = regexp.MustCompile(`connection error: desc = "(?:transport: )?(?:Error while dialing: |authentication handshake failed: |error reading server preface: )?(.*)"`)
	late        = regexp.MustCompile(`context deadline exceeded.*`)
	role        = regexp.MustCompile(`^.*/isthmus\.v1\.\S+ needs role (\w+), (.+) has role (\w+)$`)
)

const refused = "the node at %s refuses this certificate: revoked or expired; see isthmus context show"

// refusals are causes for which a connection fails because one side does not take the certificate
// of the other.
var refusals = []struct{ cause, text string }{
	{"remote error: tls: bad certificate", refused},
	{"remote error: tls: unknown certificate authority", "the node at %s does not know the authority of this certificate: the context is for another node, or of a former authority; see isthmus context show"},
	{"x509: certificate signed by unknown authority", "the node at %s has a certificate of another authority than the context: the context is for another node, or of a former authority; import a new one with isthmus context import"},
}

func (a *app) printError(err error) {
	text := a.words(err)
	var problems []*isthmusv1.Problem
	if s, ok := status.FromError(err); ok {
		for _, d := range s.Details() {
			if p, ok := d.(*isthmusv1.Problems); ok {
				problems = append(problems, p.Problems...)
			}
		}
	}
	if len(problems) == 1 { // the message has it for other clients; here it follows with its remedy
		if short, is := strings.CutSuffix(text, ": "+problems[0].Path+": "+problems[0].Rule); is {
			text = short + ": 1 problem"
		}
	}
	fmt.Fprintf(a.stderr, "isthmus: %s\n", clean(text))
	printProblems(a.stderr, a.document, problems)
}

// words returns an error for the user, without the words of grpc.
func (a *app) words(err error) string {
	text := err.Error()
	s, ok := status.FromError(err)
	if ok {
		// FromError prepends the text of the wrapping errors to the message.
		text = strings.Replace(s.Message(), fmt.Sprintf("rpc error: code = %s desc = ", s.Code()), "", 1)
	}
	switch s.Code() {
	case codes.PermissionDenied:
		text = role.ReplaceAllString(text, "`"+a.path+"` needs the role $1; this client is $2, $3")
	case codes.Unauthenticated:
		text = strings.Replace(text, "certificate is revoked", fmt.Sprintf(refused, a.node), 1)
	case codes.Unavailable:
		for _, r := range refusals {
			if strings.Contains(text, r.cause) {
				return fmt.Sprintf(r.text, a.node)
			}
		}
		text = unreachable.ReplaceAllString(text, "the daemon at "+a.node+" cannot be reached: $1")
	case codes.DeadlineExceeded:
		text = late.ReplaceAllString(text, fmt.Sprintf("the daemon at %s did not answer within %v", a.node, a.timeout))
	}
	return text
}

// note prints what a command has done, or what to do next, unless --quiet was used.
func (a *app) note(format string, args ...any) {
	if !a.quiet {
		fmt.Fprintf(a.stderr, "isthmus: "+format+"\n", args...)
	}
}

// runs wraps f for cobra: its errors become failures, except usage errors.
func runs(f func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		err := f(cmd, args)
		if err == nil {
			return nil
		}
		if u, ok := errors.AsType[usageError](err); ok {
			return u.error
		}
		return failure{err}
	}
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:           "isthmus",
		Short:         "Manage an isthmus node",
		SilenceErrors: true,
		SilenceUsage:  true,
		Long: `isthmus manages one node through its daemon: over the unix socket when it runs as root on the node itself, otherwise with
the address and the certificates of a context (isthmus context import). There may be several contexts, one for each node.

Answers go to standard output, all other messages to standard error. With -o jsonpath=TEMPLATE a command prints fields of what -o json
shows, in the template language of kubectl, as in isthmus get peers -o jsonpath='{range .peers[*]}{.name} {.state}{"\n"}{end}'. Control
characters in texts are replaced.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the plan has changes.`,
	}
	unknown := a.group("", "").RunE
	root.Args = cobra.ArbitraryArgs
	root.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		return unknown(cmd, args)
	}
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	f := root.PersistentFlags()
	f.StringVar(&a.nodeName, "node", "", "name of the context to use (default: the one chosen with isthmus context use)")
	f.StringVar(&a.contextFile, "context", "", "file with the node's address and certificates, instead of a named context (default $ISTHMUS_CONTEXT)")
	f.StringVar(&a.address, "address", "", "host and port of the API (default: those of the context)")
	f.StringVar(&a.socket, "socket", "", "unix socket of the daemon on this node (default $ISTHMUS_SOCKET; for root "+defaultSocket+" if it exists)")
	f.DurationVar(&a.timeout, "timeout", 30*time.Second, "time to wait for an answer")
	f.BoolVarP(&a.quiet, "quiet", "q", false, "print no notes on standard error, only warnings and errors")

	get := a.group("get", "List objects of one kind, or some of them by name")
	describe := a.group("describe", "Show everything about objects")
	watch := a.group("watch", "Follow changes of objects until interrupted")
	root.AddCommand(get, describe, watch)
	for _, add := range []func(root, get, describe, watch *cobra.Command){
		a.addSpec, a.addTunnels, a.addPeers, a.addDisable, a.addRoutes, a.addPolicies, a.addPolicy, a.addEgress, a.addWho, a.addFlows, a.addPing, a.addCapture, a.addPorts, a.addPools, a.addLinks, a.addNames, a.addConditions, a.addEvents, a.addAudit, a.addStatus, a.addSupport, a.addLogs, a.addNode, a.addSecrets, a.addClients,
		a.addContext, a.addCloud, a.addTopology,
	} {
		add(root, get, describe, watch)
	}
	completeFlag(root, "node", func(cmd *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
		return a.completeContexts(cmd, nil, word)
	})
	completeFlag(root, "context", files)
	completeFlag(root, "socket", files)
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	root.InitDefaultCompletionCmd()
	addExamples(root)
	plainUsage(root)
	// A group alone is not a command, although cobra runs it.
	root.SetUsageTemplate(strings.Replace(root.UsageTemplate(), "{{if .Runnable}}", "{{if and .Runnable (not .HasAvailableSubCommands)}}", 1))
	root.SetFlagErrorFunc(flagError)
	root.PersistentPreRun = func(cmd *cobra.Command, _ []string) { a.path = cmd.CommandPath() }
	// Cobra's own group shows its help and succeeds when the shell is unknown.
	for _, c := range root.Commands() {
		if c.Name() == "completion" {
			c.Args, c.RunE = cobra.ArbitraryArgs, a.group("", "").RunE
		}
	}
	return root
}

// group returns a command that only holds subcommands.
func (a *app) group(use, short string) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short,
		RunE: func(cmd *cobra.Command, args []string) error {
			var all, near []string
			var list strings.Builder
			for _, c := range cmd.Commands() {
				if !c.IsAvailableCommand() {
					continue
				}
				all = append(all, c.Name())
				if len(args) > 0 && len(similar(args[0], append([]string{c.Name()}, c.Aliases...))) > 0 {
					near = append(near, c.Name())
				}
				fmt.Fprintf(&list, "\n  %-*s %s", c.NamePadding(), c.Name(), c.Short)
			}
			if len(args) > 0 {
				hint := didYouMean(near)
				if hint == "" && cmd.HasParent() {
					hint = "; give one of " + strings.Join(all, ", ")
				}
				return fmt.Errorf("unknown command %q for %q%s", args[0], cmd.CommandPath(), hint)
			}
			return fmt.Errorf("%s: give one of%s", cmd.CommandPath(), list.String())
		},
	}
}
