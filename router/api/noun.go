package api

import (
	"context"
	"fmt"
	"path"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	nouns "github.com/isthmus-net/isthmus/router/noun"
)

// Noun answers the calls List, Get and Watch for one kind of object. Kind.From makes one.
type Noun struct {
	calls nouns.Calls
	list  func(ctx context.Context, request, response proto.Message) error
	get   func(key string) (proto.Message, error)
	watch func(ctx context.Context, stopping <-chan struct{}, changed func() <-chan struct{}, send func(isthmusv1.EventType, proto.Message) error) error
}

// From returns the noun of a kind. list returns its objects in ascending order, each key once; the
// slice and the messages must not change afterwards. It should return the same message for an
// unchanged object, because watches then need not compare it.
func (k Kind[T]) From(list func() []T) Noun { return k.FromCounted(list, nil, nil) }

// FromCounted is From for a noun whose List call has more to do: count runs before the list is
// read, and fill sets the fields of the response other than the objects. Both may be nil.
func (k Kind[T]) FromCounted(list func() []T, count func(context.Context), fill func(request, response proto.Message)) Noun {
	var none T
	n := Noun{calls: nouns.Of(none)}
	n.list = func(ctx context.Context, request, response proto.Message) error {
		if count != nil {
			count(ctx)
		}
		var filter string
		var match func(T) bool
		if k.match != nil {
			var err error
			if filter, match, err = k.match(request); err != nil {
				return err
			}
		}
		size := uint32(request.ProtoReflect().Get(nouns.Field(request, "page_size")).Uint())
		items, next, err := k.page(list(), size, nouns.Text(request, "page_token"), filter, match)
		if err != nil {
			return err
		}
		if fill != nil {
			fill(request, response)
		}
		r := response.ProtoReflect()
		objects := r.Mutable(n.calls.List.Field).List()
		for _, o := range items {
			objects.Append(protoreflect.ValueOfMessage(o.ProtoReflect()))
		}
		r.Set(nouns.Field(response, "next_page_token"), protoreflect.ValueOfString(next))
		return nil
	}
	n.get = func(key string) (proto.Message, error) { return k.get(list(), key) }
	n.watch = func(ctx context.Context, stopping <-chan struct{}, changed func() <-chan struct{}, send func(isthmusv1.EventType, proto.Message) error) error {
		return k.watch(ctx, stopping, changed, list, func(e isthmusv1.EventType, o T) error { return send(e, o) })
	}
	return n
}

// List answers a List call of the noun. The request must be of that call's type.
func (n Noun) List(ctx context.Context, request proto.Message) (proto.Message, error) {
	response := n.calls.List.Response()
	if err := n.list(ctx, request, response); err != nil {
		return nil, err
	}
	return response, nil
}

// Lists reports whether a request is for the noun's List call.
func (n Noun) Lists(request proto.Message) bool {
	return request.ProtoReflect().Type() == n.calls.List.Request().ProtoReflect().Type()
}

// served registers services, with the calls of nouns in place of the generated handlers.
type served struct {
	*grpc.Server
	// by path
	unary  map[string]func(context.Context, proto.Message) (proto.Message, error)
	stream map[string]func(grpc.ServerStream) error
	calls  map[string]*nouns.Call
}

// serveNouns returns a registrar for the services of r.
func (s *services) serveNouns(r *grpc.Server) *served {
	v := &served{r, map[string]func(context.Context, proto.Message) (proto.Message, error){}, map[string]func(grpc.ServerStream) error{}, map[string]*nouns.Call{}}
	for _, n := range s.router.Nouns() {
		list := n.calls.List
		v.calls[list.Path] = list
		v.unary[list.Path] = n.List
		if get := n.calls.Get; get != nil {
			v.calls[get.Path] = get
			v.unary[get.Path] = func(_ context.Context, request proto.Message) (proto.Message, error) {
				return n.get(nouns.Text(request, "name"))
			}
		}
		if watch := n.calls.Watch; watch != nil {
			v.calls[watch.Path] = watch
			v.stream[watch.Path] = func(stream grpc.ServerStream) error {
				return n.watch(stream.Context(), s.stopping, s.router.Changed, func(e isthmusv1.EventType, o proto.Message) error {
					event := watch.Response()
					m := event.ProtoReflect()
					m.Set(nouns.Field(event, "type"), protoreflect.ValueOfEnum(e.Number()))
					if e != isthmusv1.EventType_EVENT_TYPE_MARK {
						m.Set(watch.Field, protoreflect.ValueOfMessage(o.ProtoReflect()))
					}
					return stream.SendMsg(event)
				})
			}
		}
	}
	return v
}

// registerRest registers the services that have only calls of nouns, which need no implementation.
func (v *served) registerRest() {
	registered, rest := v.GetServiceInfo(), map[string]*grpc.ServiceDesc{}
	for full := range v.calls {
		service, method := path.Split(strings.TrimPrefix(full, "/"))
		service = strings.TrimSuffix(service, "/")
		if _, ok := registered[service]; ok {
			continue
		}
		d := rest[service]
		if d == nil {
			d = &grpc.ServiceDesc{ServiceName: service, HandlerType: (*any)(nil)}
			rest[service] = d
		}
		if v.stream[full] != nil {
			d.Streams = append(d.Streams, grpc.StreamDesc{StreamName: method, ServerStreams: true})
		} else {
			d.Methods = append(d.Methods, grpc.MethodDesc{MethodName: method})
		}
	}
	for _, d := range rest {
		v.RegisterService(d, v)
	}
}

// RegisterService implements grpc.ServiceRegistrar.
func (v *served) RegisterService(d *grpc.ServiceDesc, impl any) {
	service := *d
	service.Methods = append([]grpc.MethodDesc(nil), d.Methods...)
	for i := range service.Methods {
		m := &service.Methods[i]
		full := fmt.Sprintf("/%s/%s", d.ServiceName, m.MethodName)
		call := v.unary[full]
		if call == nil {
			continue
		}
		m.Handler = func(srv any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
			request := v.calls[full].Request()
			if err := decode(request); err != nil {
				return nil, err
			}
			handle := func(ctx context.Context, request any) (any, error) { return call(ctx, request.(proto.Message)) }
			if intercept == nil {
				return handle(ctx, request)
			}
			return intercept(ctx, request, &grpc.UnaryServerInfo{Server: srv, FullMethod: full}, handle)
		}
	}
	service.Streams = append([]grpc.StreamDesc(nil), d.Streams...)
	for i := range service.Streams {
		m := &service.Streams[i]
		full := fmt.Sprintf("/%s/%s", d.ServiceName, m.StreamName)
		call := v.stream[full]
		if call == nil {
			continue
		}
		m.Handler = func(_ any, stream grpc.ServerStream) error {
			if err := stream.RecvMsg(v.calls[full].Request()); err != nil {
				return err
			}
			return call(stream)
		}
	}
	v.Server.RegisterService(&service, impl)
}
