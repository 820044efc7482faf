package bgp

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Tables reads the tables of the BGP process (RFC 4271 section 3.2): not what was reported before,
// but what the process has now. Its methods may be called from several goroutines.
type Tables interface {
	// List returns a page of the paths between this node and one peer, in the order of their
	// prefixes. The error wraps ErrNotFound, ErrNotRunning, ErrSilent or ErrRestarted where one of
	// them applies.
	List(ctx context.Context, q Query) (Page, error)
	// LookUp returns the paths to one prefix: accepted ones in the order of preference, then
	// refused ones. Errors are as of List.
	LookUp(ctx context.Context, prefix netip.Prefix) (Page, error)
}

var (
	// ErrNotRunning means that the BGP process does not run now.
	ErrNotRunning = errors.New("the BGP process does not run; it is started again by itself")
	// ErrSilent means that the BGP process has not answered in time.
	ErrSilent = errors.New("the BGP process does not answer; try again, and see the log of isthmusd")
	// ErrRestarted means that the BGP process was restarted between two pages.
	ErrRestarted = errors.New("BGP restarted while its routes were listed; ask again from the start")
)

// View says which paths of a peer are listed.
type View string

// The views. Accepted and Rejected together are Received.
const (
	Received   View = "received" // what the peer sent, before the import policy
	Accepted   View = "accepted"
	Rejected   View = "rejected"
	Advertised View = "advertised" // what this node sends, after the export policy
)

// Query asks for a page of a peer's paths.
type Query struct {
	Peer  string
	View  View
	Limit int          // paths; a page may have fewer
	After netip.Prefix // only prefixes behind this one; invalid: from the start
	Start uint64       // of the former page; 0: any
}

// Page is an answer of Tables.
type Page struct {
	Entries []Entry
	More    bool   // entries are missing, behind the last one
	Start   uint64 // number of the start of the BGP process that answered
	// Offers say for each peer whether the best path is announced to it, by name; only of LookUp.
	Offers []Offer
}

// Offer says whether the best path to a prefix is announced to a peer.
type Offer struct {
	Peer   string
	Reason Reason // why it is not; empty: it is
	Text   string // the same in words
}

// Entry is one path.
type Entry struct {
	Prefix netip.Prefix
	Attributes
	// Refused means that the import policy does not accept the path, Used that BGP has selected it,
	// alone or together with others (multipath). Both are false for an accepted path that loses
	// against that of the peer Winner, and for an announcement.
	Refused, Used bool
	Reason        Reason // why it is refused, not used or not announced; empty: it is
	Text          string // the same in words
	Winner        string
}

// Attributes are what the BGP process has of a path.
type Attributes struct {
	Peer            string // who sent it; empty: a prefix of our own
	NextHop         netip.Addr
	ASPath          []uint32 // as in Path
	ASLength        uint32   // length in the comparison, in which a set counts as one
	FirstAS         uint32   // the neighbouring AS; 0: none
	Origin          uint8
	MED             *uint32 // nil: none
	LocalPreference *uint32 // nil: none
	Communities     []uint32
	Large           [][3]uint32 // RFC 8092
	RouterID        netip.Addr  // of the peer
	At              time.Time   // of its arrival
	Stale           bool        // the peer restarts gracefully
	Internal        bool        // the peer is in our own AS
	Address         netip.Addr  // of the peer, as compared
}

// NO_EXPORT and NO_ADVERTISE (RFC 1997).
const noExport, noAdvertise = 0xffffff01, 0xffffff02

// CommunityName returns a community as operators write it, such as "65010:100" (RFC 1997).
func CommunityName(c uint32) string {
	switch c {
	case noExport:
		return "NO_EXPORT"
	case noAdvertise:
		return "NO_ADVERTISE"
	}
	return fmt.Sprintf("%d:%d", c>>16, c&0xffff)
}

// Route returns the path as policies look at it.
func (a *Attributes) Route(prefix netip.Prefix) Route {
	r := Route{Prefix: prefix, ASPath: a.ASPath}
	for _, c := range a.Communities {
		r.Kept = r.Kept || c == noExport || c == noAdvertise
	}
	return r
}

// preference is LOCAL_PREF in the comparison.
func (a *Attributes) preference() uint32 {
	if a.LocalPreference == nil {
		return defaultLocalPreference
	}
	return *a.LocalPreference
}

func (a *Attributes) med() uint32 {
	if a.MED == nil {
		return 0
	}
	return *a.MED
}

// Compare compares two paths to one prefix as GoBGP does, and returns what decides. It is negative
// if a is better.
func Compare(a, b *Attributes) (int, Reason) {
	flag := func(a, b bool) int { // true is better
		switch {
		case a == b:
			return 0
		case a:
			return -1
		}
		return 1
	}
	sameAS := a.FirstAS != 0 && a.FirstAS == b.FirstAS || a.ASLength == 0 && b.ASLength == 0
	external := !a.Internal && !b.Internal
	for _, step := range []struct {
		order  int
		reason Reason
	}{
		{cmp.Compare(b.preference(), a.preference()), ByLocalPreference},
		{flag(a.Peer == "", b.Peer == ""), ByOwn},
		{cmp.Compare(a.ASLength, b.ASLength), ByASPath},
		{cmp.Compare(a.Origin, b.Origin), ByOrigin},
		{when(sameAS, cmp.Compare(a.med(), b.med())), ByMED},
		{flag(!a.Internal, !b.Internal), ByInternal},
		{when(external, a.At.Compare(b.At)), ByAge},
		{when(!external, a.RouterID.Compare(b.RouterID)), ByRouterID},
		{a.Address.Compare(b.Address), ByAddress},
	} {
		if step.order != 0 {
			return step.order, step.reason
		}
	}
	return 0, ""
}

func when(applies bool, order int) int {
	if applies {
		return order
	}
	return 0
}

// Together reports whether two paths are used together if one of them is the best (multipath).
func Together(a, b *Attributes) bool {
	return (a.Peer == "") == (b.Peer == "") && a.Internal == b.Internal && a.preference() == b.preference() &&
		a.ASLength == b.ASLength && a.Origin == b.Origin && a.med() == b.med()
}

// Judge says for each path to a prefix whether it is used, and else why not. They are in the order
// of preference.
func Judge(paths []Entry) {
	for i := range paths {
		p := &paths[i]
		if p.Used = i == 0 || Together(&paths[0].Attributes, &p.Attributes); p.Used {
			continue
		}
		p.Reason, p.Text = Changing, changingText
		// MED is not compared between all pairs, so that the best path need not be the one that
		// decides.
		for j := range paths[:i] {
			better := &paths[j].Attributes
			if order, why := Compare(better, &p.Attributes); order < 0 {
				p.Reason, p.Text, p.Winner = why, lossText(why, better, &p.Attributes), better.Peer
				break
			}
		}
	}
}
