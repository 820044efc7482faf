package bgp

import "context"

// Driver speaks BGP. Methods may be called from several goroutines.
type Driver interface {
	// Apply makes BGP be as configured, disturbing no session whose own configuration did not
	// change. It joins the errors of single peers and goes on after each. With the zero Config
	// every session ends.
	Apply(ctx context.Context, c Config) error

	// Peers returns the last known state of every session, without asking the BGP process.
	Peers() []PeerState

	// Reset closes a session and lets it come up again, or, when soft, passes what the peer sent
	// through the import policy again and sends our routes again. It ends a quarantine and a
	// prefix-limit hold-down. An unknown name is an error that wraps ErrNotFound.
	Reset(ctx context.Context, name string, soft bool) error

	// Run keeps BGP running until ctx is done, and reports what changes. On return the sessions are
	// left to graceful restart: no NOTIFICATION is sent.
	Run(ctx context.Context, r Reporter) error

	// Writes returns how many changes were sent to the BGP process, Starts how often it was
	// started.
	Writes() uint64
	Starts() uint64
}

// Reporter takes what a Driver sees. Its methods are called in order from one goroutine; they must
// not block for long and must not call the Driver's Apply or Reset, which wait for answers that are
// read between the calls.
type Reporter interface {
	// Peer reports a session that changed. The end of a session is reported before its paths are
	// withdrawn one by one: a state that is neither Established nor Restarting takes all paths of
	// the peer with it.
	Peer(PeerState)
	// Paths reports changed prefixes.
	Paths([]Update)
	// Restarted reports that the BGP process is new: its paths come again from the start, and what
	// is in the FIB is stale until Synced.
	Restarted()
	// Synced reports that every peer that is expected back has sent its End-of-RIB (RFC 4724), or
	// its restart time has run out: what was not reported since Restarted is gone. It is called
	// once for each Restarted, unless the BGP process is new again before.
	Synced()
}
