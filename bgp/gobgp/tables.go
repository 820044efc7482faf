package gobgp

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	api "github.com/osrg/gobgp/v3/api"

	"github.com/isthmus-net/isthmus/bgp"
)

const (
	// maxWindow bounds the bytes of a table that the child keeps for further questions. Of a larger
	// table it keeps the beginning, and reads it again for the rest.
	maxWindow = 64 << 20
	// keepWindow is how long it is kept after a question.
	keepWindow = 30 * time.Second
	// rest is how long no table is read, as a multiple of the time that reading the last one took,
	// and at most maxRest: GoBGP does nothing else while it copies a table.
	rest    = 9
	maxRest = 20 * time.Second
)

// tables answers questions about GoBGP's tables, one at a time. GoBGP can only list a table as a
// whole, so a window keeps what it listed, in order, for the questions that follow.
type tables struct {
	c    *child
	busy chan struct{} // holds one token

	next   time.Time // when a table may be read again; only for the question under way
	mu     sync.Mutex
	window *window
}

// window is the beginning of a table, behind from.
type window struct {
	table  table
	peer   uint32
	from   netip.Prefix // invalid: the start
	cut    netip.Prefix // the table goes on behind it; invalid: it is complete
	list   []encoded
	size   int
	forget *time.Timer
}

// encoded is an entry of an answer.
type encoded struct {
	prefix netip.Prefix
	bytes  []byte
}

func newTables(c *child) *tables { return &tables{c: c, busy: make(chan struct{}, 1)} }

// ask answers a question in a goroutine of its own. serve calls it.
func (t *tables) ask(m askMessage) {
	refuse := func(format string, args ...any) {
		t.c.out.putRaw(frameAnswer, append(answerHead(m.ID, answerProblem), fmt.Sprintf(format, args...)...))
	}
	select {
	case t.busy <- struct{}{}:
	default:
		refuse("another question is being answered")
		return
	}
	// Only serve reads applied.
	peers := make(map[uint32]bgp.Peer, 1)
	for _, p := range t.c.applied {
		if m.Peer == 0 || p.ID == m.Peer {
			peers[p.ID] = p.Peer
		}
	}
	go func() {
		var list []encoded
		var more bool
		var err error
		switch p, ok := peers[m.Peer]; {
		case t.c.server == nil:
			// It has no configuration yet.
		case len(m.Prefixes) > 0:
			t.paced(func() { list, err = t.look(m, peers) })
			slices.SortStableFunc(list, func(a, b encoded) int { return a.prefix.Compare(b.prefix) })
			list, more = limit(list, m.After)
		case !ok:
			// Its session is held down, so that it has no paths.
		default:
			list, more, err = t.page(m, &p)
		}
		<-t.busy // before the answer, after which the next question may come
		if err != nil {
			refuse("%v", err)
			return
		}
		flags := byte(0)
		if more {
			flags = answerMore
		}
		b := answerHead(m.ID, flags)
		for _, e := range list {
			b = append(b, e.bytes...)
		}
		t.c.out.putRaw(frameAnswer, b)
	}()
}

// paced reads tables, and not too soon after they were read before.
func (t *tables) paced(read func()) {
	time.Sleep(time.Until(t.next))
	start := time.Now()
	read()
	t.next = time.Now().Add(min(rest*time.Since(start), maxRest))
}

// limit returns the entries behind after that fit into an answer, and whether there are more. Those
// of one prefix stay together, unless they are too large by themselves.
func limit(list []encoded, after netip.Prefix) ([]encoded, bool) {
	if after.IsValid() {
		i, found := slices.BinarySearchFunc(list, after, func(e encoded, p netip.Prefix) int { return e.prefix.Compare(p) })
		for found && i < len(list) && list[i].prefix == after {
			i++
		}
		list = list[i:]
	}
	size, end := 0, 0
	for i, e := range list {
		if i > 0 && e.prefix != list[i-1].prefix {
			end = i
		}
		if size += len(e.bytes); size > answerSize {
			if end == 0 {
				end = i // of one prefix, as many as fit
			}
			return list[:max(end, 1)], true
		}
	}
	return list, false
}

