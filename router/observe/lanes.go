package observe

import (
	"maps"

	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/tunnel"
)

// SetLanes sets the lanes that routes must not use, by name of the tunnel: the proof of their link
// says so, which is faster than their keys and counters, and knows the direction. They leave the
// groups of next hops, and return to them, before anything is planned.
func (o *Observer) SetLanes(out map[string]bool) {
	o.telling.Lock()
	defer o.telling.Unlock()
	for c, carries := range o.setLanes(out) {
		o.o.FIB.SetAlive(fib.NextHop{Interface: c}, carries)
	}
}

// setLanes stores the lanes, and returns the interfaces that may have changed.
func (o *Observer) setLanes(out map[string]bool) map[string]bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if maps.Equal(o.out, out) {
		return nil
	}
	former := o.out
	o.out = maps.Clone(out)
	changed := map[string]bool{}
	for name, c := range o.tunnels {
		if former[name] != out[name] {
			changed[c.Interface] = o.carries(name, o.seen.Tunnels[name].Status)
		}
	}
	return changed
}

// carries reports whether routes may use a tunnel with a status.
func (o *Observer) carries(name string, s tunnel.Status) bool { return alive(s) && !o.out[name] }

// TunnelStates returns the last state of each tunnel, by name.
func (o *Observer) TunnelStates() map[string]tunnel.State {
	o.mu.Lock()
	defer o.mu.Unlock()
	return maps.Clone(o.seen.Tunnels)
}
