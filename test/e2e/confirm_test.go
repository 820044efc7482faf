package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/lab"
)

// without returns a document without the tunnel and the peer of a name.
func without(document, name string) string {
	var out []string
	skip := false
	for line := range strings.Lines(document) {
		if !strings.HasPrefix(line, " ") {
			skip = line == "- name: "+name+"\n"
		}
		if !skip {
			out = append(out, line)
		}
	}
	return strings.Join(out, "")
}

// exitCode returns the exit code of a program, -1 when it was killed.
func exitCode(err error) int {
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return e.ExitCode()
	}
	if err != nil {
		return -1
	}
	return 0
}

// history returns the accepted documents, newest first.
func (b *bench) history() []*isthmusv1.Revision {
	b.Helper()
	r, err := isthmusv1.NewSpecServiceClient(b.conn).ListHistory(b.Context(), &isthmusv1.ListHistoryRequest{})
	b.ok(err)
	return r.GetRevisions()
}

// present waits until a tunnel is in the API and its interface in the kernel, or in neither.
func (b *bench) present(name, iface string, want bool) {
	b.Helper()
	b.until(15*time.Second, func() error {
		_, listed := b.tunnels()[name]
		_, err := b.c.Node.Exec(b.Context(), "ip", "link", "show", iface)
		if there := err == nil; listed != want || there != want {
			return fmt.Errorf("tunnel %s listed: %v, its interface %s there: %v, want %v", name, listed, iface, there, want)
		}
		return nil
	})
}

// TestConfirm removes one tunnel in all the ways in which it can come back.
func TestConfirm(t *testing.T) {
	b := begin(t)
	const victim = "google-1"
	iface := b.tunnels()[victim].GetInterface()
	full := b.c.Document()
	less := without(full, victim)
	generation := b.status().GetGeneration()
	first := generation
	gone := func() { b.Helper(); generation++; b.present(victim, iface, false) }
	var within time.Duration
	// back waits for the end of the time limit, and until everything is as it was.
	back := func() {
		b.Helper()
		generation++
		b.until(within+time.Minute, func() error {
			if g := b.status().GetGeneration(); g != generation {
				return fmt.Errorf("generation is %d, want %d", g, generation)
			}
			return nil
		})
		b.present(victim, iface, true)
		b.up()
		b.ok(b.c.AllReachable(t.Context(), 30*time.Second))
		if s := b.status(); len(s.GetConditions()) > 0 || s.GetConfirmUntil() != nil {
			t.Errorf("status %v", s)
		}
		if out := b.cli("get", "spec"); out != full {
			t.Errorf("the document is not the former one:\n%s", out)
		}
	}
	before, peers := b.baseline()

	out, err := b.r.CLIInput(t.Context(), less, "plan", "-f", "-")
	if exitCode(err) != 3 || !strings.Contains(out, "- remove tunnel") || !strings.Contains(out, victim) {
		t.Errorf("plan of a change: %v\n%s", err, out)
	}
	if out, err = b.r.CLIInput(t.Context(), full, "plan", "-f", "-"); exitCode(err) != 0 || out != "" {
		t.Errorf("plan of nothing: %v\n%s", err, out)
	}
	if g := b.status().GetGeneration(); g != generation {
		t.Errorf("plan made generation %d", g)
	}

	confirmed := func() {
		b.Helper()
		within = lab.Limit(func() { b.cli("get", "status") })
		_, err := b.r.CLIInput(t.Context(), less, "apply", "-f", "-", "--confirm-within", within.String())
		b.ok(err)
		gone()
		if s := b.status(); len(s.GetConditions()) != 1 || s.GetConditions()[0].GetType() != "NotConfirmed" {
			t.Errorf("conditions %v", s.GetConditions())
		}
	}
	b.step("a change that is not confirmed")
	confirmed()
	back()
	b.untouched(before, peers, victim)

	b.step("the same with kill -9 of isthmusd in between, and the limit over before it is back")
	confirmed()
	b.r.Kill()
	time.Sleep(within)
	b.ok(b.r.StartDaemon(t.Context()))
	b.dial()
	back()

	b.step("a change that is confirmed")
	before, peers = b.baseline()
	confirmed()
	start := time.Now()
	b.cli("confirm", fmt.Sprint(generation))
	time.Sleep(time.Until(start.Add(within + 2*time.Second)))
	b.present(victim, iface, false)
	if s := b.status(); s.GetGeneration() != generation || len(s.GetConditions()) > 0 {
		t.Errorf("after it was confirmed: %v", s)
	}
	if _, err := b.r.CLI(t.Context(), "confirm", fmt.Sprint(generation-1)); exitCode(err) != 1 {
		t.Errorf("confirming a former generation: %v", err)
	}
	b.step("rollback")
	b.cli("rollback")
	back()
	b.untouched(before, peers, victim)

	var got []string
	for _, h := range slices.Backward(b.history()) {
		if h.GetGeneration() > first {
			got = append(got, fmt.Sprintf("%d %s %s", h.GetGeneration(), h.GetAuthor(), h.GetReason()))
		}
	}
	var want []string
	for i, text := range []string{"root apply", fmt.Sprintf("isthmusd not confirmed, back to %d", first), "root apply", fmt.Sprintf("isthmusd not confirmed, back to %d", first+2), "root apply",
		fmt.Sprintf("root rollback to %d", first+4)} {
		want = append(want, fmt.Sprintf("%d %s", first+1+uint64(i), text))
	}
	if !slices.Equal(got, want) {
		t.Errorf("history\n%q, want\n%q", got, want)
	}
	out = b.cli("get", "history")
	for _, h := range b.history() {
		if !strings.Contains(out, h.GetReason()) {
			t.Errorf("isthmus get history does not show %q:\n%s", h.GetReason(), out)
		}
	}
	b.run("no leak", (*bench).noLeak)
}

