package metrics

import (
	"cmp"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/report"
)

// seconds returns a time since the epoch.
func seconds(at *timestamppb.Timestamp) float64 {
	return float64(at.Seconds) + float64(at.Nanos)/1e9
}

var tunnelLabel = Label{Name: "tunnel", Help: "name of the tunnel in the document"}

// tunnelCounter returns the counter of a tunnel's interface.
func tunnelCounter(name, unit, help string, of func(*isthmusv1.TunnelStatus) uint64, panels ...Panel) *Metric {
	return &Metric{
		Name: name, Type: Counter, Unit: unit, Help: help, Labels: []Label{tunnelLabel}, Panels: panels,
		Trap: "It counts at the interface, so that it goes on across rekeys and restarts of the daemon. It is read once a second, and less often with thousands of tunnels.",
		read: func(v *view, emit func(float64, ...string)) {
			for _, t := range v.Tunnels {
				emit(float64(of(t)), t.Name)
			}
		},
	}
}

var tunnels = []*Metric{
	{
		Name: "isthmus_tunnel_state", Type: Gauge,
		Help:   "1 for the state that the tunnel is in, and 0 for every other state.",
		Trap:   "`unknown` is not `down`: no conclusion follows from it, as while charon does not answer. Count `up`, not the others.",
		Labels: []Label{tunnelLabel, {Name: "state", Help: quoted(report.TunnelStates()), Values: report.TunnelStates()}},
		read: func(v *view, emit func(float64, ...string)) {
			all := report.TunnelStates()
			for _, t := range v.Tunnels {
				states(all, t.State, emit, t.Name)
			}
		},
		Rules: []Rule{
			{
				Alert: "IsthmusTunnelDown", Expr: `max without (state) (isthmus_tunnel_state{state!~"up|disabled|unknown"}) == 1`, For: "1m", Severity: "critical",
				Summary:     "tunnel {{ $labels.tunnel }} of {{ $labels.instance }} does not work",
				Description: "The command says why the tunnel is not up, as far as the peer reveals it, and which line of the document to change. Its conditions are explained by `isthmus describe condition TYPE`.",
				See:         "isthmus describe tunnel {{ $labels.tunnel }}",
			},
			{
				Alert: "IsthmusTunnelUnknown", Expr: `isthmus_tunnel_state{state="unknown"} == 1`, For: "5m", Severity: "warning",
				Summary:     "the state of tunnel {{ $labels.tunnel }} of {{ $labels.instance }} is unknown",
				Description: "isthmusd cannot read the tunnel, most often because charon does not answer. The tunnel may work. Start charon (systemctl start strongswan).",
				See:         "isthmus describe condition CharonUnreachable",
			},
		},
		Panels: []Panel{
			{Title: "Tunnels by state", Kind: "timeseries", Help: "Number of tunnels in each state.", Queries: []Query{
				{`sum by (state) (isthmus_tunnel_state{job=~"$job",instance=~"$instance"})`, "{{state}}"},
			}},
			{Title: "Tunnels that are not up", Kind: "state-timeline", Help: "`isthmus describe tunnel NAME` says why.", Queries: []Query{
				{`isthmus_tunnel_state{job=~"$job",instance=~"$instance",state!="up"} == 1`, "{{instance}} {{tunnel}} {{state}}"},
			}},
		},
	},
	tunnelCounter("isthmus_tunnel_receive_bytes_total", "bytes", "Bytes of packets that came out of the tunnel, without its encapsulation.", (*isthmusv1.TunnelStatus).GetRxBytes,
		Panel{Title: "Traffic of tunnels", Kind: "timeseries", Unit: "Bps", Help: "The ten tunnels with the most traffic, by direction.", Queries: []Query{
			{`topk(10, rate(isthmus_tunnel_receive_bytes_total{job=~"$job",instance=~"$instance"}[5m]))`, "{{instance}} {{tunnel}} receive"},
			{`topk(10, rate(isthmus_tunnel_transmit_bytes_total{job=~"$job",instance=~"$instance"}[5m]))`, "{{instance}} {{tunnel}} transmit"},
		}}),
	tunnelCounter("isthmus_tunnel_transmit_bytes_total", "bytes", "Bytes of packets that went into the tunnel, without its encapsulation.", (*isthmusv1.TunnelStatus).GetTxBytes),
	tunnelCounter("isthmus_tunnel_receive_packets_total", "packets", "Packets that came out of the tunnel.", (*isthmusv1.TunnelStatus).GetRxPackets,
		Panel{Title: "Packets of tunnels", Kind: "timeseries", Unit: "pps", Help: "The ten tunnels with the most packets, by direction.", Queries: []Query{
			{`topk(10, rate(isthmus_tunnel_receive_packets_total{job=~"$job",instance=~"$instance"}[5m]))`, "{{instance}} {{tunnel}} receive"},
			{`topk(10, rate(isthmus_tunnel_transmit_packets_total{job=~"$job",instance=~"$instance"}[5m]))`, "{{instance}} {{tunnel}} transmit"},
		}}),
	tunnelCounter("isthmus_tunnel_transmit_packets_total", "packets", "Packets that went into the tunnel.", (*isthmusv1.TunnelStatus).GetTxPackets),
	{
		Name: "isthmus_tunnel_handshake_timestamp_seconds", Type: Gauge, Unit: "seconds",
		Help:   "Time at which the present keys of the tunnel were agreed, since the epoch.",
		Trap:   "It is a time and not an age. A tunnel without keys has no series.",
		Labels: []Label{tunnelLabel},
		read: func(v *view, emit func(float64, ...string)) {
			for _, t := range v.Tunnels {
				if t.Keyed != nil {
					emit(seconds(t.Keyed), t.Name)
				}
			}
		},
		Panels: []Panel{
			{Title: "Age of keys", Kind: "timeseries", Unit: "s", Help: "The ten oldest. WireGuard agrees on new keys every two minutes while there is traffic, IPsec as the document says.", Queries: []Query{
				{`topk(10, time() - isthmus_tunnel_handshake_timestamp_seconds{job=~"$job",instance=~"$instance"})`, "{{instance}} {{tunnel}}"},
			}},
		},
	},
	{
		Name: "isthmus_tunnel_ups_total", Type: Counter,
		Help:   "How often the tunnel came up since isthmusd started.",
		Trap:   "It begins with the daemon, although the tunnel may have been up before: use `increase`.",
		Labels: []Label{tunnelLabel},
		read: func(v *view, emit func(float64, ...string)) {
			for _, t := range v.Tunnels {
				emit(float64(t.TimesUp), t.Name)
			}
		},
		Rules: []Rule{{
			Alert: "IsthmusTunnelFlaps", Expr: "increase(isthmus_tunnel_ups_total[30m]) > 3", Severity: "warning",
			Summary:     "tunnel {{ $labels.tunnel }} of {{ $labels.instance }} goes down and up again and again",
			Description: "The command shows the last error. Look for loss toward the peer, for different lifetimes on both sides, and for a second device that uses the same peer.",
			See:         "isthmus describe tunnel {{ $labels.tunnel }}",
		}},
	},
}

