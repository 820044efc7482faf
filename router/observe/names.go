package observe

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
)

const (
	// useEvery is the interval at which the connection table is read for flows to addresses of
	// names. The kernel keeps a TCP connection that was reset for ten seconds, others for longer.
	useEvery = 10 * time.Second
	// useShare bounds the cost of reading: at most one part in so many of the time.
	useShare = 50
)

// WatchUse reports to the resolver which addresses of names flows use, while the document has
// `nameHold`, until ctx is done.
func (o *Observer) WatchUse(ctx context.Context) error {
	told := ""
	for {
		began := time.Now()
		err := o.noteUse(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && err.Error() != told:
			told = err.Error()
			o.o.Log.Warn("the use of addresses of names is unknown; they expire `nameHold` after their last answer", "err", err)
		case err == nil:
			told = ""
		}
		hold := o.Target().Names.Hold
		wait := max(useEvery, useShare*time.Since(began))
		if hold > 0 {
			wait = min(wait, hold/2)
		}
		pause(ctx, wait)
	}
}

// noteUse reads the connection table once, if an address is held by use. A flow counts if its
// source is among those of a policy with the name.
func (o *Observer) noteUse(ctx context.Context) error {
	held := o.o.Names.Held()
	if o.o.Flows == nil || len(held) == 0 {
		return nil
	}
	policies := o.Target().NAT.Policies
	sources := map[string][]netip.Prefix{}
	for i := range policies {
		for _, name := range policies[i].Names {
			sources[name] = append(sources[name], policies[i].Sources...)
		}
	}
	type use struct {
		name string
		a    netip.Addr
	}
	used := map[use]bool{}
	err := o.o.Flows.Dump(ctx, unix.AF_UNSPEC, func(f *conntrack.Flow) bool {
		to, from := f.Original.Destination.Addr(), f.Original.Source.Addr()
		for _, name := range held[to] {
			if u := (use{name, to}); !used[u] && slices.ContainsFunc(sources[name], func(p netip.Prefix) bool { return p.Contains(from) }) {
				used[u] = true
			}
		}
		return true
	})
	if err != nil {
		return fmt.Errorf("reading the connection table: %w", err)
	}
	for u := range used {
		o.o.Names.Used(u.name, u.a)
	}
	return nil
}

// maxToldNames bounds the names in the log entry of a dropped packet.
const maxToldNames = 3

// LeftNames returns whether the destination of a packet that the guard drops was recently an
// address of a name, as text; empty: it was not, or no policy has the name for this source.
func (o *Observer) LeftNames(c nat.Config, f nat.Flow) string {
	var out []string
	more := 0
	for _, g := range slices.Backward(o.o.Names.Lately()) {
		has := func(p nat.Policy) bool {
			return slices.Contains(p.Names, g.Name) && slices.ContainsFunc(p.Sources, func(s netip.Prefix) bool { return s.Contains(f.Source) })
		}
		switch {
		case g.Address != f.Destination || !slices.ContainsFunc(c.Policies, has):
		case len(out) == maxToldNames:
			more++
		default:
			out = append(out, fmt.Sprintf("of %s until %v ago", g.Name, time.Since(g.At).Round(time.Second)))
		}
	}
	if len(out) == 0 {
		return ""
	}
	if more > 0 {
		out = append(out, fmt.Sprintf("and of %d more names", more))
	}
	return fmt.Sprintf("; %v was an address %s: clients that keep addresses for longer than DNS says need `nameHold`, or `dnsProxy` when they ask another resolver", f.Destination, strings.Join(out, ", "))
}
