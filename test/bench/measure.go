package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/lab"
)

// table gathers the figures of several contenders, one value a round.
type table struct {
	title   string
	rows    []string
	columns []string
	cells   map[[2]string][]float64
}

func newTable(format string, args ...any) *table {
	return &table{title: fmt.Sprintf(format, args...), cells: map[[2]string][]float64{}}
}

// add notes a value. Rows and columns are printed in the order in which they were first named.
func (t *table) add(row, column string, value float64) {
	if !slices.Contains(t.rows, row) {
		t.rows = append(t.rows, row)
	}
	if !slices.Contains(t.columns, column) {
		t.columns = append(t.columns, column)
	}
	t.cells[[2]string{row, column}] = append(t.cells[[2]string{row, column}], value)
}

// print writes the figures, and then for each row in "over" the ratios of the first row to it,
// taken round by round.
func (t *table) print(w io.Writer, over ...string) {
	fmt.Fprintf(w, "\n%s\n", t.title)
	tw := tabwriter.NewWriter(w, 2, 0, 2, ' ', 0)
	for _, c := range t.columns {
		fmt.Fprintf(tw, "\t%s", c)
	}
	fmt.Fprintln(tw)
	line := func(name string, values func(column string) []float64) {
		fmt.Fprint(tw, name)
		for _, c := range t.columns {
			fmt.Fprintf(tw, "\t%s", spread(values(c)))
		}
		fmt.Fprintln(tw)
	}
	for _, r := range t.rows {
		line(r, func(c string) []float64 { return t.cells[[2]string{r, c}] })
	}
	for _, r := range over {
		line(t.rows[0]+" / "+r, func(c string) []float64 {
			return ratios(t.cells[[2]string{t.rows[0], c}], t.cells[[2]string{r, c}])
		})
	}
	tw.Flush()
}

func ratios(a, b []float64) (out []float64) {
	for i := range min(len(a), len(b)) {
		if b[i] != 0 {
			out = append(out, a[i]/b[i])
		}
	}
	return out
}

// spread is "median (smallest-largest)".
func spread(v []float64) string {
	if len(v) == 0 {
		return "-"
	}
	s := slices.Sorted(slices.Values(v))
	if len(s) == 1 {
		return short(s[0])
	}
	return fmt.Sprintf("%s (%s-%s)", short(median(s)), short(s[0]), short(s[len(s)-1]))
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// short has three significant digits.
func short(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case v >= 0.1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return strconv.FormatFloat(v, 'g', 2, 64)
}

// processes are those that run in a node, without this one, and their children: isthmusd's BGP
// process has a network namespace of its own.
func processes(n *lab.Node) (pids []int, err error) {
	var want, have unix.Stat_t
	if err := unix.Stat("/run/netns/"+n.Namespace, &want); err != nil {
		return nil, fmt.Errorf("finding the processes of %s: %w", n.Name, err)
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		pid, _ := strconv.Atoi(filepath.Base(p))
		if pid != os.Getpid() && unix.Stat(p+"/ns/net", &have) == nil && have.Ino == want.Ino {
			pids = append(pids, pid)
		}
	}
	for i := 0; i < len(pids); i++ { // pids grows
		lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pids[i]))
		for _, list := range lists {
			text, _ := os.ReadFile(list)
			for _, word := range strings.Fields(string(text)) {
				if pid, err := strconv.Atoi(word); err == nil && !slices.Contains(pids, pid) {
					pids = append(pids, pid)
				}
			}
		}
	}
	return pids, err
}

// cpuTime is the user and system time that processes have used, all threads together.
func cpuTime(pids ...int) (sum time.Duration) {
	for _, pid := range pids {
		var t unix.Timespec
		// MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)
		if unix.ClockGettime(int32(^pid<<3|2), &t) == nil {
			sum += time.Duration(t.Nano())
		}
	}
	return sum
}

// status sums a field of /proc/PID/status over processes; sizes are in MiB.
func status(field string, pids ...int) (sum float64) {
	for _, pid := range pids {
		sum += statusOf(fmt.Sprintf("/proc/%d/status", pid), field)
	}
	return sum
}

func statusOf(path, field string) float64 {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(text), "\n"+field+":")
	words := strings.Fields(rest)
	if len(words) == 0 {
		return 0
	}
	n, _ := strconv.ParseFloat(words[0], 64)
	if len(words) > 1 && words[1] == "kB" {
		n /= 1024
	}
	return n
}

// wakeups counts how often the threads of processes have slept and woken up.
func wakeups(pids ...int) (sum float64) {
	for _, pid := range pids {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		for _, t := range tasks {
			sum += statusOf(t, "voluntary_ctxt_switches")
		}
	}
	return sum
}
