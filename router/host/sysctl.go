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

// Sysctl is a kernel parameter: its path below /proc/sys, and its wanted value.
//
// Source of meanings and defaults: the kernel's Documentation/networking/ip-sysctl.rst and
// nf_conntrack-sysctl.rst.
type Sysctl struct {
	Path, Value string
	// Default is the kernel's initial value, where that matters.
	Default string
	// Optional parameters may be missing from the kernel, or be writable only in another network
	// namespace.
	Optional bool
	// IfDefault parameters are left alone when something else has set them.
	IfDefault bool
	// AtLeast parameters are numbers that may be larger.
	AtLeast bool
}

// Forwarding returns the parameters that turn packet forwarding on or off.
func Forwarding(on bool) []Sysctl {
	value := "0"
	if on {
		value = "1"
	}
	return []Sysctl{
		{Path: "net/ipv4/ip_forward", Value: value},
		{Path: "net/ipv6/conf/all/forwarding", Value: value, Optional: true},
		// The kernel resets this to its default when forwarding changes.
		{Path: "net/ipv4/conf/all/accept_redirects", Value: "0"},
		{Path: "net/ipv4/conf/default/accept_redirects", Value: "0"},
	}
}

// Portless returns the parameters for the conntrack timeouts of flows without ports, in whole
// seconds; none for 0.
func Portless(d time.Duration) []Sysctl {
	if d <= 0 {
		return nil
	}
	var all []Sysctl
	// nf_conntrack_proto_generic.c, nf_conntrack_proto_gre.c
	for _, name := range []string{"generic_timeout", "gre_timeout", "gre_timeout_stream"} {
		all = append(all, Sysctl{Path: "net/netfilter/nf_conntrack_" + name, Value: strconv.FormatInt(int64(d/time.Second), 10), Optional: true})
	}
	return all
}

// Sysctls returns the parameters that a router needs besides Forwarding, for a node with the given
// underlay interface and other interfaces that lead to networks. Tunnels are not included: they
// start with the values of "default".
func Sysctls(underlay string, attached []string) []Sysctl {
	all := []Sysctl{
		// While the node forwards, the kernel accepts router advertisements on the underlay only
		// with 2. If it accepted them before, the node's route may come from them. This is the
		// first parameter, because forwarding would drop that route. With another value, as
		// networkd sets it, the kernel ignores advertisements.
		{Path: "net/ipv6/conf/" + underlay + "/accept_ra", Value: "2", Default: "1", Optional: true, IfDefault: true},
		// Loose reverse path filter (RFC 3704 section 2.4), because the return path may use another
		// tunnel. The kernel uses the larger of "all" and the interface's own.
		{Path: "net/ipv4/conf/all/rp_filter", Value: "2"},
		{Path: "net/ipv4/conf/default/rp_filter", Value: "2"},
		// Strangers could fill a disk with log messages about their packets. One of "all" and the
		// interface's own is enough to log.
		{Path: "net/ipv4/conf/all/log_martians", Value: "0"},
		{Path: "net/ipv4/conf/default/log_martians", Value: "0"},
		// Senders must not choose the path of a packet (RFC 5095; RFC 7126 section 4.3). Both "all"
		// and the interface must allow it.
		{Path: "net/ipv4/conf/all/accept_source_route", Value: "0"},
		{Path: "net/ipv4/conf/default/accept_source_route", Value: "0"},
		{Path: "net/ipv6/conf/all/accept_source_route", Value: "-1", Optional: true},
		// A packet may leave by the interface on which it arrived; its sender must still not be
		// redirected. One of "all" and the interface's own is enough to send.
		{Path: "net/ipv4/conf/all/send_redirects", Value: "0"},
		{Path: "net/ipv4/conf/default/send_redirects", Value: "0"},
		// The node does not accept redirects either, also while it does not forward.
		{Path: "net/ipv4/conf/all/accept_redirects", Value: "0"},
		{Path: "net/ipv4/conf/default/accept_redirects", Value: "0"},
		{Path: "net/ipv6/conf/all/accept_redirects", Value: "0", Optional: true},
		{Path: "net/ipv6/conf/default/accept_redirects", Value: "0", Optional: true},
		// Spread flows over equal paths by addresses and ports.
		{Path: "net/ipv4/fib_multipath_hash_policy", Value: "1"},
		{Path: "net/ipv6/fib_multipath_hash_policy", Value: "1", Optional: true},
		// With 1, the kernel notifies every route of a nexthop group that is replaced, so that a
		// failover takes as long as the table is.
		{Path: "net/ipv4/nexthop_compat_mode", Value: "0"},
		// A flow may change its path, so that only part of its segments was seen here.
		{Path: "net/netfilter/nf_conntrack_tcp_be_liberal", Value: "1", Optional: true},
		{Path: "net/netfilter/nf_conntrack_tcp_loose", Value: "1", Optional: true},
		// The log of translations needs the bytes of a flow, and when it began and ended. Flows
		// that began earlier have neither.
		{Path: "net/netfilter/nf_conntrack_acct", Value: "1", Optional: true},
		{Path: "net/netfilter/nf_conntrack_timestamp", Value: "1", Optional: true},
	}
	// A spoke that contacts every address of a network behind the node must not fill the neighbour
	// table, which also has the routers of the underlay.
	for _, family := range []string{"ipv4", "ipv6"} {
		for i, value := range []string{"1024", "4096", "8192"} {
			all = append(all, Sysctl{Path: fmt.Sprintf("net/%s/neigh/default/gc_thresh%d", family, i+1), Value: value, Optional: true, AtLeast: true})
		}
	}
	for _, name := range append([]string{underlay}, attached...) {
		// Existing interfaces have their own values.
		all = append(all,
			Sysctl{Path: "net/ipv4/conf/" + name + "/log_martians", Value: "0", Optional: true},
			Sysctl{Path: "net/ipv4/conf/" + name + "/accept_source_route", Value: "0", Optional: true},
			Sysctl{Path: "net/ipv4/conf/" + name + "/send_redirects", Value: "0", Optional: true},
			Sysctl{Path: "net/ipv4/conf/" + name + "/accept_redirects", Value: "0", Optional: true},
			Sysctl{Path: "net/ipv6/conf/" + name + "/accept_redirects", Value: "0", Optional: true})
		if name != underlay {
			// A host of a spoke must not become the node's router, not even while the node does not
			// forward.
			all = append(all, Sysctl{Path: "net/ipv6/conf/" + name + "/accept_ra", Value: "0", Optional: true})
		}
	}
	return all
}

