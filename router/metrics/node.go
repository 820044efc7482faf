package metrics

import (
	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/report"
)

var node = []*Metric{
	{
		Name: "isthmus_build_info", Type: Gauge,
		Help: "1, with the version of isthmusd in the labels.",
		Labels: []Label{
			{Name: "version", Help: "version of isthmusd"}, {Name: "revision", Help: "revision of the source, empty when it is unknown"}, {Name: "goversion", Help: "version of Go that built it"},
		},
		Trap: "An update of isthmusd changes the labels, which makes a new series. Join with `on (job, instance)`.",
		read: func(v *view, emit func(float64, ...string)) {
			emit(1, v.options.Version, v.options.Revision, v.options.Go)
		},
		Rules: []Rule{
			{
				Alert: "IsthmusNodeGone", For: "2m", Severity: "critical",
				Expr:        "max by (job, instance) (max_over_time(isthmus_build_info[1d])) unless on (job, instance) isthmus_build_info",
				Summary:     "{{ $labels.instance }} is not scraped",
				Description: "Prometheus has read {{ $labels.instance }} within the last day and reads it no longer. Check on the node that isthmusd runs and that `access.api` names the address of Prometheus, and that the certificate of Prometheus is not revoked. The alert ends a day after a node is removed for good.",
				See:         "isthmus get status",
			},
			{
				Alert: "IsthmusNoNode", Expr: "absent(isthmus_build_info)", For: "5m", Severity: "critical",
				Summary:     "Prometheus reads no isthmus node",
				Description: "Check the scrape configuration: the port of the API, the authority, and the certificate of a client with role reader.",
				See:         "isthmus client list",
			},
		},
		Panels: []Panel{
			{Title: "Nodes", Kind: "stat", Help: "Nodes that Prometheus reads, by version.", Queries: []Query{{`count by (version) (isthmus_build_info{job=~"$job",instance=~"$instance"})`, "{{version}}"}}},
		},
	},
	{
		Name: "isthmus_start_timestamp_seconds", Type: Gauge, Unit: "seconds",
		Help: "Time at which isthmusd started, since the epoch.",
		Trap: "Counters of isthmusd itself start again from 0 here; those of the kernel go on.",
		read: func(v *view, emit func(float64, ...string)) {
			if at := v.Status.GetStarted(); at != nil {
				emit(seconds(at))
			}
		},
		Rules: []Rule{{
			Alert: "IsthmusDaemonRestarts", Expr: "changes(isthmus_start_timestamp_seconds[30m]) > 2", Severity: "warning",
			Summary:     "isthmusd of {{ $labels.instance }} restarts again and again",
			Description: "Tunnels, routes and rules stay while it restarts. Read its log on the node: journalctl -u isthmusd.",
			See:         "isthmus describe condition GenerationHeldBack",
		}},
	},
	{
		Name: "isthmus_document_generation", Type: Gauge,
		Help: "Generation of the accepted document; 0 when there has never been one.",
		read: func(v *view, emit func(float64, ...string)) { emit(float64(v.Status.GetGeneration())) },
		Panels: []Panel{
			{Title: "Generation", Kind: "timeseries", Help: "The accepted document and the applied one.", Queries: []Query{
				{`isthmus_document_generation{job=~"$job",instance=~"$instance"}`, "{{instance}} accepted"},
				{`isthmus_document_applied_generation{job=~"$job",instance=~"$instance"}`, "{{instance}} applied"},
			}},
		},
	},
	{
		Name: "isthmus_document_applied_generation", Type: Gauge,
		Help: "Generation of the newest document that is applied completely.",
		read: func(v *view, emit func(float64, ...string)) { emit(float64(v.Status.GetAppliedGeneration())) },
		Rules: []Rule{{
			Alert: "IsthmusDocumentNotApplied", Expr: "isthmus_document_generation != isthmus_document_applied_generation", For: "5m", Severity: "critical",
			Summary:     "{{ $labels.instance }} does not carry its document out completely",
			Description: "A part of the accepted document fails. The condition NotApplied names the part and the reason; correct the cause, or apply another document.",
			See:         "isthmus describe condition NotApplied",
		}},
	},
	{
		Name: "isthmus_condition", Type: Gauge,
		Help: "1 while the node, or one of its tunnels, peers or routes, has a condition of this type and severity, and 0 otherwise.",
		Trap: "Every type that exists has a series, so that a query never misses one. The message and the object are in `isthmus get status`.",
		Labels: []Label{
			{Name: "type", Help: "type of the condition ([list](conditions.md))", Values: conditionTypes()}, {Name: "severity", Help: "`error` or `warning`", Values: []string{string(condition.Error), string(condition.Warning)}},
		},
		read: conditions,
		Rules: []Rule{
			{
				Alert: "IsthmusNodeError", Expr: `isthmus_condition{severity="error"} == 1`, For: "1m", Severity: "critical",
				Summary:     "{{ $labels.instance }} has the error {{ $labels.type }}",
				Description: "A function of the node does not work, or will stop working without help. The command prints the meaning of {{ $labels.type }}, its cause and its remedy; `isthmus get status` shows the object.",
				See:         "isthmus describe condition {{ $labels.type }}",
			},
			{
				Alert: "IsthmusNodeWarning", Expr: `isthmus_condition{severity="warning"} == 1`, For: "15m", Severity: "warning",
				Summary:     "{{ $labels.instance }} has the warning {{ $labels.type }}",
				Description: "Everything works, perhaps with less reserve. The command prints the meaning of {{ $labels.type }}, its cause and its remedy.",
				See:         "isthmus describe condition {{ $labels.type }}",
			},
		},
		Panels: []Panel{
			{Title: "Conditions", Kind: "state-timeline", Help: "Conditions that were present. `isthmus describe condition TYPE` has the remedy.", Queries: []Query{
				{`isthmus_condition{job=~"$job",instance=~"$instance"} == 1`, "{{instance}} {{type}} ({{severity}})"},
			}},
		},
	},
	{
		Name: "isthmus_certificate_expiry_timestamp_seconds", Type: Gauge, Unit: "seconds",
		Help:   "Time at which a certificate expires, since the epoch.",
		Trap:   "`client` is the first certificate to expire that was neither renewed nor revoked; once it has expired, the next one takes its place.",
		Labels: []Label{{Name: "kind", Help: "`authority`: the certificate authority of the node; `server`: its certificate; `last-admin`: the last certificate of an admin; `client`: the first one of any client", Values: certificateKinds}},
		read: func(v *view, emit func(float64, ...string)) {
			for _, kind := range certificateKinds {
				if at, ok := v.expiries[kind]; ok {
					emit(float64(at.Unix()), kind)
				}
			}
		},
		Rules: []Rule{{
			Alert: "IsthmusCertificateExpires", Expr: "isthmus_certificate_expiry_timestamp_seconds - time() < 14 * 86400", For: "1h", Severity: "warning",
			Summary:     "a certificate of {{ $labels.instance }} expires within 14 days: {{ $labels.kind }}",
			Description: "client, last-admin: run `isthmus client renew` on the client, or issue another certificate. authority: run `isthmus authority renew`. server: it renews itself 30 days before; the condition ServerCertificate says why it did not.",
			See:         "isthmus describe condition ClientsExpire",
		}},
		Panels: []Panel{
			{Title: "Certificates expire in", Kind: "timeseries", Unit: "s", Help: "Time left.", Queries: []Query{
				{`isthmus_certificate_expiry_timestamp_seconds{job=~"$job",instance=~"$instance"} - time()`, "{{instance}} {{kind}}"},
			}},
		},
	},
	{
		Name: "isthmus_dropped_packets_total", Type: Counter, Unit: "packets",
		Help:   "Packets that the rules dropped.",
		Trap:   "It starts again from 0 when another process removes the rules. The log has samples with source, destination and the reason.",
		Labels: []Label{{Name: "reason", Help: "why, as in [security](security.md#sides)", Values: dropReasons()}},
		read: func(v *view, emit func(float64, ...string)) {
			for _, d := range v.Drops {
				emit(float64(d.Packets), d.Reason)
			}
		},
		Rules: []Rule{
			{
				Alert: "IsthmusGuardDrops", Expr: `increase(isthmus_dropped_packets_total{reason="guard"}[5m]) > 0`, Severity: "warning",
				Summary:     "{{ $labels.instance }} drops packets of spokes toward the Internet",
				Description: "No policy translates these packets, so that they would leave with an inside source. The log of the node names samples and the policy that should have matched; add their sources to a policy, or stop the host that sends them.",
				See:         "isthmus get policies",
			},
			{
				Alert: "IsthmusForeignSources", Expr: `rate(isthmus_dropped_packets_total{reason="foreign-source"}[5m]) > 10`, For: "5m", Severity: "warning",
				Summary:     "{{ $labels.instance }} drops packets whose source does not belong to their tunnel",
				Description: "A spoke sends from addresses that the document does not give it. Correct the `sources` of the tunnel or attachment, the import rules of its peer, or the host that sends them.",
				See:         "isthmus get policies",
			},
		},
		Panels: []Panel{
			{Title: "Dropped packets", Kind: "timeseries", Unit: "pps", Help: "By reason.", Queries: []Query{
				{`rate(isthmus_dropped_packets_total{job=~"$job",instance=~"$instance"}[$__rate_interval])`, "{{instance}} {{reason}}"},
			}},
		},
	},
	{
		Name: "isthmus_event_export_delivered_total", Type: Counter,
		Help:   "Events that a receiver in `events.export` has taken.",
		Trap:   "UDP has no answer, so that all that was sent counts.",
		Labels: []Label{{Name: "target", Help: "name of the receiver in the document"}},
		read: func(v *view, emit func(float64, ...string)) {
			for _, e := range v.Exports {
				emit(float64(e.Delivered), e.Name)
			}
		},
	},
	{
		Name: "isthmus_event_export_failed_total", Type: Counter,
		Help:   "Attempts to send events to a receiver in `events.export` that failed.",
		Labels: []Label{{Name: "target", Help: "name of the receiver in the document"}},
		read: func(v *view, emit func(float64, ...string)) {
			for _, e := range v.Exports {
				emit(float64(e.Failed), e.Name)
			}
		},
		Rules: []Rule{{
			Alert: "IsthmusEventExportFailing", Expr: "increase(isthmus_event_export_failed_total[10m]) > 0 and increase(isthmus_event_export_delivered_total[10m]) == 0", For: "5m", Severity: "warning",
			Summary:     "events of {{ $labels.instance }} do not reach {{ $labels.target }}",
			Description: "The receiver or the path to it is down, or it refuses the events. The node keeps 10,000 events, and sends what is missing when the receiver is back.",
			See:         "isthmus describe condition EventExportFailing",
		}},
		Panels: []Panel{
			{Title: "Events to receivers", Kind: "timeseries", Unit: "ops", Help: "Delivered, and attempts that failed.", Queries: []Query{
				{`rate(isthmus_event_export_delivered_total{job=~"$job",instance=~"$instance"}[$__rate_interval])`, "{{instance}} {{target}} delivered"},
				{`rate(isthmus_event_export_failed_total{job=~"$job",instance=~"$instance"}[$__rate_interval])`, "{{instance}} {{target}} failed"},
			}},
		},
	},
	{
		Name: "isthmus_event_export_gaps_total", Type: Counter,
		Help:   "Times at which a receiver in `events.export` may have missed events, because the node did not have them any more.",
		Trap:   "A start after a loss of power counts too: the last seconds before it may be missing.",
		Labels: []Label{{Name: "target", Help: "name of the receiver in the document"}},
		read: func(v *view, emit func(float64, ...string)) {
			for _, e := range v.Exports {
				emit(float64(e.Gaps), e.Name)
			}
		},
	},
	{
		Name: "isthmus_nic_allowance_exceeded_total", Type: Counter,
		Help: "Packets that the cloud held back or dropped because they were beyond what it grants this type of machine.",
		Trap: "The driver of AWS (ena) counts them, since the machine started; other drivers have no series. Azure and Google limit machines too and count nothing that the machine can read. It is read every 10 seconds, for the underlay and the attachments of the document.",
		Labels: []Label{
			{Name: "interface", Help: "name of the interface in the document"},
			{Name: "kind", Help: quoted(report.AllowanceKinds()) + ": bandwidth, packets a second, tracked connections, and packets to the cloud's own services", Values: report.AllowanceKinds()},
		},
		read: func(v *view, emit func(float64, ...string)) {
			for _, a := range v.Allowances {
				emit(float64(a.Packets), a.Interface, a.Kind)
			}
		},
		Rules: []Rule{{
			Alert: "IsthmusNICAllowance", Expr: "rate(isthmus_nic_allowance_exceeded_total[5m]) > 0", For: "5m", Severity: "warning",
			Summary:     "the cloud holds back or drops packets of {{ $labels.interface }} of {{ $labels.instance }} beyond its allowance {{ $labels.kind }}",
			Description: "The machine sends or receives more than the cloud grants its type, and no setting of the node changes that. Choose a larger instance type, or spread the traffic over more nodes.",
			See:         "isthmus describe condition NICAllowance",
		}},
		Panels: []Panel{
			{Title: "Packets beyond the cloud's allowances", Kind: "timeseries", Unit: "pps", Help: "Held back or dropped, by interface and kind.", Queries: []Query{
				{`rate(isthmus_nic_allowance_exceeded_total{job=~"$job",instance=~"$instance"}[$__rate_interval])`, "{{instance}} {{interface}} {{kind}}"},
			}},
		},
	},
}

// certificateKinds are those of auth.Authority.Expiries.
var certificateKinds = []string{"authority", "server", "last-admin", "client"}

func conditionTypes() (out []string) {
	for _, k := range condition.All {
		out = append(out, k.Name)
	}
	return out
}

func dropReasons() (out []string) {
	for _, r := range nat.Reasons {
		out = append(out, string(r))
	}
	return out
}

func conditions(v *view, emit func(float64, ...string)) {
	type key struct{ kind, severity string }
	present := map[key]bool{}
	note := func(all []*isthmusv1.Condition) {
		for _, c := range all {
			present[key{c.Type, c.Severity}] = true
		}
	}
	note(v.Status.GetConditions())
	for _, t := range v.Tunnels {
		note(t.Conditions)
	}
	for _, p := range v.Peers {
		note(p.Conditions)
	}
	if v.IPv4.Withheld+v.IPv6.Withheld > 0 {
		present[key{condition.Withheld.Name, string(condition.Warning)}] = true
	}
	for _, k := range condition.All {
		for _, s := range k.Severities {
			emit(truth(present[key{k.Name, string(s)}]), k.Name, string(s))
		}
	}
}
