package importer

import (
	"strings"
	"testing"
)

// TestUsableKey has texts that stand where a key was expected, and keys.
func TestUsableKey(t *testing.T) {
	for _, test := range []struct{ cloud, text, key, reason string }{
		{"aws", "", "", ""},
		{"aws", "Ab3.dE_9kLmN", "Ab3.dE_9kLmN", ""},
		{"aws", "Ab3dE9k", "", "8 to 64"},
		{"aws", "0b3dE9kLmN", "", "do not begin with 0"},
		{"aws", strings.Repeat("aB", 33), "", "8 to 64"},
		{"aws", "Ab3dE9k-LmN", "", "letters, digits, dots"},
		{"aws", "REDACTED", "", "placeholder"},
		{"aws", "Redacted_by_ops", "", "placeholder"},
		{"aws", "changeme1234", "", "placeholder"},
		{"aws", "PLACEHOLDER", "", "placeholder"},
		{"aws", "sensitive", "", "placeholder"},
		{"aws", "pre_shared_key", "", "placeholder"},
		{"aws", "xxxxxxxx", "", "one character"},
		{"aws", "********", "", "one character"},
		{"aws", "Ab3d********9kLm", "", "placeholder"},
		{"aws", "var.tunnel1_key", "", "expression"},
		{"aws", "arn:aws:secretsmanager:eu-north-1:000000000000:secret:s2svpn-x", "", "expression"},
		{"azure", "(sensitive value)", "", "expression"},
		{"azure", "<pre-shared-key>", "", "expression"},
		{"azure", "<hidden>", "", "expression"},
		{"azure", "${var.x}", "", "expression"},
		{"azure", "[parameters('k')]", "", "expression"},
		{"azure", "@Microsoft.KeyVault(SecretUri=https://v.vault.azure.net/k)", "", "expression"},
		{"azure", "https://v.vault.azure.net/secrets/k", "", "expression"},
		{"azure", "None", "", "placeholder"},
		{"azure", "null", "", "placeholder"},
		{"azure", "a-b", "", "without hyphens"},
		{"azure", "Qw+er/ty=12", "Qw+er/ty=12", ""},
		{"gcp", "•••••", "", "one character"},
		{"gcp", "Ab~3-dE", "Ab~3-dE", ""},
		{"gcp", "two words", "", "blanks or line ends inside"},
		{"gcp", "two\nlines", "", "blanks or line ends inside"},
		{"gcp", "\ufeffAb3dE9k \r\n", "Ab3dE9k", ""},
		{"gcp", "A\x00b\x003\x00d\x00", "Ab3d", ""},
		{"oci", "Ab3dE9k.", "", "letters and digits"},
		{"oci", "Ab3dE9kL", "Ab3dE9kL", ""},
		{"gcp", strings.Repeat("ab", 3000), "", "longer than any key"},
	} {
		key, cut, reason := usableKey(test.cloud, test.text)
		if key != test.key || !strings.Contains(reason, test.reason) || (reason == "") != (test.reason == "") || key != "" && cut != (key != test.text) {
			t.Errorf("%s %.80q: %q, %t, %q", test.cloud, test.text, key, cut, reason)
		}
		if len(test.text) > 4 && strings.Contains(reason, test.text) {
			t.Errorf("%q: the reason repeats the text: %s", test.text, reason)
		}
	}
}
