package gobgp

import (
	"context"
	"fmt"
	"net/netip"
	"reflect"
	"slices"

	api "github.com/osrg/gobgp/v3/api"

	"github.com/isthmus-net/isthmus/bgp"
)

// apply makes GoBGP match m with one call per difference, and returns the number of differences. A
// peer keeps its session unless it changes in a way that needs a new one.
func (c *child) apply(m configMessage) (changes uint64, errs []error) {
	ctx := context.Background()
	fail := func(name string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("peer %s: %w", name, err))
		}
	}
	want := make(map[string]peerConfig, len(m.Peers))
	for _, p := range m.Peers {
		want[p.Peer.Name] = p
	}
	for name, old := range c.applied {
		now, ok := want[name]
		if ok && !interrupts(old, now) {
			continue
		}
		changes++
		fail(name, c.server.DeletePeer(ctx, &api.DeletePeerRequest{Address: old.Peer.Address.String()}))
		delete(c.applied, name)
	}

	// Policies come before the peers that they apply to, and before our own paths.
	withdraw := make(map[string]bool)
	var again []peerConfig
	for name, old := range c.applied {
		now := want[name]
		if !reflect.DeepEqual(old.Peer.Export, now.Peer.Export) {
			withdraw[name] = true
		}
		if !reflect.DeepEqual(old.Peer.Import, now.Peer.Import) {
			again = append(again, now)
		}
	}
	before, after := compilePolicies(c.config.ASN, c.config.Peers, nil), compilePolicies(m.ASN, m.Peers, nil)
	if !reflect.DeepEqual(before.String(), after.String()) {
		changes++
		if len(withdraw) > 0 {
			fail("", c.server.SetPolicies(ctx, compilePolicies(m.ASN, m.Peers, withdraw)))
			for name := range withdraw {
				if c.heldBack(want[name].Peer) {
					continue
				}
				fail(name, c.server.ResetPeer(ctx, &api.ResetPeerRequest{Address: want[name].Peer.Address.String(), Soft: true, Direction: api.ResetPeerRequest_OUT}))
			}
		}
		if err := c.server.SetPolicies(ctx, after); err != nil {
			return changes, append(errs, fmt.Errorf("setting policies: %w", err))
		}
		for _, p := range again {
			fail(p.Peer.Name, c.server.ResetPeer(ctx, &api.ResetPeerRequest{Address: p.Peer.Address.String(), Soft: true, Direction: api.ResetPeerRequest_IN}))
		}
	}

	for _, p := range c.config.Announce {
		if !slices.Contains(m.Announce, p) {
			changes++
			errs = append(errs, c.announce(ctx, p, false))
		}
	}
	for _, p := range m.Announce {
		if !slices.Contains(c.config.Announce, p) {
			changes++
			errs = append(errs, c.announce(ctx, p, true))
		}
	}

	for _, p := range m.Peers {
		name := p.Peer.Name
		c.mu.Lock()
		c.ids[p.Peer.Address.String()] = p.ID
		delete(c.max, p.ID)
		// GoBGP's own limit is of one family.
		if p.Peer.MaxPrefixes > exactLimit || p.Peer.OtherLocal.IsValid() {
			c.max[p.ID] = p.Peer.MaxPrefixes
		}
		c.mu.Unlock()
		n := compilePeer(m.ASN, p, c.config.Restarting)
		old, ok := c.applied[name]
		switch {
		case !ok:
			changes++
			if err := c.server.AddPeer(ctx, &api.AddPeerRequest{Peer: n}); err != nil {
				fail(name, err)
				continue
			}
		case old.Peer.MaxPrefixes != p.Peer.MaxPrefixes:
			changes++
			_, err := c.server.UpdatePeer(ctx, &api.UpdatePeerRequest{Peer: n})
			fail(name, err)
		}
		c.applied[name] = p
	}
	c.config.Peers, c.config.Announce = m.Peers, m.Announce
	return changes, errs
}

// heldBack reports whether GoBGP still defers its announcements to a peer after a restart (RFC
// 4724 section 4.1). When it sends them, it applies the policies of that time. A soft reset would
// announce at once, and while updates are deferred no withdrawal follows: the peer would keep the
// path forever.
func (c *child) heldBack(p bgp.Peer) (held bool) {
	_ = c.server.ListPeer(context.Background(), &api.ListPeerRequest{Address: p.Address.String()}, func(s *api.Peer) {
		held = s.GetGracefulRestart().GetLocalRestarting()
	})
	return held
}

// interrupts reports whether a change ends the session.
func interrupts(a, b peerConfig) bool {
	return bgp.Interrupts(a.Peer, b.Peer) != "" ||
		a.Key != b.Key || a.Outside != b.Outside
}

func (c *child) announce(ctx context.Context, prefix netip.Prefix, on bool) error {
	p, err := compileAnnounce(prefix)
	if err != nil {
		return err
	}
	if on {
		_, err = c.server.AddPath(ctx, &api.AddPathRequest{TableType: api.TableType_GLOBAL, Path: p})
	} else {
		err = c.server.DeletePath(ctx, &api.DeletePathRequest{TableType: api.TableType_GLOBAL, Path: p})
	}
	if err != nil {
		return fmt.Errorf("announcing %v: %w", prefix, err)
	}
	return nil
}

func (c *child) reset(m resetMessage) error {
	for name, p := range c.applied {
		if p.ID != m.Peer {
			continue
		}
		r := &api.ResetPeerRequest{Address: p.Peer.Address.String(), Soft: m.Soft, Direction: api.ResetPeerRequest_BOTH}
		if m.Soft && c.heldBack(p.Peer) {
			r.Direction = api.ResetPeerRequest_IN
		}
		if err := c.server.ResetPeer(context.Background(), r); err != nil {
			return fmt.Errorf("resetting peer %s: %w", name, err)
		}
		return nil
	}
	return nil // held out; the daemon admits it again
}
