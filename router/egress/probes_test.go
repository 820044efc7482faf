package egress

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func target(t testing.TB, text string) Target {
	t.Helper()
	out, err := ParseTarget(text)
	if err != nil {
		t.Fatal(text, err)
	}
	return out
}

func TestParseTarget(t *testing.T) {
	for text, want := range map[string]string{
		"tcp://198.51.100.7:443":             "",
		"tcp://[2001:db8::7]:443":            "",
		"icmp://198.51.100.7":                "",
		"icmp://[2001:db8::7]":               "",
		"icmp://2001:DB8::7":                 "icmp://[2001:db8::7]",
		"https://api.partner.example/health": "https://api.partner.example:443/health",
		"https://api.partner.example":        "https://api.partner.example:443/",
		"http://198.51.100.7:8080/a?b=c":     "",
		"tcp://198.51.100.7":                 "has no port",
		"tcp://198.51.100.7:0":               "has a port that is not from 1 to 65535",
		"tcp://198.51.100.7:70000":           "has a port that is not from 1 to 65535",
		"tcp://198.51.100.7:443/":            "has a path, which tcp does not use",
		"icmp://198.51.100.7:7":              "has a port, which icmp does not use",
		"udp://198.51.100.7:53":              "has none of the schemes tcp, http, https and icmp",
		"198.51.100.7":                       "has none of the schemes tcp, http, https and icmp",
		"https:///health":                    "has no host",
		"https://me:secret@a.example/":       "has a user or a fragment, which a probe cannot have",
		"http://[::1":                        "is not a valid URL",
	} {
		got, err := ParseTarget(text)
		switch {
		case want == "":
			want = text
			fallthrough
		case strings.Contains(want, "://"):
			if err != nil || got.String() != want {
				t.Errorf("%s: %v, %v", text, got, err)
			}
			if again, err := ParseTarget(got.String()); err != nil || again != got {
				t.Errorf("%s: parsed again: %v, %v", text, again, err)
			}
		case err == nil || err.Error() != want:
			t.Errorf("%s: %v, %v, want %s", text, got, err, want)
		}
	}
}

func TestTargetsOfAFamily(t *testing.T) {
	p := Probes{Targets: []Target{target(t, "icmp://192.0.2.1"), target(t, "icmp://2001:db8::1"), target(t, "tcp://a.example:1"), target(t, "tcp://192.0.2.2:1")}}
	for address, want := range map[string]string{"192.0.2.9": "3 2", "2001:db8::9": "2 2"} {
		targets, quorum := p.For(netip.MustParseAddr(address))
		if got := fmt.Sprint(len(targets), quorum); got != want {
			t.Errorf("%s: %s, want %s", address, got, want)
		}
	}
}
