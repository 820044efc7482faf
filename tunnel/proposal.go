package tunnel

import (
	"regexp"
	"strconv"
	"strings"
)

// The words of strongSwan's proposals that charon 6.0 supports and that IKEv2 can use (its
// documentation, "Cipher Suites"). Each has the overhead that it adds to a packet.
var (
	aeadWord      = regexp.MustCompile(`^(?:aes(?:128|192|256)(?:gcm|ccm)(8|12|16|64|96|128)?|chacha20poly1305)$`)
	cipherWord    = regexp.MustCompile(`^(?:aes(?:128|192|256)?(?:ctr)?|camellia(?:128|192|256)|3des)$`)
	integrityWord = regexp.MustCompile(`^(?:sha1|sha|sha2|sha256|sha2_256|sha384|sha2_384|sha512|sha2_512|md5|aesxcbc|aescmac)$`)
	prfWord       = regexp.MustCompile(`^prf(?:sha1|sha256|sha384|sha512|md5|aesxcbc|aescmac)$`)
	groupWord     = regexp.MustCompile(`^(?:modp(?:768|1024|1536|2048|3072|4096|6144|8192|1024s160|2048s224|2048s256)|ecp(?:192|224|256|384|521)(?:bp)?|curve25519|x25519|curve448|x448|(?:ke[1-7]_)?(?:mlkem512|mlkem768|mlkem1024|none))$`)
	esnWord       = regexp.MustCompile(`^(?:esn|noesn)$`)
)

// UnknownWord returns the first word of a proposal that charon does not support or that is
// misplaced, with the reason, or the whole proposal with what is missing. Both are empty if the
// proposal is valid.
func UnknownWord(proposal string, esp bool) (word, why string) {
	var aead, cipher, integrity, prf, group bool
	for _, w := range strings.Split(proposal, "-") {
		switch {
		case aeadWord.MatchString(w):
			aead = true
		case cipherWord.MatchString(w):
			cipher = true
		case integrityWord.MatchString(w):
			integrity = true
		case prfWord.MatchString(w) && !esp:
			prf = true
		case prfWord.MatchString(w):
			return w, "is for IKE only"
		case groupWord.MatchString(w):
			group = true
		case esnWord.MatchString(w) && esp:
		default:
			return w, "is not a known algorithm"
		}
	}
	switch {
	case !aead && !cipher:
		return proposal, "names no cipher"
	case aead && cipher:
		return proposal, "mixes ciphers with and without authentication of their own, which need a proposal each"
	case cipher && !integrity:
		return proposal, "names no integrity algorithm"
	case aead && integrity && esp:
		return proposal, "names an integrity algorithm together with a cipher that has its own"
	case !esp && aead && !prf && !integrity:
		return proposal, "names no pseudo-random function, such as prfsha384"
	case !esp && !group:
		return proposal, "names no key exchange group, such as ecp384"
	}
	return "", ""
}

// espOverhead returns the maximum overhead of ESP with UDP encapsulation inside the outer IP header
// (RFC 4303, RFC 3948), and the alignment of the ciphertext: 8 bytes of UDP, 8 of SPI and sequence
// number, and 2 of pad length and next header.
func espOverhead(proposal string) (bytes, align int) {
	const headers, trailer = 8 + 8, 2
	iv, icv := 8, 0
	align = 4
	for _, w := range strings.Split(proposal, "-") {
		switch m := aeadWord.FindStringSubmatch(w); {
		case m != nil:
			icv = 16
			if n, err := strconv.Atoi(m[1]); err == nil {
				if n > 16 { // given in bits
					n /= 8
				}
				icv = n
			}
		case w == "3des":
			iv, align = 8, 8
		case strings.HasSuffix(w, "ctr"):
		case cipherWord.MatchString(w):
			iv, align = 16, 16
		case integrityWord.MatchString(w):
			switch {
			case strings.HasSuffix(w, "512"):
				icv = 32
			case strings.HasSuffix(w, "384"):
				icv = 24
			case strings.HasSuffix(w, "256"), w == "sha2":
				icv = 16
			default:
				icv = 12
			}
		}
	}
	return headers + iv + icv + trailer, align
}
