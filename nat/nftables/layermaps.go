package nftables

import (
	"fmt"
	"hash/fnv"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
)

// layerMap returns the name of one of the maps of a layer.
func layerMap(view string, layer, part, parts int, ipv6 bool) string {
	if parts > 1 {
		return fmt.Sprintf("%s-%d.%d-%s", view, layer+1, part+1, familyOf(ipv6).suffix)
	}
	return fmt.Sprintf("%s-%d-%s", view, layer+1, familyOf(ipv6).suffix)
}

// mapSize is the average number of elements per map above which a layer gets twice as many maps.
const mapSize = 1536

// parts returns into how many maps, a power of two, a layer with this number of elements is
// divided. To remove an element, the kernel (6.18, nft_pipapo_remove) walks all elements before
// it, at about 5 us each; to add one, it copies the map. One more lookup costs a new flow about
// 0.1 us.
func parts(elements int) int {
	n := 1
	for n*mapSize < elements {
		n *= 2
	}
	return n
}

// part returns the index of the map of a layer that holds a key.
func part(key string, parts int) int {
	h := fnv.New32a()
	h.Write([]byte(key))
	// the upper bits: the lower ones depend on too few bytes of the key
	return int(uint64(h.Sum32()) * uint64(parts) >> 32)
}

// mapFor returns the name of the map that holds a rule.
func (r *ruleset) mapFor(view string, layer int, rule *nat.Rule, key string) string {
	ipv6 := rule.Source.Addr().Is6()
	n := 1
	if parts := r.layers[view][b2i(ipv6)]; layer < len(parts) {
		n = parts[layer]
	}
	return layerMap(view, layer, part(key, n), n, ipv6)
}

// ask adds the chains that look a packet up in a view, and returns the jump to them. A packet that
// no layer matches returns, and continues after the jump.
func (r *ruleset) ask(view string, f family) []expr.Any {
	name := view + "-" + f.suffix
	port := register(2*f.size + 4)
	withPorts := func(l4 byte) []expr.Any {
		return exprs(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, l4), verdict(expr.VerdictGoto, name+"-ports"))
	}
	// Packets of other protocols have no port. The bytes in its place must not affect the lookup,
	// and may not exist.
	others := r.lookups(view, f, &expr.Immediate{Register: port, Data: []byte{0, 0}})
	r.chains[name] = &chain{rules: append([][]expr.Any{withPorts(unix.IPPROTO_TCP), withPorts(unix.IPPROTO_UDP)}, others...)}
	r.chains[name+"-ports"] = &chain{rules: r.lookups(view, f, transport(2, 2, port))}
	return exprs(verdict(expr.VerdictJump, name))
}

// lookups returns one rule for each map of the layers of a view.
func (r *ruleset) lookups(view string, f family, port expr.Any) (rules [][]expr.Any) {
	for layer, parts := range r.layers[view][b2i(f.ipv6)] {
		for part := range parts {
			rules = append(rules, exprs(
				network(f.source, f.size, register(0)),
				network(f.dst, f.size, register(f.size)),
				meta(expr.MetaKeyL4PROTO, register(2*f.size)),
				port,
				&expr.Lookup{SourceRegister: register(0), IsDestRegSet: true, SetName: layerMap(view, layer, part, parts, f.ipv6)},
			))
		}
	}
	return rules
}
