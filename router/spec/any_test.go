package spec

import (
	"math/rand/v2"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// words are the strings of random messages. Each is valid in some field.
var words = []string{"", "a", "b", "aws-0", "A_b", "eth0", "lo", "10.9.0.4", "10.9.0.10", "203.0.113.9", "0.0.0.0", "::", "::1", "2001:db8::1", "::ffff:10.9.0.4", "fe80::1%eth0", "169.254.64.2/30", "169.254.64.1",
	"169.254.21.2/32", "10.1.0.0/16", "10.1.2.3/16", "0.0.0.0/0", "::/0", "2001:db8::/32", "172.16.0.0/12", "224.0.0.1", "255.255.255.255", "10.9.0.4:80", "[::1]:443", ":80", "tcp", "udp", "icmp", "47", "80", "1-65535", "65535-1", "0", "443-",
	"snat", "no-nat", "deny", "reject", "dnat", "redirect", "aws", "azure", "azure-vwan", "gcp", "oci", "block", "bypass", "api.partner.example", "*.example.com", "*", "EXAMPLE.com.", "tcp://198.51.100.7:443", "https://x/", "icmp://10.9.0.4", "http://",
	"aes256gcm16-prfsha384-ecp384", "aes256-sha1-modp1024", "null", "none", "start", "trap", "k", "wireguard", "psk", "hub-1.example", "vpn@example.com", "\x00", "ä", "-", "--", "../x", "a b"}

// anyMessage fills a message at random.
func anyMessage(r *rand.Rand, m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if r.IntN(3) == 0 {
			continue
		}
		one := func() protoreflect.Value {
			switch f.Kind() {
			case protoreflect.StringKind:
				return protoreflect.ValueOfString(words[r.IntN(len(words))])
			case protoreflect.BoolKind:
				return protoreflect.ValueOfBool(r.IntN(2) == 0)
			case protoreflect.Uint32Kind:
				return protoreflect.ValueOfUint32([]uint32{0, 1, 2, 30, 80, 576, 1280, 1400, 65535, 65536, 64512, 64620, 23456, 1 << 31, 1<<32 - 1}[r.IntN(15)])
			case protoreflect.Uint64Kind:
				return protoreflect.ValueOfUint64(r.Uint64() >> r.IntN(64))
			case protoreflect.Int64Kind:
				return protoreflect.ValueOfInt64([]int64{0, 1, -1, 30, 3600, 86400, -1 << 63, 1<<63 - 1}[r.IntN(8)])
			case protoreflect.Int32Kind:
				return protoreflect.ValueOfInt32([]int32{0, 1, -1, 500_000_000, -1 << 31, 1<<31 - 1}[r.IntN(6)])
			}
			panic(f.FullName())
		}
		switch {
		case f.IsList() && f.Message() != nil:
			list := m.Mutable(f).List()
			for range r.IntN(4 - min(depth, 3)) {
				e := list.NewElement()
				anyMessage(r, e.Message(), depth+1)
				list.Append(e)
			}
		case f.IsList():
			for range r.IntN(3) {
				m.Mutable(f).List().Append(one())
			}
		case f.Message() != nil:
			anyMessage(r, m.Mutable(f).Message(), depth+1)
		default:
			m.Set(f, one())
		}
	}
}

// TestAnyMessage checks that Check and Edit end for random messages.
func TestAnyMessage(t *testing.T) {
	base, problems := parse(editEgress + "  policies:\n  - {name: a, action: deny, sources: [10.1.0.0/16]}\n")
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	good := 0
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 9))
		m := &isthmusv1.Spec{}
		anyMessage(r, m.ProtoReflect(), 0)
		s, problems := Check(FromMessage(m), stored)
		if s == nil {
			t.Fatalf("seed %d: nothing returned", seed)
		}
		if len(problems) == 0 {
			good++
			text, err := Encode(m)
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if d, problems := Decode([]byte(text)); len(problems) > 0 || !proto.Equal(d.Message, m) {
				t.Fatalf("seed %d: %v\n%s", seed, problems, text)
			}
		}
		e := Edit{Set: m.GetEgress().GetPolicies(), Delete: []string{words[r.IntN(len(words))]}}
		if _, _, err := e.Apply(base, editEgress+"  policies:\n  - {name: a, action: deny, sources: [10.1.0.0/16]}\n"); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
	t.Logf("%d without problems", good)
}
