// Command vm runs a program as root in a throw-away Debian machine; see package
// test/vm and docs/testing.md.
//
//	vm build                              make the cached root, print its directory
//	vm run [flags] COMMAND [ARG...]       run COMMAND in the guest
//	vm test [flags] PACKAGE [TESTFLAG...] build the package's tests and run them there
//	vm shell [flags]                      a shell on this terminal
//
// The exit status is the command's, 124 at the time limit, 125 if the guest
// failed, 130 after an interrupt, 2 for wrong usage.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/isthmus-net/isthmus/test/vm"
)

const usage = "usage: vm build | run [flags] COMMAND [ARG...] | test [flags] PACKAGE [TESTFLAG...] | shell [flags] [COMMAND...]"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	status, err := run(ctx)
	interrupted := ctx.Err() != nil
	stop()
	if interrupted {
		os.Exit(130)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		if errors.Is(err, context.DeadlineExceeded) {
			os.Exit(124)
		}
		os.Exit(125)
	}
	os.Exit(status)
}

func run(ctx context.Context) (int, error) {
	c := vm.Config{Stdout: os.Stdout, Stderr: os.Stderr, Progress: os.Stderr}
	list := func(to *[]string) func(string) error {
		return func(s string) error { *to = append(*to, s); return nil }
	}
	f := flag.NewFlagSet("vm", flag.ExitOnError)
	f.Usage = func() { fmt.Fprintln(os.Stderr, usage); f.PrintDefaults() }
	f.Func("p", "file or directory to copy to /payload (repeatable)", list(&c.Payload))
	f.Func("e", "VAR=value for the command (repeatable)", list(&c.Env))
	f.StringVar(&c.Out, "o", "", "directory for what the command leaves in /out")
	f.StringVar(&c.Suite, "suite", vm.Trixie, "Debian release of the guest: "+vm.Trixie+" or "+vm.Bookworm)
	f.DurationVar(&c.Limit, "t", 0, "time limit (10m)")
	f.IntVar(&c.CPUs, "cpus", 2, "virtual CPUs")
	f.IntVar(&c.MemoryMiB, "mem", 2048, "memory in MiB")
	f.BoolVar(&c.TTY, "tty", false, "connect the command to this terminal")
	if len(os.Args) < 2 {
		f.Usage()
		return 2, nil
	}
	if err := f.Parse(os.Args[2:]); err != nil {
		return 2, nil
	}
	args := f.Args()
	switch os.Args[1] {
	case "build":
		img, err := vm.Build(ctx, os.Stderr)
		if err != nil {
			return 0, err
		}
		if _, err := vm.FindQEMU(ctx, os.Stderr); err != nil {
			return 0, err
		}
		fmt.Println(img.Dir)
		return 0, nil
	case "shell":
		if c.TTY = true; len(args) == 0 {
			args = []string{"bash", "-l"}
		}
	case "run":
	case "test":
		if len(args) == 0 {
			f.Usage()
			return 2, nil
		}
		dir, err := os.MkdirTemp("", "ist-test-")
		if err != nil {
			return 0, err
		}
		defer os.RemoveAll(dir)
		binary := filepath.Join(dir, "package.test")
		build := exec.CommandContext(ctx, "go", "test", "-c", "-vet=off", "-ldflags=-w", "-o", binary, args[0])
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		build.Stdout, build.Stderr = os.Stderr, os.Stderr
		if err := build.Run(); err != nil {
			return 0, fmt.Errorf("building the tests of %s: %w", args[0], err)
		}
		if _, err := os.Stat(binary); err != nil {
			return 0, fmt.Errorf("building the tests of %s: it has none", args[0])
		}
		c.Payload = append(c.Payload, binary)
		for i, a := range args { // "-v" as for go test
			if i > 0 && strings.HasPrefix(a, "-") && !strings.HasPrefix(a, "-test.") {
				args[i] = "-test." + strings.TrimLeft(a, "-")
			}
		}
		args = append([]string{"./package.test"}, args[1:]...)
	default:
		f.Usage()
		return 2, nil
	}
	if len(args) == 0 {
		f.Usage()
		return 2, nil
	}
	c.Command = args
	return vm.Run(ctx, c)
}
