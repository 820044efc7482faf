// Package event records what happens on a node: changes of tunnels, sessions, conditions, pools and
// documents, and calls that change something. Each event has a kind of one list; docs/events.md is
// made from it. The log is bounded, and survives restarts of the daemon.
package event

import (
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// Bounds of an event's texts, in bytes: some are from peers and callers.
const (
	maxMessage = 512
	maxObject  = 160
	maxWho     = 160
)

// Event is one line of the log.
type Event struct {
	Seq        uint64        `json:"seq,omitzero"`
	Time       time.Time     `json:"time,omitzero"`
	Type       string        `json:"type,omitzero"`
	Object     string        `json:"object,omitzero"` // as "tunnel/aws-0"
	Severity   Severity      `json:"severity,omitzero"`
	Message    string        `json:"message,omitzero"`
	Detail     string        `json:"detail,omitzero"` // a condition's type, or an address
	Lasted     time.Duration `json:"lasted,omitzero"` // of the former state
	Who        string        `json:"who,omitzero"`
	Generation uint64        `json:"generation,omitzero"`
}

// key tells apart the events of one look.
func (e Event) key() string { return e.Type + "\x00" + e.Object + "\x00" + e.Detail }

// bounded returns the event with its texts cut to their bounds.
func (e Event) bounded() Event {
	e.Message, e.Object, e.Who, e.Detail = cut(e.Message, maxMessage), cut(e.Object, maxObject), cut(e.Who, maxWho), cut(e.Detail, maxObject)
	return e
}

// cut shortens a text to a number of bytes, and makes it valid UTF-8.
func cut(s string, most int) string {
	if len(s) > most {
		const dots = "..."
		s = s[:most-len(dots)]
		for i := 0; i < utf8.UTFMax && len(s) > 0 && !utf8.ValidString(s[max(0, len(s)-utf8.UTFMax):]); i++ {
			s = s[:len(s)-1]
		}
		s += dots
	}
	return strings.ToValidUTF8(s, "?")
}

// Proto returns the event as the API has it.
func (e Event) Proto() *isthmusv1.Event {
	m := &isthmusv1.Event{
		Sequence: e.Seq, Time: timestamppb.New(e.Time), Type: e.Type, Object: e.Object, Severity: string(e.Severity), Message: e.Message,
		Detail: e.Detail, Who: e.Who, Generation: e.Generation,
	}
	if e.Lasted > 0 {
		m.Lasted = durationpb.New(e.Lasted)
	}
	return m
}
