package main

import (
	"bytes"
	"strconv"
	"strings"
	"testing"
)

// TestSection checks that a table below a description is bounded and names the command that lists
// the rest, and that there is none without objects.
func TestSection(t *testing.T) {
	numbers := []column[int]{{header: "NUMBER", value: func(_ *app, n int) string { return strconv.Itoa(n) }}}
	for n, want := range map[int]string{
		0:              "",
		2:              "\nnumbers:\nNUMBER\n0\n1\n",
		maxRelated + 5: "and 5 more: isthmus get numbers\n",
	} {
		var out bytes.Buffer
		var items []int
		for i := range n {
			items = append(items, i)
		}
		if err := section(&app{stdout: &out}, "numbers", "isthmus get numbers", numbers, items); err != nil {
			t.Fatal(err)
		}
		if got := out.String(); !strings.HasSuffix(got, want) || strings.Count(got, "\n") > maxRelated+4 || n == 0 && got != "" {
			t.Errorf("%d items: %q", n, got)
		}
	}
}
