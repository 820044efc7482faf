package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Sysctl is a kernel parameter: its path below /proc/sys, and the value it should have.
type Sysctl struct {
	Path, Value string
	// Optional ones may be missing from the kernel.
	Optional bool
}

// Forwarding returns the parameters that have the kernel forward packets, or not.
func Forwarding(on bool) []Sysctl {
	value := "0"
	if on {
		value = "1"
	}
	return []Sysctl{
		{Path: "net/ipv4/ip_forward", Value: value},
		{Path: "net/ipv6/conf/all/forwarding", Value: value, Optional: true},
		// The kernel gives this its default when forwarding changes.
		{Path: "net/ipv4/conf/all/accept_redirects", Value: "0"},
		{Path: "net/ipv4/conf/default/accept_redirects", Value: "0"},
	}
}

// Portless returns the parameters for how long flows without ports are remembered: none for 0, and for less than 0 those that the kernel
// begins with.
func Portless(d time.Duration) []Sysctl {
	if d == 0 {
		return nil
	}
	other, gre, answered := d, d, d
	if d < 0 { // nf_conntrack_proto_generic.c, nf_conntrack_proto_gre.c
		other, gre, answered = 10*time.Minute, 30*time.Second, 3*time.Minute
	}
	seconds := func(d time.Duration) string { return strconv.FormatInt(int64(d/time.Second), 10) }
	return []Sysctl{
		{Path: "net/netfilter/nf_conntrack_generic_timeout", Value: seconds(other), Optional: true},
		{Path: "net/netfilter/nf_conntrack_gre_timeout", Value: seconds(gre), Optional: true},
		{Path: "net/netfilter/nf_conntrack_gre_timeout_stream", Value: seconds(answered), Optional: true},
	}
}

// Sysctls returns the parameters that a router needs beside Forwarding, for a node with the given underlay interface.
func Sysctls(underlay string) []Sysctl {
	return []Sysctl{
		// Router advertisements are still heard on the underlay when the node forwards; it may have its route from them.
		// This comes first, since forwarding would drop that route.
		{Path: "net/ipv6/conf/" + underlay + "/accept_ra", Value: "2", Optional: true},
		// Loose reverse path filter (RFC 3704 section 2.4): the way back may be another tunnel. The larger of "all" and the
		// interface's own counts.
		{Path: "net/ipv4/conf/all/rp_filter", Value: "2"},
		{Path: "net/ipv4/conf/default/rp_filter", Value: "2"},
		// A packet may leave by the interface it came from; that is no reason to tell its sender another way.
		{Path: "net/ipv4/conf/all/send_redirects", Value: "0"},
		{Path: "net/ipv4/conf/default/send_redirects", Value: "0"},
		{Path: "net/ipv4/conf/" + underlay + "/send_redirects", Value: "0"},
		{Path: "net/ipv4/conf/all/accept_redirects", Value: "0"},
		{Path: "net/ipv4/conf/default/accept_redirects", Value: "0"},
		// Spread flows over equal paths by addresses and ports.
		{Path: "net/ipv4/fib_multipath_hash_policy", Value: "1"},
		{Path: "net/ipv6/fib_multipath_hash_policy", Value: "1", Optional: true},
		// With 1, the kernel reports every route of a nexthop group that is replaced, which makes a failover as slow as the
		// table is long.
		{Path: "net/ipv4/nexthop_compat_mode", Value: "0"},
		// A flow may change its path, so that only part of its segments was seen here.
		{Path: "net/netfilter/nf_conntrack_tcp_be_liberal", Value: "1", Optional: true},
		{Path: "net/netfilter/nf_conntrack_tcp_loose", Value: "1", Optional: true},
		// What the log of translations tells about a flow: its bytes, and when it began and ended. Flows that began before are
		// told without.
		{Path: "net/netfilter/nf_conntrack_acct", Value: "1", Optional: true},
		{Path: "net/netfilter/nf_conntrack_timestamp", Value: "1", Optional: true},
	}
}

// Tune gives parameters of the calling thread's network namespace their values. It writes only those that differ, goes
// on after an error, and returns how many it wrote.
func Tune(want []Sysctl) (written int, err error) {
	var errs []error
	for _, s := range want {
		path := filepath.Join("/proc/sys", s.Path)
		have, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) && s.Optional {
			continue
		}
		if err == nil && strings.TrimSpace(string(have)) == s.Value {
			continue
		}
		if err == nil {
			written++
			err = os.WriteFile(path, []byte(s.Value), 0)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("setting kernel parameter %s to %s: %w", s.Path, s.Value, err))
		}
	}
	return written, errors.Join(errs...)
}
