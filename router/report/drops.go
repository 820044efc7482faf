package report

import (
	"context"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
)

// sampleRetry is the delay after the guard's samples could not be read, as while a former daemon
// still listens.
const sampleRetry = 30 * time.Second

// SampleDrops logs a sample of the packets that the rules drop, each with the policy that should
// have matched.
func (r *Report) SampleDrops(ctx context.Context) error {
	for {
		err := r.NAT.Sample(ctx, r.dropped)
		if ctx.Err() != nil {
			return nil
		}
		r.Log.Warn("packets that the guard drops cannot be sampled; trying again", "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(sampleRetry):
		}
	}
}

func (r *Report) dropped(reason nat.Reason, f nat.Flow) {
	why := reason.String()
	if reason == nat.DropGuard {
		_, effective := r.Applied.Effective()
		why = effective.NAT.Explain(f) + r.Observed.LeftNames(effective.NAT, f)
	}
	r.Log.Warn("dropped a packet", "reason", string(reason), "source", f.Source, "destination", f.Destination, "protocol", f.Protocol, "port", f.Port, "why", why)
}

// lossShown is how long a condition reports a past loss of the rules.
const lossShown = time.Hour

// guardConditions reports that the rules are or were missing.
func (r *Report) guardConditions() []*isthmusv1.Condition {
	at, until, times := r.Applied.GuardLoss()
	switch {
	case times == 0:
	case until.IsZero():
		return []*isthmusv1.Condition{condition.GuardMissing.Error(at, "another process removed the rules, and nothing is forwarded until they are back")}
	case time.Since(until) < lossShown:
		return []*isthmusv1.Condition{condition.GuardWasMissing.Warning(at, "another process removed the rules, %d times since the daemon started; they were back after %v, and nothing was forwarded meanwhile; `systemctl disable nftables` when its ruleset begins with `flush ruleset`",
			times, until.Sub(at).Round(time.Millisecond))}
	}
	return nil
}
