package link

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ClearPools removes every address that AddPool has added to any interface, and returns their
// number.
func (l *Links) ClearPools() (removed int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	added, err := l.poolLocked()
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, p := range added {
		if err := l.changeAddress(unix.RTM_DELADDR, p.index, p.Address); err != nil {
			errs = append(errs, fmt.Errorf("removing address %s of %s: %w", p.Local, p.iface, err))
			continue
		}
		removed++
	}
	return removed, errors.Join(errs...)
}

// ClearLinks removes every interface of the kinds in Ensure whose alias begins with mark, and
// returns their number.
func (l *Links) ClearLinks(mark string) (removed int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ours, err := l.List(mark)
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, link := range ours {
		if link.Kind != Xfrm && link.Kind != WireGuard && link.Kind != TUN {
			continue
		}
		if err := l.delete(link); err != nil {
			errs = append(errs, fmt.Errorf("removing interface %s: %w", link.Name, err))
			continue
		}
		removed++
	}
	return removed, errors.Join(errs...)
}

// ClearIPsec removes the IPsec states and policies with an if_id from first to last, and returns
// their number. A kernel without IPsec has none.
func (l *Links) ClearIPsec(first, last uint32) (removed int, err error) {
	var states []netlink.XfrmState
	err = again(func() (err error) { states, err = l.h.XfrmStateList(netlink.FAMILY_ALL); return err })
	if absent(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("listing IPsec states: %w", err)
	}
	var policies []netlink.XfrmPolicy
	if err := again(func() (err error) { policies, err = l.h.XfrmPolicyList(netlink.FAMILY_ALL); return err }); err != nil {
		return 0, fmt.Errorf("listing IPsec policies: %w", err)
	}
	ours := func(id int) bool { return uint32(id) >= first && uint32(id) <= last }
	var errs []error
	count := func(err error) {
		switch {
		case errors.Is(err, unix.ESRCH), errors.Is(err, unix.ENOENT): // gone meanwhile
		case err != nil:
			errs = append(errs, err)
		default:
			removed++
			l.writes.Add(1)
		}
	}
	for _, p := range policies {
		if ours(p.Ifid) {
			count(l.h.XfrmPolicyDel(&p))
		}
	}
	for _, s := range states {
		if ours(s.Ifid) {
			count(l.h.XfrmStateDel(&netlink.XfrmState{Dst: s.Dst, Src: s.Src, Proto: s.Proto, Spi: s.Spi, Ifid: s.Ifid, Mark: s.Mark}))
		}
	}
	if len(errs) > 0 {
		return removed, fmt.Errorf("removing IPsec states and policies: %w", errors.Join(errs...))
	}
	return removed, nil
}

// absent reports that the kernel has no IPsec, or no netlink interface for it.
func absent(err error) bool {
	return errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}
