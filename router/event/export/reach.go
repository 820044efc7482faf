package export

import (
	"fmt"
	"net"
	"net/netip"
	"syscall"
)

// dialer connects to addresses that reach allows, whatever their name was.
func dialer(reach func(netip.Addr) error) *net.Dialer {
	return &net.Dialer{Timeout: sendTime, KeepAlive: sendTime, Control: func(_, address string, _ syscall.RawConn) error {
		a, err := netip.ParseAddrPort(address)
		if err == nil {
			err = reach(a.Addr())
		}
		if err != nil {
			return fmt.Errorf("the receiver %s %w", address, err)
		}
		return nil
	}}
}
