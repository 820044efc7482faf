package egress

import (
	"math/rand/v2"
	"strings"
	"time"
)

// killedEdits kills the daemon at random moments of edits of single policies. The document is the
// one before or the one after, acknowledged edits are not lost, and the document decides new flows.
func (w *world) killedEdits() {
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	before, err := w.hub.CLI(w.Context(), "", "get", "spec")
	w.ok(err)
	took, there := 0, false
	for i := range 12 {
		args, input := []string{"policy", "delete", "blocked"}, ""
		if !there {
			args, input = []string{"policy", "set", "-f", "-"}, "policies: [{name: blocked, action: reject, sources: [172.16.0.0/16], destinations: [198.51.100.7/32]}]"
		}
		done := make(chan error, 1)
		go func() {
			_, err := w.hub.CLI(w.Context(), input, args...)
			done <- err
		}()
		time.Sleep(time.Duration(random.IntN(30)) * time.Millisecond)
		w.hub.Kill()
		acknowledged := <-done == nil
		w.hub.Start(w.T)
		w.hub.Settled(w.T)
		text, err := w.hub.CLI(w.Context(), "", "get", "spec")
		w.ok(err)
		now := strings.Contains(text, "- name: blocked\n")
		if acknowledged && now == there {
			w.Fatalf("seed %d: edit %d was acknowledged and is lost", seed, i)
		}
		if now != there {
			took++
		}
		if there = now; !there && text != before {
			w.Fatalf("seed %d: edit %d: neither document:\n%s", seed, i, text)
		}
		if f, err := w.open(w.inside, client, service); (err == nil) == there {
			w.Fatalf("seed %d: edit %d: policy there: %v, a new flow: %v", seed, i, there, err)
		} else if err == nil {
			f.Close()
		}
	}
	if there {
		w.policy("", "- remove", "delete", "blocked")
	}
	w.Logf("%d of 12 edits were accepted under a daemon that was killed", took)
}
