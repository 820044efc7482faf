package bgp

import "context"

// Driver speaks BGP. Methods may be called from several goroutines.
type Driver interface {
	// Apply makes BGP be as configured, disturbing no session whose own configuration did not change. It joins the
	// errors of single peers and goes on after each.
	Apply(ctx context.Context, c Config) error

	// Peers returns the last known state of every session, without asking the BGP process.
	Peers() []PeerState

	// Reset closes a session and lets it come up again, or, when soft, sends a route refresh (RFC 2918) and our
	// routes again. It ends a quarantine. An unknown name is an error that wraps ErrNotFound.
	Reset(ctx context.Context, name string, soft bool) error

	// Run keeps BGP running until ctx is done, and reports what changes. On return the sessions are left to
	// graceful restart: no NOTIFICATION is sent.
	Run(ctx context.Context, r Reporter) error

	// Writes returns how many changes were sent to the BGP process, Starts how often it was started.
	Writes() uint64
	Starts() uint64
}

// Reporter takes what a Driver sees. Its methods are called in order from one goroutine and must not block for long.
type Reporter interface {
	// Peer reports a session that changed.
	Peer(PeerState)
	// Paths reports changed prefixes.
	Paths([]Update)
	// Restarted reports that the BGP process is new: its paths come again from the start, and what is in the FIB is
	// stale until Synced.
	Restarted()
	// Synced reports that every peer that is expected back has sent its End-of-RIB (RFC 4724), or its restart time
	// has run out: what was not reported since Restarted is gone.
	Synced()
}
