package api

import (
	"crypto/sha256"
	"encoding/base64"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// statusPause is the shortest time between two messages of WatchStatus.
const statusPause = time.Second

// WatchStatus implements SystemService.
func (s *services) WatchStatus(r *isthmusv1.WatchStatusRequest, stream grpc.ServerStreamingServer[isthmusv1.WatchStatusResponse]) error {
	// The client learns that the watch is open, although nothing may have changed.
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	for sent := r.ResumeToken; ; {
		st, changed := s.router.Status()
		if token := statusToken(st); token != sent {
			if err := stream.Send(&isthmusv1.WatchStatusResponse{Status: st, ResumeToken: token}); err != nil {
				return err
			}
			sent = token
		}
		pause := time.NewTimer(statusPause)
		err := wait(stream.Context(), s.stopping, pause.C)
		pause.Stop()
		if err == nil {
			err = wait(stream.Context(), s.stopping, changed)
		}
		if err != nil {
			return err
		}
	}
}

// statusToken returns a checksum of a status without its counters. As a resume token it needs
// nothing that the node would have to remember.
func statusToken(st *isthmusv1.SystemStatus) string {
	st = proto.CloneOf(st)
	st.Counters = nil
	if st.Platform != nil {
		st.Platform.Read = nil
	}
	if s := st.Summary; s != nil {
		s.Ports, s.GuardPackets = nil, 0
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(st)
	if err != nil {
		return "" // text that is not UTF-8; the status is then sent again
	}
	sum := sha256.Sum256(data)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}