var peerLabel = Label{Name: "peer", Help: "name of the peer in the document"}

// prefixSets are the sets of prefixes that are counted for a peer.
var prefixSets = []struct {
	name string
	of   func(*isthmusv1.PeerStatus) uint32
}{
	{"received", (*isthmusv1.PeerStatus).GetPrefixesReceived}, {"accepted", (*isthmusv1.PeerStatus).GetPrefixesAccepted},
	{"advertised", (*isthmusv1.PeerStatus).GetPrefixesAnnounced}, {"held_back", (*isthmusv1.PeerStatus).GetPrefixesHeldBack},
}

func prefixSetNames() (out []string) {
	for _, s := range prefixSets {
		out = append(out, s.name)
	}
	return out
}

var peers = []*Metric{
	{
		Name: "isthmus_bgp_peer_state", Type: Gauge,
		Help:   "1 for the state that the BGP session is in, and 0 for every other state.",
		Trap:   "The states are those of RFC 4271 and four of isthmus. A state has a label and not a number: compare it with `established`.",
		Labels: []Label{peerLabel, {Name: "state", Help: quoted(report.PeerStates()), Values: report.PeerStates()}},
		read: func(v *view, emit func(float64, ...string)) {
			all := report.PeerStates()
			for _, p := range v.Peers {
				states(all, p.State, emit, p.Name)
			}
		},
		Rules: []Rule{{
			Alert: "IsthmusPeerDown", Expr: `max without (state) (isthmus_bgp_peer_state{state!~"established|disabled"}) == 1`, For: "2m", Severity: "critical",
			Summary:     "the BGP session with {{ $labels.peer }} of {{ $labels.instance }} is not established",
			Description: "The command shows the last error. When the tunnel of the peer is down, begin there. A session in quarantine has a condition, and `isthmus reset peer` ends it.",
			See:         "isthmus describe peer {{ $labels.peer }}",
		}},
		Panels: []Panel{
			{Title: "Sessions by state", Kind: "timeseries", Help: "Number of BGP sessions in each state.", Queries: []Query{
				{`sum by (state) (isthmus_bgp_peer_state{job=~"$job",instance=~"$instance"})`, "{{state}}"},
			}},
			{Title: "Sessions that are not established", Kind: "state-timeline", Help: "`isthmus describe peer NAME` shows the last error.", Queries: []Query{
				{`isthmus_bgp_peer_state{job=~"$job",instance=~"$instance",state!="established"} == 1`, "{{instance}} {{peer}} {{state}}"},
			}},
		},
	},
	{
		Name: "isthmus_bgp_peer_ups_total", Type: Counter,
		Help:   "How often the BGP session was established since isthmusd started.",
		Labels: []Label{peerLabel},
		read: func(v *view, emit func(float64, ...string)) {
			for _, p := range v.Peers {
				emit(float64(p.TimesUp), p.Name)
			}
		},
		Rules: []Rule{{
			Alert: "IsthmusPeerFlaps", Expr: "increase(isthmus_bgp_peer_ups_total[30m]) > 3", Severity: "warning",
			Summary:     "the BGP session with {{ $labels.peer }} of {{ $labels.instance }} ends again and again",
			Description: "The command shows the last error. Compare the hold time with the loss of the tunnel, and see whether the peer sends more prefixes than `maxPrefixes`.",
			See:         "isthmus describe peer {{ $labels.peer }}",
		}},
	},
	{
		Name: "isthmus_bgp_prefixes", Type: Gauge,
		Help:   "Prefixes of the BGP session, by set.",
		Trap:   "`accepted` counts the prefixes for which a path of the peer is in use.",
		Labels: []Label{peerLabel, {Name: "set", Help: "`received` from the peer, `accepted` of these, `advertised` to the peer, `held_back` from it by export.maxPrefixes", Values: prefixSetNames()}},
		read: func(v *view, emit func(float64, ...string)) {
			for _, p := range v.Peers {
				for _, s := range prefixSets {
					emit(float64(s.of(p)), p.Name, s.name)
				}
			}
		},
		Rules: []Rule{{
			Alert: "IsthmusPrefixesHeldBack", Expr: `isthmus_bgp_prefixes{set="held_back"} > 0`, For: "5m", Severity: "warning",
			Summary:     "{{ $labels.instance }} does not announce all prefixes to {{ $labels.peer }}",
			Description: "There are more prefixes than export.maxPrefixes of the peer. Put aggregates into `announce`, or raise it to what the peer takes.",
			See:         "isthmus describe condition PrefixesHeldBack",
		}},
		Panels: []Panel{
			{Title: "Prefixes", Kind: "timeseries", Help: "By peer and set.", Queries: []Query{
				{`isthmus_bgp_prefixes{job=~"$job",instance=~"$instance"}`, "{{instance}} {{peer}} {{set}}"},
			}},
		},
	},
	{
		Name: "isthmus_bgp_prefix_limit", Type: Gauge,
		Help:   "Prefixes that the peer may send before its session ends (maxPrefixes).",
		Trap:   "A peer without a limit has no series.",
		Labels: []Label{peerLabel},
		read: func(v *view, emit func(float64, ...string)) {
			for _, p := range v.Peers {
				if limit, ok := v.Limits[p.Name]; ok {
					emit(float64(limit), p.Name)
				}
			}
		},
		Rules: []Rule{{
			Alert: "IsthmusPrefixLimitNear", Expr: `isthmus_bgp_prefixes{set="received"} / ignoring (set) isthmus_bgp_prefix_limit > 0.9`, For: "5m", Severity: "warning",
			Summary:     "{{ $labels.peer }} sends {{ $labels.instance }} nearly as many prefixes as it may",
			Description: "Above maxPrefixes the session ends. Have the peer send aggregates, or raise `maxPrefixes`.",
			See:         "isthmus describe peer {{ $labels.peer }}",
		}},
	},
}

