package spec

import (
	"fmt"
	"strings"
	"testing"
)

const goodMetrics = `node: {name: hub-1}
underlay: {interface: eth0, address: 10.9.0.4, publicAddress: 203.0.113.4}
tunnels:
- {name: aws, inside: [{local: 169.254.64.2/30}], ipsec: {remoteAddress: 198.51.100.1, psk: aws-0}}
attachments:
- {name: lan, interface: eth1, sources: [10.8.0.0/24]}
egress: {pools: [{name: partner, addresses: [{address: 10.9.0.10, publicAddress: 203.0.113.10}]}]}
metrics: {listen: [169.254.64.2, 10.8.0.1], from: [10.8.0.0/24, 172.16.0.0/16]}
`

func TestMetrics(t *testing.T) {
	for text, want := range map[string]string{
		goodMetrics: "{[169.254.64.2 10.8.0.1] 9100 [10.8.0.0/24 172.16.0.0/16]}",
		strings.Replace(goodMetrics, "metrics: {", "metrics: {port: 65535, ", 1): "{[169.254.64.2 10.8.0.1] 65535 [10.8.0.0/24 172.16.0.0/16]}",
		goodMetrics[:strings.Index(goodMetrics, "metrics:")]:                     "{[] 0 []}",
	} {
		if s, problems := parse(text); len(problems) > 0 || fmt.Sprint(s.Metrics) != want {
			t.Errorf("%v, %v, want %s", s.Metrics, problems, want)
		}
	}
	var many []string
	for i := range maxSources + 1 {
		many = append(many, fmt.Sprintf("10.%d.%d.0/24", i/256, i%256))
	}
	for _, k := range []struct{ from, to, want string }{
		{", from: [10.8.0.0/24, 172.16.0.0/16]", "", `metrics.from: is required`},
		{"[10.8.0.0/24, 172.16.0.0/16]", "[" + strings.Join(many, ", ") + "]", `metrics.from: "1001" are more than 1000 prefixes`},
		{"[10.8.0.0/24, 172.16.0.0/16]", "[10.8.0.0/24, 10.8.0.0/24]", `metrics.from[1]: "10.8.0.0/24" is given twice`},
		{"[169.254.64.2, 10.8.0.1]", "[]", `metrics.listen: is required`},
		{"[169.254.64.2, 10.8.0.1]", "[10.8.0.1, 10.8.0.2, 10.8.0.3, 10.8.0.4, 10.8.0.5]", `metrics.listen: "5" are more than 4`},
		{"10.8.0.1]", "10.9.0.4]", `metrics.listen[1]: "10.9.0.4" is the address of the underlay`},
		{"10.8.0.1]", "203.0.113.4]", `metrics.listen[1]: "203.0.113.4" is the address of the underlay`},
		{"10.8.0.1]", "10.9.0.10]", `metrics.listen[1]: "10.9.0.10" is an address of pool partner`},
		{"10.8.0.1]", "203.0.113.10]", `metrics.listen[1]: "203.0.113.10" is an address of pool partner`},
		{"10.8.0.1]", "0.0.0.0]", `metrics.listen[1]: "0.0.0.0" is not a unicast address`},
		{"10.8.0.1]", `"::"]`, `metrics.listen[1]: "::" is not a unicast address`},
		{"10.8.0.1]", "127.0.0.1]", `metrics.listen[1]: "127.0.0.1" is not a unicast address`},
		{"10.8.0.1]", "224.0.0.1]", `metrics.listen[1]: "224.0.0.1" is not a unicast address`},
		{"10.8.0.1]", "169.254.64.1]", `metrics.listen[1]: "169.254.64.1" is not a local inside address of a tunnel`},
		{"10.8.0.1]", "169.254.169.254]", `metrics.listen[1]: "169.254.169.254" is not a local inside address of a tunnel`},
		{"10.8.0.1]", "168.63.129.16]", `metrics.listen[1]: "168.63.129.16" is an address at which the cloud's platform`},
		{"10.8.0.1]", "169.254.64.2]", `metrics.listen[1]: "169.254.64.2" is listed twice`},
		{"10.8.0.1]", "hub]", `metrics.listen[1]: "hub" is not an IP address`},
		{"metrics: {", "metrics: {port: 1023, ", `metrics.port: "1023" is not a port from 1024 to 65535`},
		{"metrics: {", "metrics: {port: 65536, ", `metrics.port: "65536" is not a port from 1024 to 65535`},
	} {
		text := strings.Replace(goodMetrics, k.from, k.to, 1)
		if text == goodMetrics {
			t.Errorf("%s: the text has not changed", k.want)
			continue
		}
		if _, problems := parse(text); len(problems) != 1 || !strings.Contains(problems.Error(), k.want) {
			t.Errorf("%v, want %s", problems, k.want)
		}
	}
	// Only strangers would reach it.
	alone := `node: {name: hub-1}
underlay: {interface: eth0, address: 10.9.0.4}
attachments: [{name: vpc, interface: eth0, sources: [10.9.64.0/18]}]
metrics: {listen: [10.8.0.1], from: [10.9.64.0/18]}
`
	if _, problems := parse(alone); len(problems) != 1 || !strings.Contains(problems.Error(), `metrics.listen[0]: "10.8.0.1" is served on tunnels and on attachments with an interface of their own`) {
		t.Errorf("%v", problems)
	}
}
