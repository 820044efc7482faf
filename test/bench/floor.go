package main

// The fewest possible rules, written by hand for one attachment: they show how much of isthmus's
// cost is the kernel's price for the guarantees, and how much is ours.

// hooks are the three base chains at which isthmus checks a packet, without any check.
const hooks = `table inet floor {
chain sources {
type filter hook prerouting priority -290
}
chain forward {
type filter hook forward priority -150
}
chain guard {
type filter hook postrouting priority 300
}
}
`

// sidesAlone has there, for one attachment, the checks of isthmus: the interface, the source, and
// whether leaving packets have a source of the pool.
const sidesAlone = `table inet floor {
map from {
typeof meta iif : verdict
size 64
elements = { tun0 : goto tun, up0 : accept, lo : accept }
}
set attached {
typeof meta iif
size 64
elements = { tun0 }
}
chain tun {
meta nfproto ipv6 goto tun6
ip saddr { 10.0.0.0/8, 172.31.0.0/30 } accept
drop
}
chain tun6 {
ip6 saddr 2001:db8:a::/48 accept
meta l4proto ipv6-icmp accept
drop
}
chain sources {
type filter hook prerouting priority -290
meta iif vmap @from
}
chain clamp {
meta l4proto != tcp accept
tcp flags & (syn | rst) != syn accept
accept
}
chain forward {
type filter hook forward priority -150
meta oif up0 meta iif != up0 goto clamp
meta oif @attached meta iif up0 ct state established goto clamp
drop
}
chain guard6 {
ip6 saddr 2001:db8:9::11 accept
meta l4proto ipv6-icmp accept
drop
}
chain guard {
type filter hook postrouting priority 300
meta oif != up0 accept
meta nfproto ipv6 goto guard6
ip saddr { 192.0.2.1, 192.0.2.11 } accept
drop
}
}
`

// policyAlone chooses the address of a new flow by one policy, in a map of prefixes and ports, by
// the hash of its source, and counts the ports that are in use.
const policyAlone = `table inet linear {
map policies {
type ipv4_addr . ipv4_addr . inet_proto . inet_service : verdict
flags interval
elements = { 10.0.0.0/8 . 0.0.0.0/0 . 0-255 . 0-65535 : goto pool }
}
set begun {
type ipv4_addr . ipv4_addr . inet_proto . inet_service
flags dynamic,timeout
timeout 1m
size 65536
}
chain pool {
update @begun { ip saddr . ip daddr . meta l4proto . tcp dport counter }
snat ip to jhash ip saddr mod 4 map { 0 : 192.0.2.11, 1 : 192.0.2.11, 2 : 192.0.2.11, 3 : 192.0.2.11 }
}
chain post {
type nat hook postrouting priority srcnat
oifname != up0 accept
meta nfproto ipv4 ip saddr . ip daddr . meta l4proto . tcp dport vmap @policies
}
}
`
