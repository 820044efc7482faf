package spec

import (
	"fmt"
	"strings"
	"testing"
)

const goodExports = `node: {name: hub-1}
underlay: {interface: eth0, address: 10.9.0.4}
events:
  export:
  - {name: siem, syslog: "10.20.0.5:514"}
  - {name: old, syslog: "[2001:db8::5]:514", protocol: udp, minSeverity: error}
  - {name: pager, webhook: "https://hooks.example.com/T0/B0?k=1", secret: aws-0, minSeverity: warning}
  - {name: local, webhook: "http://10.20.0.6:8080/"}
`

func TestExports(t *testing.T) {
	s, problems := parse(goodExports)
	got := strings.ReplaceAll(fmt.Sprint(s.Exports), "invalid AddrPort", "-")
	if want := "[{siem 10.20.0.5:514 tcp   info} {old [2001:db8::5]:514 udp   error} {pager -  https://hooks.example.com/T0/B0?k=1 aws-0#"; len(problems) > 0 || !strings.HasPrefix(got, want) {
		t.Errorf("%s, %v, want %s", got, problems, want)
	}
	var many []string
	for i := range maxExports + 1 {
		many = append(many, fmt.Sprintf("  - {name: t%d, syslog: \"10.20.0.5:514\"}\n", i))
	}
	const siem = `{name: siem, syslog: "10.20.0.5:514"}`
	for _, k := range []struct{ from, to, want string }{
		{siem, `{syslog: "10.20.0.5:514"}`, `events.export[0].name: is required`},
		{siem, `{name: old, syslog: "10.20.0.5:514"}`, `events.export[1].name: "old" is the name of events.export[0].name too`},
		{siem, `{name: siem}`, `events.export[0].syslog: is required`},
		{siem, `{name: siem, syslog: "10.20.0.5:514", webhook: "https://x.example"}`, `events.export[0].webhook: is given besides syslog`},
		{siem, `{name: siem, syslog: 10.20.0.5}`, `events.export[0].syslog: "10.20.0.5" is not an address with a port`},
		{siem, `{name: siem, syslog: "10.20.0.5:0"}`, `"10.20.0.5:0" is not an address with a port`},
		{siem, `{name: siem, syslog: "siem.example:514"}`, `"siem.example:514" is not an address with a port`},
		{siem, `{name: siem, syslog: "[fe80::1%eth0]:514"}`, `is not an address with a port`},
		{siem, `{name: siem, syslog: "127.0.0.1:514"}`, `"127.0.0.1:514" is the node itself`},
		{siem, `{name: siem, syslog: "169.254.169.254:80"}`, `"169.254.169.254:80" is a service of the cloud for the machine`},
		{siem, `{name: siem, syslog: "[::ffff:169.254.169.254]:80"}`, `is a service of the cloud for the machine`},
		{siem, `{name: siem, syslog: "10.20.0.5:514", protocol: tls}`, `events.export[0].protocol: "tls" is none of tcp, udp`},
		{siem, `{name: siem, syslog: "10.20.0.5:514", minSeverity: all}`, `events.export[0].minSeverity: "all" is none of info, warning, error`},
		{siem, `{name: siem, syslog: "10.20.0.5:514", secret: aws-0}`, `events.export[0].secret: "aws-0" is the secret of a webhook`},
		{"https://hooks.example.com/T0/B0?k=1", "hooks.example.com", `events.export[2].webhook: "://" is not an URL of https`},
		{"https://hooks.example.com/T0/B0?k=1", "ftp://hooks.example.com/FileKey", `"ftp://hooks.example.com" is not an URL of https`},
		{"https://hooks.example.com/T0/B0?k=1", "http://hooks.example.com/FileKey", `"http://hooks.example.com" is a name without TLS`},
		{"https://hooks.example.com/T0/B0?k=1", "https://ann:FileKey@hooks.example.com/", `events.export[2].webhook: has a user or a password in it`},
		{"https://hooks.example.com/T0/B0?k=1", "https://hooks.example.com/#FileKey", `has a fragment`},
		{"https://hooks.example.com/T0/B0?k=1", "https://hooks.example.com/" + strings.Repeat("FileKey", 300), `is not an URL of at most 2048 bytes`},
		{"https://hooks.example.com/T0/B0?k=1", "https://[::1]/", `"https://[::1]" is the node itself`},
		{"https://hooks.example.com/T0/B0?k=1", "https://hooks.example.com/%zz", `is not an URL`},
		{"secret: aws-0", "secret: unknown", `events.export[2].secret: "unknown" is not a stored secret`},
		{"secret: aws-0", "protocol: tcp", `events.export[2].protocol: "tcp" is a protocol of syslog`},
		{goodExports[strings.Index(goodExports, "  - "):], strings.Join(many, ""), `events.export: "9" are more than 8`},
	} {
		text := strings.Replace(goodExports, k.from, k.to, 1)
		if text == goodExports {
			t.Errorf("%s: the text has not changed", k.want)
			continue
		}
		if _, problems := parse(text); len(problems) != 1 || !strings.Contains(problems.Error(), k.want) || strings.Contains(problems.Error(), "FileKey") {
			t.Errorf("%v, want %s", problems, k.want)
		}
	}
}
