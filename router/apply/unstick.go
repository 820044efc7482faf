package apply

import (
	"context"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
)

// Bounds of removing flows from the connection table.
const (
	// downBeforeEnd is how long an address must be down before flows that leave with it end, so
	// that a flap ends none.
	downBeforeEnd = 3 * time.Second
	// betweenEnds is the minimum time between two such endings for one address.
	betweenEnds = 30 * time.Second
	// endsAtOnce is the maximum number of flows that end in a second: each of them begins again.
	endsAtOnce = 20_000
	// endRetry is the delay after a failed read of the table.
	endRetry = 5 * time.Second
	// maxEndJobs bounds the sets of flows that wait to be ended; further ones are merged into the
	// last.
	maxEndJobs = 16
)

// unsticker removes flows of connectionless protocols that cannot continue from the connection
// table. Such a flow never reaches the rules again while its client sends, because each packet
// renews its entry.
type unsticker struct {
	flows Flows
	log   *slog.Logger
	kick  chan struct{}

	mu   sync.Mutex
	jobs []endJob
	// stopped has the policies whose flows were ended last, and swept the rules that flows were
	// last compared with.
	stopped []nat.Policy
	swept   nat.Config
	// addresses whose flows are to end, with the due time; zero: done
	down map[netip.Addr]time.Time
	last map[netip.Addr]time.Time // when the flows of an address were last ended
}

// endJob is a set of flows to end.
type endJob struct {
	why string
	has func(nat.Track) bool
	// all includes flows of protocols with connections.
	all bool
}

func newUnsticker(flows Flows, log *slog.Logger) *unsticker {
	return &unsticker{flows: flows, log: log, kick: make(chan struct{}, 1), down: map[netip.Addr]time.Time{}, last: map[netip.Addr]time.Time{}}
}

// use receives the configuration in force, with the addresses that are down. Flows that leave with
// such an address end after a while if another address of its pool and family is up. With blocks, a
// source has no other address.
func (u *unsticker) use(c nat.Config, leaves func(netip.Addr) bool) {
	if u == nil {
		return
	}
	now, down := time.Now(), map[netip.Addr]bool{}
	for _, p := range c.Pools {
		for _, ipv6 := range []bool{false, true} {
			all := p.Family(ipv6)
			if p.Blocks != nil || !slices.ContainsFunc(all, func(a nat.PoolAddress) bool { return !a.Down }) {
				continue
			}
			for _, a := range all {
				if a.Down {
					down[a.Address] = true
				}
			}
		}
	}
	u.stop(c)
	u.sweepUnder(c, leaves)
	u.mu.Lock()
	for a := range u.down {
		if !down[a] {
			delete(u.down, a)
		}
	}
	for a := range down {
		if _, known := u.down[a]; !known {
			u.down[a] = latest(now.Add(downBeforeEnd), u.last[a].Add(betweenEnds))
		}
	}
	for a, at := range u.last {
		if now.Sub(at) > betweenEnds {
			delete(u.last, a)
		}
	}
	u.mu.Unlock()
	u.wake()
}

// stop ends flows that policies end, once for each set of policies: new flows that such a policy
// matches do not begin. After a start of the daemon it runs again.
func (u *unsticker) stop(c nat.Config) {
	same := slices.EqualFunc(u.stopped, c.Policies, func(p, q nat.Policy) bool { return p.Equal(&q) })
	u.stopped = c.Policies
	if same {
		return
	}
	if stopper := c.Stopper(); stopper != nil {
		u.end(endJob{why: "a policy ends them", all: true, has: func(t nat.Track) bool { return stopper(t) != nil }})
	}
}

// sweepUnder ends flows of connectionless protocols that began under other rules and cannot
// continue under these. After a start of the daemon it checks all flows.
func (u *unsticker) sweepUnder(c nat.Config, leaves func(netip.Addr) bool) {
	same := slices.EqualFunc(u.swept.Policies, c.Policies, samePolicy) &&
		reflect.DeepEqual(u.swept.Maps, c.Maps) && reflect.DeepEqual(u.swept.Attachments, c.Attachments)
	u.swept = c
	if same {
		return // the health of addresses and proxies sends no flow astray
	}
	astray := c.Astray(leaves)
	u.end(endJob{why: "the rules have changed", has: func(t nat.Track) bool { return astray(t) != "" }})
}

