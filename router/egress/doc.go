// Package egress defines the configuration of what isthmus does with traffic toward the Internet
// besides translating it: which addresses are probed, which domain names are resolved, when a node
// takes over the addresses of its pair, and what is logged. It does no I/O; the packages below it
// act on it.
package egress
