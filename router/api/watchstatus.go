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

// statusPause is the shortest time between two messages of WatchStatus.
const statusPause = time.Second

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
		st, changed := s.router.Status()
		if token := statusToken(st); token != sent {
			if err := stream.Send(&isthmusv1.WatchStatusResponse{Status: st, ResumeToken: token}); err != nil {
				return err
			}
			sent = token
		}
		// Conditions also begin and end with time, without a change.
		within, cancel := context.WithTimeout(ctx, statusPause+healthPeriod)
		err := wait(within, s.stopping, time.After(statusPause))
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
		return "" // text that is not UTF-8; the status is then sent again
	}
	sum := sha256.Sum256(data)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}
