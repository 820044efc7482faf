package report

import (
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
)

func (r *Report) takeoverConditions() (out []*isthmusv1.Condition) {
	s := r.Takeover.State()
	switch {
	case s.Paths == 0:
	case r.Takeover.Mover == nil:
		out = append(out, condition.TakeoverImpossible.Error(r.started, "the document wants addresses to be taken over, and there is no program that does it: start isthmusd with -mover"))
	case s.Err != nil:
		out = append(out, condition.TakeoverFailed.Error(s.Tried, "taking the public addresses: %v; it is tried again", s.Err))
	case !s.Tried.IsZero():
		out = append(out, condition.TookOver.Warning(s.Tried, "the other node did not answer, and this one took the public addresses of the pools"))
	}
	return out
}
