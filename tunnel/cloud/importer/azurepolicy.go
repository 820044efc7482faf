package importer

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

var (
	azureCiphers = map[string]string{"gcmaes256": "aes256gcm16", "gcmaes192": "aes192gcm16", "gcmaes128": "aes128gcm16", "aes256": "aes256", "aes192": "aes192", "aes128": "aes128", "des3": "3des"}
	azureHashes  = map[string]string{"sha384": "sha384", "sha256": "sha256", "sha1": "sha1", "md5": "md5"}
	azureGroups  = map[string]string{
		"dhgroup24": "modp2048s256", "ecp384": "ecp384", "ecp256": "ecp256", "dhgroup14": "modp2048", "dhgroup2048": "modp2048", "dhgroup2": "modp1024", "dhgroup1": "modp768",
		"pfs24": "modp2048s256", "pfs2048": "modp2048", "pfs14": "modp2048", "pfs2": "modp1024", "pfs1": "modp768",
	}
)

// azureBasic reports whether a gateway has the SKU that cannot have custom policies.
func azureBasic(g document) bool { return strings.EqualFold(g.string("sku", "name"), "Basic") }

// azurePolicy turns a custom policy into proposals; without one, Azure has its default policy.
func (r *Result) azurePolicy(c, g document, name string, instance int, t *Tunnel) {
	p := preset(t.Cloud)
	policies := c.get("ipsecPolicies").items()
	if len(policies) == 0 {
		const from = "the connection has no custom policy"
		t.IKE, t.ESP = Value[[]string]{[]string{"aes256-sha256-modp1024"}, from}, Value[[]string]{[]string{"aes256gcm16"}, from}
		if instance == 0 && !azureBasic(g) {
			r.note(c, c.node, "%s: has the default policy, which is weak (group 2, no PFS); add a custom one as isthmus cloud show %s says, and leave the proposals out", name, t.Cloud)
		}
		return
	}
	q := policies[0]
	word := func(words map[string]string, field string) string {
		text := q.string(field)
		w, ok := words[strings.ToLower(text)]
		if !ok && instance == 0 {
			r.note(c, q, "%s: ipsecPolicies/%s %q is not known here", name, field, short(text))
		}
		return w
	}
	cipher, hash, group := word(azureCiphers, "ikeEncryption"), word(azureHashes, "ikeIntegrity"), word(azureGroups, "dhGroup")
	if cipher != "" && hash != "" && group != "" {
		if strings.Contains(cipher, "gcm") {
			hash = "prf" + hash
		}
		t.IKE = differs(cipher+"-"+hash+"-"+group, p.IKEProposals.Is, "connection/ipsecPolicies")
	}
	if cipher = word(azureCiphers, "ipsecEncryption"); cipher != "" {
		parts := []string{cipher}
		if !strings.Contains(cipher, "gcm") {
			parts = append(parts, word(azureHashes, "ipsecIntegrity"))
		}
		if pfs := q.string("pfsGroup"); !strings.EqualFold(pfs, "None") && pfs != "" {
			parts = append(parts, word(azureGroups, "pfsGroup"))
		}
		if !slices.Contains(parts, "") {
			t.ESP = differs(strings.Join(parts, "-"), p.ESPProposals.Is, "connection/ipsecPolicies")
		}
	}
	t.ChildRekey = r.earlier(c, q, r.seconds(c, q.get("saLifeTimeSeconds"), "ipsecPolicies/saLifeTimeSeconds"), p.ChildRekey.Is, 5*time.Minute)
	t.RekeyBytes = r.azureBytes(c, q.get("saDataSizeKilobytes"), "ipsecPolicies/saDataSizeKilobytes", p.ChildRekeyBytes.Is)
}

// differs returns a proposal if it is not the preset's.
func differs(proposal string, usual []string, from string) (v Value[[]string]) {
	if !slices.Equal(usual, []string{proposal}) {
		return Value[[]string]{[]string{proposal}, from}
	}
	return v
}

// azureBytes returns a rekey limit in bytes that is an eighth below the gateway's, if the preset's
// is not.
func (r *Result) azureBytes(d document, n *node, what string, preset uint64) (v Value[uint64]) {
	text := n.string()
	if text == "" {
		return v
	}
	kb, err := strconv.ParseUint(text, 10, 32)
	if err != nil || kb < 1200 {
		r.note(d, n, "%s: %q is not a number of kilobytes that this node can renew before", what, short(text))
		return v
	}
	if ours := kb * 1000 / 8 * 7; ours < preset*7/8 {
		return Value[uint64]{ours, fmt.Sprintf("before the gateway's %d KB, %s", kb, what)}
	}
	return v
}
