package report

import (
	"fmt"

	"github.com/isthmus-net/isthmus/tunnel"
)

// Summary describes the state of the node in one line.
func (r *Report) Summary() string {
	status, _ := r.Status()
	if status.GetGeneration() == 0 {
		return "no document yet: isthmus apply -f FILE"
	}
	up, tunnels := 0, r.tunnels()
	for _, t := range tunnels {
		if t.State == string(tunnel.Up) {
			up++
		}
	}
	bad := 0
	for _, c := range status.GetConditions() {
		if c.Severity == "error" {
			bad++
		}
	}
	text := fmt.Sprintf("generation %d", status.GetGeneration())
	if status.GetAppliedGeneration() != status.GetGeneration() {
		text += fmt.Sprintf(" (applied: %d)", status.GetAppliedGeneration())
	}
	return fmt.Sprintf("%s, %d of %d tunnels up, %d errors", text, up, len(tunnels), bad)
}