var routes = []*Metric{
	{
		Name: "isthmus_fib_routes", Type: Gauge,
		Help: "Routes that isthmus owns, by family and whether the kernel has them as wanted.",
		Trap: "A route that is withheld because it would take an address of the node or its platform counts as not installed.",
		Labels: []Label{
			{Name: "family", Help: "`ipv4` or `ipv6`", Values: []string{"ipv4", "ipv6"}}, {Name: "installed", Help: "`true` or `false`", Values: []string{"true", "false"}},
		},
		read: func(v *view, emit func(float64, ...string)) {
			emit(float64(v.IPv4.Installed), "ipv4", "true")
			emit(float64(v.IPv4.Missing), "ipv4", "false")
			emit(float64(v.IPv6.Installed), "ipv6", "true")
			emit(float64(v.IPv6.Missing), "ipv6", "false")
		},
		Rules: []Rule{{
			Alert: "IsthmusRoutesMissing", Expr: `isthmus_fib_routes{installed="false"} > 0`, For: "5m", Severity: "warning",
			Summary:     "{{ $labels.instance }} has {{ $value }} routes that the kernel does not have",
			Description: "The list of routes shows which ones, and why a route is withheld.",
			See:         "isthmus describe condition Withheld",
		}},
		Panels: []Panel{
			{Title: "Routes", Kind: "timeseries", Help: "Routes that isthmus owns.", Queries: []Query{
				{`isthmus_fib_routes{job=~"$job",instance=~"$instance"}`, "{{instance}} {{family}} installed={{installed}}"},
			}},
		},
	},
}

