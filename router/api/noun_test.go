package api_test

import (
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
)

// TestEveryCallIsServed checks that no call of any service is left to the generated handler, which
// answers UNIMPLEMENTED: neither that of a noun that the router lacks, nor any other.
func TestEveryCallIsServed(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	conn := dialRole(t, s, auth.Admin)
	services := isthmusv1.File_isthmus_v1_services_proto.Services()
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			m := methods.Get(j)
			path := "/" + string(services.Get(i).FullName()) + "/" + string(m.Name())
			message := func(d protoreflect.MessageDescriptor) any {
				mt, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
				if err != nil {
					t.Fatal(err)
				}
				return mt.New().Interface()
			}
			stream, err := conn.NewStream(soon(t), &grpc.StreamDesc{ServerStreams: m.IsStreamingServer(), ClientStreams: m.IsStreamingClient()}, path)
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.SendMsg(message(m.Input())); err != nil {
				t.Fatal(err)
			}
			stream.CloseSend()
			if head, err := stream.Header(); head != nil && err == nil && m.IsStreamingServer() {
				continue // it is served, although it may have nothing to send
			}
			if err := stream.RecvMsg(message(m.Output())); status.Code(err) == codes.Unimplemented {
				t.Errorf("%s: %v", path, err)
			}
		}
	}
}
