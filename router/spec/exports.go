package spec

import (
	"fmt"
	"net/netip"
	"net/url"
	"strings"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

const (
	maxExports = 8
	maxURL     = 2048
)

// exports checks the receivers of events.
func (c *checker) exports(all []*isthmusv1.EventTarget) {
	for i, e := range all[:c.limited("events.export", len(all), maxExports)] {
		c.export(fmt.Sprintf("events.export[%d]", i), e)
	}
}

func (c *checker) export(path string, e *isthmusv1.EventTarget) {
	c.Name("receiver of events", path+".name", e.GetName())
	out := Export{Name: e.GetName(), MinSeverity: c.oneOf(path+".minSeverity", e.GetMinSeverity(), "info", "warning", "error")}
	switch {
	case e.GetSyslog() != "" && e.GetWebhook() != "":
		c.Problem(path+".webhook", "", "is given besides syslog", "make a receiver of its own for each")
	case e.GetSyslog() != "":
		out.Syslog = c.syslog(path+".syslog", e.GetSyslog())
		out.Protocol = c.oneOf(path+".protocol", e.GetProtocol(), "tcp", "udp")
		if e.GetSecret() != "" {
			c.Problem(path+".secret", e.GetSecret(), "is the secret of a webhook, and syslog has none", "remove it")
		}
	case e.GetWebhook() != "":
		out.Webhook = c.webhook(path+".webhook", e.GetWebhook())
		if e.GetProtocol() != "" {
			c.Problem(path+".protocol", e.GetProtocol(), "is a protocol of syslog", "remove it")
		}
		if e.GetSecret() != "" {
			out.Secret = c.secret(path+".secret", e.GetSecret())
		}
	default:
		c.Missing(path+".syslog", "give the address and port of a syslog server, or a webhook")
	}
	c.s.Exports = append(c.s.Exports, out)
}

// oneOf reads one of some words. The first is the default.
func (c *checker) oneOf(path, text string, words ...string) string {
	for _, w := range words {
		if text == w {
			return w
		}
	}
	if text != "" {
		c.Problem(path, text, "is none of "+strings.Join(words, ", "), "choose one of them")
	}
	return words[0]
}

func (c *checker) syslog(path, text string) netip.AddrPort {
	at, err := netip.ParseAddrPort(text)
	switch {
	case err != nil || at.Port() == 0 || at.Addr().Zone() != "":
		c.Problem(path, text, "is not an address with a port", `write it as "10.20.0.5:514" or "[2001:db8::5]:514"`)
	case nat.Outside(at.Addr()) != nil:
		c.Problem(path, text, nat.Outside(at.Addr()).Error(), "give the address of a syslog server")
	}
	return at
}

// webhook checks an URL. The exporter checks the addresses of its name at each connection.
func (c *checker) webhook(path, text string) string {
	const remedy = `write it as "https://hooks.example.com/isthmus"`
	u, err := url.Parse(text)
	shown := "" // it may have a key in it
	if err == nil && u.User == nil {
		shown = u.Scheme + "://" + u.Host
	}
	if err != nil || len(text) > maxURL {
		c.Problem(path, shown, fmt.Sprintf("is not an URL of at most %d bytes", maxURL), remedy)
		return text
	}
	a, notAddress := netip.ParseAddr(u.Hostname())
	switch {
	case u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.Opaque != "":
		c.Problem(path, shown, "is not an URL of https", remedy)
	case u.User != nil:
		c.Problem(path, shown, "has a user or a password in it", "use `secret`, which signs the body, or a key in the path")
	case u.Fragment != "":
		c.Problem(path, shown, "has a fragment, which is never sent", "remove it")
	case notAddress == nil && nat.Outside(a) != nil:
		c.Problem(path, shown, nat.Outside(a).Error(), "give the URL of a receiver")
	case notAddress != nil && u.Scheme == "http":
		c.Problem(path, shown, "is a name without TLS, so that any host that answers for it receives the events", "use https, or an address")
	}
	return text
}
