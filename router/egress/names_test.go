package egress

import (
	"strings"
	"testing"
)

func TestParseName(t *testing.T) {
	for text, want := range map[string]string{
		"API.Partner.example.": "api.partner.example", "*.example.com": "*.example.com", "localhost": "localhost", "_dmarc.a-b.example": "_dmarc.a-b.example",
		"": "", ".": "", "a..b": "", "*.com": "", "*": "", "a.*.b": "", "-a.example": "", "a b.example": "", "192.0.2.1": "", "2001:db8::1": "", "bücher.example": "",
		strings.Repeat("a", 64) + ".example": "", strings.Repeat("abcdefg.", 32) + "example": "",
	} {
		got, err := ParseName(text)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}

func TestNameMatches(t *testing.T) {
	for _, k := range []struct {
		pattern, name string
		want          bool
	}{
		{"a.example", "a.example", true}, {"a.example", "b.a.example", false},
		{"*.a.example", "b.a.example", true}, {"*.a.example", "c.b.a.example", true}, {"*.a.example", "a.example", false}, {"*.a.example", "ba.example", false},
	} {
		if got := NameMatches(k.pattern, k.name); got != k.want {
			t.Errorf("%s, %s: %v", k.pattern, k.name, got)
		}
	}
}
