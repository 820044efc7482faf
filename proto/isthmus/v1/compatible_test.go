package isthmusv1

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/isthmus-net/isthmus/test/golden"
)

// TestCompatible checks that nothing of the contract in testdata/contract.txt was removed, renamed,
// renumbered or given another type. With -update it adds what is new; a line that is gone stays an
// error, and only an edit of the file by hand removes it.
func TestCompatible(t *testing.T) {
	const file = "testdata/contract.txt"
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	now := contract()
	for line := range strings.Lines(string(data)) {
		if line = strings.TrimSuffix(line, "\n"); !slices.Contains(now, line) {
			t.Errorf("the contract has no longer: %s", line)
		}
	}
	if !t.Failed() {
		golden.Check(t, file, strings.Join(now, "\n")+"\n")
	}
}

// contract returns a line for each field, value and method.
func contract() (out []string) {
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	var message func(protoreflect.MessageDescriptor)
	enum := func(e protoreflect.EnumDescriptor) {
		for i := range e.Values().Len() {
			v := e.Values().Get(i)
			add("value %s %d %s", e.FullName(), v.Number(), v.Name())
		}
	}
	message = func(m protoreflect.MessageDescriptor) {
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			kind := f.Kind().String()
			if f.Message() != nil {
				kind = string(f.Message().FullName())
			} else if f.Enum() != nil {
				kind = string(f.Enum().FullName())
			}
			if f.HasPresence() && f.Message() == nil {
				kind = "optional " + kind
			}
			if o := f.ContainingOneof(); o != nil && !o.IsSynthetic() {
				kind += " of " + string(o.Name())
			}
			add("field %s %d %s %s %s", m.FullName(), f.Number(), f.Name(), f.Cardinality(), kind)
		}
		for i := range m.Enums().Len() {
			enum(m.Enums().Get(i))
		}
		for i := range m.Messages().Len() {
			message(m.Messages().Get(i))
		}
	}
	protoregistry.GlobalFiles.RangeFilesByPackage("isthmus.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Messages().Len() {
			message(f.Messages().Get(i))
		}
		for i := range f.Enums().Len() {
			enum(f.Enums().Get(i))
		}
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				add("method %s %s stream %t returns %s stream %t %v", m.FullName(), m.Input().FullName(), m.IsStreamingClient(),
					m.Output().FullName(), m.IsStreamingServer(), proto.GetExtension(m.Options(), E_Role))
			}
		}
		return true
	})
	slices.Sort(out)
	return out
}
