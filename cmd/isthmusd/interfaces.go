package main

import (
	"maps"
	"time"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/liveness"
)

// namesFor is how long the names of interfaces are used. A new interface is marked as ours after it
// appears.
const namesFor = 5 * time.Second

// interfaces returns a function that reads the counters of the tunnels' interfaces, by name. It
// reads their names again when an interface has come or gone, and after namesFor.
func interfaces(links *link.Links) func() (map[string]liveness.Counters, error) {
	var known []link.Link // those of tunnels
	var present map[int]bool
	var read time.Time
	return func() (map[string]liveness.Counters, error) {
		stats, err := links.Stats()
		if err != nil {
			return nil, err
		}
		now := make(map[int]bool, len(stats))
		for index := range stats {
			now[index] = true
		}
		if !maps.Equal(now, present) || time.Since(read) > namesFor {
			if known, err = links.List(tunnel.Mark); err != nil {
				return nil, err
			}
			present, read = now, time.Now()
		}
		out := make(map[string]liveness.Counters, len(known))
		for _, l := range known {
			if s, ok := stats[l.Index]; ok {
				out[l.Name] = liveness.Counters{
					Index: l.Index, RxBytes: s.RxBytes, TxBytes: s.TxBytes, RxPackets: s.RxPackets, TxPackets: s.TxPackets,
					// WireGuard in the kernel counts all packets of the peer, an embedded device
					// only data.
					Handshakes: l.Kind == link.WireGuard,
				}
			}
		}
		return out, nil
	}
}