// page returns the entries of a peer's table.
func (t *tables) page(m askMessage, p *bgp.Peer) ([]encoded, bool, error) {
	t.mu.Lock()
	w := t.window
	t.mu.Unlock()
	behind := func(p netip.Prefix) bool { return p.IsValid() && (!m.After.IsValid() || p.Compare(m.After) > 0) }
	usable := w != nil && !m.Fresh && w.table == m.Table && w.peer == m.Peer &&
		(!w.from.IsValid() || m.After.IsValid() && w.from.Compare(m.After) <= 0) &&
		(!w.cut.IsValid() || behind(w.cut))
	if !usable {
		w = &window{table: m.Table, peer: m.Peer, from: m.After}
		kind := api.TableType_ADJ_IN
		if m.Table == adjOut {
			kind = api.TableType_ADJ_OUT
		}
		var err error
		for _, family := range families(p) {
			t.paced(func() {
				err = errors.Join(err, t.list(&api.ListPathRequest{TableType: kind, Name: p.Address.String(), Family: family}, func(e encoded) {
					if behind(e.prefix) {
						w.add(e)
					}
				}))
			})
		}
		if err != nil {
			return nil, false, err
		}
		w.sort()
	}
	t.keep(w)
	list, more := limit(w.list, m.After)
	return list, more || w.cut.IsValid(), nil
}

// keep stores a window for the next questions.
func (t *tables) keep(w *window) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.window != nil && t.window.forget != nil {
		t.window.forget.Stop()
	}
	t.window = w
	w.forget = time.AfterFunc(keepWindow, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.window == w {
			t.window = nil
		}
	})
}

func (w *window) sort() {
	slices.SortFunc(w.list, func(a, b encoded) int { return a.prefix.Compare(b.prefix) })
}

// add adds an entry. When there are too many, those with the highest prefixes go.
func (w *window) add(e encoded) {
	if w.cut.IsValid() && e.prefix.Compare(w.cut) > 0 {
		return
	}
	w.list = append(w.list, e)
	if w.size += len(e.bytes); w.size <= maxWindow {
		return
	}
	w.sort()
	for w.size > maxWindow/2 {
		last := len(w.list) - 1
		w.size -= len(w.list[last].bytes)
		w.list[last] = encoded{}
		w.list = w.list[:last]
	}
	w.cut = w.list[len(w.list)-1].prefix
}

// look returns the paths to prefixes: in the local table, or those that any peer sent.
func (t *tables) look(m askMessage, peers map[uint32]bgp.Peer) (all []encoded, err error) {
	for _, v4 := range []bool{true, false} {
		request := &api.ListPathRequest{TableType: api.TableType_GLOBAL, Family: ipv4}
		if !v4 {
			request.Family = ipv6
		}
		for _, p := range m.Prefixes {
			if p.Addr().Is4() == v4 {
				request.Prefixes = append(request.Prefixes, &api.TableLookupPrefix{Prefix: p.String()})
			}
		}
		if len(request.Prefixes) == 0 {
			continue
		}
		add := func(e encoded) { all = append(all, e) }
		if m.Table == local {
			if err := t.list(request, add); err != nil {
				return nil, err
			}
			continue
		}
		request.TableType = api.TableType_ADJ_IN
		for _, p := range peers {
			if !p.Carries(v4) {
				continue
			}
			request.Name = p.Address.String()
			if err := t.list(request, add); err != nil {
				return nil, err
			}
		}
	}
	return all, nil
}

// list calls f with the encoded paths of GoBGP.
func (t *tables) list(r *api.ListPathRequest, f func(encoded)) error {
	return t.c.server.ListPath(context.Background(), r, func(d *api.Destination) {
		for i, p := range d.GetPaths() {
			prefix, ok := decodePrefix(p.GetNlri())
			if !ok || i == maxPaths {
				return
			}
			a := decodePath(p)
			a.peer, _ = t.c.id(p.GetNeighborIp())
			f(encoded{prefix, appendEntry(nil, prefix, &a)})
		}
	})
}
