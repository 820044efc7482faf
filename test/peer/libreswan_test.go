package peer

import (
	"strings"
	"testing"
)

func TestLibreswanProposals(t *testing.T) {
	for _, test := range []struct{ from, want, groups string }{
		{AzureIKE, "aes_gcm256-sha2_384;dh20", "dh20"},
		{AzureESP, "aes_gcm256;dh20", "dh20"},
		{"aes256gcm16", "aes_gcm256", ""},
		{"aes128-aes256-sha1-sha256-modp2048-ecp256,aes128gcm16-ecp256", "aes128+aes256-sha1+sha2_256;dh14+dh19,aes_gcm128;dh19", "dh14 dh19"},
	} {
		got, groups, err := libreswanProposals(test.from)
		if err != nil || got != test.want || strings.Join(groups, " ") != test.groups {
			t.Errorf("%s: %s, groups %v, %v", test.from, got, groups, err)
		}
	}
	for from, want := range map[string]string{AzureDefaultIKE: "libreswan has no modp1024", "aes256-prfmd5": "libreswan has no prfmd5"} {
		if _, _, err := libreswanProposals(from); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", from, err, want)
		}
	}
}

func TestLibreswanTunnel(t *testing.T) {
	tunnel := Tunnel{Name: "t1", Local: addr("203.0.113.1"), Remote: addr("198.51.100.1"), RemoteID: "192.0.2.1", IfID: 7, IKE: AzureIKE, ESP: AzureESP, Start: "start",
		Life: AzureLife}
	got, err := tunnel.libreswan()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"  leftid=203.0.113.1\n", "  rightid=192.0.2.1\n", "  pfs=yes\n", "  ipsec-interface=7\n", "  auto=start\n", "  ikelifetime=28800s\n", "  salifetime=27000s\n",
		"  rekeymargin=1800s\n", "  ipsec-max-bytes=104857600000\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	tunnel.ESP = "aes256gcm16"
	if got, err := tunnel.libreswan(); err != nil || !strings.Contains(got, "  pfs=no\n") {
		t.Errorf("without a group: %v\n%s", err, got)
	}
	tunnel.ESP = "aes256gcm16-ecp384-ecp256"
	if _, err := tunnel.libreswan(); err == nil {
		t.Error("two groups pass")
	}
}
