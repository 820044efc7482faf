package bgp

import "context"

// Driver runs BGP. Its methods may be called from several goroutines.
type Driver interface {
	// Apply brings BGP to the configuration, without disturbing sessions whose own configuration is
	// unchanged. It joins the errors of single peers and continues after each. The zero Config ends
	// every session.
	Apply(ctx context.Context, c Config) error

	// Peers returns the last known state of every session, without asking the BGP process.
	Peers() []PeerState

	// Reset closes a session so that it is established again, or, with soft, applies the import
	// policy to the peer's routes again and sends our routes again. It ends a quarantine and a
	// prefix-limit hold-down. An unknown name is an error that wraps ErrNotFound.
	Reset(ctx context.Context, name string, soft bool) error

	// Run keeps BGP running until ctx is done, and reports changes. On return the sessions are left
	// to graceful restart: no NOTIFICATION is sent.
	Run(ctx context.Context, r Reporter) error

	// Writes returns the number of changes sent to the BGP process, Starts the number of its
	// starts.
	Writes() uint64
	Starts() uint64
}

// Reporter receives the observations of a Driver. Its methods are called in order from one
// goroutine. They must not block for long, and must not call the Driver's Apply or Reset, which
// wait for answers that are read between the calls.
type Reporter interface {
	// Peer reports a session that changed. The end of a session is reported before its paths are
	// withdrawn one by one: a state that is neither Established nor Restarting takes all paths of
	// the peer with it.
	Peer(PeerState)
	// Paths reports changed prefixes.
	Paths([]Update)
	// Restarted reports that the BGP process is new: its paths come again from the start, and the
	// routes in the FIB are stale until Synced.
	Restarted()
	// Synced reports that every expected peer has sent its End-of-RIB (RFC 4724), or its restart
	// time has expired: paths that were not reported since Restarted are gone. It is called once
	// for each Restarted, unless the BGP process restarts again before.
	Synced()
}
