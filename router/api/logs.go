package api

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/logs"
	"github.com/isthmus-net/isthmus/router/reason"
)

// Bounds of watches of the log: a slow one keeps the texts of a batch in memory.
const (
	maxLogWatches          = 16
	maxLogWatchesPerClient = 4
	// logBatch is how many entries a watch takes from the log at a time.
	logBatch = 64
)

// logFilter returns the filter of a request.
func logFilter(m *isthmusv1.LogFilter) (f logs.Filter, err error) {
	f = logs.Filter{MinLevel: m.GetMinLevel(), Room: m.GetRoom()}
	if f.Since, err = timeOf("since", m.GetSince()); err != nil {
		return f, err
	}
	if err := f.Check(); err != nil {
		return f, reason.RequestInvalid.Errorf("%v", err)
	}
	return f, nil
}

func logEntry(e *logs.Entry) *isthmusv1.LogEntry {
	m := &isthmusv1.LogEntry{Time: timestamppb.New(e.Time), Level: logs.LevelName(e.Level), Message: e.Message, Sequence: e.Seq}
	for _, a := range e.Attributes {
		m.Attributes = append(m.Attributes, &isthmusv1.LogAttribute{Key: a.Key, Value: a.Value})
	}
	return m
}

// pagedLogs has the tokens of pages of the log.
var pagedLogs = Kind[*isthmusv1.LogEntry]{name: "log entry"}

// ListLogs implements LogService.
func (s *services) ListLogs(ctx context.Context, r *isthmusv1.ListLogsRequest) (*isthmusv1.ListLogsResponse, error) {
	if s.logs == nil {
		return s.UnimplementedLogServiceServer.ListLogs(ctx, r)
	}
	size, err := pageSize(r.PageSize)
	if err != nil {
		return nil, err
	}
	filter, err := logFilter(r.Filter)
	if err != nil {
		return nil, err
	}
	text, _ := proto.MarshalOptions{Deterministic: true}.Marshal(r.Filter)
	of := s.logs.ID() + string(text)
	newest := s.logs.Newest()
	before := newest + 1 // the token continues after exactly these entries
	if r.PageToken != "" {
		last, ok := pagedLogs.readToken(r.PageToken, of)
		if before, err = strconv.ParseUint(last, 10, 64); !ok || err != nil || before == 0 {
			return nil, reason.PageToken.Errorf("page_token: belongs to another list or filter, or the daemon has started again; start again without it")
		}
	}
	entries, more := s.logs.Before(before, size, filter.Match)
	out := &isthmusv1.ListLogsResponse{ResumeToken: resumeToken(s.logs.ID(), newest)}
	for _, e := range entries {
		out.Entries = append(out.Entries, logEntry(e))
	}
	if more {
		out.NextPageToken = pagedLogs.token(fmt.Sprint(entries[len(entries)-1].Seq), of)
	}
	return out, nil
}

// WatchLogs implements LogService.
func (s *services) WatchLogs(r *isthmusv1.WatchLogsRequest, stream grpc.ServerStreamingServer[isthmusv1.LogEntry]) error {
	ctx, log := stream.Context(), s.logs
	if log == nil {
		return s.UnimplementedLogServiceServer.WatchLogs(r, stream)
	}
	filter, err := logFilter(r.Filter)
	if err != nil {
		return err
	}
	gone, err := s.watchingLogs.join(ctx)
	if err != nil {
		return err
	}
	defer gone()
	var from, missing uint64
	lost := ""
	switch {
	case r.ResumeToken != "":
		of, text, _ := strings.Cut(r.ResumeToken, "-")
		if from, err = strconv.ParseUint(text, 10, 64); err != nil || of == "" || of == log.ID() && from > log.Newest() {
			return reason.PageToken.Errorf("resume_token: is not from the log of a node; start again without it")
		}
		filter.Since = time.Time{} // the client has had the entries before the token
		if of != log.ID() {
			from, lost = 0, "the daemon has started again, and its log is in memory only; the journal of the machine has the last entries before that"
		}
	case filter.Since.IsZero():
		from = log.Newest()
	}
	// The client learns that the watch is open, although there may be no entries.
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	// A watch that begins with a time does not miss what was there before it.
	for checked := filter.Since.IsZero(); ; checked = true {
		changed := log.Changed()
		entries, gone := log.After(from, logBatch)
		if checked && gone > 0 {
			missing += gone
			if lost == "" {
				lost = "entries were written faster than the watch could send them, or before it continued"
			}
		}
		for _, e := range entries {
			from = e.Seq
			if !filter.Match(e) {
				continue
			}
			m := logEntry(e)
			m.ResumeToken, m.Lost, m.LostEntries = resumeToken(log.ID(), e.Seq), lost, missing
			lost, missing = "", 0
			if err := stream.Send(m); err != nil {
				return err
			}
		}
		if len(entries) > 0 {
			continue
		}
		if err := wait(ctx, s.stopping, changed); err != nil {
			return err
		}
	}
}
