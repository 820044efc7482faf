package gobgp

import (
	"context"
	"fmt"
	"slices"
	"time"

	api "github.com/osrg/gobgp/v3/api"

	"github.com/isthmus-net/isthmus/bgp"
)

// counterInterval is how often the child reads the counters. GoBGP serves this, like all requests,
// in one goroutine.
const counterInterval = 5 * time.Second

// counters reads the counters of all sessions every few seconds, and soon after a session has come
// up.
func (c *child) counters(ctx context.Context) {
	t := time.NewTicker(counterInterval)
	last := make(map[uint32]countersMessage)
	for {
		select {
		case <-t.C:
		case <-c.poll:
		}
		var changed []countersMessage
		err := c.server.ListPeer(ctx, &api.ListPeerRequest{}, func(p *api.Peer) {
			id, ok := c.id(p.GetConf().GetNeighborAddress())
			if !ok {
				return
			}
			m := decodeCounters(p)
			m.Peer = id
			if last[id] != m {
				last[id] = m
				changed = append(changed, m)
			}
			c.mu.Lock()
			limit := c.max[id]
			c.mu.Unlock()
			if limit > 0 && m.Received > limit {
				c.exceeded(p.GetConf().GetNeighborAddress(), id, m.Received, limit)
			}
		})
		if err != nil {
			continue // ListPeer returns no errors of its own
		}
		for chunk := range slices.Chunk(changed, 1000) {
			c.out.put(frameCounters, chunk)
		}
	}
}

// exceeded shuts down the session of a peer above a limit that GoBGP does not enforce.
func (c *child) exceeded(address string, id, received, limit uint32) {
	err := c.server.ShutdownPeer(context.Background(), &api.ShutdownPeerRequest{
		Address:       address,
		Communication: fmt.Sprintf("%d prefixes received, %d allowed", received, limit),
	})
	if err != nil {
		c.out.put(frameLog, logMessage{Level: "ERROR", Text: fmt.Sprintf("shutting down: %v", err), Peer: id})
	}
	c.out.put(frameState, stateMessage{Peer: id, State: bgp.PrefixLimit})
}
