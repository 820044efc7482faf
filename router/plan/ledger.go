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

// FirstID is the smallest number that a tunnel gets, and IDs up to LastID are ours alone: an xfrm state with such an if_id was made
// for one of our tunnels.
const (
	FirstID uint32 = 490_001
	LastID  uint32 = 499_999
)

// maxRetired bounds how many removed tunnels are remembered, so that bringing one back gives it what it had.
const maxRetired = 1000

// Ledger remembers the choices that were made once and must not change while a tunnel exists.
type Ledger struct {
	Tunnels map[string]Entry `json:"tunnels"`
	// Retired are the names of removed tunnels, the oldest first.
	Retired []string `json:"retired,omitempty"`
}

// Entry is what was chosen for one tunnel.
type Entry struct {
	ID        uint32 `json:"id"`
	Interface string `json:"interface"`
	// Inside is the allocated block; not set when the document gives the addresses.
	Inside netip.Prefix `json:"inside,omitzero"`
}

// clone returns a copy that can be changed.
func (l Ledger) clone() Ledger {
	c := Ledger{Tunnels: maps.Clone(l.Tunnels), Retired: slices.Clone(l.Retired)}
	if c.Tunnels == nil {
		c.Tunnels = map[string]Entry{}
	}
	return c
}

// retire notes which tunnels are gone and forgets the oldest beyond maxRetired.
func (l *Ledger) retire(present map[string]bool) {
	l.Retired = slices.DeleteFunc(l.Retired, func(name string) bool { return present[name] })
	for _, name := range slices.Sorted(maps.Keys(l.Tunnels)) {
		if !present[name] && !slices.Contains(l.Retired, name) {
			l.Retired = append(l.Retired, name)
		}
	}
	for len(l.Retired) > maxRetired {
		l.forgetOldest()
	}
}

func (l *Ledger) forgetOldest() bool {
	if len(l.Retired) == 0 {
		return false
	}
	delete(l.Tunnels, l.Retired[0])
	l.Retired = l.Retired[1:]
	return true
}

// freeID returns the smallest number that no tunnel has or had.
func (l *Ledger) freeID() (uint32, error) {
	for {
		used := map[uint32]bool{}
		for _, e := range l.Tunnels {
			used[e.ID] = true
		}
		for id := FirstID; id <= LastID; id++ {
			if !used[id] {
				return id, nil
			}
		}
		if !l.forgetOldest() {
			return 0, fmt.Errorf("all %d tunnel numbers are in use", LastID-FirstID+1)
		}
	}
}

// freeBlock returns an inside block that overlaps neither the document's nor a remembered one.
func (l *Ledger) freeBlock(given []netip.Prefix) (netip.Prefix, error) {
	for {
		used := slices.Clone(given)
		for _, e := range l.Tunnels {
			if e.Inside.IsValid() {
				used = append(used, e.Inside)
			}
		}
		p, err := apipa.Allocate(used)
		if err == nil || !l.forgetOldest() {
			return p, err
		}
	}
}

// interfacePrefix keeps our interface names apart from those of the system.
const interfacePrefix = "t-"

// freeInterface returns an interface name for a tunnel: its own name where that fits into the 15 characters of
// IFNAMSIZ, else its beginning with a digest.
func (l *Ledger) freeInterface(name string) string {
	used := map[string]bool{}
	for _, e := range l.Tunnels {
		used[e.Interface] = true
	}
	const limit = 15 - len(interfacePrefix)
	if len(name) <= limit && !used[interfacePrefix+name] {
		return interfacePrefix + name
	}
	for i := 0; ; i++ {
		sum := sha256.Sum256(fmt.Appendf(nil, "%d %s", i, name))
		const digits = 6
		candidate := interfacePrefix + name[:min(len(name), limit-digits-1)] + "-" + hex.EncodeToString(sum[:])[:digits]
		if !used[candidate] {
			return candidate
		}
	}
}

// inside returns the pair of an allocated block: the peer has the first host address, this node the second.
func inside(block netip.Prefix) tunnel.Inside {
	remote := block.Addr().Next()
	return tunnel.Inside{Local: netip.PrefixFrom(remote.Next(), block.Bits()), Remote: remote}
}
