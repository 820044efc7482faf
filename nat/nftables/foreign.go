package nftables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/isthmus-net/isthmus/router/netlink"
	"golang.org/x/sys/unix"
)

// harmless lists expressions that only match, count or drop a packet. Any other may change its
// addresses, its mark, its conntrack entry, or where it is sent.
var harmless = strings.Fields("bitwise byteorder cmp connlimit counter exthdr fib hash immediate last limit log lookup match meta numgen objref osf payload quota range reject rt socket xfrm ct dynset")

// writing lists the attributes with which an expression writes instead of reads
// (linux/netfilter/nf_tables.h).
var writing = map[string]uint16{
	"payload": 5, // NFTA_PAYLOAD_SREG
	"meta":    3, // NFTA_META_SREG
	"ct":      4, // NFTA_CT_SREG
	"exthdr":  7, // NFTA_EXTHDR_SREG
}

// legacyTables lists the files with the tables of legacy iptables, whose rules nftables does not
// show.
var legacyTables = []string{"ip_tables_names", "ip6_tables_names", "arp_tables_names"}

// Foreign lists the rules outside our tables that may change packets, of all families and hooks,
// and tables that cannot be read. Rules that only match, count or drop are left out. See
// nat.Prover.
func (d *Driver) Foreign(ctx context.Context) (found []string, err error) {
	g, err := openGeneration(d.options.NetNS)
	if err != nil {
		return nil, err
	}
	defer unix.Close(g.fd)
	// without CAP_NET_ADMIN the default stays
	_ = unix.SetsockoptInt(g.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
	rules, err := dump(ctx, g, unix.NFT_MSG_GETRULE, judge)
	if err != nil {
		return nil, fmt.Errorf("reading the rules of others: %w", err)
	}
	tables, err := dump(ctx, g, unix.NFT_MSG_GETFLOWTABLE, offloads)
	if err != nil {
		return nil, fmt.Errorf("reading the flowtables of others: %w", err)
	}
	found = slices.Concat(rules, tables)
	if d.options.NetNS == 0 { // the files are of the process's own network namespace
		for _, name := range legacyTables {
			// A kernel without iptables lacks the file.
			if tables, err := os.ReadFile("/proc/thread-self/net/" + name); err == nil && len(bytes.TrimSpace(tables)) > 0 {
				found = append(found, fmt.Sprintf("tables of iptables-legacy (%s: %s), whose rules cannot be read", name, strings.Join(strings.Fields(string(tables)), ", ")))
			}
		}
	}
	slices.Sort(found)
	return found, nil
}

// dumps bounds the attempts of a dump that transactions interrupt (NLM_F_DUMP_INTR).
const dumps = 20

// dump requests all objects of a kind, and returns each text once that judge finds for the family
// and the attributes of one. A dump that a transaction interrupted may lack objects that were there
// all the time, so it is repeated.
func dump(ctx context.Context, g *generation, kind uint16, judge func(family byte, attrs []byte) string) ([]string, error) {
	buffer := make([]byte, 1<<17)
	for range dumps {
		if err := g.send(kind, unix.NLM_F_DUMP, unix.NFPROTO_UNSPEC); err != nil {
			return nil, err
		}
		var found []string
		answer := netlink.Answer{Sequence: g.sequence}
		for !answer.Ended {
			n, err := g.receive(buffer)
			if err = errors.Join(err, ctx.Err()); err != nil {
				return nil, err
			}
			ok := answer.Read(buffer[:n], func(m netlink.Message) {
				if len(m.Body) < 4 {
					return
				}
				if what := judge(m.Body[0], m.Body[4:]); what != "" && !slices.Contains(found, what) {
					found = append(found, what)
				}
			})
			if !ok {
				return nil, errTruncated
			}
		}
		if errno := answer.End.Errno(); errno != 0 {
			return nil, errno
		}
		if !answer.Interrupted {
			return found, nil
		}
	}
	return nil, fmt.Errorf("interrupted %d times by changes", dumps)
}

// judge returns in which table and chain a rule is and what it may do, or an empty text when it is
// ours or harmless.
func judge(family byte, attrs []byte) string {
	var table, chain string
	var expressions []byte
	for kind, value := range netlink.Attributes(attrs) {
		switch kind {
		case unix.NFTA_RULE_TABLE:
			table = netlink.Text(value)
		case unix.NFTA_RULE_CHAIN:
			chain = netlink.Text(value)
		case unix.NFTA_RULE_EXPRESSIONS:
			expressions = value
		}
	}
	if family == unix.NFPROTO_INET && (table == tableName || table == tableName+"-esp") {
		return ""
	}
	var does []string
	for _, element := range netlink.Attributes(expressions) {
		var name string
		var data []byte
		for kind, value := range netlink.Attributes(element) {
			switch kind {
			case unix.NFTA_EXPR_NAME:
				name = netlink.Text(value)
			case unix.NFTA_EXPR_DATA:
				data = value
			}
		}
		bad := !slices.Contains(harmless, name)
		if attribute, ok := writing[name]; ok {
			for kind := range netlink.Attributes(data) {
				bad = bad || kind == attribute
			}
		}
		if name == "target" { // of iptables-nft
			const nameAttribute = 1 // NFTA_TARGET_NAME
			for kind, value := range netlink.Attributes(data) {
				if kind == nameAttribute {
					name = netlink.Text(value)
					bad = !slices.Contains([]string{"ACCEPT", "DROP", "RETURN", "REJECT", "LOG", "NFLOG"}, name)
				}
			}
		}
		if bad && !slices.Contains(does, name) {
			does = append(does, name)
		}
	}
	if len(does) == 0 {
		return ""
	}
	return fmt.Sprintf("a rule in chain %s of table %s %s, which may change packets (%s)", chain, familyNames[family], table, strings.Join(does, ", "))
}

// offloads describes a flowtable. isthmus has none, and a flow stays in a flowtable after the rule
// that added it is gone.
func offloads(family byte, attrs []byte) string {
	const tableAttribute, nameAttribute = 1, 2 // NFTA_FLOWTABLE_TABLE, NFTA_FLOWTABLE_NAME
	var table, name string
	for kind, value := range netlink.Attributes(attrs) {
		switch kind {
		case tableAttribute:
			table = netlink.Text(value)
		case nameAttribute:
			name = netlink.Text(value)
		}
	}
	return fmt.Sprintf("flowtable %s of table %s %s, whose flows bypass the rules", name, familyNames[family], table)
}

var familyNames = map[byte]string{unix.NFPROTO_INET: "inet", unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6", unix.NFPROTO_ARP: "arp", unix.NFPROTO_BRIDGE: "bridge", unix.NFPROTO_NETDEV: "netdev"}
