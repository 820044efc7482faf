package cloud

import (
	"regexp"
	"slices"
	"strings"
)

// Algorithms are the algorithms that a gateway accepts, in strongSwan's words (its documentation,
// "Cipher Suites").
type Algorithms struct {
	Encryption []string
	// for ciphers without authentication of their own; in IKE also the pseudo-random functions
	Integrity []string
	Groups    []string
	PFS       bool // a CHILD SA is always rekeyed with a key exchange group
}

// String lists them.
func (a Algorithms) String() string {
	s := strings.Join(a.Encryption, " ") + "; " + strings.Join(a.Integrity, " ") + "; " + strings.Join(a.Groups, " ")
	if a.PFS {
		s += "; PFS is required"
	}
	return s
}

var synonyms = map[string]string{
	"aes": "aes128", "sha": "sha1", "sha2": "sha256", "sha2_256": "sha256", "sha2_384": "sha384", "sha2_512": "sha512",
	"x25519": "curve25519", "x448": "curve448",
}

var (
	gcmBits   = regexp.MustCompile(`^(aes(?:128|192|256)gcm)(?:128)?$`)
	groupWord = regexp.MustCompile(`^(modp|ecp|curve|mlkem)`)
	moreKE    = regexp.MustCompile(`^ke[1-7]_`)
	hashWord  = regexp.MustCompile(`^(sha|md5|aesxcbc|aescmac)`)
)

// Refuse returns why the gateway accepts no combination of a valid proposal, and what it accepts
// instead; empty if it accepts one.
func (a Algorithms) Refuse(proposal string, esp bool) (rule, remedy string) {
	kinds := map[string][]string{}
	for _, w := range strings.Split(proposal, "-") {
		if s, ok := synonyms[w]; ok {
			w = s
		}
		if m := gcmBits.FindStringSubmatch(w); m != nil {
			w = m[1] + "16"
		}
		kind := "cipher"
		switch prf, isPRF := strings.CutPrefix(w, "prf"); {
		case w == "esn" || w == "noesn":
			continue
		case isPRF:
			kind, w = "pseudo-random function", prf
		case moreKE.MatchString(w):
			kind = "additional key exchange"
		case groupWord.MatchString(w):
			kind = "group"
		case hashWord.MatchString(w):
			kind = "integrity algorithm"
		}
		kinds[kind] = append(kinds[kind], w)
	}
	for _, k := range []struct {
		kind  string
		takes []string
	}{
		{"cipher", a.Encryption},
		{"integrity algorithm", a.Integrity},
		{"pseudo-random function", a.Integrity},
		{"group", a.Groups},
		{"additional key exchange", nil},
	} {
		given := kinds[k.kind]
		accepted := func(w string) bool { return slices.Contains(k.takes, w) || strings.HasSuffix(w, "_none") }
		if len(given) > 0 && !slices.ContainsFunc(given, accepted) {
			if len(k.takes) == 0 {
				return "takes no " + k.kind, "leave " + strings.Join(given, ", ") + " out"
			}
			return "takes no " + k.kind + " " + strings.Join(given, " or "), "choose from " + strings.Join(k.takes, ", ")
		}
	}
	if esp && a.PFS && len(kinds["group"]) == 0 {
		return "renews a CHILD SA only with a key exchange group (PFS)", "add one of " + strings.Join(a.Groups, ", ")
	}
	return "", ""
}
