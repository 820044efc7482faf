package report

import (
	"slices"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
)

// interfaceConditions reports interfaces of the document that the machine does not have, or that
// are down.
func interfaceConditions(t plan.Target, seen fib.Surroundings) (out []*isthmusv1.Condition) {
	if len(seen.Devices) == 0 {
		return nil // the machine has not been read yet
	}
	look := func(of, name string) {
		switch link, there := seen.Devices[name]; {
		case !there:
			out = append(out, condition.InterfaceMissing.Error(time.Time{}, "interface %s of %s is not on this machine; compare with `ip link`", name, of))
		case link.Down:
			out = append(out, condition.InterfaceDown.Error(time.Time{}, "interface %s of %s is down or has no carrier: nothing passes there", name, of))
		}
	}
	if t.Underlay.Interface != "" {
		look("the underlay", t.Underlay.Interface)
	}
	for _, a := range t.Attachments {
		if _, tunnel := t.Tunnel(a.Name); !tunnel && a.Interface != t.Underlay.Interface {
			look("attachment "+a.Name, a.Interface)
		}
	}
	return out
}

// wayConditions reports outside addresses of peers that the kernel does not reach through the
// underlay.
func wayConditions(t plan.Target, seen fib.Surroundings) (out []*isthmusv1.Condition) {
	u := t.Underlay
	if len(seen.Addresses) > 0 && u.Interface != "" && !slices.ContainsFunc(seen.Addresses, func(a fib.Assigned) bool { return a.Interface == u.Interface && a.Prefix.Addr() == u.Address }) {
		out = append(out, condition.NoUnderlayAddress.Error(time.Time{}, "interface %s does not have underlay.address %v; compare with `ip address`", u.Interface, u.Address))
	}
	if link, ok := seen.Devices[u.Interface]; ok && len(t.Tunnels) > 0 && link.MTU < u.MTU {
		out = append(out, condition.UnderlayMTU.Error(time.Time{}, "interface %s has an MTU of %d and the document expects %d: packets of tunnels that have no mtu of their own are fragmented or lost; set underlay.mtu to %d", u.Interface, link.MTU, u.MTU, link.MTU))
	}
	for _, c := range t.Tunnels {
		to := c.Outside().Addr()
		if by := seen.Way(to); to.IsValid() && by != "" && by != t.Underlay.Interface {
			one := condition.NotByUnderlay.Error(time.Time{}, "tunnel %s: the kernel sends to %v by interface %s, and the document says %s; add a route to it by %s, or change underlay.interface", c.Name, to, by, t.Underlay.Interface, t.Underlay.Interface)
			one.Object = "tunnel " + c.Name
			out = append(out, one)
		}
	}
	return out
}

func (r *Report) charonConditions() (out []*isthmusv1.Condition) {
	words, since, err := r.Observed.Charon()
	if err != nil {
		out = append(out, condition.CharonUnreachable.Error(since, "%v; established tunnels go on until their keys expire: start charon (systemctl start strongswan)", err))
	}
	for _, w := range words {
		out = append(out, condition.CharonUnfit.Warning(since, "%s", w))
	}
	return out
}
