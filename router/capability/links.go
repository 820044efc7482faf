package capability

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/lane"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/tunnel"
)

// LaneProver proves lanes; see router/lane/proof.
type LaneProver interface {
	// Use sets the links to prove.
	Use([]lane.Link)
	State() []lane.LinkState
	// Run works until ctx is done.
	Run(ctx context.Context) error
}

// LaneObserver has the states of tunnels, and keeps routes out of lanes.
type LaneObserver interface {
	SetLanes(out map[string]bool)
	TunnelStates() map[string]tunnel.State
}

// LinkOptions are the dependencies of Links.
type LinkOptions struct {
	Prover   LaneProver
	Observed LaneObserver
	// Shares counts the buckets of groups of next hops, by interface. Nil: unknown.
	Shares func(context.Context) (map[string]int, error)
	// Heal negotiates new keys of a tunnel, or with again makes its interface again.
	Heal    func(ctx context.Context, tunnel string, again bool) error
	Changed func()
	Log     *slog.Logger
}

// Links proves the lanes of links, keeps routes out of those that do not carry packets, and heals
// them.
type Links struct {
	o    LinkOptions
	kick chan struct{}

	mu     sync.Mutex
	states []lane.LinkState
	shares map[string]int
	healer lane.Healer
	since  map[string]time.Time // when links lost their last usable lane
	said   map[string]string    // what the log says of each lane
}

// NewLinks returns Links.
func NewLinks(o LinkOptions) *Links {
	return &Links{o: o, kick: make(chan struct{}, 1), healer: lane.Healer{}, since: map[string]time.Time{}, said: map[string]string{}}
}

// Kick has the states of the lanes read at once: one of them has changed.
func (l *Links) Kick() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// Capability describes Links.
func (l *Links) Capability() Capability {
	return Capability{
		Name: "links between nodes", Section: "links", Nouns: []api.Noun{api.Links.From(l.List)}, Conditions: l.conditions, Run: l.run,
		Kinds: []*condition.Kind{condition.LaneDead, condition.LaneMTU, condition.LaneUnproved, condition.LinkDown, condition.LinkSilent},
		Jobs: []apply.Job{{
			Key: "lanes", Stage: apply.StageTunnel, Part: func(t *plan.Target) any { return links(t) },
			Do: func(_ context.Context, t *plan.Target) error { l.o.Prover.Use(links(t)); return nil },
		}},
	}
}

// links returns the links of a target, with the lanes that are enabled.
func links(t *plan.Target) []lane.Link {
	var out []lane.Link
	for _, link := range t.Links {
		one := lane.Link{Name: link.Name, Node: link.Node}
		for _, name := range link.Lanes {
			if i, ok := t.Tunnel(name); ok && !t.Tunnels[i].Disabled {
				c := t.Tunnels[i]
				one.Lanes = append(one.Lanes, lane.Lane{Name: name, Number: c.Number, Interface: c.Interface, Local: c.Inside[0].Local.Addr(), Remote: c.Inside[0].Remote, MTU: c.MTU})
			}
		}
		if len(one.Lanes) > 0 {
			out = append(out, one)
		}
	}
	return out
}

const (
	// lookEvery is the time between two looks at figures that change without an event.
	lookEvery = 500 * time.Millisecond
	// countEvery is the number of looks between two counts of buckets.
	countEvery = 4
)

func (l *Links) run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { _ = l.o.Prover.Run(ctx) })
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for n := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-l.kick:
			l.look(ctx, true)
		case <-tick.C:
			if n++; l.look(ctx, false) && n%countEvery == 0 {
				l.count(ctx)
			}
		}
	}
}

// look takes the states of the lanes, has routes leave those that are not usable, and heals them.
// changed says that a state has changed. It returns whether there are links.
func (l *Links) look(ctx context.Context, changed bool) bool {
	states := l.o.Prover.State()
	out := map[string]bool{}
	for _, s := range states {
		for _, one := range s.Lanes {
			if !one.Usable {
				out[one.Name] = true
			}
		}
	}
	l.o.Observed.SetLanes(out)
	now := time.Now()
	l.mu.Lock()
	l.states = states
	l.say(now)
	heals := l.healer.Due(states, now)
	l.mu.Unlock()
	for _, h := range heals {
		l.o.Log.Info("healing a lane", "lane", h.Lane, "how", h.How())
		if err := l.o.Heal(ctx, h.Lane, h.Again); err != nil {
			l.o.Log.Warn("healing a lane failed", "lane", h.Lane, "err", err)
			l.mu.Lock()
			l.healer.Failed(h.Lane, err)
			l.mu.Unlock()
		}
	}
	if changed || len(heals) > 0 {
		l.o.Changed()
	}
	return len(states) > 0
}