// samePolicy compares two policies, ignoring the health of their proxies.
func samePolicy(p, q nat.Policy) bool {
	p.Down, q.Down = false, false
	return p.Equal(&q)
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// end ends the flows in a set, if their protocol has no connections.
func (u *unsticker) end(j endJob) {
	u.mu.Lock()
	same := -1
	for i := range u.jobs {
		if u.jobs[i].all == j.all {
			same = i
		}
	}
	if len(u.jobs) < maxEndJobs || same < 0 {
		u.jobs = append(u.jobs, j)
	} else {
		had := u.jobs[same].has
		u.jobs[same].has = func(t nat.Track) bool { return had(t) || j.has(t) }
	}
	u.mu.Unlock()
	u.wake()
}

func (u *unsticker) wake() {
	select {
	case u.kick <- struct{}{}:
	default:
	}
}

// due returns the sets whose time has come, the number of jobs among them, and the next due time;
// zero: at the next event.
func (u *unsticker) due(now time.Time) (sets []endJob, jobs int, next time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	sets = slices.Clone(u.jobs)
	for a, at := range u.down {
		switch {
		case at.IsZero():
		case !at.After(now):
			sets = append(sets, endJob{why: "address " + a.String() + " is down", has: leavesAs(a)})
		case next.IsZero() || at.Before(next):
			next = at
		}
	}
	return sets, len(u.jobs), next
}

// leavesAs returns the set of flows from inside that leave with an address.
func leavesAs(a netip.Addr) func(nat.Track) bool {
	return func(t nat.Track) bool {
		// the node's own flows stay, and those turned back inside
		return t.LeavesAs == a && t.Source != a && t.Destination != a
	}
}

// run ends flows until ctx is done.
func (u *unsticker) run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-u.kick:
		case <-timer.C:
		}
		timer.Stop()
		now := time.Now()
		sets, jobs, next := u.due(now)
		if len(sets) == 0 {
			if !next.IsZero() {
				timer.Reset(time.Until(next))
			}
			continue
		}
		all, err := u.sweep(ctx, sets)
		if err != nil && ctx.Err() == nil {
			u.log.Warn("ending flows that cannot live on failed; trying again", "err", err)
		}
		wait := time.Second
		switch {
		case err != nil:
			wait = endRetry
		case all:
			u.done(jobs, now)
			wait = 0
		}
		// Work that arrives meanwhile waits too: this pause bounds the rate.
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		timer.Reset(0)
	}
}

// sweep ends the flows of some sets, and reports whether these were all.
func (u *unsticker) sweep(ctx context.Context, sets []endJob) (all bool, err error) {
	ended := make([]int, len(sets))
	left := endsAtOnce
	_, err = u.flows.End(ctx, unix.AF_UNSPEC, func(f *conntrack.Flow) bool {
		if left == 0 || f.Status&conntrack.Dying != 0 {
			return false
		}
		t, bare := f.Track(), nat.Connectionless(f.Protocol)
		i := slices.IndexFunc(sets, func(s endJob) bool { return (bare || s.all) && s.has(t) })
		if i < 0 {
			return false
		}
		ended[i]++
		left--
		return true
	})
	for i, n := range ended {
		if n > 0 {
			u.log.Info("flows ended", "flows", n, "why", sets[i].why)
		}
	}
	return left > 0, err
}

// done records that the first jobs, and the addresses that were due, have no such flows left.
func (u *unsticker) done(jobs int, now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.jobs = slices.Delete(u.jobs, 0, jobs)
	for a, at := range u.down {
		if !at.IsZero() && !at.After(now) {
			u.down[a], u.last[a] = time.Time{}, now
		}
	}
}
