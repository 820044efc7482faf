package capability

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/plan"
)

// AllowanceKinds are the kinds of allowances that are reported: bandwidth in each direction,
// packets a second, tracked connections, and packets a second to the cloud's own services.
var AllowanceKinds = []string{"bw_in", "bw_out", "pps", "conntrack", "linklocal"}

const (
	// allowancePace is the interval of reading the counters.
	allowancePace = 10 * time.Second
	// allowanceTold is how long a counter that grew is reported.
	allowanceTold = 2 * time.Minute
	// maxAllowanceInterfaces bounds the interfaces that are read, the underlay first, because each
	// read takes the kernel's lock of all interfaces (RTNL).
	maxAllowanceInterfaces = 64
)

// AllowanceCounter counts the packets of an interface beyond one allowance.
type AllowanceCounter struct {
	Interface, Kind string
	Packets         uint64
}

// AllowanceOptions are the dependencies of Allowances.
type AllowanceOptions struct {
	// Read reads the counters of an interface by kind, none if there are none. Nil: nothing is
	// read.
	Read    func(iface string) (map[string]uint64, error)
	Target  func() plan.Target
	Changed func() // after the conditions changed
	Log     *slog.Logger
}

// Allowances watches the counters of packets that the cloud holds back or drops because they are
// beyond what it grants the machine.
type Allowances struct {
	AllowanceOptions
	mu     sync.Mutex // guards the fields below
	seen   map[string]map[string]uint64
	growth map[AllowanceCounter]growth // by interface and kind, with zero packets
	failed map[string]bool             // interfaces whose last read failed
}

// growth is a time in which a counter grew.
type growth struct {
	since, last time.Time
	packets     uint64
}

// NewAllowances returns Allowances that have read nothing.
func NewAllowances(o AllowanceOptions) *Allowances {
	return &Allowances{AllowanceOptions: o, seen: map[string]map[string]uint64{}, growth: map[AllowanceCounter]growth{}, failed: map[string]bool{}}
}

// Capability describes Allowances.
func (a *Allowances) Capability() Capability {
	c := Capability{
		Name: "allowances of the cloud", Section: "underlay", Kinds: []*condition.Kind{condition.NICAllowance},
		Conditions: func() []*isthmusv1.Condition { return a.conditions(time.Now()) },
	}
	if a.Read != nil {
		c.Run = a.run
	}
	return c
}

func (a *Allowances) run(ctx context.Context) error {
	tick := time.NewTicker(allowancePace)
	defer tick.Stop()
	for {
		a.look(time.Now())
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// watched returns the interfaces of the document that isthmus does not make itself.
func watched(t plan.Target) (out []string) {
	if t.Underlay.Interface != "" {
		out = append(out, t.Underlay.Interface)
	}
	for _, at := range t.Attachments {
		if _, tunnel := t.Tunnel(at.Name); !tunnel && !slices.Contains(out, at.Interface) && len(out) < maxAllowanceInterfaces {
			out = append(out, at.Interface)
		}
	}
	return out
}

// look reads the counters, and compares them with the former ones. A failed read keeps them.
func (a *Allowances) look(now time.Time) {
	names := watched(a.Target())
	read, errs := map[string]map[string]uint64{}, map[string]error{}
	for _, name := range names {
		read[name], errs[name] = a.Read(name)
	}
	a.mu.Lock()
	news := false
	for _, name := range names {
		if err := errs[name]; err != nil {
			if !a.failed[name] {
				a.Log.Warn("the counters of the cloud's allowances cannot be read; the former ones are shown", "interface", name, "err", err)
			}
			a.failed[name] = true
			continue
		}
		delete(a.failed, name)
		maps.DeleteFunc(read[name], func(kind string, _ uint64) bool { return !slices.Contains(AllowanceKinds, kind) })
		for kind, n := range read[name] {
			key := AllowanceCounter{Interface: name, Kind: kind}
			// A counter that has become smaller is one of another interface, or began again.
			if before, known := a.seen[name][kind]; known && n > before {
				g := a.growth[key]
				if now.Sub(g.last) >= allowanceTold {
					g, news = growth{since: now}, true
				}
				g.last, g.packets = now, g.packets+n-before
				a.growth[key] = g
			}
		}
		a.seen[name] = read[name]
	}
	gone := func(name string) bool { return !slices.Contains(names, name) }
	maps.DeleteFunc(a.seen, func(name string, _ map[string]uint64) bool { return gone(name) })
	maps.DeleteFunc(a.failed, func(name string, _ bool) bool { return gone(name) })
	maps.DeleteFunc(a.growth, func(k AllowanceCounter, g growth) bool {
		ended := gone(k.Interface) || now.Sub(g.last) >= allowanceTold
		news = news || ended
		return ended
	})
	a.mu.Unlock()
	if news {
		a.Changed()
	}
}

// Counters returns the counters that the interfaces have, sorted.
func (a *Allowances) Counters() (out []AllowanceCounter) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(a.seen)) {
		for _, kind := range AllowanceKinds {
			if n, ok := a.seen[name][kind]; ok {
				out = append(out, AllowanceCounter{name, kind, n})
			}
		}
	}
	return out
}

// conditions reports the interfaces with counters that grew lately.
func (a *Allowances) conditions(now time.Time) (out []*isthmusv1.Condition) {
	a.mu.Lock()
	defer a.mu.Unlock()
	keys := slices.SortedFunc(maps.Keys(a.growth), func(x, y AllowanceCounter) int {
		return cmp.Or(strings.Compare(x.Interface, y.Interface), slices.Index(AllowanceKinds, x.Kind)-slices.Index(AllowanceKinds, y.Kind))
	})
	for i := 0; i < len(keys); {
		name, since := keys[i].Interface, time.Time{}
		var kinds []string
		for ; i < len(keys) && keys[i].Interface == name; i++ {
			g := a.growth[keys[i]]
			if now.Sub(g.last) >= allowanceTold {
				continue
			}
			if since.IsZero() || g.since.Before(since) {
				since = g.since
			}
			kinds = append(kinds, fmt.Sprintf("%s (%d packets)", keys[i].Kind, g.packets))
		}
		if len(kinds) > 0 {
			out = append(out, condition.NICAllowance.Warning(since, "interface %s: the cloud held back or dropped packets beyond its allowance %s: choose a larger instance type, or spread the traffic over more nodes", name, strings.Join(kinds, ", ")))
		}
	}
	return out
}
