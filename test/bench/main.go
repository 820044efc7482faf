// Command bench compares isthmus with other implementations of the same task, in network namespaces
// of this kernel.
//
//	bench [-rounds N] [-quick] [-former DIRECTORY]
//	      [fib | failover | ipsec | nat | packets | flowtable | idle ...]
//
// Without names it measures everything. The contenders of a figure take turns within a round, so
// that a disturbance of the machine affects all of them. Figures are medians over the rounds with
// the smallest and the largest, and ratios are taken within a round. Nothing passes or fails: the
// output is for readers of docs/benchmarks.md. It needs root.
//
// With -former it runs by turns with the bench program of another revision, and compares what both
// measure of isthmus.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/bgp/gobgp"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/vm"
)

// bench is one run of this command.
type bench struct {
	rounds int
	quick  bool
	// tree that the other implementations are run from; "" in the guest, which has them
	root string
	self string // this program, which is also some of the contenders
}

type part struct {
	name string
	run  func(*bench, context.Context) error
}

var parts = []part{
	{"fib", (*bench).fib},
	{"failover", (*bench).failover},
	{"ipsec", (*bench).ipsec},
	{"nat", (*bench).nat},
	{"packets", (*bench).packets},
	{"flowtable", (*bench).flowtable},
	{"idle", (*bench).idle},
}

func main() {
	gobgp.RunIfChild()
	if len(os.Args) > 1 && contenders[os.Args[1]] != nil {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		if err := contenders[os.Args[1]](ctx, os.Args[2:]); err != nil {
			fmt.Fprintf(os.Stderr, "bench %s: %v\n", os.Args[1], err)
			os.Exit(1)
		}
		return
	}
	b := &bench{}
	flag.IntVar(&b.rounds, "rounds", 3, "`number` of rounds of each figure")
	flag.BoolVar(&b.quick, "quick", false, "a tenth of the sizes, for a look at whether it works")
	former := flag.String("former", "", "compare with the revision that test/former has built in `directory`")
	flag.Parse()
	names := flag.Args()
	for _, n := range names {
		if !slices.ContainsFunc(parts, func(p part) bool { return p.name == n }) {
			fmt.Fprintf(os.Stderr, "bench: no part %q\n", n)
			os.Exit(2)
		}
	}
	if err := b.run(context.Background(), *former, names); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (b *bench) run(ctx context.Context, former string, names []string) (err error) {
	if b.self, err = os.Executable(); err != nil {
		return err
	}
	if former != "" {
		return b.pair(ctx, former, names)
	}
	if !vm.Inside() { // there the programs are installed
		img, err := vm.Build(ctx, os.Stderr)
		if err != nil {
			return err
		}
		b.root = img.Tree()
	}
	fmt.Printf("%s, %s, rounds: %d\n", machine(), runtime.Version(), b.rounds)
	var errs []error
	for _, p := range parts {
		if len(names) > 0 && !slices.Contains(names, p.name) {
			continue
		}
		started := time.Now()
		if err := p.run(b, ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.name, err))
		}
		fmt.Fprintf(os.Stderr, "(%s took %v)\n", p.name, time.Since(started).Round(time.Second))
	}
	return errors.Join(errs...)
}

// lab makes an empty topology whose peers come from the tree.
func (b *bench) lab() (*lab.Lab, error) { return lab.New(lab.Options{Root: b.root}) }

// size is n, or a tenth of it with -quick.
func (b *bench) size(n int) int {
	if b.quick {
		return n / 10
	}
	return n
}

// machine describes where this runs.
func machine() string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	model := "processor"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, rest, ok := strings.Cut(string(info), "model name"); ok {
			line, _, _ := strings.Cut(rest, "\n")
			model = strings.TrimLeft(line, "\t :")
		}
	}
	load, _ := os.ReadFile("/proc/loadavg")
	return fmt.Sprintf("Linux %s, %d x %s, load before %s", bytes.TrimRight(u.Release[:], "\x00"), runtime.NumCPU(), model, strings.Join(strings.Fields(string(load))[:1], ""))
}
