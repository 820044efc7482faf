package egress

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// ProbedPool is a set of source addresses and how they are probed.
type ProbedPool struct {
	Name      string
	Addresses []netip.Addr
	// Announce are prefixes to originate in BGP only while an address is usable.
	Announce []netip.Prefix
	Probes   Probes
}

// Probes configures the targets that an address must reach. Without targets, every address is
// usable.
type Probes struct {
	Targets  []Target
	Interval time.Duration // between two probes of one target
	Timeout  time.Duration // at most Interval
	// time for which an address that was down must be healthy before it is usable
	HoldDown time.Duration
	Rise     int // successes in a row after which a failed target is up
	Fall     int // failures in a row after which a target is down
	// targets that must be up; 0: more than half of those of the address's family
	Quorum int
}

// For returns the targets of an address, which are those of its family and those with a name, and
// how many of them must be up.
func (p Probes) For(a netip.Addr) (targets []Target, quorum int) {
	for _, t := range p.Targets {
		if host, err := netip.ParseAddr(t.Host); err != nil || host.Is4() == a.Is4() {
			targets = append(targets, t)
		}
	}
	quorum = p.Quorum
	if quorum == 0 {
		quorum = len(targets)/2 + 1
	}
	return targets, quorum
}

// Target is something that an address must reach.
type Target struct {
	Scheme string // "tcp", "http", "https" or "icmp"
	Host   string // address or name
	Port   uint16 // 0 with icmp
	Path   string // with http and https: path and query, at least "/"
}

// ParseTarget reads a target such as "tcp://198.51.100.7:443", "https://api.partner.example/health"
// or "icmp://2001:db8::7". The error is the rule that the text breaks.
func ParseTarget(text string) (Target, error) {
	// An icmp target has no port, so that an IPv6 address needs no brackets.
	if host, ok := strings.CutPrefix(text, "icmp://"); ok {
		if a, err := netip.ParseAddr(host); err == nil && a.Zone() == "" {
			return Target{Scheme: "icmp", Host: a.String()}, nil
		}
	}
	u, err := url.Parse(text)
	if err != nil {
		return Target{}, errors.New("is not a valid URL")
	}
	t := Target{Scheme: u.Scheme, Host: u.Hostname()}
	web := t.Scheme == "http" || t.Scheme == "https"
	if u.Port() != "" {
		port, err := strconv.ParseUint(u.Port(), 10, 16)
		if err != nil || port == 0 {
			return Target{}, errors.New("has a port that is not from 1 to 65535")
		}
		t.Port = uint16(port)
	}
	switch {
	case !web && t.Scheme != "tcp" && t.Scheme != "icmp":
		return Target{}, errors.New("has none of the schemes tcp, http, https and icmp")
	case t.Host == "":
		return Target{}, errors.New("has no host")
	case u.User != nil || u.Fragment != "":
		return Target{}, errors.New("has a user or a fragment, which a probe cannot have")
	case !web && (u.Path != "" || u.RawQuery != ""):
		return Target{}, fmt.Errorf("has a path, which %s does not use", t.Scheme)
	case t.Scheme == "icmp" && t.Port != 0:
		return Target{}, errors.New("has a port, which icmp does not use")
	case t.Scheme == "tcp" && t.Port == 0:
		return Target{}, errors.New("has no port")
	}
	if a, err := netip.ParseAddr(t.Host); err == nil {
		t.Host = a.String()
	}
	if web {
		if t.Port == 0 {
			t.Port = map[string]uint16{"http": 80, "https": 443}[t.Scheme]
		}
		t.Path = u.RequestURI()
	}
	return t, nil
}

// String returns the target as a URL.
func (t Target) String() string {
	host := t.Host
	if t.Port != 0 {
		host = net.JoinHostPort(host, strconv.Itoa(int(t.Port)))
	} else if a, err := netip.ParseAddr(host); err == nil && a.Is6() {
		host = "[" + host + "]"
	}
	return t.Scheme + "://" + host + t.Path
}

// PoolHealth sums up the probes of a pool.
type PoolHealth struct {
	Name string
	// addresses that may be used: the healthy ones, and those without a verdict yet
	Usable   int
	Healthy  int          // addresses whose probes are answered
	Known    int          // addresses with a verdict
	Unusable []netip.Addr // the others
}
