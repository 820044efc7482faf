package gobgp

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

const (
	// answerTimeout is how long the child may take for an answer: it may have to wait before it
	// reads a table again.
	answerTimeout = 45 * time.Second
	// listTimeout bounds the time for a page. All paths may have to be read to find those that are
	// refused.
	listTimeout = time.Minute
	// maxPage bounds the bytes of a page, as the child encodes them, before the last answer.
	maxPage = 2 << 20
)

var _ bgp.Tables = (*Driver)(nil)

// question is the one that the child has to answer.
type question struct {
	id     uint64
	answer chan answer // capacity 1
}

// List implements bgp.Tables.
func (d *Driver) List(ctx context.Context, q bgp.Query) (bgp.Page, error) {
	page, err := d.listed(ctx, q.Peer, q.Start, func(ctx context.Context, l *listing) error { return l.list(ctx, q) })
	if err != nil {
		return page, fmt.Errorf("listing the paths of peer %s: %w", q.Peer, err)
	}
	return page, nil
}

// LookUp implements bgp.Tables.
func (d *Driver) LookUp(ctx context.Context, prefix netip.Prefix) (bgp.Page, error) {
	page, err := d.listed(ctx, "", 0, func(ctx context.Context, l *listing) error { return l.lookUp(ctx, prefix) })
	if err != nil {
		return page, fmt.Errorf("looking up %v: %w", prefix, err)
	}
	return page, nil
}

// listing is a call of List or LookUp under way.
type listing struct {
	d        *Driver
	p        *process
	page     bgp.Page
	asn      uint32
	deciders map[string]bgp.Decider // by peer
	ids      map[string]uint32
	size     int // of the entries, as the child encodes them
}

// listed calls fill, with no other listing under way, and returns the page. peer may be empty.
func (d *Driver) listed(ctx context.Context, peer string, start uint64, fill func(context.Context, *listing) error) (bgp.Page, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	select {
	case d.asking <- struct{}{}:
		defer func() { <-d.asking }()
	case <-ctx.Done():
		return bgp.Page{}, silent(ctx)
	}
	l, err := d.listing(peer, start)
	if err == nil {
		err = fill(ctx, l)
	}
	if err != nil {
		return bgp.Page{}, err
	}
	return l.page, nil
}

func (d *Driver) listing(peer string, start uint64) (*listing, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case peer != "" && d.peers[peer] == nil:
		return nil, bgp.ErrNotFound
	case d.proc == nil || d.replace:
		return nil, bgp.ErrNotRunning
	case start != 0 && start != d.starts:
		return nil, bgp.ErrRestarted
	}
	l := &listing{
		d: d, p: d.proc, page: bgp.Page{Start: d.starts}, asn: d.want.ASN,
		deciders: make(map[string]bgp.Decider), ids: make(map[string]uint32),
	}
	for i := range d.want.Peers {
		p := &d.want.Peers[i] // Apply replaces the slice, and never its elements
		l.deciders[p.Name], l.ids[p.Name] = p.Decider(d.want.ASN), d.ids[p.Name]
	}
	return l, nil
}

// silent returns the error for a context that is done.
func silent(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	return bgp.ErrSilent
}

// ask returns the child's answer.
func (l *listing) ask(ctx context.Context, m askMessage) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	d, c := l.d, make(chan answer, 1)
	d.mu.Lock()
	d.message++
	m.ID = d.message
	d.question = question{m.ID, c}
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.question = question{}
		d.mu.Unlock()
	}()
	go func() {
		unread := time.AfterFunc(readTimeout, l.p.kill) // as in call
		if writeJSON(l.p.conn, frameAsk, m) != nil {
			l.p.kill()
		}
		unread.Stop()
	}()
	select {
	case a := <-c:
		if a.problem != "" {
			return a, fmt.Errorf("%w (%s)", bgp.ErrSilent, a.problem)
		}
		return a, nil
	case <-l.p.done:
		return answer{}, bgp.ErrRestarted
	case <-ctx.Done():
		return answer{}, silent(ctx)
	}
}

// answered passes an answer to the listing that waits for it.
func (d *Driver) answered(a answer) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if a.id == d.question.id && d.question.answer != nil {
		d.question.answer <- a
		d.question = question{}
	}
}

