package nat

import (
	"net/netip"
	"reflect"
	"testing"
	"time"
)

// TestPolicyEqual changes each field in turn: none may be forgotten.
func TestPolicyEqual(t *testing.T) {
	for i := range reflect.TypeFor[Policy]().NumField() {
		var a, b Policy
		f := reflect.ValueOf(&b).Elem().Field(i)
		name := reflect.TypeFor[Policy]().Field(i).Name
		switch v := f.Addr().Interface().(type) {
		case *string:
			*v = "x"
		case *Action:
			*v = Deny
		case *bool:
			*v = true
		case *[]string:
			*v = []string{"x"}
		case *[]netip.Prefix:
			*v = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
		case *[]PortRange:
			*v = []PortRange{{1, 2}}
		case *netip.AddrPort:
			*v = netip.MustParseAddrPort("10.0.0.1:80")
		case *Timeouts:
			v.UDP = time.Second
		default:
			t.Fatalf("%s: a field of a kind that this test does not know", name)
		}
		if a.Equal(&b) || b.Equal(&a) {
			t.Errorf("%s is not compared", name)
		}
		if !b.Equal(&b) {
			t.Errorf("%s: not equal to itself", name)
		}
	}
}
