package fib

import (
	"cmp"
	"fmt"
	"net/netip"
)

// Domain is a routing domain, by the number of its table in the kernel (RTA_TABLE). Zero is the
// main table. TableMain itself is not a valid Domain: one table must not have two keys.
type Domain uint32

// Transit is the domain of default routes that are for forwarded packets alone. Routing rules send
// those packets there, when the main table has nothing but a default route for them.
const Transit Domain = 0x4954

// DomainOf returns the domain of a table.
func DomainOf(table uint32) Domain {
	if table == TableMain {
		return 0
	}
	return Domain(table)
}

// Table returns the number of the domain's table.
func (d Domain) Table() uint32 {
	if d == 0 {
		return TableMain
	}
	return uint32(d)
}

// Key identifies a route: its domain and its prefix.
type Key struct {
	Domain Domain
	Prefix netip.Prefix
}

// Main returns the key of a prefix in the main table.
func Main(p netip.Prefix) Key { return Key{Prefix: p} }

// Compare orders keys by domain, then IPv4 before IPv6, then by address, a shorter prefix first.
func (k Key) Compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Domain, o.Domain), k.Prefix.Compare(o.Prefix))
}

// String returns the prefix, with the table unless that is the main one.
func (k Key) String() string {
	if k.Domain == 0 {
		return k.Prefix.String()
	}
	return fmt.Sprintf("%v in table %d", k.Prefix, k.Domain)
}

// Masked returns the key without bits behind the prefix's length.
func (k Key) Masked() Key { return Key{k.Domain, k.Prefix.Masked()} }
