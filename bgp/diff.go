package bgp

import "reflect"

// keeps are the fields of a Peer whose change does not end the session.
var keeps = map[string]bool{"Tunnel": true, "Lanes": true, "Import": true, "Export": true, "MaxPrefixes": true}

// Interrupts returns why a change of a peer from a to b ends the session; empty if it does not.
func Interrupts(a, b Peer) string {
	switch {
	case a.Disabled:
		return ""
	case b.Disabled:
		return "the session is shut down"
	}
	va, vb := reflect.ValueOf(a), reflect.ValueOf(b)
	for i := range va.NumField() {
		if !keeps[va.Type().Field(i).Name] && !reflect.DeepEqual(va.Field(i).Interface(), vb.Field(i).Interface()) {
			return "the session is closed and opened again"
		}
	}
	return ""
}
