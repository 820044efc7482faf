package document

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
)

// countTime bounds how long a plan waits for the count of flows.
const countTime = 3 * time.Second

// counted adds to each change the number of flows that it ends.
func (m *Manager) counted(changes []plan.Change) []plan.Change {
	var ends []nat.Ending
	for _, c := range changes {
		ends = append(ends, c.Ends...)
	}
	if len(ends) == 0 {
		return changes
	}
	counts, err := []int(nil), errTooManyEndings
	if len(ends) <= maxCounted {
		ctx, cancel := context.WithTimeout(context.Background(), countTime)
		counts, err = m.Machine.Count(ctx, ends)
		cancel()
	}
	for i := range changes {
		c := &changes[i]
		var said []string
		if c.Interrupts != "" {
			said = append(said, c.Interrupts)
		}
		for _, e := range c.Ends {
			if err != nil {
				said = append(said, fmt.Sprintf("flows %s end, their number is unknown: %v", e.Flows, err))
				continue
			}
			said = append(said, ended(counts[0], e.Flows))
			counts = counts[1:]
		}
		c.Interrupts = strings.Join(said, "; ")
	}
	return changes
}

// maxCounted bounds the sets of flows that are counted: each flow is compared with each set.
const maxCounted = 1000

var errTooManyEndings = fmt.Errorf("more than %d objects end some", maxCounted)

// ended describes n flows that end, as "3,214 flows from 203.0.113.9 end".
func ended(n int, flows string) string {
	if n == 1 {
		return "1 flow " + flows + " ends"
	}
	return thousands(n) + " flows " + flows + " end"
}

// thousands formats a number with a comma before each three digits.
func thousands(n int) string {
	digits := strconv.Itoa(n)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

// strange returns the interfaces that have a network and are not in the document, with their
// networks as text.
func strange(t plan.Target, seen fib.Surroundings) (out []string) {
	networks := map[string][]string{}
	for _, a := range seen.Addresses {
		named := a.Interface == t.Underlay.Interface || slices.Contains(t.NAT.Attached(), a.Interface)
		if !named && !a.Prefix.IsSingleIP() && !a.Prefix.Addr().IsLoopback() && !a.Prefix.Addr().IsLinkLocalUnicast() {
			networks[a.Interface] = append(networks[a.Interface], a.Prefix.Masked().String())
		}
	}
	for name, all := range networks {
		out = append(out, fmt.Sprintf("%s (%s)", name, strings.Join(all, ", ")))
	}
	slices.Sort(out)
	return out
}

// surprises returns notes about interfaces and addresses of the machine that the document does not
// name, and about those that it names and the machine does not have.
func surprises(s *spec.Spec, t plan.Target, seen fib.Surroundings) (out spec.Problems) {
	if len(seen.Addresses) == 0 {
		return nil // the machine has not been read yet
	}
	note := func(path, value, rule, remedy string) {
		out = append(out, spec.Problem{Path: path, Value: value, Rule: rule, Remedy: remedy, Line: s.Line(path)})
	}
	for _, name := range strange(t, seen) {
		iface, _, _ := strings.Cut(name, " ")
		note("attachments", name, "is an interface that the document does not name: nothing is forwarded from or to it",
			fmt.Sprintf("if a network behind it is a spoke, add `- {name: lan, interface: %s, sources: [...]}`", iface))
	}
	missing := func(path, name string) bool {
		if _, there := seen.Devices[name]; there {
			return false
		}
		note(path, name, "is not an interface of this machine at present", "compare it with `ip link`")
		return true
	}
	for _, a := range s.Attachments {
		missing(a.Path()+".interface", a.Interface)
	}
	if missing("underlay.interface", t.Underlay.Interface) {
		return out
	}
	if !slices.ContainsFunc(seen.Addresses, func(a fib.Assigned) bool {
		return a.Interface == t.Underlay.Interface && a.Prefix.Addr() == t.Underlay.Address
	}) {
		note("underlay.address", t.Underlay.Address.String(), "is not an address of interface "+t.Underlay.Interface+" at present", "compare it with `ip address`")
	}
	return out
}

// cut adds to the changes the addresses that the node loses, with the ports that listen there, the
// services that are closed, and a warning if the caller loses the API. The zero caller loses
// nothing.
func (m *Manager) cut(changes []plan.Change, from, to plan.Target, caller netip.Addr) []plan.Change {
	seen := m.Machine.Surroundings()
	has := func(t plan.Target, a netip.Addr) bool {
		return slices.ContainsFunc(t.NAT.Pools, func(p nat.Pool) bool {
			return slices.ContainsFunc(p.Addresses, func(q nat.PoolAddress) bool { return q.Address == a })
		})
	}
	for i := range changes {
		c := &changes[i]
		add := func(said string) { interrupt(c, said) }
		switch {
		case c.Kind == "access" && c.Name == "api" && caller.IsValid() && !slices.ContainsFunc(to.NAT.API.From, func(p netip.Prefix) bool { return p.Contains(caller) }):
			add(fmt.Sprintf("this document closes the API to you (%v); use --confirm-within", caller))
		case c.Kind == "access" && c.Name == "input" && to.NAT.Input.Drop && !from.NAT.Input.Drop:
			if ports := m.Machine.Listening(to.Underlay.Address); len(ports) > 0 {
				add("ports that listen now: " + strings.Join(ports, ", "))
			}
		}
		if c.Kind != "pool" || c.Action == plan.Remove {
			continue
		}
		for _, a := range to.NAT.Pool(c.Name).Addresses {
			if a.Address == to.Underlay.Address || has(from, a.Address) || !slices.ContainsFunc(seen.Addresses, func(o fib.Assigned) bool { return o.Prefix.Addr() == a.Address }) {
				continue
			}
			said := fmt.Sprintf("%v is an address of the node, which will no longer answer there", a.Address)
			if ports := m.Machine.Listening(a.Address); len(ports) > 0 {
				said += ": " + strings.Join(ports, ", ")
			}
			add(said)
		}
	}
	return changes
}
