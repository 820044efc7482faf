package conntrack

import (
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
)

// Track returns the fields by which flows are selected to be ended.
func (f *Flow) Track() nat.Track {
	t := nat.Track{
		Source: f.Original.Source.Addr(), Destination: f.Original.Destination.Addr(),
		LeavesAs: f.Reply.Destination.Addr(), GoesTo: f.Reply.Source.Addr(),
		Protocol: f.Protocol,
	}
	if f.Protocol != unix.IPPROTO_ICMP && f.Protocol != unix.IPPROTO_ICMPV6 {
		t.Port, t.ServerPort = f.Original.Destination.Port(), f.Reply.Source.Port()
	}
	return t
}

// UnderWay reports whether the flow is active: it is not being removed, and a TCP connection does
// not merely wait for late packets (TIME_WAIT and CLOSE of the kernel's enum tcp_conntrack).
func (f *Flow) UnderWay() bool {
	const timeWait, closed = 7, 8
	return f.Status&Dying == 0 && f.TCPState != timeWait && f.TCPState != closed
}