// TestKillWhileApplying kills isthmusd with kill -9 at random moments of twenty changes. The tests
// of router/store add a loss of power.
func TestKillWhileApplying(t *testing.T) {
	b := begin(t)
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	const victim = "google-1"
	iface := b.tunnels()[victim].GetInterface()
	last, first := b.c.Document(), b.status().GetGeneration()
	accepted := 0
	for i := range 20 {
		document := b.c.Document()
		if i%2 == 0 {
			document = without(document, victim)
		}
		document = strings.Replace(document, "- name: site\n", fmt.Sprintf("- name: site\n  mtu: %d\n", 1300+i), 1)
		done := make(chan error, 1)
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			done <- b.r.Apply(ctx, document)
		}()
		time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond)
		b.r.Kill()
		err := <-done
		b.ok(b.r.StartDaemon(t.Context()))
		b.dial()
		switch now := b.cli("get", "spec"); {
		case now == document:
			last = document
			accepted++
		case err == nil:
			t.Fatalf("change %d was acknowledged and is lost", i)
		case now != last:
			t.Fatalf("change %d: %v; the document is neither the new one nor the last:\n%s", i, err, now)
		}
		b.until(20*time.Second, func() error {
			s := b.status()
			if s.GetAppliedGeneration() != s.GetGeneration() || len(s.GetConditions()) > 0 {
				return fmt.Errorf("status %v", s)
			}
			return nil
		})
		b.present(victim, iface, strings.Contains(last, victim))
	}
	b.step("%d of 20 were accepted", accepted)
	b.ok(b.r.Apply(t.Context(), b.c.Document()))
	b.up()
	b.ok(b.c.AllReachable(t.Context(), 60*time.Second))
	g, h := b.status().GetGeneration(), b.history()
	if i := slices.IndexFunc(h, func(r *isthmusv1.Revision) bool { return r.GetGeneration() == first }); h[0].GetGeneration() != g || uint64(i) != g-first {
		t.Errorf("generation %d, history %v, first %d", g, h, first)
	}
	b.run("no leak", (*bench).noLeak)
}
