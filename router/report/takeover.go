package report

import (
	"fmt"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

func (r *Report) takeoverConditions() (out []*isthmusv1.Condition) {
	s := r.Takeover.State()
	switch {
	case s.Paths == 0:
	case r.Takeover.Mover == nil:
		out = append(out, &isthmusv1.Condition{
			Type: "TakeoverImpossible", Severity: "error", Since: stamp(r.started),
			Message: "the document wants addresses to be taken over, and there is no program that does it: start isthmusd with -mover",
		})
	case s.Err != nil:
		out = append(out, &isthmusv1.Condition{
			Type: "TakeoverFailed", Severity: "error", Since: stamp(s.Tried), Message: fmt.Sprintf("taking the public addresses: %v; it is tried again", s.Err),
		})
	case !s.Tried.IsZero():
		out = append(out, &isthmusv1.Condition{
			Type: "TookOver", Severity: "warning", Since: stamp(s.Tried), Message: "the other node did not answer, and this one took the public addresses of the pools",
		})
	}
	return out
}
