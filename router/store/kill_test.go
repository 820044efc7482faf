package store

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestKill kills a process in the midst of writing, on the real file system, and finds everything
// that it had said was accepted. The lock goes with the process.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	last := uint64(0)
	for round := range 5 {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestHelperWriter$")
		cmd.Env = []string{"ISTHMUS_TEST_STORE=" + dir}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			if _, err := fmt.Sscanf(lines.Text(), "accepted %d", &last); err != nil {
				t.Fatalf("the writer says %q", lines.Text())
			}
			if n == 20 {
				// into one write or another
				time.Sleep(time.Duration(round) * 300 * time.Microsecond)
				cmd.Process.Kill()
			}
		}
		cmd.Wait()
		s, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		cur, _ := s.Current()
		if d := s.Damage(); len(d) != 0 || cur.Generation < last || cur.Generation > last+1 {
			t.Errorf("round %d: present is %d, accepted was %d, damage %v", round, cur.Generation, last, d)
		}
		if want := fmt.Sprintf(`{"n":%d}`, cur.Generation); string(cur.Ledger) != want || !strings.HasPrefix(cur.Text, fmt.Sprintf("document %d ", cur.Generation)) {
			t.Errorf("round %d: document and ledger do not belong together: %.20s, %s", round, cur.Text, cur.Ledger)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if last < 100 {
		t.Errorf("only %d documents were accepted", last)
	}
}

// TestHelperWriter is the process that TestKill kills.
func TestHelperWriter(t *testing.T) {
	dir := os.Getenv("ISTHMUS_TEST_STORE")
	if dir == "" {
		return
	}
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	cur, _ := s.Current()
	for n := cur.Generation + 1; ; n++ {
		r := Revision{Text: fmt.Sprintf("document %d %s", n, strings.Repeat("x", 1<<16)), Ledger: json.RawMessage(fmt.Sprintf(`{"n":%d}`, n))}
		if _, err := s.Accept(n-1, r); err != nil {
			t.Fatal(err)
		}
		fmt.Printf("accepted %d\n", n)
	}
}
