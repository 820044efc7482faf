// Package egress holds the words for what isthmus does with traffic toward the Internet besides translating it: which
// addresses are probed, which domain names are resolved, when a node takes over the addresses of its pair, and what is
// logged. The package is configuration alone, without I/O; the packages below it carry it out.
package egress
