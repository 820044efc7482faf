package api

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/router/reason"
)

// Bounds of pages of events and of audit entries.
const (
	logPage    = 100
	maxLogPage = 1000
	// watchBatch is how many events a watch takes from the log at a time.
	watchBatch = 500
)

// ObserveCalls has the calls in an audit log recorded as events. Call it before the logs are used.
func ObserveCalls(audit *auth.Audit, events *event.Log) {
	audit.Observe(func(e auth.Entry) {
		events.Call(event.Call{
			Time: e.Time, Event: string(e.Event), Who: e.Who, Address: e.Address, Method: e.Method, Object: e.Object, Result: e.Result, Error: e.Error,
			Suppressed: e.Suppressed,
		})
	})
}

// pageSize returns the size of a page of a log.
func pageSize(size uint32) (int, error) {
	switch {
	case size == 0:
		return logPage, nil
	case size > maxLogPage:
		return 0, reason.RequestInvalid.Errorf("page_size %d: must be 1 to %d", size, maxLogPage)
	}
	return int(size), nil
}

// timeOf returns the zero time for a time that is not set.
func timeOf(field string, t *timestamppb.Timestamp) (time.Time, error) {
	if t == nil {
		return time.Time{}, nil
	}
	if err := t.CheckValid(); err != nil {
		return time.Time{}, reason.RequestInvalid.Errorf("%s: %v", field, err)
	}
	return t.AsTime(), nil
}

// filterOf returns the filter of a request, with the events that the caller may see.
func filterOf(ctx context.Context, m *isthmusv1.EventFilter) (f event.Filter, err error) {
	f = event.Filter{Objects: m.GetObjects(), Types: m.GetTypes(), Severity: event.Severity(m.GetMinSeverity()), Admin: auth.FromContext(ctx).Role >= auth.Admin}
	if f.Since, err = timeOf("since", m.GetSince()); err != nil {
		return f, err
	}
	if f.Until, err = timeOf("until", m.GetUntil()); err != nil {
		return f, err
	}
	if err := f.Check(); err != nil {
		return f, reason.RequestInvalid.Errorf("%v", err)
	}
	return f, nil
}

// pagedEvents has the tokens of pages of events.
var pagedEvents = Kind[*isthmusv1.Event]{name: "event"}

// ListEvents implements EventService.
func (s *services) ListEvents(ctx context.Context, r *isthmusv1.ListEventsRequest) (*isthmusv1.ListEventsResponse, error) {
	if s.events == nil {
		return s.UnimplementedEventServiceServer.ListEvents(ctx, r)
	}
	size, err := pageSize(r.PageSize)
	if err != nil {
		return nil, err
	}
	filter, err := filterOf(ctx, r.Filter)
	if err != nil {
		return nil, err
	}
	text, _ := proto.MarshalOptions{Deterministic: true}.Marshal(r.Filter)
	of := s.events.ID() + string(text)
	var before uint64
	if r.PageToken != "" {
		last, ok := pagedEvents.readToken(r.PageToken, of)
		if before, err = strconv.ParseUint(last, 10, 64); !ok || err != nil || before == 0 {
			return nil, reason.PageToken.Errorf("page_token: belongs to another list or filter; start again without it")
		}
	}
	events, more := s.events.Before(before, size, filter.Match)
	out := &isthmusv1.ListEventsResponse{}
	for _, e := range events {
		out.Events = append(out.Events, e.Proto())
	}
	if more {
		out.NextPageToken = pagedEvents.token(fmt.Sprint(events[len(events)-1].Seq), of)
	}
	return out, nil
}

// resumeToken names an event of a log: another log, or this one after its files were lost, has
// another identity.
func resumeToken(log string, seq uint64) string { return fmt.Sprintf("%s-%d", log, seq) }

// WatchEvents implements EventService.
func (s *services) WatchEvents(r *isthmusv1.WatchEventsRequest, stream grpc.ServerStreamingServer[isthmusv1.WatchEventsResponse]) error {
	ctx, log := stream.Context(), s.events
	if log == nil {
		return s.UnimplementedEventServiceServer.WatchEvents(r, stream)
	}
	filter, err := filterOf(ctx, r.Filter)
	if err != nil {
		return err
	}
	id := log.ID()
	var from uint64
	lost, checked := "", true
	switch {
	case r.ResumeToken != "":
		of, text, _ := strings.Cut(r.ResumeToken, "-")
		if from, err = strconv.ParseUint(text, 10, 64); err != nil || of == "" {
			return reason.PageToken.Errorf("resume_token: is not from a watch of events; start again without it")
		}
		filter.Since = time.Time{} // the client has had the events before the token
		if of != id {
			from, lost, checked = 0, "the node has another event log than before", false
		}
	case filter.Since.IsZero():
		from = log.Newest()
	default:
		checked = false
	}
	for marked := false; ; {
		changed := log.Changed()
		if from > log.Newest() {
			from, lost, checked = 0, "the event log ends before the last event that was sent", false
		}
		events, last, whole := log.After(from, watchBatch, filter.Match)
		if checked && !whole {
			lost = "the node ended without a stop, or so many events followed that the first of them are gone"
		}
		from, checked = last, true
		send := func(kind isthmusv1.EventType, e *isthmusv1.Event, seq uint64) error {
			m := &isthmusv1.WatchEventsResponse{Type: kind, Event: e, ResumeToken: resumeToken(id, seq), Lost: lost}
			lost = ""
			return stream.Send(m)
		}
		for _, e := range events {
			if err := send(isthmusv1.EventType_EVENT_TYPE_ADDED, e.Proto(), e.Seq); err != nil {
				return err
			}
		}
		if len(events) == watchBatch {
			continue
		}
		if !marked {
			marked = true
			if err := send(isthmusv1.EventType_EVENT_TYPE_MARK, nil, from); err != nil {
				return err
			}
		}
		if err := wait(ctx, s.stopping, changed); err != nil {
			return err
		}
	}
}

// ListAudit implements AccessService.
func (s *services) ListAudit(ctx context.Context, r *isthmusv1.ListAuditRequest) (*isthmusv1.ListAuditResponse, error) {
	size, err := pageSize(r.PageSize)
	if err != nil {
		return nil, err
	}
	q := auth.Query{Who: r.Who, Method: r.Method, Limit: size, Token: r.PageToken}
	if q.Since, err = timeOf("since", r.Since); err != nil {
		return nil, err
	}
	if q.Until, err = timeOf("until", r.Until); err != nil {
		return nil, err
	}
	leave, err := s.reading.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	page, err := s.authority.ListAudit(q)
	if err != nil {
		return nil, statusOf(err)
	}
	out := &isthmusv1.ListAuditResponse{NextPageToken: page.Next, Damaged: page.Damaged}
	for _, e := range page.Entries {
		out.Entries = append(out.Entries, &isthmusv1.AuditEntry{
			Time: timestamppb.New(e.Time), Event: string(e.Event), Call: e.Call, Who: valid(e.Who), Role: e.Role, Serial: e.Serial, Address: e.Address,
			Method: valid(e.Method), Object: valid(e.Object), Digest: e.Digest, FromGeneration: e.From, ToGeneration: e.To, Result: e.Result,
			Error: valid(e.Error), Suppressed: e.Suppressed,
		})
	}
	return out, nil
}

// valid makes a text valid UTF-8, which messages must be: the audit log cuts texts at a number of
// bytes.
func valid(s string) string { return strings.ToValidUTF8(s, "?") }