// count counts the buckets of the groups of next hops.
func (l *Links) count(ctx context.Context) {
	if l.o.Shares == nil {
		return
	}
	counted, err := l.o.Shares(ctx)
	if err != nil {
		l.o.Log.Debug("the shares of lanes are unknown", "err", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shares = counted
}

// say logs what has changed, and keeps since when links are down.
func (l *Links) say(now time.Time) {
	said, since := map[string]string{}, map[string]time.Time{}
	for _, s := range l.states {
		for _, one := range s.Lanes {
			text := fmt.Sprintf("%s out, %s in", one.Out.Status, one.In.Status)
			if said[one.Name] = text; l.said[one.Name] != text {
				l.o.Log.Info("lane is "+text, "lane", one.Name, "link", s.Name, "node", s.Node, "usable", one.Usable, "reason", one.Why)
			}
		}
		if s.Usable() == 0 {
			since[s.Name] = now
			if at, known := l.since[s.Name]; known {
				since[s.Name] = at
			}
		}
	}
	l.said, l.since = said, since
}

// List returns the links with the states of their lanes, by name.
func (l *Links) List() []*isthmusv1.LinkStatus {
	tunnels := l.o.Observed.TunnelStates()
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]*isthmusv1.LinkStatus, 0, len(l.states))
	for _, s := range l.states {
		one := &isthmusv1.LinkStatus{Name: s.Name, Node: s.Node, Usable: uint32(s.Usable()), Silent: stamp(s.Silent), Restarts: uint32(s.Restarts), Stalls: uint32(s.Stalls)}
		for _, state := range s.Lanes {
			one.Lanes = append(one.Lanes, l.laneStatus(state, tunnels[state.Name]))
		}
		out = append(out, one)
	}
	slices.SortFunc(out, func(a, b *isthmusv1.LinkStatus) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func (l *Links) laneStatus(s lane.LaneState, t tunnel.State) *isthmusv1.LaneStatus {
	out := &isthmusv1.LaneStatus{
		Tunnel: s.Name, Number: uint32(s.Number), Interface: s.Interface, Local: s.Local.String(), Remote: s.Remote.String(),
		Out: direction(s.Out), In: direction(s.In), Usable: s.Usable, Reason: s.Why, Silent: s.Silent, PathMtu: uint32(s.PathMTU),
		Buckets: uint32(l.shares[s.Interface]), RxBytes: t.RxBytes, TxBytes: t.TxBytes, RxPackets: t.RxPackets, TxPackets: t.TxPackets,
	}
	if s.RTT.Samples > 0 {
		out.RttP50, out.RttP99 = durationpb.New(s.RTT.P50), durationpb.New(s.RTT.P99)
	}
	if s.Err != nil {
		out.LastError = s.Err.Error()
	}
	if h := l.healer[s.Name]; h != nil && h.Count > 0 {
		out.Heals, out.Healed, out.Heal = uint32(h.Count), stamp(h.At), h.How
		if h.Err != nil {
			out.LastError = h.Err.Error()
		}
	}
	return out
}

func direction(d lane.Direction) *isthmusv1.LaneDirection {
	out := &isthmusv1.LaneDirection{Status: string(d.Status), Since: stamp(d.Since), Reason: d.Why}
	if d.Loss >= 0 {
		out.Loss = &d.Loss
	}
	return out
}

// silentAfter is how long the daemon of the other node may be silent before it is reported: it may
// be starting again.
const silentAfter = 10 * time.Second

func (l *Links) conditions() (out []*isthmusv1.Condition) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.states {
		add := func(c *isthmusv1.Condition) { c.Object = "link " + s.Name; out = append(out, c) }
		if !s.Silent.IsZero() && time.Since(s.Silent) >= silentAfter {
			add(condition.LinkSilent.Warning(s.Silent, "link %s: the daemon of %s has sent nothing since %s, and its kernel answers: lanes that die one way are not recognized", s.Name, s.Node, clock(s.Silent)))
		}
		if at, down := l.since[s.Name]; down {
			add(condition.LinkDown.Error(at, "link %s: no lane carries packets both ways to %s: %s", s.Name, s.Node, s.Lanes[0].Why))
			continue
		}
		for _, one := range s.Lanes {
			if c := l.laneCondition(s, one); c != nil {
				add(c)
			}
		}
	}
	return out
}

// laneCondition describes a lane of a link that works.
func (l *Links) laneCondition(s lane.LinkState, one lane.LaneState) *isthmusv1.Condition {
	var dead []string
	since := time.Time{}
	for _, d := range []struct {
		lane.Direction
		name string
	}{{one.Out, "to " + s.Node}, {one.In, "from " + s.Node}} {
		if d.Status == lane.Dead {
			dead = append(dead, fmt.Sprintf("%s since %s (%s)", d.name, clock(d.Since), d.Why))
			if since.IsZero() || d.Since.Before(since) {
				since = d.Since
			}
		}
	}
	switch {
	case len(dead) > 0:
		healed := ""
		if h := l.healer[one.Name]; h != nil && h.Count > 0 {
			healed = fmt.Sprintf("; this node has tried to heal it %d times, at %s by %s", h.Count, clock(h.At), h.How)
		}
		return condition.LaneDead.Warning(since, "lane %s is dead %s; its flows use %d other lanes%s", one.Name, strings.Join(dead, " and "), s.Usable(), healed)
	case one.Out.Status == lane.MTU:
		return condition.LaneMTU.Warning(one.Out.Since, "lane %s: %s", one.Name, one.Out.Why)
	case one.In.Status == lane.MTU:
		return condition.LaneMTU.Warning(one.In.Since, "lane %s: %s", one.Name, one.In.Why)
	case !one.Usable:
		return condition.LaneUnproved.Warning(one.In.Since, "lane %s has not been proved since it exists: %s to %s, %s from it", one.Name, one.Out.Status, s.Node, one.In.Status)
	}
	return nil
}

func clock(t time.Time) string { return t.UTC().Format(time.TimeOnly) }
