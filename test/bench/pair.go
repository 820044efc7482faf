package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// pair runs this program and the one of another revision by turns, part by part and round by round,
// and prints what both have measured, with the ratio taken within a round. The rows that do not
// depend on the revision, such as BIRD, show how much the machine varies. The directory former has
// the other program, bench, and its source.
func (b *bench) pair(ctx context.Context, former string, names []string) error {
	fmt.Printf("%s, rounds: %d; this revision, and the one in %s\n", machine(), b.rounds, former)
	former, err := filepath.Abs(former) // the program runs in another directory
	if err != nil {
		return err
	}
	programs := [2]string{b.self, filepath.Join(former, "bench")}
	// A part builds isthmusd from the source in its working directory.
	directories := [2]string{"", filepath.Join(former, "source")}
	if _, err := os.Stat(directories[1]); err != nil {
		return fmt.Errorf("finding the other revision: %w; test/former builds it", err)
	}
	var errs []error
	for _, p := range parts {
		if len(names) > 0 && !slices.Contains(names, p.name) {
			continue
		}
		var both [2]figures // this revision's, and the former one's
		for round := range b.rounds {
			order := []int{0, 1}
			if round%2 == 1 {
				order = []int{1, 0}
			}
			for _, i := range order {
				out, err := b.round(ctx, programs[i], directories[i], p.name)
				if err == nil {
					err = both[i].add(out)
				}
				if err != nil {
					errs = append(errs, fmt.Errorf("%s, revision %d, round %d: %w", p.name, i, round+1, err))
				}
			}
		}
		if err := both[0].compare(os.Stdout, &both[1]); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.name, err))
		}
	}
	return errors.Join(errs...)
}

// round runs one round of a part by a program in a directory, and returns what it prints.
func (b *bench) round(ctx context.Context, program, dir, part string) (string, error) {
	args := []string{"-rounds", "1"}
	if b.quick {
		args = append(args, "-quick")
	}
	cmd := exec.CommandContext(ctx, program, append(args, part)...)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	out, err := cmd.Output()
	return string(out), err
}

// figures are the tables of a part, one value a round in each cell.
type figures struct {
	tables []*table
}

// cells separates the cells of a line that tabwriter has aligned.
var cells = regexp.MustCompile(`\s{2,}`)

// add reads the tables of one round, without their ratios.
func (f *figures) add(out string) error {
	var now []*table
	var t *table
	var columns []string
	title := ""
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		cell := cells.Split(line, -1)
		switch {
		case strings.TrimSpace(line) == "":
			title, t = "", nil
		case title == "":
			title = line
		case t == nil && cell[0] == "":
			t, columns = newTable("%s", title), cell[1:]
			now = append(now, t)
		case t != nil && !strings.Contains(cell[0], " / "):
			for i, c := range cell[1:] {
				// A part that measures several times in a round prints the median with the spread.
				c, _, _ = strings.Cut(c, " (")
				if v, err := strconv.ParseFloat(c, 64); err == nil && i < len(columns) {
					t.add(cell[0], columns[i], v)
				}
			}
		}
	}
	if f.tables == nil {
		f.tables = now
		return nil
	}
	if len(now) != len(f.tables) {
		return fmt.Errorf("reading the output: %d tables, in the first round %d", len(now), len(f.tables))
	}
	for i, t := range now {
		for _, r := range t.rows {
			for _, c := range t.columns {
				for _, v := range t.cells[[2]string{r, c}] {
					f.tables[i].add(r, c, v)
				}
			}
		}
	}
	return nil
}

// compare prints the figures next to those of the other revision. Tables, rows and columns are
// matched by their place, because a revision may have renamed them.
func (f *figures) compare(w io.Writer, other *figures) error {
	if len(f.tables) != len(other.tables) {
		return fmt.Errorf("comparing: %d tables, the other revision has %d", len(f.tables), len(other.tables))
	}
	for i, t := range f.tables {
		o := other.tables[i]
		if len(t.rows) != len(o.rows) || len(t.columns) != len(o.columns) {
			return fmt.Errorf("comparing %q: %q by %q, the other revision has %q by %q", t.title, t.rows, t.columns, o.rows, o.columns)
		}
		both := newTable("%s", t.title)
		for j, r := range t.rows {
			for k, c := range t.columns {
				now, then := t.cells[[2]string{r, c}], o.cells[[2]string{o.rows[j], o.columns[k]}]
				for row, values := range map[string][]float64{"": now, ", former": then, ", this / former": ratios(now, then)} {
					both.cells[[2]string{r + row, c}] = values
				}
			}
			both.rows = append(both.rows, r, r+", former", r+", this / former")
		}
		both.columns = t.columns
		both.print(w)
	}
	return nil
}
