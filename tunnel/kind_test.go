package tunnel

import (
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/secret"
)

// kinds has a configuration of each kind, by the name of the field that sets it.
func kinds() map[string]Config {
	return map[string]Config{
		"IPsec":     {IPsec: &IPsec{LocalAddress: netip.MustParseAddr("10.0.0.4"), RemoteAddress: netip.MustParseAddr("198.51.100.1"), ESPProposals: []string{"aes256gcm16-ecp384"}}},
		"WireGuard": {WireGuard: &WireGuard{Endpoint: netip.MustParseAddrPort("203.0.113.7:51820"), ListenPort: 51821}},
	}
}

// TestEveryKind looks for a carrier behind each kind that Config can hold, so that a new kind is
// not forgotten.
func TestEveryKind(t *testing.T) {
	all, seen := kinds(), map[Kind]bool{}
	for i := range reflect.TypeFor[Config]().NumField() {
		f := reflect.TypeFor[Config]().Field(i)
		if f.Type.Kind() != reflect.Pointer {
			continue
		}
		c, ok := all[f.Name]
		if !ok {
			t.Errorf("the test has no tunnel with %s", f.Name)
			continue
		}
		if k := c.Kind(); k == "" || seen[k] {
			t.Errorf("%s: kind %q", f.Name, k)
		}
		seen[c.Kind()] = true
		if !c.Outside().Addr().IsValid() || len(c.Needs()) == 0 || len(c.Needs()[0]) == 0 {
			t.Errorf("%s: outside %v, needs %v", f.Name, c.Outside(), c.Needs())
		}
		if mtu := c.LargestMTU(1500); mtu >= 1500-20 || mtu < 1280 {
			t.Errorf("%s: MTU %d", f.Name, mtu)
		}
	}
}

func TestNoKind(t *testing.T) {
	var c Config
	if c.Kind() != "" || c.Outside().IsValid() || c.ListenPort() != 0 || c.Lane() || c.LargestMTU(1500) != 1500 || len(Diff(c, c)) != 0 {
		t.Errorf("%+v", c)
	}
}

func TestKindsDiffer(t *testing.T) {
	all := kinds()
	if d := Diff(all["IPsec"], all["WireGuard"]); len(d) != 1 || d[0].Field != "kind" || d[0].Old != KindIPsec || d[0].New != KindWireGuard || d[0].Interrupts == "" {
		t.Errorf("%+v", d)
	}
}

// TestDiffOfEveryField changes each field of each kind by itself: each shows.
func TestDiffOfEveryField(t *testing.T) {
	for name := range kinds() {
		settings := reflect.TypeFor[Config]()
		field, _ := settings.FieldByName(name)
		for i := range field.Type.Elem().NumField() {
			a, b := kinds()[name], kinds()[name]
			f := reflect.ValueOf(&b).Elem().FieldByName(name).Elem().Field(i)
			switch v := f.Addr().Interface().(type) {
			case *netip.Addr:
				*v = netip.MustParseAddr("192.0.2.9")
			case *netip.AddrPort:
				*v = netip.MustParseAddrPort("192.0.2.9:1")
			case *string:
				*v += "x"
			case *[]string:
				*v = append(*v, "x")
			case *time.Duration:
				*v += time.Second
			case *bool:
				*v = !*v
			case *uint16:
				*v++
			case *uint32:
				*v++
			case *uint64:
				*v++
			case *[32]byte:
				v[0]++
			case *secret.Ref:
				v.Name += "x"
			default:
				t.Fatalf("%s.%s: the test cannot change a %T", name, field.Type.Elem().Field(i).Name, v)
			}
			if d := Diff(a, b); len(d) != 1 {
				t.Errorf("%s.%s: %+v", name, field.Type.Elem().Field(i).Name, d)
			}
		}
	}
}
