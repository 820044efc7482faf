package lab

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
)

// Pair is a private address and the public one that it is translated to outside.
type Pair struct{ Private, Public netip.Addr }

// OneToOne makes the node a cloud's 1:1 NAT between its interface wan and the rest: addresses are
// rewritten in both directions without any connection state, so that both sides may send first. An
// address without a pair passes unchanged: a leaked inside source stays visible.
func (n *Node) OneToOne(ctx context.Context, wan string, pairs ...Pair) error {
	var in, out []string
	for _, p := range pairs {
		in = append(in, fmt.Sprintf("%s : %s", p.Public, p.Private))
		out = append(out, fmt.Sprintf("%s : %s", p.Private, p.Public))
	}
	rules := fmt.Sprintf(`table ip onetoone {
	map in { type ipv4_addr : ipv4_addr; elements = { %s }; }
	map out { type ipv4_addr : ipv4_addr; elements = { %s }; }
	chain pre { type filter hook prerouting priority raw; iifname "%s" ip daddr set ip daddr map @in; }
	chain post { type filter hook postrouting priority srcnat; oifname "%s" ip saddr set ip saddr map @out; }
}`, strings.Join(in, ", "), strings.Join(out, ", "), wan, wan)
	if _, err := n.ExecInput(ctx, rules, "nft", "-f", "-"); err != nil {
		return fmt.Errorf("setting up 1:1 NAT: %w", err)
	}
	return nil
}