// list fills the page with paths of a peer.
func (l *listing) list(ctx context.Context, q bgp.Query) error {
	m := askMessage{Table: adjIn, Peer: l.ids[q.Peer], After: q.After, Fresh: !q.After.IsValid()}
	var held []netip.Prefix
	more := true
	if q.View == bgp.Advertised {
		m.Table = adjOut
		held, more = l.advertised(q)
	}
	for more && len(l.page.Entries) < q.Limit && l.size < maxPage {
		a, err := l.ask(ctx, m)
		if err != nil {
			return err
		}
		m.Fresh, more = false, a.more
		for i, e := range a.entries {
			if m.After.IsValid() && e.Prefix.Compare(m.After) <= 0 {
				l.p.kill() // it would be asked forever
				return bgp.ErrRestarted
			}
			m.After = e.Prefix
			if !l.judge(q, &e) {
				continue
			}
			l.size += a.size / len(a.entries)
			if l.page.Entries = append(l.page.Entries, e); len(l.page.Entries) == q.Limit {
				more = more || i < len(a.entries)-1
				break
			}
		}
	}
	l.page.More = more
	if q.View == bgp.Advertised {
		l.addHeld(q, held)
		return nil
	}
	return l.weigh(ctx)
}

// advertised returns the prefixes that a peer does not get because of its limit, in order, and
// whether there is a session on which others are sent.
func (l *listing) advertised(q bgp.Query) (held []netip.Prefix, up bool) {
	d := l.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if s := d.peers[q.Peer]; s == nil || s.State != bgp.Established {
		return nil, false
	}
	for p := range d.rib.limited[q.Peer] {
		if !slices.Contains(d.admitted[q.Peer], p) && (!q.After.IsValid() || p.Compare(q.After) > 0) {
			held = append(held, p)
		}
	}
	slices.SortFunc(held, netip.Prefix.Compare)
	return held, true
}

// addHeld adds prefixes that are held back to the page, which keeps its order and its limit.
func (l *listing) addHeld(q bgp.Query, held []netip.Prefix) {
	if len(held) == 0 {
		return
	}
	all := l.page.Entries
	for _, p := range held {
		if l.page.More && len(l.page.Entries) > 0 && p.Compare(l.page.Entries[len(l.page.Entries)-1].Prefix) > 0 {
			break
		}
		d := l.deciders[q.Peer]
		all = append(all, bgp.Entry{Prefix: p, Reason: bgp.HeldBack, Text: d.ExportText(bgp.Route{Prefix: p}, bgp.HeldBack)})
	}
	slices.SortStableFunc(all, func(a, b bgp.Entry) int { return a.Prefix.Compare(b.Prefix) })
	if len(all) > q.Limit {
		all, l.page.More = all[:q.Limit], true
	}
	l.page.Entries = all
}

// judge completes an entry of a peer's table, and reports whether the view has it.
func (l *listing) judge(q bgp.Query, e *bgp.Entry) bool {
	d := l.deciders[q.Peer]
	if q.View == bgp.Advertised {
		if _, local := inner(l.ids[q.Peer], *d.Peer); e.NextHop == local {
			e.NextHop = d.Peer.LocalAddress
			if e.Prefix.Addr().Is4() != local.Is4() {
				e.NextHop = d.Peer.OtherLocal
			}
		}
		return true
	}
	e.Peer = q.Peer
	changes := l.refuse(e)
	switch q.View {
	case bgp.Accepted:
		if changes.LocalPreference != 0 {
			e.LocalPreference = &changes.LocalPreference
		}
		return !e.Refused
	case bgp.Rejected:
		return e.Refused
	}
	return true
}

// refuse decides on the path of an entry by the import policy.
func (l *listing) refuse(e *bgp.Entry) bgp.Changes {
	d, known := l.deciders[e.Peer]
	if !known {
		e.Refused, e.Reason, e.Text = true, bgp.Changing, "the peer is not in the document any more"
		return bgp.Changes{}
	}
	r := e.Route(e.Prefix)
	changes, why := d.ExplainImport(r)
	e.Refused, e.Reason, e.Text = why != "", why, d.ImportText(r, why)
	return changes
}