// Room for flows in connection tracking: one for each flowMemory bytes of memory, within bounds. A
// flow takes some 400 bytes.
const (
	flowMemory = 16 << 10
	fewFlows   = 1 << 16
	mostFlows  = 1 << 21
)

// Conntrack returns the parameters for the number of flows that a machine with this memory in bytes
// can track. The kernel's default is 65536 for 1 to 4 GiB and 262144 for more, whatever the machine
// routes.
func Conntrack(memory uint64) []Sysctl {
	flows := strconv.FormatUint(min(max(memory/flowMemory, fewFlows), mostFlows), 10)
	return []Sysctl{
		{Path: "net/netfilter/nf_conntrack_buckets", Value: flows, Optional: true, AtLeast: true},
		{Path: "net/netfilter/nf_conntrack_max", Value: flows, Optional: true, AtLeast: true},
	}
}

// meets reports whether a parameter may stay as it is.
func (s Sysctl) meets(have string) bool {
	if s.AtLeast {
		a, err := strconv.ParseUint(have, 10, 64)
		b, err2 := strconv.ParseUint(s.Value, 10, 64)
		return err == nil && err2 == nil && a >= b
	}
	return have == s.Value || s.IfDefault && have != s.Default
}

// Tune sets parameters of the calling thread's network namespace. It writes only those that differ,
// continues after an error, and returns how many it wrote.
func Tune(want []Sysctl) (written int, err error) {
	var errs []error
	for _, s := range want {
		path := filepath.Join("/proc/sys", s.Path)
		have, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) && s.Optional {
			continue
		}
		if err == nil && s.meets(strings.TrimSpace(string(have))) {
			continue
		}
		if err == nil {
			if err = os.WriteFile(path, []byte(s.Value), 0); err == nil {
				written++
			} else if errors.Is(err, fs.ErrPermission) && s.Optional {
				continue
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("setting kernel parameter %s to %s: %w", s.Path, s.Value, err))
		}
	}
	return written, errors.Join(errs...)
}
