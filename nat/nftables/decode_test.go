package nftables

import (
	"reflect"
	"testing"

	"github.com/isthmus-net/isthmus/nat"
)

// maps4 is a table with one layer of elements.
func maps4(elements map[string]element) *ruleset {
	return &ruleset{sets: map[string]*set{"policy-1-4": {shape{isMap: true, isVerdict: true, isInterval: true, isConcat: true}, elements}}}
}

func TestCountersMove(t *testing.T) {
	count := func(n uint64) nat.Counter { return nat.Counter{Packets: n, Bytes: 100 * n} }
	counted := func(before, now uint64) element {
		return element{kind: drop, policy: "p", before: count(before), now: count(now)}
	}
	wanted := element{kind: drop, policy: "p"}
	other := element{kind: drop, policy: "other", now: count(1000)}
	have := map[string]element{"a": counted(1, 2), "b": counted(4, 8), "o": other}
	for _, k := range []struct {
		name        string
		want        map[string]element
		remove, add map[string]element
		moved       bool
	}{
		{"nothing", map[string]element{"a": wanted, "b": wanted, "o": other}, nil, nil, false},
		{"one goes", map[string]element{"b": wanted, "o": other},
			map[string]element{"a": counted(1, 2), "b": counted(4, 8)}, map[string]element{"b": counted(15, 0)}, true},
		{"one moves", map[string]element{"b": wanted, "c": wanted, "o": other},
			map[string]element{"a": counted(1, 2)}, map[string]element{"c": counted(3, 0)}, true},
		{"one comes", map[string]element{"a": wanted, "b": wanted, "c": wanted, "o": other},
			nil, map[string]element{"c": wanted}, false},
		{"the policy goes", map[string]element{"o": other},
			map[string]element{"a": counted(1, 2), "b": counted(4, 8)}, nil, false},
	} {
		todo, moved := changes(maps4(have), maps4(k.want))
		got := todo["policy-1-4"]
		if got == nil {
			got = &change{}
		}
		if len(got.remove)+len(k.remove) > 0 && !reflect.DeepEqual(got.remove, k.remove) ||
			len(got.add)+len(k.add) > 0 && !reflect.DeepEqual(got.add, k.add) || moved != k.moved {
			t.Errorf("%s: remove %+v, add %+v, moved %v; want %+v, %+v, %v", k.name, got.remove, got.add, moved, k.remove, k.add, k.moved)
		}
	}
}

func TestComment(t *testing.T) {
	for _, before := range []nat.Counter{{}, {Packets: 7}, {Packets: 1 << 63, Bytes: 1<<64 - 1}} {
		if name, got := decodeComment(encodeComment("p-1", before)); name != "p-1" || got != before {
			t.Errorf("%q, %+v", name, got)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{8, 0, 1, 0, 0xff, 0xff, 0xff, 0xfc, 10, 0, 2, 0, 'p', 'o', 'o', 'l', '4', 0, 0, 0}, "name 1 2")
	f.Fuzz(func(t *testing.T, b []byte, comment string) {
		decodeVerdict(b)
		decodeGeneration(b)
		decodeAnswer(b, shape{isMap: true, isVerdict: true, isInterval: true, isConcat: true})
		decodeComment(comment)
	})
}
