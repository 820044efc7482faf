package event

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/router/condition"
)

// maxTerms bounds the objects and the types of a filter.
const maxTerms = 100

// Filter selects events. An empty field selects all.
type Filter struct {
	Since, Until time.Time
	Objects      []string // as "tunnel/aws-0", or a kind of objects, as "tunnel"
	Types        []string // of events, or of the conditions that they are about
	Severity     Severity // the least
	// Admin includes the events that only admins see, and those whose type is not known.
	Admin bool
}

// Check returns an error for a filter that cannot select anything.
func (f Filter) Check() error {
	if f.Severity != "" && !slices.Contains(Severities, f.Severity) {
		return fmt.Errorf("min_severity %q: must be info, warning or error", cut(string(f.Severity), maxObject))
	}
	if len(f.Objects) > maxTerms || len(f.Types) > maxTerms {
		return fmt.Errorf("filter: has more than %d objects or types", maxTerms)
	}
	for _, name := range f.Types {
		if _, ok := Lookup(name); ok {
			continue
		}
		if _, ok := condition.Lookup(name); !ok {
			return fmt.Errorf("type %q: must be a type of events or of conditions, such as TunnelDown or PoolDown", cut(name, maxObject))
		}
	}
	for _, name := range f.Objects {
		if name == "" || len(name) > maxObject {
			return fmt.Errorf("object %q: must be one such as tunnel/aws-0, or a kind such as tunnel", cut(name, maxObject))
		}
	}
	return nil
}

// Match reports whether the filter selects an event.
func (f Filter) Match(e Event) bool {
	if k, ok := Lookup(e.Type); !f.Admin && (!ok || k.Admin) {
		return false
	}
	switch {
	case !f.Since.IsZero() && e.Time.Before(f.Since), !f.Until.IsZero() && !e.Time.Before(f.Until):
		return false
	case f.Severity != "" && slices.Index(Severities, e.Severity) < slices.Index(Severities, f.Severity):
		return false
	}
	kind, _, _ := strings.Cut(e.Object, "/")
	if len(f.Objects) > 0 && !slices.Contains(f.Objects, e.Object) && !slices.Contains(f.Objects, kind) {
		return false
	}
	return len(f.Types) == 0 || slices.ContainsFunc(f.Types, func(t string) bool { return strings.EqualFold(t, e.Type) || strings.EqualFold(t, e.Detail) })
}
