package main

import (
	"net"
	"slices"
	"testing"

	"github.com/isthmus-net/isthmus/router/nl"
)

// TestHosts: whoever listens on all addresses is reached under each, however that is written.
func TestHosts(t *testing.T) {
	links, err := nl.Open()
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
