package noun

import (
	"testing"

	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

func TestOf(t *testing.T) {
	path := func(c *Call) string {
		if c == nil {
			return ""
		}
		return c.Path
	}
	for _, k := range []struct {
		object           proto.Message
		list, get, watch string
	}{
		{&isthmusv1.PoolStatus{}, "/isthmus.v1.PoolService/ListPools", "/isthmus.v1.PoolService/GetPool", "/isthmus.v1.PoolService/WatchPools"},
		{&isthmusv1.NameStatus{}, "/isthmus.v1.NameService/ListNames", "", "/isthmus.v1.NameService/WatchNames"},
		{&isthmusv1.Revision{}, "/isthmus.v1.SpecService/ListHistory", "", ""},
	} {
		c := Of(k.object)
		if path(c.List) != k.list || path(c.Get) != k.get || path(c.Watch) != k.watch {
			t.Errorf("%T: %q, %q, %q", k.object, path(c.List), path(c.Get), path(c.Watch))
		}
		if _, ok := c.List.Response().ProtoReflect().Get(c.List.Field).Interface().(interface{ Len() int }); !ok {
			t.Errorf("%T: %s is not the list of objects", k.object, c.List.Field.FullName())
		}
	}
	if c := Of(&isthmusv1.PoolStatus{}); c.Watch.Field.FullName() != "isthmus.v1.PoolEvent.pool" || Text(&isthmusv1.GetPoolRequest{Name: "a"}, "name") != "a" || Text(&isthmusv1.GetPoolRequest{}, "other") != "" {
		t.Errorf("fields: %s", c.Watch.Field.FullName())
	}
	defer func() {
		if recover() == nil {
			t.Error("Of accepts a message that no service lists")
		}
	}()
	Of(&isthmusv1.SystemStatus{})
}
