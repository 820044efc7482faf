package main

import (
	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/liveness"
)

// interfaces returns a function that reads the counters of the tunnels' interfaces, by name.
func interfaces(links *link.Links) func() (map[string]liveness.Counters, error) {
	return func() (map[string]liveness.Counters, error) {
		all, err := links.List(tunnel.Mark)
		if err != nil {
			return nil, err
		}
		out := make(map[string]liveness.Counters, len(all))
		for _, l := range all {
			out[l.Name] = liveness.Counters{
				Index: l.Index, RxBytes: l.RxBytes, TxBytes: l.TxBytes, RxPackets: l.RxPackets, TxPackets: l.TxPackets,
				// WireGuard in the kernel counts all packets of the peer, an embedded device only
				// data.
				Handshakes: l.Kind == link.WireGuard,
			}
		}
		return out, nil
	}
}
