package api

import (
	"context"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/reason"
)

// Machine is the machine that the router runs on. Methods may be called from several goroutines. An
// error wraps ErrInvalid if the request is wrong; all others are about the machine's state.
type Machine interface {
	Get(ctx context.Context) (*isthmusv1.Machine, error)
	Upgrade(ctx context.Context, h *isthmusv1.UpgradeHeader, body io.Reader) (*isthmusv1.UpgradeResponse, error)
	Rollback(ctx context.Context) (*isthmusv1.RollbackSlotResponse, error)
	Reboot(ctx context.Context) error
	PowerOff(ctx context.Context) error
	Seal(ctx context.Context, r *isthmusv1.SealRequest) (*isthmusv1.SealResponse, error)
	Unseal(ctx context.Context, r *isthmusv1.UnsealRequest) (*isthmusv1.UnsealResponse, error)
}

const (
	// maxChunk bounds the bytes of a slot in one message.
	maxChunk = 1 << 20
	// chunkLimit is how long a client may take to send one message.
	chunkLimit = time.Minute
)

// needsMachine returns an error if the daemon has no Machine.
func (s *services) needsMachine() error {
	if s.machine == nil {
		return reason.NotManaged.Errorf("this daemon does not manage the machine that it runs on")
	}
	return nil
}

// ofMachine turns an error of the machine into a status: FAILED_PRECONDITION where statusOf has
// none.
func ofMachine(err error) error {
	if err == nil {
		return nil
	}
	if s := status.Convert(statusOf(err)); s.Code() != codes.Internal {
		return s.Err()
	}
	return reason.MachineRefused.Errorf("%v", err)
}

func (s *services) GetMachine(ctx context.Context, _ *isthmusv1.GetMachineRequest) (*isthmusv1.Machine, error) {
	if err := s.needsMachine(); err != nil {
		return nil, err
	}
	m, err := s.machine.Get(ctx)
	return m, ofMachine(err)
}

func (s *services) Upgrade(stream grpc.ClientStreamingServer[isthmusv1.UpgradeRequest, isthmusv1.UpgradeResponse]) error {
	if err := s.needsMachine(); err != nil {
		return err
	}
	first, err := stream.Recv()
	if err != nil && err != io.EOF {
		return err
	}
	if first.GetHeader() == nil || len(first.Chunk) > 0 {
		return reason.RequestInvalid.Errorf("the first message must have the header and nothing else")
	}
	body, bytes := io.Pipe()
	defer body.Close()
	go receive(stream, bytes)
	r, err := s.machine.Upgrade(stream.Context(), first.Header, body)
	if err != nil {
		return ofMachine(err)
	}
	return stream.SendAndClose(r)
}

// receive writes a slot's bytes to a pipe until the stream or the reader ends, or until the client
// sends nothing for chunkLimit.
func receive(stream grpc.ClientStreamingServer[isthmusv1.UpgradeRequest, isthmusv1.UpgradeResponse], to *io.PipeWriter) {
	late := time.AfterFunc(chunkLimit, func() {
		to.CloseWithError(reason.DeadlineExceeded.Errorf("the client sent nothing for %v", chunkLimit))
	})
	defer late.Stop()
	for {
		late.Reset(chunkLimit)
		m, err := stream.Recv()
		late.Stop() // the time that the helper takes to write does not count
		if err == nil && (m.Header != nil || len(m.Chunk) > maxChunk) {
			err = reason.RequestInvalid.Errorf("each message after the first must have at most %d bytes of the slot and no header", maxChunk)
		}
		if err == nil {
			_, err = to.Write(m.Chunk)
		}
		if err != nil {
			to.CloseWithError(err)
			return
		}
	}
}

func (s *services) RollbackSlot(ctx context.Context, _ *isthmusv1.RollbackSlotRequest) (*isthmusv1.RollbackSlotResponse, error) {
	if err := s.needsMachine(); err != nil {
		return nil, err
	}
	r, err := s.machine.Rollback(ctx)
	return r, ofMachine(err)
}

func (s *services) Reboot(ctx context.Context, _ *isthmusv1.RebootRequest) (*isthmusv1.RebootResponse, error) {
	if err := s.needsMachine(); err != nil {
		return nil, err
	}
	return &isthmusv1.RebootResponse{}, ofMachine(s.machine.Reboot(ctx))
}

func (s *services) PowerOff(ctx context.Context, _ *isthmusv1.PowerOffRequest) (*isthmusv1.PowerOffResponse, error) {
	if err := s.needsMachine(); err != nil {
		return nil, err
	}
	return &isthmusv1.PowerOffResponse{}, ofMachine(s.machine.PowerOff(ctx))
}

func (s *services) Seal(ctx context.Context, r *isthmusv1.SealRequest) (*isthmusv1.SealResponse, error) {
	if err := s.needsMachine(); err != nil {
		return nil, err
	}
	a, err := s.machine.Seal(ctx, r)
	return a, ofMachine(err)
}

func (s *services) Unseal(ctx context.Context, r *isthmusv1.UnsealRequest) (*isthmusv1.UnsealResponse, error) {
	if err := s.needsMachine(); err != nil {
		return nil, err
	}
	a, err := s.machine.Unseal(ctx, r)
	return a, ofMachine(err)
}
