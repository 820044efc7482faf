package api

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/reason"
)

// Pace of a watch of the status. Reading the status of thousands of objects takes some ten
// milliseconds, and a watch may use a hundredth of one processor.
const (
	statusPause  = time.Second // the shortest between two messages
	statusShare  = 100
	longestPause = 10 * time.Second
)

// pauseAfter returns the pause after a read that took some time.
func pauseAfter(took time.Duration) time.Duration {
	return min(max(statusPause, statusShare*took), longestPause)
}

// WatchStatus implements SystemService.
func (s *services) WatchStatus(r *isthmusv1.WatchStatusRequest, stream grpc.ServerStreamingServer[isthmusv1.WatchStatusResponse]) error {
	if sum, err := base64.RawURLEncoding.DecodeString(r.ResumeToken); r.ResumeToken != "" && (err != nil || len(sum) != sha256.Size) {
		return reason.PageToken.Errorf("resume_token: is not from a watch of the status; start again without it")
	}
	// The client learns that the watch is open, although nothing may have changed.
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	ctx := stream.Context()
	for sent := r.ResumeToken; ; {
		begun := time.Now()
		st, changed := s.router.Status()
		if token := statusToken(st); token == "" || token != sent {
			if err := stream.Send(&isthmusv1.WatchStatusResponse{Status: st, ResumeToken: token}); err != nil {
				return err
			}
			sent = token
		}
		pause := pauseAfter(time.Since(begun))
		// Conditions also begin and end with time, without a change.
		within, cancel := context.WithTimeout(ctx, pause+healthPeriod)
		err := wait(within, s.stopping, time.After(pause))
		if err == nil {
			err = wait(within, s.stopping, changed)
		}
		cancel()
		if err != nil && (ctx.Err() != nil || within.Err() != context.DeadlineExceeded) {
			return err
		}
	}
}

// statusToken returns a checksum of a status without its counters, and without times that begin
// with the daemon. As a resume token it needs nothing that the node would have to remember, and
// stays valid when the daemon starts again.
func statusToken(st *isthmusv1.SystemStatus) string {
	st = proto.CloneOf(st)
	st.Started, st.Counters = nil, nil
	if st.Platform != nil {
		st.Platform.Read = nil
	}
	if s := st.Summary; s != nil {
		s.Ports, s.GuardPackets = nil, 0
	}
	for _, c := range st.Conditions {
		c.Since = nil
	}
	slices.SortFunc(st.Conditions, func(a, b *isthmusv1.Condition) int {
		return cmp.Or(strings.Compare(a.Type, b.Type), strings.Compare(a.Object, b.Object), strings.Compare(a.Message, b.Message))
	})
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(st)
	if err != nil {
		return "" // a text is not UTF-8: sending it fails, and the client gets that error
	}
	sum := sha256.Sum256(data)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}
