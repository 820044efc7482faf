package link

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/fib"
)

// transitPriority is the priority of the first of the rules of RouteTransit. Those of the machine
// itself are usually smaller, those of the kernel's main and default tables larger.
const transitPriority = 20000

// transitRules returns the rules that send forwarded packets to the table of fib.Transit, if the
// main table has only a default route for them. Packets of the node itself come "from lo".
func transitRules(family int) (out []netlink.Rule) {
	for i, table := range []int{fib.TableMain, int(fib.Transit.Table())} {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table, r.Protocol = family, transitPriority+i, table, Protocol
		r.Invert, r.IifName = true, "lo"
		if table == fib.TableMain {
			r.SuppressPrefixlen = 0
		}
		out = append(out, *r)
	}
	return out
}

func sameRule(a, b netlink.Rule) bool {
	return a.Priority == b.Priority && a.Table == b.Table && a.Invert == b.Invert && a.IifName == b.IifName && a.SuppressPrefixlen == b.SuppressPrefixlen &&
		a.Src == nil && a.Dst == nil && a.Mark == 0 && a.OifName == "" && a.Goto < 0
}

// RouteTransit makes forwarded packets look for a default route in the table of fib.Transit before
// that of the main table, or removes the rules for it (ip-rule(8), suppress_prefixlength). It
// removes every other rule with Protocol.
func (l *Links) RouteTransit(on bool) error {
	_, err := l.setTransit(on)
	return err
}

// ClearTransit removes the rules of RouteTransit, and returns their number.
func (l *Links) ClearTransit() (removed int, err error) { return l.setTransit(false) }

func (l *Links) setTransit(on bool) (removed int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		var rules []netlink.Rule
		err := again(func() (err error) { rules, err = l.h.RuleList(family); return err })
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // the kernel has no IPv6
		}
		if err != nil {
			return removed, fmt.Errorf("listing routing rules: %w", err)
		}
		var missing []netlink.Rule
		if on {
			missing = transitRules(family)
		}
		// The last rule first: without the one before it, it would win over the main table.
		for _, r := range slices.Backward(rules) {
			if r.Protocol != Protocol {
				continue
			}
			if i := slices.IndexFunc(missing, func(w netlink.Rule) bool { return sameRule(r, w) }); i >= 0 {
				missing = slices.Delete(missing, i, i+1)
				continue
			}
			r.Family = family
			switch err := l.h.RuleDel(&r); {
			case err == nil:
				removed++
				l.writes.Add(1)
			case !errors.Is(err, unix.ENOENT):
				errs = append(errs, fmt.Errorf("removing routing rule %d: %w", r.Priority, err))
			}
		}
		for _, r := range missing {
			if err := l.h.RuleAdd(&r); err != nil && !errors.Is(err, unix.EEXIST) {
				errs = append(errs, fmt.Errorf("adding routing rule %d: %w", r.Priority, err))
				break // the second one needs the first
			}
			l.writes.Add(1)
		}
	}
	return removed, errors.Join(errs...)
}
