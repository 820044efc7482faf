// Package noun finds the API calls of a noun. All nouns have the same calls: LIST returns pages,
// GET one object by name, WATCH a stream of events. The server and the command line derive them
// from the descriptors of the .proto files, so that a new noun needs no code of its own for calls.
package noun

import (
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// Call is one method of the API.
type Call struct {
	Path              string // as "/isthmus.v1.PoolService/ListPools"
	request, response protoreflect.MessageType
	// Field is the field of the response that holds the objects, or the object of an event. It is
	// nil for a Get call, whose response is the object.
	Field protoreflect.FieldDescriptor
}

// Request returns an empty request.
func (c *Call) Request() proto.Message { return c.request.New().Interface() }

// Response returns an empty response.
func (c *Call) Response() proto.Message { return c.response.New().Interface() }

// Calls are the methods of a noun. A nil Get or Watch means that it has no such call.
type Calls struct{ List, Get, Watch *Call }

// Of returns the calls whose objects are messages of m's type. It looks in the services of the
// message's .proto file, and panics if none of them lists the objects: the noun is incomplete.
func Of(m proto.Message) Calls {
	object := m.ProtoReflect().Descriptor()
	var calls Calls
	services := object.ParentFile().Services()
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			method := methods.Get(j)
			out, name := method.Output(), string(method.Name())
			switch {
			case strings.HasPrefix(name, "List") && !method.IsStreamingServer():
				if f := fieldOf(out, object, true); f != nil && calls.List == nil {
					calls.List = call(method, f)
				}
			case strings.HasPrefix(name, "Get") && out.FullName() == object.FullName():
				calls.Get = call(method, nil)
			case strings.HasPrefix(name, "Watch") && method.IsStreamingServer():
				if f := fieldOf(out, object, false); f != nil {
					calls.Watch = call(method, f)
				}
			}
		}
	}
	if calls.List == nil {
		panic(fmt.Sprintf("no service lists %s", object.FullName()))
	}
	return calls
}

// fieldOf returns the first field of a message that holds an object, or with list the first
// repeated field that holds objects.
func fieldOf(m, object protoreflect.MessageDescriptor, list bool) protoreflect.FieldDescriptor {
	fields := m.Fields()
	for i := range fields.Len() {
		if f := fields.Get(i); f.Message() != nil && f.IsList() == list && f.Message().FullName() == object.FullName() {
			return f
		}
	}
	return nil
}

func call(m protoreflect.MethodDescriptor, f protoreflect.FieldDescriptor) *Call {
	return &Call{
		Path:    fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name()),
		request: typeOf(m.Input()), response: typeOf(m.Output()), Field: f,
	}
}

func typeOf(d protoreflect.MessageDescriptor) protoreflect.MessageType {
	t, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		panic(err) // cannot happen: generated code registers each message of its file
	}
	return t
}

// Field returns a field of a message by its name in the .proto file. It panics if there is none.
func Field(m proto.Message, name protoreflect.Name) protoreflect.FieldDescriptor {
	f := m.ProtoReflect().Descriptor().Fields().ByName(name)
	if f == nil {
		panic(fmt.Sprintf("%s has no field %s", m.ProtoReflect().Descriptor().FullName(), name))
	}
	return f
}

// Text returns the text of a field, "" if the message has no such field.
func Text(m proto.Message, name protoreflect.Name) string {
	if f := m.ProtoReflect().Descriptor().Fields().ByName(name); f != nil {
		return m.ProtoReflect().Get(f).String()
	}
	return ""
}
