package plan

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/apipa"
)

// FirstID is the smallest ID of a tunnel. The IDs up to LastID belong to isthmus: an xfrm state
// with such an if_id was made for one of its tunnels.
const (
	FirstID uint32 = 490_001
	LastID  uint32 = 499_999
)

// maxRetired bounds the removed tunnels in the ledger. A tunnel that is added again gets its former
// values.
const maxRetired = 1000

// Ledger keeps the choices that must not change while a tunnel exists.
type Ledger struct {
	Tunnels map[string]Entry `json:"tunnels"`
	// Retired has the names of removed tunnels, the oldest first.
	Retired []string `json:"retired,omitempty"`
}

// Entry has the choices for one tunnel.
type Entry struct {
	ID        uint32 `json:"id"`
	Interface string `json:"interface"`
	// Inside is the allocated block, or the peer's address if Local is set. It is not set when the
	// document gives the addresses.
	Inside netip.Prefix `json:"inside,omitzero"`
	// Local is this node's address, for a gateway with single addresses instead of blocks.
	Local netip.Prefix `json:"local,omitzero"`
}

// pair returns the allocated addresses: in a block the peer has the first host address, this node
// the second.
func (e Entry) pair() tunnel.Inside {
	if e.Local.IsValid() {
		return tunnel.Inside{Local: e.Local, Remote: e.Inside.Addr()}
	}
	remote := e.Inside.Addr().Next()
	return tunnel.Inside{Local: netip.PrefixFrom(remote.Next(), e.Inside.Bits()), Remote: remote}
}

// chooser makes the choices of one plan. It indexes the values in use, so that a choice does not
// scan the ledger.
type chooser struct {
	ledger     Ledger
	ids        map[uint32]bool
	lowID      uint32 // no ID below is free
	interfaces map[string]bool
	used       *apipa.Account       // inside addresses of the document and the ledger
	given      []netip.Prefix       // this node's single ones in the document
	locals     map[netip.Prefix]int // number of tunnels with a single address of this node
}

// newChooser starts with a copy of a ledger and the inside addresses of the document: given, and
// among them shared, this node's single addresses, which further tunnels may also have. Tunnels of
// the ledger, also removed ones, lose addresses that the document gives.
func newChooser(former Ledger, given, shared []netip.Prefix) *chooser {
	c := &chooser{
		ledger: Ledger{Tunnels: map[string]Entry{}, Retired: slices.Clone(former.Retired)},
		ids:    map[uint32]bool{}, lowID: FirstID, interfaces: map[string]bool{},
		used: new(apipa.Account), given: shared, locals: map[netip.Prefix]int{},
	}
	for _, p := range given {
		c.used.Use(p)
	}
	for _, p := range shared {
		c.locals[p]++
	}
	for _, name := range slices.Sorted(maps.Keys(former.Tunnels)) {
		e := former.Tunnels[name]
		if c.used.Users(e.Inside) > 0 || c.used.Users(e.Local) > c.locals[e.Local] {
			e.Inside, e.Local = netip.Prefix{}, netip.Prefix{}
		}
		c.put(name, e)
	}
	return c
}

// put records the entry of a tunnel.
func (c *chooser) put(name string, e Entry) {
	c.forget(name)
	c.ledger.Tunnels[name] = e
	c.ids[e.ID], c.interfaces[e.Interface] = true, true
	c.used.Use(e.Inside)
	if e.Local.IsValid() {
		c.used.Use(e.Local)
		c.locals[e.Local]++
	}
}

func (c *chooser) forget(name string) {
	e, ok := c.ledger.Tunnels[name]
	if !ok {
		return
	}
	delete(c.ledger.Tunnels, name)
	delete(c.ids, e.ID)
	c.lowID = max(FirstID, min(c.lowID, e.ID))
	delete(c.interfaces, e.Interface)
	c.used.Release(e.Inside)
	if e.Local.IsValid() {
		c.used.Release(e.Local)
		if c.locals[e.Local]--; c.locals[e.Local] == 0 {
			delete(c.locals, e.Local)
		}
	}
}

// retire records removed tunnels, and forgets the oldest beyond maxRetired.
func (c *chooser) retire(present map[string]bool) {
	l := &c.ledger
	l.Retired = slices.DeleteFunc(l.Retired, func(name string) bool { return present[name] })
	known := make(map[string]bool, len(l.Retired))
	for _, name := range l.Retired {
		known[name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(l.Tunnels)) {
		if !present[name] && !known[name] {
			l.Retired = append(l.Retired, name)
		}
	}
	for len(l.Retired) > maxRetired {
		c.forgetOldest()
	}
}

func (c *chooser) forgetOldest() bool {
	if len(c.ledger.Retired) == 0 {
		return false
	}
	c.forget(c.ledger.Retired[0])
	c.ledger.Retired = c.ledger.Retired[1:]
	return true
}

// freeID returns the smallest ID that no tunnel of the ledger has.
func (c *chooser) freeID() (uint32, error) {
	for {
		for ; c.lowID <= LastID; c.lowID++ {
			if !c.ids[c.lowID] {
				return c.lowID, nil
			}
		}
		if !c.forgetOldest() {
			return 0, fmt.Errorf("all %d tunnel IDs are in use", LastID-FirstID+1)
		}
	}
}

// inside allocates inside addresses for a tunnel that its cloud accepts and that no tunnel of the
// document or the ledger has. A tunnel keeps its addresses while its cloud accepts them.
func (c *chooser) inside(name string, e Entry, rule apipa.Rule) (Entry, error) {
	if e.Inside.IsValid() && e.Local.IsValid() == rule.Single {
		pair := e.pair()
		if bad, _ := rule.Check(pair.Local, pair.Remote); bad == "" {
			return e, nil
		}
	}
	for {
		e.Inside, e.Local = netip.Prefix{}, netip.Prefix{}
		c.put(name, e) // its former addresses are free
		var err error
		if rule.Single {
			e.Local, err = c.local(rule)
			c.put(name, e)
		}
		if err == nil {
			e.Inside, err = c.used.Free(rule)
		}
		if err == nil {
			return e, nil
		}
		if !c.forgetOldest() {
			return Entry{ID: e.ID, Interface: e.Interface}, err
		}
	}
}

// local returns this node's address for a gateway with single addresses: one of the document that
// the gateway accepts, else one of the ledger, else a free one.
func (c *chooser) local(rule apipa.Rule) (netip.Prefix, error) {
	for _, p := range slices.Concat(c.given, slices.SortedFunc(maps.Keys(c.locals), comparePrefix)) {
		if bad, _ := rule.Check(p, p.Addr()); bad == "" {
			return p, nil
		}
	}
	return c.used.Free(rule)
}

// interfacePrefix separates our interface names from those of the system.
const interfacePrefix = "t-"

// freeInterface returns an interface name for a tunnel: its own name if that fits into the 15
// characters of IFNAMSIZ, else its beginning with a digest.
func (c *chooser) freeInterface(name string) string {
	const limit = 15 - len(interfacePrefix)
	if len(name) <= limit && !c.interfaces[interfacePrefix+name] {
		return interfacePrefix + name
	}
	for i := 0; ; i++ {
		sum := sha256.Sum256(fmt.Appendf(nil, "%d %s", i, name))
		const digits = 6
		candidate := interfacePrefix + name[:min(len(name), limit-digits-1)] + "-" + hex.EncodeToString(sum[:])[:digits]
		if !c.interfaces[candidate] {
			return candidate
		}
	}
}
