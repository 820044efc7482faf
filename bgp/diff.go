package bgp

import (
	"fmt"
	"reflect"
)

// Difference is one field in which two configurations of a peer differ.
type Difference struct {
	Field      string
	Old, New   string
	Interrupts string // why a change ends the session; empty if it does not
}

// DiffPeer returns the fields in which b differs from a, in the order of declaration.
func DiffPeer(a, b Peer) []Difference {
	var d []Difference
	const reset = "the session is closed and opened again"
	negotiated := map[string]string{
		"Interface": reset, "Address": reset, "LocalAddress": reset, "ASN": reset, "HoldTime": reset, "Keepalive": reset,
		"TTL": reset, "Passive": reset, "Password": reset, "GracefulRestart": reset,
		"AllowOwnAS": reset, "ASOverride": reset,
	}
	va, vb := reflect.ValueOf(a), reflect.ValueOf(b)
	for i := range va.NumField() {
		x, y := va.Field(i).Interface(), vb.Field(i).Interface()
		if reflect.DeepEqual(x, y) {
			continue
		}
		name := va.Type().Field(i).Name
		d = append(d, Difference{Field: name, Old: fmt.Sprint(x), New: fmt.Sprint(y), Interrupts: negotiated[name]})
	}
	return d
}
