package kernel

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/sockfilter/sockfiltertest"
)

// TestWatchFilter runs the filter of the watch over messages, and over all their prefixes.
func TestWatchFilter(t *testing.T) {
	const self, other = 0x01020304, 0x04030201
	route := func(protocol byte) []byte { return []byte{5: protocol, 11: 0} }  // struct rtmsg
	nextHop := func(protocol byte) []byte { return []byte{2: protocol, 7: 0} } // struct nhmsg
	for _, tt := range []struct {
		name   string
		kind   uint16
		flags  uint16
		sender uint32
		body   []byte
		need   int // the bytes that a message needs to pass; 0: it is dropped
	}{
		{"link", unix.RTM_NEWLINK, 0, 0, nil, 6},
		{"link that is gone", unix.RTM_DELLINK, 0, 0, nil, 6},
		{"link, changed by us", unix.RTM_NEWLINK, 0, self, nil, 6},
		{"route of ours, changed by another", unix.RTM_NEWROUTE, 0, other, route(fib.Protocol), 22},
		{"route of ours, removed by the kernel", unix.RTM_DELROUTE, 0, 0, route(fib.Protocol), 22},
		{"route of ours, changed by us", unix.RTM_NEWROUTE, 0, self, route(fib.Protocol), 0},
		{"route of another", unix.RTM_NEWROUTE, unix.NLM_F_CREATE, other, route(unix.RTPROT_STATIC), 0},
		{"route of another in the place of one", unix.RTM_NEWROUTE, unix.NLM_F_REPLACE, other, route(unix.RTPROT_STATIC), 16},
		{"route of ours in the place of one, by us", unix.RTM_NEWROUTE, unix.NLM_F_REPLACE, self, route(fib.Protocol), 0},
		{"nexthop of ours, removed by another", unix.RTM_DELNEXTHOP, 0, other, nextHop(fib.Protocol), 19},
		{"nexthop of ours, changed by the kernel", unix.RTM_NEWNEXTHOP, 0, 0, nextHop(fib.Protocol), 19},
		{"nexthop of ours, changed by us", unix.RTM_NEWNEXTHOP, 0, self, nextHop(fib.Protocol), 0},
		{"nexthop of another", unix.RTM_DELNEXTHOP, 0, other, nextHop(unix.RTPROT_STATIC), 0},
		{"nexthop of another in the place of one", unix.RTM_NEWNEXTHOP, unix.NLM_F_REPLACE, other, nextHop(unix.RTPROT_STATIC), 0},
		{"nexthop whose other bytes are our protocol", unix.RTM_NEWNEXTHOP, 0, other, []byte{0: fib.Protocol, 5: fib.Protocol, 7: 0}, 0},
	} {
		m := native.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(tt.body)))
		m = native.AppendUint16(m, tt.kind)
		m = native.AppendUint16(m, tt.flags)
		m = native.AppendUint32(m, 1)
		m = native.AppendUint32(m, tt.sender)
		m = append(m, tt.body...)
		for n := range len(m) + 1 {
			if got, want := sockfiltertest.Passes(t, watchFilter(self), m[:n], nil), tt.need > 0 && n >= tt.need; got != want {
				t.Errorf("%s: %d of %d bytes pass: %v, want %v", tt.name, n, len(m), got, want)
			}
		}
	}
}