var (
	policyLabel  = Label{Name: "policy", Help: "name of the policy in the document"}
	poolLabel    = Label{Name: "pool", Help: "name of the pool in the document"}
	addressLabel = Label{Name: "address", Help: "address of the pool in the document"}
)

func policyCounter(name, unit, help string, of func(*isthmusv1.PolicyStatus) uint64, panels ...Panel) *Metric {
	return &Metric{
		Name: name, Type: Counter, Unit: unit, Help: help, Labels: []Label{policyLabel}, Panels: panels,
		Trap: "The first packet of a flow is counted. It starts again from 0 when another process removes the rules.",
		read: func(v *view, emit func(float64, ...string)) {
			for _, p := range v.Policies {
				emit(float64(of(p)), p.Name)
			}
		},
	}
}

var egress = []*Metric{
	policyCounter("isthmus_nat_policy_flows_total", "", "Flows that the policy decided.", (*isthmusv1.PolicyStatus).GetFlows,
		Panel{Title: "New flows of policies", Kind: "timeseries", Unit: "cps", Help: "The ten policies with the most new flows.", Queries: []Query{
			{`topk(10, rate(isthmus_nat_policy_flows_total{job=~"$job",instance=~"$instance"}[$__rate_interval]))`, "{{instance}} {{policy}}"},
		}}),
	policyCounter("isthmus_nat_policy_bytes_total", "bytes", "Bytes of the first packets of the flows that the policy decided.", (*isthmusv1.PolicyStatus).GetBytes),
	{
		Name: "isthmus_nat_pool_addresses", Type: Gauge,
		Help:   "Addresses of the pool, by the result of their probes.",
		Trap:   "`unknown` and `unprobed` addresses are in use like `healthy` ones. When all are `down`, all stay in use.",
		Labels: []Label{poolLabel, {Name: "state", Help: quoted(report.AddressStates()), Values: report.AddressStates()}},
		read: func(v *view, emit func(float64, ...string)) {
			for _, p := range v.Pools {
				for _, s := range report.AddressStates() {
					n := 0
					for _, m := range p.Members {
						if m.Health == s {
							n++
						}
					}
					emit(float64(n), p.Name, s)
				}
			}
		},
		Rules: []Rule{{
			Alert: "IsthmusPoolDegraded", Expr: `sum without (state) (isthmus_nat_pool_addresses{state=~"down|returning"}) > 0`, For: "1m", Severity: "warning",
			Summary:     "pool {{ $labels.pool }} of {{ $labels.instance }} has {{ $value }} addresses that do not work",
			Description: "New flows avoid them unless none works. `isthmus describe pool` shows each probe with its last error.",
			See:         "isthmus describe condition PoolDegraded",
		}},
		Panels: []Panel{
			{Title: "Addresses of pools", Kind: "timeseries", Help: "By the result of their probes.", Queries: []Query{
				{`isthmus_nat_pool_addresses{job=~"$job",instance=~"$instance"} > 0`, "{{instance}} {{pool}} {{state}}"},
			}},
		},
	},
	{
		Name: "isthmus_nat_flows", Type: Gauge,
		Help:   "Flows that use the address of the pool, as last counted.",
		Trap:   "The connection table is counted at intervals that grow with its size.",
		Labels: []Label{poolLabel, addressLabel},
		read: func(v *view, emit func(float64, ...string)) {
			for _, a := range v.Ports.GetAddresses() {
				emit(float64(a.Flows), a.Pool, a.Address)
			}
		},
		Panels: []Panel{
			{Title: "Flows of addresses", Kind: "timeseries", Help: "Flows that use an address of a pool.", Queries: []Query{
				{`isthmus_nat_flows{job=~"$job",instance=~"$instance"}`, "{{instance}} {{pool}} {{address}}"},
			}},
		},
	},
	{
		Name: "isthmus_nat_ports_used_ratio", Type: Gauge, Unit: "ratio",
		Help:   "Share of the ports of the address that are in use toward its busiest destination, from 0 to 1.",
		Trap:   "Each destination, protocol and port has all ports of an address for itself: the sum over destinations means nothing. `isthmus get ports` names the destination.",
		Labels: []Label{poolLabel, addressLabel},
		read:   portsUsed,
		Rules: []Rule{{
			Alert: "IsthmusPortsLow", Expr: "isthmus_nat_ports_used_ratio > 0.8", For: "1m", Severity: "warning",
			Summary:     "address {{ $labels.address }} of pool {{ $labels.pool }} of {{ $labels.instance }} uses {{ $value | humanizePercentage }} of its ports toward one destination",
			Description: "When every address of the pool has none left, new flows to that destination are refused. Add an address to the pool, or spread the clients over more destinations; `isthmus get ports` names it.",
			See:         "isthmus describe condition PortsLow",
		}},
		Panels: []Panel{
			{Title: "Ports in use", Kind: "timeseries", Unit: "percentunit", Help: "Toward the busiest destination of each address.", Queries: []Query{
				{`isthmus_nat_ports_used_ratio{job=~"$job",instance=~"$instance"}`, "{{instance}} {{pool}} {{address}}"},
			}},
		},
	},
	table("isthmus_conntrack_entries", Gauge, "Entries of the kernel's connection table.", (*isthmusv1.ConnectionTable).GetEntries,
		Panel{Title: "Connection table", Kind: "timeseries", Help: "Entries and their limit.", Queries: []Query{
			{`isthmus_conntrack_entries{job=~"$job",instance=~"$instance"}`, "{{instance}} entries"},
			{`isthmus_conntrack_limit{job=~"$job",instance=~"$instance"}`, "{{instance}} limit"},
		}}).alert(Rule{
		Alert: "IsthmusConnectionTableLow", Expr: "isthmus_conntrack_entries / isthmus_conntrack_limit > 0.85", For: "1m", Severity: "warning",
		Summary:     "the connection table of {{ $labels.instance }} is {{ $value | humanizePercentage }} full",
		Description: "When it is full, new flows are refused. Raise net.netfilter.nf_conntrack_max.",
		See:         "isthmus describe condition ConnectionTableLow",
	}),
	table("isthmus_conntrack_limit", Gauge, "Limit of the connection table (net.netfilter.nf_conntrack_max).", (*isthmusv1.ConnectionTable).GetLimit),
	table("isthmus_conntrack_insert_failed_total", Counter, "New flows that the kernel could not add to the connection table.", (*isthmusv1.ConnectionTable).GetInsertFailed),
}

