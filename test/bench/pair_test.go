package main

import (
	"strings"
	"testing"
)

// TestPair reads tables as print writes them, and compares two rounds of two revisions.
func TestPair(t *testing.T) {
	out := func(title string, of ...[2]float64) string {
		var b strings.Builder
		b.WriteString("Linux 6, 2 x processor\n")
		x := newTable("%s", title)
		for i, v := range of {
			row := []string{"isthmus", "FRR", "isthmus, no log"}[i]
			if i == 2 { // measured three times in a round
				x.add(row, "load s", v[0]-1)
				x.add(row, "load s", v[0]+1)
			}
			x.add(row, "load s", v[0])
			x.add(row, "peak MiB", v[1])
		}
		x.print(&b, "FRR")
		return b.String()
	}
	var this, former figures
	for _, f := range []struct {
		of  *figures
		out string
	}{
		{&this, out("BGP to FIB", [2]float64{1, 20}, [2]float64{7, 7}, [2]float64{3, 30})},
		{&this, out("BGP to FIB", [2]float64{2, 20}, [2]float64{7, 7}, [2]float64{3, 30})},
		{&former, out("FIB", [2]float64{2, 10}, [2]float64{9, 9}, [2]float64{3, 30})},
		{&former, out("FIB", [2]float64{2, 10}, [2]float64{9, 9}, [2]float64{3, 30})},
	} {
		if err := f.of.add(f.out); err != nil {
			t.Fatal(err)
		}
	}
	var b strings.Builder
	if err := this.compare(&b, &former); err != nil {
		t.Fatal(err)
	}
	const want = `
BGP to FIB
                                load s            peak MiB
isthmus                         1.50 (1.00-2.00)  20.0 (20.0-20.0)
isthmus, former                 2.00 (2.00-2.00)  10.0 (10.0-10.0)
isthmus, this / former          0.75 (0.50-1.00)  2.00 (2.00-2.00)
FRR                             7.00 (7.00-7.00)  7.00 (7.00-7.00)
FRR, former                     9.00 (9.00-9.00)  9.00 (9.00-9.00)
FRR, this / former              0.78 (0.78-0.78)  0.78 (0.78-0.78)
isthmus, no log                 3.00 (3.00-3.00)  30.0 (30.0-30.0)
isthmus, no log, former         3.00 (3.00-3.00)  30.0 (30.0-30.0)
isthmus, no log, this / former  1.00 (1.00-1.00)  1.00 (1.00-1.00)
`
	if b.String() != want {
		t.Errorf("compared:\n%s", b.String())
	}
	if err := this.compare(&b, &figures{}); err == nil {
		t.Error("revisions with other tables are compared")
	}
}
