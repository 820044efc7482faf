package explain

import (
	"regexp"
	"slices"
	"strings"
)

// transforms maps charon's names of algorithms to the keywords of a proposal.
var transforms = []struct {
	pattern *regexp.Regexp
	word    string
	kind    int
}{
	{regexp.MustCompile(`^AES_GCM_(8|12|16)_(128|192|256)$`), "aes${2}gcm${1}", cipher},
	{regexp.MustCompile(`^AES_CCM_(8|12|16)_(128|192|256)$`), "aes${2}ccm${1}", cipher},
	{regexp.MustCompile(`^AES_CBC_(128|192|256)$`), "aes$1", cipher},
	{regexp.MustCompile(`^AES_CTR_(128|192|256)$`), "aes${1}ctr", cipher},
	{regexp.MustCompile(`^CHACHA20_POLY1305(?:_256)?$`), "chacha20poly1305", cipher},
	{regexp.MustCompile(`^3DES_CBC$`), "3des", cipher},
	{regexp.MustCompile(`^HMAC_SHA1_96$`), "sha1", integrity},
	{regexp.MustCompile(`^HMAC_SHA2_(256|384|512)_(?:128|192|256)$`), "sha$1", integrity},
	{regexp.MustCompile(`^HMAC_MD5_96$`), "md5", integrity},
	{regexp.MustCompile(`^AES_(XCBC|CMAC)_96$`), "aes$1", integrity},
	{regexp.MustCompile(`^PRF_HMAC_SHA2_(256|384|512)$`), "prfsha$1", prf},
	{regexp.MustCompile(`^PRF_HMAC_(SHA1|MD5)$`), "prf$1", prf},
	{regexp.MustCompile(`^PRF_AES128_(XCBC|CMAC)$`), "prfaes$1", prf},
	{regexp.MustCompile(`^MODP_(\d+)$`), "modp$1", keyExchange},
	{regexp.MustCompile(`^MODP_(\d+)_(\d+)$`), "modp${1}s$2", keyExchange},
	{regexp.MustCompile(`^ECP_(\d+)$`), "ecp$1", keyExchange},
	{regexp.MustCompile(`^ECP_(\d+)_BP$`), "ecp${1}bp", keyExchange},
	{regexp.MustCompile(`^ML_KEM_(\d+)$`), "mlkem$1", keyExchange},
	// charon 6.0 begins additional key exchanges with their number (RFC 9370).
	{regexp.MustCompile(`^KE([1-7])_ML_KEM_(\d+)$`), "ke${1}_mlkem$2", additionalKE},
	{regexp.MustCompile(`^KE([1-7])_NONE$`), "", sequence},
	{regexp.MustCompile(`^CURVE_(25519|448)$`), "curve$1", keyExchange},
	{regexp.MustCompile(`^EXT_SEQ$`), "esn", sequence},
	{regexp.MustCompile(`^NO_EXT_SEQ$`), "", sequence},
}

const (
	cipher = iota
	integrity
	prf
	keyExchange
	additionalKE
	sequence
	kinds
)

// notation turns an offer as charon logs it, such as
// "AES_CBC_128/HMAC_SHA1_96/PRF_HMAC_SHA1/MODP_2048", into a proposal that matches it,
// "aes128-sha1-modp2048": of its first alternative with known algorithms, the first of each kind.
func notation(offer string) (string, bool) {
	for _, one := range strings.Split(offer, ", ") {
		if p, ok := notationOf(one); ok {
			return p, true
		}
	}
	return "", false
}

func notationOf(offer string) (string, bool) {
	var words [kinds]string
	for _, name := range strings.Split(offer, "/") {
		word, kind, known := "", 0, false
		for _, t := range transforms {
			if m := t.pattern.FindStringSubmatchIndex(name); m != nil {
				word, kind, known = strings.ToLower(string(t.pattern.ExpandString(nil, t.word, name, m))), t.kind, true
				break
			}
		}
		switch {
		case !known && additionalWord.MatchString(strings.ToLower(name)):
			return "", false
		case !known:
		case words[kind] == "":
			words[kind] = word
		case kind == additionalKE && !strings.Contains(words[kind], word[:len("ke1_")]):
			words[kind] += "-" + word
		}
	}
	aead := strings.Contains(words[cipher], "gcm") || strings.Contains(words[cipher], "ccm") || strings.HasPrefix(words[cipher], "chacha")
	if words[cipher] == "" || !aead && words[integrity] == "" {
		return "", false
	}
	if words[prf] != "" && words[keyExchange] == "" {
		return "", false // an IKE offer with an unknown group
	}
	if words[prf] == "prf"+words[integrity] {
		words[prf] = "" // it follows from the integrity algorithm
	}
	var out []string
	for _, w := range words {
		if w != "" {
			out = append(out, w)
		}
	}
	return strings.Join(out, "-"), true
}

// additionalWord is the beginning of an additional key exchange in a proposal.
var additionalWord = regexp.MustCompile(`^ke[1-7]_`)

// additional reports whether a proposal has additional key exchanges.
func additional(proposal string) bool {
	return slices.ContainsFunc(strings.Split(proposal, "-"), additionalWord.MatchString)
}

// classicalOnly returns the proposals without additional key exchanges if all have some.
func classicalOnly(proposals []string) (out []string) {
	for _, p := range proposals {
		if !additional(p) {
			return nil
		}
		words := slices.DeleteFunc(strings.Split(p, "-"), additionalWord.MatchString)
		if one := strings.Join(words, "-"); !slices.Contains(out, one) {
			out = append(out, one)
		}
	}
	return out
}

var groupWord = regexp.MustCompile(`^(?:ke[1-7]_|modp|ecp|curve|x25519|x448|mlkem)`)

// group returns the first group in the proposals; empty: they have none.
func group(proposals []string) string {
	for _, p := range proposals {
		for _, w := range strings.Split(p, "-") {
			if groupWord.MatchString(w) {
				return w
			}
		}
	}
	return ""
}

// ungrouped returns a proposal without its groups.
func ungrouped(proposal string) string {
	var out []string
	for _, w := range strings.Split(proposal, "-") {
		if !groupWord.MatchString(w) {
			out = append(out, w)
		}
	}
	return strings.Join(out, "-")
}

// weak reports whether a proposal has an algorithm that is broken or about to be (RFC 8247,
// section 2: SHOULD NOT or MUST NOT).
func weak(proposal string) bool {
	for _, w := range strings.Split(proposal, "-") {
		switch w {
		case "3des", "md5", "prfmd5", "modp768", "modp1024", "modp1536", "modp1024s160", "modp2048s224", "modp2048s256":
			return true
		}
	}
	return false
}
