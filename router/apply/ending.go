package apply

import (
	"context"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/live"
)

// endOrphans ends the flows of addresses that no pool has any more, whichever document, daemon or
// failure removed them. It reads the connection table only if the addresses differ from those of
// its last complete run.
func (a *Applier) endOrphans(ctx context.Context, c nat.Config, f live.Facts) error {
	if a.o.Flows == nil {
		return nil
	}
	var addresses []netip.Addr
	for _, p := range c.Pools {
		for _, o := range p.Addresses {
			addresses = append(addresses, o.Address)
		}
	}
	machine := map[netip.Addr]bool{}
	for _, o := range f.Machine.Addresses {
		machine[o.Prefix.Addr()] = true
		addresses = append(addresses, o.Prefix.Addr())
	}
	if a.cleaned != nil && slices.Equal(a.cleaned, addresses) {
		return nil
	}
	orphaned := c.Orphaned(func(x netip.Addr) bool { return machine[x] })
	n, err := a.o.Flows.End(ctx, unix.AF_UNSPEC, func(f *conntrack.Flow) bool {
		return f.Status&conntrack.Dying == 0 && orphaned(f.Track())
	})
	if n > 0 {
		a.o.Log.Info("flows ended, since their address is in no pool any more", "flows", n)
	}
	if err == nil {
		a.cleaned = append([]netip.Addr{}, addresses...)
	}
	return err
}
