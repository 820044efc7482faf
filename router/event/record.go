package event

import (
	"context"
	"time"
)

// Source is the node whose changes are recorded; router/report implements it.
type Source interface {
	// Changed returns a channel that is closed when the state may have changed.
	Changed() <-chan struct{}
	// Recorded returns the state to compare. Its times of Now and Started are not used.
	Recorded() Snapshot
}

// Pace of the recorder. Conditions also appear and end with time, without a change.
const (
	lookPause  = time.Second
	lookPeriod = 2 * time.Second
)

// Run records the start of the daemon, then each change until ctx is done, and then the stop. It
// compares the state at most once a second: a state that lasts less is recorded only where the node
// counts how often it began.
func (l *Log) Run(ctx context.Context, version string, s Source) error {
	l.Start(version)
	defer l.Stop()
	started := l.now()
	for {
		changed := s.Changed()
		now := s.Recorded()
		now.Now, now.Started = l.now(), started
		l.Look(now)
		// Reading the state of thousands of objects takes some milliseconds.
		pause := lookPause + time.Duration(len(now.Tunnels)+len(now.Peers)+len(now.Conditions))*50*time.Microsecond
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
		select {
		case <-changed:
		case <-time.After(lookPeriod):
		case <-ctx.Done():
			return nil
		}
	}
}
