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

// Bounds of taking flows out of the connection table.
const (
	// downBeforeEnd is how long an address must be down before flows that leave with it end, so
	// that a flap ends none.
	downBeforeEnd = 3 * time.Second
	// betweenEnds is the least time between two such endings for one address.
	betweenEnds = 30 * time.Second
	// endsAtOnce is how many flows end in a second at most: each of them begins again.
	endsAtOnce = 20_000
	// endRetry is the delay after the table could not be read.
	endRetry = 5 * time.Second
	// maxEndJobs is how many sets of flows wait to be ended; more are joined with the last.
	maxEndJobs = 16
)

// unsticker takes flows without connections out of the connection table that cannot live on there.
// Such a flow never asks the rules again as long as its client sends: each packet renews the entry.
type unsticker struct {
	flows Flows
	log   *slog.Logger
	kick  chan struct{}

	mu   sync.Mutex
	jobs []endJob
	// stopped are the policies of which those that end flows have been asked, and swept the rules
	// against which flows have been held.
	stopped []nat.Policy
	swept   nat.Config
	// addresses of which flows are to end, and when they are due; zero: that is done
	down map[netip.Addr]time.Time
	last map[netip.Addr]time.Time // when flows of an address ended last
}

// endJob is a set of flows to end.
type endJob struct {
	why string
	has func(nat.Track) bool
	// all ends flows with connections too.
	all bool
}

func newUnsticker(flows Flows, log *slog.Logger) *unsticker {
	return &unsticker{flows: flows, log: log, kick: make(chan struct{}, 1), down: map[netip.Addr]time.Time{}, last: map[netip.Addr]time.Time{}}
}

// use hears of the configuration that is in force, with the addresses that are down. Flows that
// leave with one of these end after a while when another address of its pool and family is up. With
// blocks a source has no other address.
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

// stop ends flows that policies end, once for each set of policies: what such a policy decides on
// does not begin again. After a start of the daemon they are asked again.
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

// sweepUnder ends flows without connections that began under other rules and cannot go on under
// these. After a start of the daemon all are looked at.
func (u *unsticker) sweepUnder(c nat.Config, leaves func(netip.Addr) bool) {
	same := slices.EqualFunc(u.swept.Policies, c.Policies, samePolicy) &&
		reflect.DeepEqual(u.swept.Maps, c.Maps) && reflect.DeepEqual(u.swept.Attachments, c.Attachments)
	u.swept = c
	if same {
		return // which addresses and proxies work sends no flow astray
	}
	astray := c.Astray(leaves)
	u.end(endJob{why: "the rules have changed", has: func(t nat.Track) bool { return astray(t) != "" }})
}

// samePolicy compares what two policies say, whether or not their proxy works.
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

// end has flows end of which a set says so, if their protocol has no connections.
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

// due returns the sets whose time has come, how many of them are jobs, and when to look again;
// zero: when something happens.
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
		// the node's own stay, and those turned back inside
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
		// What comes meanwhile waits for this as well: it is the bound on the rate.
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		timer.Reset(0)
	}
}

// sweep ends the flows of some sets, and says whether these were all.
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

// done notes that the first jobs, and the addresses that were due, have no such flows left.
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
