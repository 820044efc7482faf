package importer

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"
)

// keyRule is what a cloud accepts as a pre-shared key.
type keyRule struct {
	chars *regexp.Regexp
	least int
	most  int
	says  string
}

var keyRules = map[string]keyRule{
	"aws":   {regexp.MustCompile(`^[A-Za-z1-9._][A-Za-z0-9._]*$`), 8, 64, "AWS's keys have 8 to 64 letters, digits, dots and underscores, and do not begin with 0"},
	"azure": {regexp.MustCompile(`^[!-,.-}]+$`), 1, 128, "Azure's keys have 1 to 128 printable ASCII characters without hyphens and tildes"},
	"gcp":   {regexp.MustCompile(`^[!-~]+$`), 1, 4096, "Google's keys have printable ASCII characters"},
	"oci":   {regexp.MustCompile(`^[A-Za-z0-9]+$`), 1, 64, "Oracle's keys have letters and digits"},
}

// Texts that stand in the place of a key: expressions of templates, references to vaults, masks,
// and, without anything but letters, words.
var (
	expression = regexp.MustCompile(`(?i)^(<.*>|\(.*\)|\[.*\]|\$?\{.*\}|%.*%|\$\(.*|@Microsoft\..*|arn:.*|https?:.*|projects/.*/secrets/.*|ocid1\..*|(var|local|data|module|random_password|random_string)\.[a-z_].*)$`)
	mask       = regexp.MustCompile(`\*\*\*|\.\.\.|…|•|●|(?i)redacted|placeholder|change_?me|replace_?me|sensitive_?value|^(your|insert|enter|paste)[-_. ]?(own|pre|shared|secret|psk|key)`)
	notLetters = regexp.MustCompile(`[^a-z]+`)
	words      = map[string]bool{
		"hidden": true, "sensitive": true, "masked": true, "null": true, "none": true, "nil": true, "undefined": true, "unknown": true, "changeit": true,
		"todo": true, "tbd": true, "fixme": true, "secret": true, "mysecret": true, "supersecret": true, "password": true, "presharedkey": true, "preshared": true, "sharedkey": true,
		"sharedsecret": true, "psk": true, "mypsk": true, "key": true, "mykey": true, "example": true, "examplekey": true, "dummy": true, "removed": true, "omitted": true, "encrypted": true,
		"suppressed": true, "stripped": true, "confidential": true, "private": true, "notshown": true, "notavailable": true, "notset": true, "na": true, "empty": true, "string": true, "securestring": true,
		"value": true, "knownafterapply": true, "systemsecuritysecurestring": true, "true": true, "false": true,
	}
)

// blank matches what surrounds a key that was copied from somewhere: blanks, line ends, byte order
// marks, other characters without width, and the zeros of UTF-16.
func blank(r rune) bool {
	return unicode.IsSpace(r) || r == 0 || r == '\ufeff' || r == '\u200b' || r == '\u2060' || r == '\ufffe'
}

// usableKey decides whether a text is a pre-shared key of a cloud. It returns the key, whether
// something was cut from its ends, and, when it is not a key, the reason, which does not contain
// the text. A text that is empty has no reason.
func usableKey(cloud, text string) (key string, cut bool, reason string) {
	key = strings.TrimFunc(strings.ReplaceAll(text, "\x00", ""), blank)
	cut = key != text
	rule, letters := keyRules[cloud], notLetters.ReplaceAllString(strings.ToLower(key), "")
	switch {
	case key == "":
	case len(key) > 4096:
		reason = "the text is longer than any key"
	case strings.Trim(key, string([]rune(key)[0])) == "":
		reason = "the text is one character again and again, which is a mask"
	case expression.MatchString(key):
		reason = "the text is an expression, or the name of a place that has the key"
	case mask.MatchString(key), words[letters] && len(key) <= len(letters)+4:
		reason = "the text is a placeholder"
	case strings.ContainsFunc(key, blank):
		reason = "the text has blanks or line ends inside; if they belong to the key, store it by hand"
	case len(key) < rule.least || len(key) > rule.most || !rule.chars.MatchString(key):
		reason = rule.says
	}
	if reason != "" {
		key = ""
	}
	return key, cut, reason
}

// place is a field where a key can be.
type place struct {
	n    *node
	from string
}

// key reads the key of a tunnel from the first place that has a usable one. A tunnel without a key
// is noted, with how to get it.
func (r *Result) key(d document, at *node, subject, cloud, how string, places ...place) (v Value[Secret]) {
	why := "is not in the file"
	for _, p := range places {
		key, cut, reason := usableKey(cloud, p.n.text)
		switch {
		case key != "":
			if cut {
				r.note(d, p.n, "%s: blanks, line ends or a byte order mark around its key (%s) were cut off", subject, p.from)
			}
			return keyFrom(key, p.from)
		case strings.TrimSpace(p.n.text) == sensitiveValue:
			why, at = "is not in "+p.from+", which terraform hides", p.n
			how = "give terraform show -json, which has it"
		case reason != "":
			why = fmt.Sprintf("is not in %s: %s", p.from, reason)
			at = p.n
		}
	}
	r.note(d, at, "%s: its key %s; %s", subject, why, how)
	return v
}
