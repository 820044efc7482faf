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
	fd, err := openSocket(d.options.NetNS, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	// without CAP_NET_ADMIN the default stays
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
	patience := unix.NsecToTimeval(10e9)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience); err != nil {
		return nil, err
	}
	err = dump(ctx, fd, unix.NFT_MSG_GETRULE, func(family byte, attrs []byte) {
		if what := judge(family, attrs); what != "" && !slices.Contains(found, what) {
			found = append(found, what)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("reading the rules of others: %w", err)
	}
	err = dump(ctx, fd, unix.NFT_MSG_GETFLOWTABLE, func(family byte, attrs []byte) { found = append(found, offloads(family, attrs)) })
	if err != nil {
		return nil, fmt.Errorf("reading the flowtables of others: %w", err)
	}
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

// dump requests all objects of a kind, and calls each with the family and the attributes of every
// one.
func dump(ctx context.Context, fd int, kind uint16, each func(family byte, attrs []byte)) error {
	header := []byte{unix.NFPROTO_UNSPEC, 0, 0, 0} // nfgenmsg
	request := netlink.Request(unix.NFNL_SUBSYS_NFTABLES<<8|kind, unix.NLM_F_DUMP, 0, header)
	if err := unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buffer := make([]byte, 1<<17)
	for {
		n, _, err := unix.Recvfrom(fd, buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err = errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		for b := buffer[:n]; len(b) >= unix.SizeofNlMsghdr; {
			m, rest, ok := netlink.Next(b)
			if !ok {
				return errors.New("the message is truncated")
			}
			b = rest
			switch m.Kind {
			case unix.NLMSG_DONE:
				return nil
			case unix.NLMSG_ERROR:
				if errno := m.Errno(); errno != 0 {
					return errno
				}
			default:
				if len(m.Body) >= 4 {
					each(m.Body[0], m.Body[4:])
				}
			}
		}
	}
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
