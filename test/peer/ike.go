package peer

import (
	"context"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/lab"
)

// IKE is a running IKE daemon: strongSwan's or libreswan's.
type IKE interface {
	// Load sets the daemon's tunnels to exactly these.
	Load(context.Context, ...Tunnel) error
	// Children is the number of installed CHILD_SAs of each tunnel.
	Children(context.Context) (map[string]int, error)
	// RekeyIKE and RekeyChild start a rekey of the tunnel from this side.
	RekeyIKE(ctx context.Context, tunnel string) error
	RekeyChild(ctx context.Context, tunnel string) error
	// Terminate closes the tunnel's IKE_SA from this side.
	Terminate(ctx context.Context, tunnel string) error
	// Kill ends the daemon as a crash of its machine would: the peer receives nothing, and SAs and
	// policies are gone.
	Kill(context.Context) error
}

// crash kills a daemon and removes its SAs and policies from the kernel.
func crash(ctx context.Context, n *lab.Node, p *lab.Process) error {
	p.Signal(unix.SIGKILL)
	<-p.Done()
	_, err := n.Exec(ctx, "sh", "-c", "ip xfrm state flush && ip xfrm policy flush")
	return err
}

func orAddress(id string, a netip.Addr) string {
	if id == "" {
		return a.String()
	}
	return id
}
