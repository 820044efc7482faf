package logs

import (
	"context"
	"log/slog"
	"slices"
	"time"
)

// handler is a slog.Handler that adds records to a log, and passes them on.
type handler struct {
	log  *Log
	next slog.Handler
	// attributes are those of WithAttrs, and prefix those of WithGroup.
	attributes []Attribute
	prefix     string
}

// Handler returns a handler that adds each record to the log before it passes it on to next. Next
// decides which levels are enabled.
func (l *Log) Handler(next slog.Handler) slog.Handler { return &handler{log: l, next: next} }

// Enabled implements slog.Handler.
func (h *handler) Enabled(ctx context.Context, l slog.Level) bool { return h.next.Enabled(ctx, l) }

// WithAttrs implements slog.Handler.
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	d := *h
	d.next = h.next.WithAttrs(attrs)
	d.attributes = slices.Clone(h.attributes)
	for _, a := range attrs {
		d.attributes = appendAttr(d.attributes, h.prefix, a)
	}
	return &d
}

// WithGroup implements slog.Handler.
func (h *handler) WithGroup(name string) slog.Handler {
	d := *h
	d.next = h.next.WithGroup(name)
	if name != "" {
		d.prefix += name + "."
	}
	return &d
}

// Handle implements slog.Handler.
func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	attributes := slices.Clone(h.attributes)
	r.Attrs(func(a slog.Attr) bool {
		attributes = appendAttr(attributes, h.prefix, a)
		return true
	})
	h.log.add(entry(r.Time, r.Level, r.Message, attributes))
	return h.next.Handle(ctx, r)
}

// entry returns a bounded entry. The texts of attributes are bounded each.
func entry(at time.Time, level slog.Level, message string, attributes []Attribute) *Entry {
	last := Attribute{"cut", "true"} // of an entry that is not whole
	e := &Entry{Time: at, Level: level, Message: clean(message, maxEntry-last.size())}
	left := maxEntry - last.size() - len(e.Message)
	for i, a := range attributes {
		if i == maxAttributes {
			e.Attributes = append(e.Attributes, last)
			break
		}
		if over := a.size() - left; over > 0 {
			if keep := len(a.Value) - over; keep > len(cutMark) {
				e.Attributes = append(e.Attributes, Attribute{a.Key, clean(a.Value, keep)})
			}
			e.Attributes = append(e.Attributes, last)
			break
		}
		if a.Key == "room" {
			e.Room = a.Value
		}
		left -= a.size()
		e.Attributes = append(e.Attributes, a)
	}
	return e
}

// appendAttr appends an attribute as text: a group becomes its attributes, with its name before
// their keys.
func appendAttr(to []Attribute, prefix string, a slog.Attr) []Attribute {
	a.Value = a.Value.Resolve()
	switch {
	case a.Equal(slog.Attr{}):
		return to
	case a.Value.Kind() == slog.KindGroup:
		if a.Key != "" {
			prefix += a.Key + "."
		}
		for _, inner := range a.Value.Group() {
			to = appendAttr(to, prefix, inner)
		}
		return to
	case len(to) > maxAttributes: // entry leaves it out
		return to
	}
	return append(to, Attribute{clean(prefix+a.Key, maxEntry), clean(text(a.Value), maxEntry)})
}
