package spec

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress"
)

func (c *checker) translationLog(path string, l *isthmusv1.TranslationLog) {
	if l == nil {
		return
	}
	const least = 64 << 20
	c.s.Log = egress.Log{Enabled: true, MaxBytes: egress.DefaultLogBytes,
		MaxAge: c.duration(path+".maxAge", l.GetMaxAge(), egress.DefaultLogAge, time.Hour, 10*365*24*time.Hour)}
	switch v := l.GetMaxBytes(); {
	case v == 0:
	case v < least || v > 1<<62:
		c.Problem(path+".maxBytes", fmt.Sprint(v), "is out of range", fmt.Sprintf("give %d (64 MiB) or more", least))
	default:
		c.s.Log.MaxBytes = int64(v)
	}
}

// mostBlocks bounds the sources with a block in a pool.
const mostBlocks = 65536

func (c *checker) blocks(path string, b *isthmusv1.Blocks, pool nat.Pool) *nat.Blocks {
	out := &nat.Blocks{FirstPort: uint16(c.Number(path+".firstPort", b.GetFirstPort(), 1024, 1, 65535))}
	if b.GetSize() == 0 {
		c.Missing(path+".size", "give the number of ports of a block")
	}
	out.Size = uint16(c.Number(path+".size", b.GetSize(), 1, 1, 64512))
	if len(b.GetSources()) == 0 {
		c.Missing(path+".sources", "give the prefixes of the sources")
	}
	var list []placed
	for i, text := range b.GetSources() {
		at := fmt.Sprintf("%s.sources[%d]", path, i)
		p, ok := c.Prefix(at, text)
		if !ok {
			continue
		}
		list = append(list, placed{p, at})
	}
	late := map[int]bool{}
	overlaps(list, nil, func(i, j int) {
		c.Problem(list[i].path, list[i].prefix.String(), "overlaps "+list[j].prefix.String(), "name each source once")
		late[i] = true
	})
	for i, p := range list {
		if !late[i] {
			out.Sources = append(out.Sources, p.prefix)
		}
	}
	for _, ipv6 := range []bool{false, true} {
		var addresses uint64
		for _, a := range pool.Addresses {
			if a.Address.Is6() == ipv6 {
				addresses++
			}
		}
		sources, room := out.Count(ipv6), addresses*uint64(max(out.PerAddress(), 0))
		switch family := map[bool]string{false: "IPv4", true: "IPv6"}[ipv6]; {
		case sources > mostBlocks:
			c.Problem(path+".sources", fmt.Sprint(sources), fmt.Sprintf("are more %s sources than %d", family, mostBlocks), "name fewer")
		case sources > room:
			c.Problem(path+".sources", fmt.Sprint(sources), fmt.Sprintf("are more %s sources than the %d blocks that there are: %d addresses with %d blocks of %d ports each", family, room, addresses, out.PerAddress(), out.Size),
				"add addresses, make the blocks smaller, or name fewer sources")
		}
	}
	return out
}

// inBlocks checks that a policy lets only sources with a block use a pool with blocks.
func (c *checker) inBlocks(path string, pool *nat.Pool, sources []netip.Prefix) {
	for i, src := range sources {
		if pool.Blocks == nil || !c.spend(len(pool.Blocks.Sources)) {
			return
		}
		if !slices.ContainsFunc(pool.Blocks.Sources, func(p netip.Prefix) bool { return p.Bits() <= src.Bits() && p.Contains(src.Addr()) }) {
			c.Problem(fmt.Sprintf("%s.sources[%d]", path, i), src.String(), "is not within the sources that have a block of pool "+pool.Name, "add it to the pool's `blocks.sources`, or take another pool")
		}
	}
}
