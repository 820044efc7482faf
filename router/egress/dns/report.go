package dns

import (
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/router/egress"
)

// Addresses returns the present addresses of a name or wildcard that was set, in order.
func (r *Resolver) Addresses(name string) []netip.Addr {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.table.addresses(name)
}

// Lately returns the addresses that names lost within the last hour, in the order in which they
// went; at most the last 4096.
func (r *Resolver) Lately() []Gone {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.table.lately(time.Now())
}

// Held returns the names of each address that stays while flows use it. It is empty unless
// Config.Hold is set.
func (r *Resolver) Held() map[netip.Addr][]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[netip.Addr][]string{}
	if r.table.hold == 0 {
		return out
	}
	for name, record := range r.table.records {
		for a := range record.entries {
			out[a] = append(out[a], name)
		}
	}
	return out
}

// State is the state of a name.
type State struct {
	Addresses []netip.Addr
	Next      time.Time // of the next query; zero for a wildcard
	// LastError is why queries fail, with the family, and Failing since when; zero when they do
	// not.
	LastError string
	Failing   time.Time
	// Stale counts the addresses of families whose queries fail.
	Stale int
	// Differs is the time since when each answer to the node has had new addresses although no
	// client has asked the proxy for the name lately; zero: it is not so.
	Differs time.Time
	// Refused are addresses of the last answers that no name may have, at most four of a family.
	Refused []netip.Addr
}

// State returns the state of a name or wildcard.
func (r *Resolver) State(name string) State {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := State{Addresses: r.table.addresses(name)}
	record := r.table.records[name]
	if record == nil || egress.IsWildcard(name) {
		return s
	}
	s.Differs = r.table.differs(record, time.Now())
	for i, q := range record.queries {
		if q.unused {
			continue
		}
		s.Refused = append(s.Refused, q.refused...)
		if s.Next.IsZero() || q.next.Before(s.Next) {
			s.Next = q.next
		}
		if q.err != "" {
			if s.LastError != "" {
				s.LastError += "; "
			}
			s.LastError += [2]string{"IPv4: ", "IPv6: "}[i] + q.err
			if s.Failing.IsZero() || q.failing.Before(s.Failing) {
				s.Failing = q.failing
			}
			for _, a := range s.Addresses {
				s.Stale += b2i(b2i(a.Is6()) == i)
			}
		}
	}
	return s
}