// weigh completes the accepted paths of the page: whether BGP uses them, and why not.
func (l *listing) weigh(ctx context.Context) error {
	var unused []netip.Prefix
	at := make(map[netip.Prefix]int)
	d := l.d
	d.mu.Lock()
	if d.starts != l.page.Start {
		d.mu.Unlock()
		return bgp.ErrRestarted
	}
	for i := range l.page.Entries {
		e := &l.page.Entries[i]
		if e.Peer == "" || e.Reason != "" {
			continue
		}
		e.Used = slices.ContainsFunc(d.rib.paths[e.Prefix], func(p bgp.Path) bool { return p.Peer == e.Peer })
		if !e.Used {
			unused = append(unused, e.Prefix)
			at[e.Prefix] = i
		}
	}
	d.mu.Unlock()
	for len(unused) > 0 {
		chunk := unused[:min(len(unused), maxAsked)]
		a, err := l.ask(ctx, askMessage{Table: local, Prefixes: chunk})
		if err != nil {
			return err
		}
		behind := chunk[len(chunk)-1]
		if a.more {
			behind = a.entries[len(a.entries)-1].Prefix
		}
		for _, paths := range byPrefix(a.entries) {
			l.place(paths)
			if i, ok := at[paths[0].Prefix]; ok {
				for _, p := range paths {
					if e := &l.page.Entries[i]; p.Peer == e.Peer {
						e.Used, e.Reason, e.Text, e.Winner = p.Used, p.Reason, p.Text, p.Winner
						delete(at, e.Prefix)
					}
				}
			}
		}
		rest := slices.IndexFunc(unused, func(p netip.Prefix) bool { return p.Compare(behind) > 0 })
		if rest < 0 {
			break
		}
		unused = unused[rest:]
	}
	for _, i := range at {
		l.page.Entries[i].Reason, l.page.Entries[i].Text = bgp.Changing, "the tables changed while they were read; ask again"
	}
	return nil
}

// byPrefix divides entries, which are in the order of prefixes.
func byPrefix(all []bgp.Entry) (groups [][]bgp.Entry) {
	for len(all) > 0 {
		n := slices.IndexFunc(all, func(e bgp.Entry) bool { return e.Prefix != all[0].Prefix })
		if n < 0 {
			n = len(all)
		}
		groups = append(groups, all[:n])
		all = all[n:]
	}
	return groups
}

// place adds the peers' properties to the paths to one prefix in the local table, and judges them.
func (l *listing) place(paths []bgp.Entry) {
	for i := range paths {
		if d, ok := l.deciders[paths[i].Peer]; ok {
			paths[i].Internal = d.Peer.ASN == l.asn
			paths[i].Address, _ = inner(l.ids[paths[i].Peer], *d.Peer)
		}
	}
	bgp.Judge(paths)
}

// offer says for each peer whether the best path is announced to it.
func (l *listing) offer(best *bgp.Entry) {
	d, r := l.d, best.Route(best.Prefix)
	var from *bgp.Peer
	if by, ok := l.deciders[best.Peer]; ok {
		from = by.Peer
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(l.deciders)) {
		to := l.deciders[name]
		why := to.ExplainExport(from, r)
		if s := d.peers[name]; s == nil || s.State != bgp.Established {
			why = bgp.NoSession
		} else if _, limited := d.rib.limited[name][best.Prefix]; why == "" && limited && !slices.Contains(d.admitted[name], best.Prefix) {
			why = bgp.HeldBack
		} else if why == "" && !best.Prefix.Addr().Is4() && to.Peer.Address.Is4() && !s.BothFamilies {
			why = bgp.OtherFamily
		}
		l.page.Offers = append(l.page.Offers, bgp.Offer{Peer: name, Reason: why, Text: to.ExportText(r, why)})
	}
}

// lookUp fills the page with all paths to a prefix.
func (l *listing) lookUp(ctx context.Context, prefix netip.Prefix) error {
	a, err := l.ask(ctx, askMessage{Table: local, Prefixes: []netip.Prefix{prefix}})
	if err != nil {
		return err
	}
	sent, err := l.ask(ctx, askMessage{Table: adjIn, Prefixes: []netip.Prefix{prefix}})
	if err != nil {
		return err
	}
	other := func(e bgp.Entry) bool { return e.Prefix != prefix }
	if slices.ContainsFunc(a.entries, other) || slices.ContainsFunc(sent.entries, other) {
		l.p.kill()
		return fmt.Errorf("%w: it answered for another prefix", bgp.ErrSilent)
	}
	l.place(a.entries)
	l.page.Entries, l.page.More = a.entries, a.more || sent.more
	if len(a.entries) > 0 {
		l.offer(&a.entries[0])
	}
	slices.SortFunc(sent.entries, func(a, b bgp.Entry) int { return strings.Compare(a.Peer, b.Peer) })
	for _, e := range sent.entries {
		if l.refuse(&e); e.Refused {
			l.page.Entries = append(l.page.Entries, e)
		}
	}
	return nil
}