// alert adds an alert rule.
func (m *Metric) alert(r Rule) *Metric {
	m.Rules = append(m.Rules, r)
	return m
}

// table returns a metric of the connection table.
func table[N uint32 | uint64](name string, t Type, help string, of func(*isthmusv1.ConnectionTable) N, panels ...Panel) *Metric {
	return &Metric{
		Name: name, Type: t, Help: help, Panels: panels,
		Trap: "It is read while the document has a pool. Without one there is no series.",
		read: func(v *view, emit func(float64, ...string)) {
			if c := v.Ports.GetTable(); c.GetLimit() > 0 {
				emit(float64(of(c)))
			}
		},
	}
}

func portsUsed(v *view, emit func(float64, ...string)) {
	type key struct{ pool, address string }
	most := map[key]float64{}
	for _, a := range v.Ports.GetAddresses() {
		most[key{a.Pool, a.Address}] = 0
	}
	for _, p := range v.Ports.GetPorts() {
		k := key{p.Pool, p.Address}
		most[k] = max(most[k], p.Percent/100)
	}
	keys := make([]key, 0, len(most))
	for k := range most {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b key) int {
		return cmp.Or(strings.Compare(a.pool, b.pool), strings.Compare(a.address, b.address))
	})
	for _, k := range keys {
		emit(most[k], k.pool, k.address)
	}
}
