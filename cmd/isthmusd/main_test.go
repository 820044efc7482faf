package main

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/router/link"
)

// TestHosts checks that a daemon that listens on all addresses is reached under each, however they
// are written.
func TestHosts(t *testing.T) {
	links, err := link.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer links.Close()
	of := func(o options) []string {
		out, err := hosts(o, links)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	every := of(options{listen: ":7443"})
	for listen, want := range map[string][]string{
		"0.0.0.0:7443": every,
		"[::]:7443":    every,
	} {
		got := of(options{listen: listen})
		for _, h := range want {
			if !slices.Contains(got, h) {
				t.Errorf("-listen %s: the certificate is not for %s", listen, h)
			}
		}
		for _, h := range got {
			if ip := net.ParseIP(h); ip != nil && ip.IsUnspecified() {
				t.Errorf("-listen %s: the certificate is for %s", listen, h)
			}
		}
	}
	if got := of(options{listen: "192.0.2.9:7443", hosts: "node, 192.0.2.10"}); !slices.Equal(got[:2], []string{"node", "192.0.2.10"}) || got[len(got)-1] != "192.0.2.9" {
		t.Errorf("got %v", got)
	}
}

// TestSources checks that the error has each invalid value of -api-from.
func TestSources(t *testing.T) {
	got, err := sources("203.0.113.0/28,2001:db8::/64")
	if want := []netip.Prefix{netip.MustParsePrefix("203.0.113.0/28"), netip.MustParsePrefix("2001:db8::/64")}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := sources(""); err != nil || got != nil {
		t.Errorf("of nothing: %v, %v", got, err)
	}
	_, err = sources("203.0.113.0/28,203.0.113.9,203.0.113.1/24,everything,203.0.113.0/28")
	for _, want := range []string{`-api-from[1]: "203.0.113.9"`, `-api-from[2]: "203.0.113.1/24"`, `-api-from[3]: "everything"`, `-api-from[4]: "203.0.113.0/28" is given twice`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if _, err := sources(strings.Repeat("203.0.113.0/28,", 1000) + "203.0.113.0/28"); err == nil || !strings.Contains(err.Error(), "are more than 1000 prefixes") {
		t.Errorf("too many: %v", err)
	}
}
