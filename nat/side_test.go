package nat

import (
	"net/netip"
	"testing"
)

// TestOutside checks that services of the machine and of its platform are not taken for hosts
// outside.
func TestOutside(t *testing.T) {
	for text, ok := range map[string]bool{
		"10.20.0.5": true, "203.0.113.5": true, "2001:db8::5": true, "fd00::5": true, "::ffff:127.0.0.1": false, "64:ff9b::169.254.169.254": false, "64:ff9b::203.0.113.5": true, "127.8.0.1": false, "::1": false, "0.0.0.0": false, "::": false,
		"169.254.1.1": false, "168.63.129.16": false, "fd00:ec2::254": false, "fe80::1": false, "224.0.0.1": false, "ff02::1": false, "255.255.255.255": false,
	} {
		if err := Outside(netip.MustParseAddr(text)); (err == nil) != ok {
			t.Errorf("%s: %v", text, err)
		}
	}
}
