package secret

import (
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	key := "a2V5IG9mIHRoaXJ0eS10d28gYnl0ZXMgZm9yIHRlc3Q="
	for _, k := range []struct {
		kind  Kind
		value string
		wrong string // part of the error; empty: it fits
	}{
		{PSK, "correct horse battery staple", ""},
		{PSK, " \n", "empty"},
		{PSK, "<pre-shared key>", "placeholder"},
		{PSK, "ChangeMe", "placeholder"},
		{PSK, "${PSK}", "placeholder"},
		{PSK, "{{ psk }}", "placeholder"},
		{PSK, "********", "placeholder"},
		{PSK, "xylophone", ""},
		{PSK, "xxx", "placeholder"},
		{WireGuardKey, key, ""},
		{WireGuardKey, key + "\n", ""},
		{WireGuardKey, key[4:], "32 bytes"},
		{WireGuardKey, "correct horse battery staple", "32 bytes"},
		{Password, strings.Repeat("p", 80), ""},
		{Password, strings.Repeat("p", 81), "80 bytes"},
	} {
		err := k.kind.Check([]byte(k.value))
		if (err == nil) != (k.wrong == "") || err != nil && !strings.Contains(err.Error(), k.wrong) {
			t.Errorf("%s %q: %v, want %q", k.kind, k.value, err, k.wrong)
		}
		if err != nil && len(k.value) > 10 && strings.Contains(err.Error(), k.value) {
			t.Errorf("%s: the error repeats the value: %v", k.kind, err)
		}
	}
}
