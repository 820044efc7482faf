package auth

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/reason"
)

// Subject describes a request in the audit log.
type Subject struct {
	Object string
	Digest string
}

// Unary returns the interceptor that admits or refuses calls and writes the audit log. describe
// returns the subject of a writing request, without its secrets; generation returns the present
// generation.
func (a *Authority) Unary(describe func(request any) Subject, generation func() uint64) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, request any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		r, err := a.admit(ctx, info.FullMethod)
		if err != nil {
			return nil, err
		}
		if !r.write {
			return next(ctx, request)
		}
		subject := describe(request)
		e := a.entry(ctx, info.FullMethod)
		e.Object, e.Digest, e.From = shorten(subject.Object), subject.Digest, generation()
		if e, err = a.audit.begin(e); err != nil {
			return nil, reason.AuditFailed.Errorf("%v", err)
		}
		response, err := next(ctx, request)
		e.Event, e.Result = End, status.Code(err).String()
		if err != nil {
			e.Error = shorten(status.Convert(err).Message())
		} else if g, ok := response.(interface{ GetGeneration() uint64 }); ok {
			e.To = g.GetGeneration()
		} else if c, ok := response.(interface{ GetClient() *isthmusv1.Client }); ok && c.GetClient() != nil {
			// of the issued certificate
			e.Object = shorten(e.Object + ", serial " + c.GetClient().GetSerial())
		}
		// The change is made and its Begin is on disk: an error now would be wrong.
		_ = a.audit.write(e)
		return response, err
	}
}

// Stream returns the interceptor for streams. A writing stream is in the audit log from its first
// message on, which describe describes; it cannot change anything before the log has stored that.
func (a *Authority) Stream(describe func(request any) Subject, generation func() uint64) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		r, err := a.admit(stream.Context(), info.FullMethod)
		if err != nil {
			return err
		}
		done, ok := a.clients.openStream(FromContext(stream.Context()).Serial)
		if !ok {
			return reason.TooManyStreams.Errorf("%d streams of this client are open already", maxStreamsPerClient)
		}
		defer done()
		if !r.write {
			return next(srv, stream)
		}
		audited := &auditedStream{ServerStream: stream, begin: func(request any) (Entry, error) {
			subject := describe(request)
			e := a.entry(stream.Context(), info.FullMethod)
			e.Object, e.Digest, e.From = shorten(subject.Object), subject.Digest, generation()
			return a.audit.begin(e)
		}}
		err = next(srv, audited)
		if e := audited.entry; e.Event != "" {
			e.Event, e.Result = End, status.Code(err).String()
			if err != nil {
				e.Error = shorten(status.Convert(err).Message())
			}
			_ = a.audit.write(e) // as in Unary
		}
		return err
	}
}

// auditedStream writes Begin to the audit log when the first message has come.
type auditedStream struct {
	grpc.ServerStream
	begin func(request any) (Entry, error)
	entry Entry // zero: no message yet
}

func (s *auditedStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil || s.entry.Event != "" {
		return err
	}
	e, err := s.begin(m)
	if err != nil {
		return reason.AuditFailed.Errorf("%v", err)
	}
	s.entry = e
	return nil
}

// admit returns the rule of a method, or the status of the refusal.
func (a *Authority) admit(ctx context.Context, method string) (rule, error) {
	r, known := rules[method]
	return a.judge(ctx, method, r, known)
}

// judge returns the rule of a method or a page, or the status of the refusal.
func (a *Authority) judge(ctx context.Context, method string, r rule, known bool) (rule, error) {
	id := FromContext(ctx)
	method = shorten(method)
	var err error
	switch {
	case id.Role == 0:
		err = reason.CallerUnknown.Errorf("who is calling is not known")
	case id.Serial != "" && a.valid(id.Serial) != nil:
		err = reason.CertificateRevoked.Errorf("certificate is revoked")
	case !id.Expires.IsZero() && a.clock().at.After(id.Expires):
		// The timer of the connection stops while a machine sleeps, and does not follow changes of
		// the clock.
		err = reason.CertificateExpired.Errorf("certificate has expired")
	case !known:
		err = reason.MethodNotAllowed.With(map[string]string{"method": method}, "%s is not allowed", method)
	case id.Role < r.role:
		err = reason.PermissionRole.With(map[string]string{"method": method, "role": id.Role.String(), "needed": r.role.String()}, "%s needs role %s, %s has role %s", method, r.role, id.Name, id.Role)
	case !a.clients.allowCall(id.Serial, a.now()):
		err = reason.RateLimited.Errorf("more than %d calls per second", callsPerSecond)
		if !r.write {
			return rule{}, err
		}
	default:
		return r, nil
	}
	e := a.entry(ctx, method)
	e.Result, e.Error = status.Code(err).String(), shorten(status.Convert(err).Message())
	if aerr := a.audit.refuse(id.Name+id.Serial, e); aerr != nil {
		return rule{}, reason.Again(err, fmt.Sprintf("%s; and %v", status.Convert(err).Message(), aerr))
	}
	return rule{}, err
}

func (a *Authority) entry(ctx context.Context, method string) Entry {
	id := FromContext(ctx)
	e := Entry{Who: id.Name, Role: id.Role.String(), Serial: id.Serial, Method: method}
	if p, ok := peer.FromContext(ctx); ok {
		e.Address = hostOf(p.Addr)
	}
	return e
}
