package ipsec

import (
	"net/netip"
	"regexp"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/tunnel"
)

const (
	mostTalks   = 512             // negotiations without a tunnel yet, of which strangers can open any number
	talkFor     = 2 * time.Minute // of which each is forgotten: charon ends a half-open one after 30 s
	mostCallers = 256             // addresses that no tunnel is for
	callerFor   = 24 * time.Hour  // after the last attempt of which it is forgotten
	mostWords   = 300             // of what a peer sends and people read, in bytes
	exactFor    = 5 * time.Minute // how long what the peer's own call taught stands against its vaguer answers
)

// line is one line of charon's log.
type line struct {
	sa    string // unique id of the IKE SA that it is about
	name  string // connection of that, once it is known
	words string
}

// presented is what a peer that answers calls itself.
var presented = regexp.MustCompile(`^(?:authentication of '(.*)' with pre-shared key successful$|IDir '(.*?)' does not match to )`)

// talk is an IKE SA that a peer has asked for and that charon has not assigned to a connection. Lines come from
// several threads of charon, not always in order.
type talk struct {
	at      time.Time
	remote  netip.Addr
	unknown bool // no connection has its address, or none with its IKE version
	refused bool // no proposal of it, or no identity, fits a connection
	counted bool
	learnt  tunnel.Evidence
}

// ear follows charon's log for what it says about strangers. It is pure but for its memory.
type ear struct {
	talks   map[string]*talk
	callers map[netip.Addr]*tunnel.Caller
}

func newEar() ear { return ear{map[string]*talk{}, map[netip.Addr]*tunnel.Caller{}} }

var (
	lookingFor = regexp.MustCompile(`^looking for peer configs matching \S+?\[(.*)\]\.\.\.(?P<peer>\S+?)\[(.*)\]$`)
	noConfig   = regexp.MustCompile(`^no IKE config found for \S+?\.\.\.(?P<peer>\S+?), sending`)
	halfOpen   = regexp.MustCompile(`^deleting half open IKE_SA with (?P<peer>\S+) after timeout`)
	refusedTS  = regexp.MustCompile(`^traffic selectors (.*) unacceptable`)
)

// sender returns where a packet came from that charon took.
func sender(words string) (netip.Addr, bool) {
	rest, ok := strings.CutPrefix(words, "received packet: from ")
	if !ok {
		return netip.Addr{}, false
	}
	text, _, _ := strings.Cut(rest, "[")
	a, err := netip.ParseAddr(text)
	return a, err == nil
}

// evidence adds what a line tells about the peer to what is known, and reports whether that was something.
func evidence(e *tunnel.Evidence, words string) bool {
	former := *e
	if offer, ok := strings.CutPrefix(words, "received proposals: "); ok {
		if ike, ok := strings.CutPrefix(offer, "IKE:"); ok {
			e.IKEOffer = brief(strings.ReplaceAll(ike, ", IKE:", ", "))
		} else if esp, ok := strings.CutPrefix(offer, "ESP:"); ok {
			e.ESPOffer = brief(strings.ReplaceAll(strings.ReplaceAll(esp, ", ESP:", ", "), "/NO_EXT_SEQ", ""))
		}
	} else if m := lookingFor.FindStringSubmatch(words); m != nil {
		e.CalledUs, e.Identity = brief(m[1]), brief(m[3])
	} else if m := refusedTS.FindStringSubmatch(words); m != nil {
		e.Selectors = brief(m[1])
	} else if strings.HasPrefix(words, "parsed ID_PROT request") || strings.HasPrefix(words, "parsed AGGRESSIVE request") {
		e.IKEv1 = true
	} else if strings.Contains(words, "but MAC mismatched") {
		e.OtherKey = true
	} else if halfOpen.MatchString(words) {
		e.HalfOpen = true
	}
	return *e != former
}

func brief(s string) string {
	if len(s) > mostWords {
		return strings.ToValidUTF8(s[:mostWords], "") + "…"
	}
	return s
}

// hear takes a line about an IKE SA without a connection. It returns the talk once it is known who it is with.
func (e *ear) hear(l line, now time.Time) *talk {
	t := e.talks[l.sa]
	if t == nil {
		e.forget(now)
		t = &talk{}
		e.talks[l.sa] = t
	}
	t.at = now
	if a, ok := sender(l.words); ok {
		t.remote = a
	}
	for _, p := range []*regexp.Regexp{lookingFor, noConfig, halfOpen} {
		if m := p.FindStringSubmatch(l.words); m != nil {
			if a, err := netip.ParseAddr(m[p.SubexpIndex("peer")]); err == nil {
				t.remote = a
			}
		}
	}
	evidence(&t.learnt, l.words)
	switch {
	case noConfig.MatchString(l.words):
		t.unknown = true
	case strings.HasPrefix(l.words, "no matching peer config found"), strings.HasPrefix(l.words, "received proposals unacceptable"), strings.HasPrefix(l.words, "received proposals inacceptable"):
		t.refused = true
	}
	if !t.remote.IsValid() {
		return nil
	}
	return t
}

// reason says why charon refused a talk; empty while it has not.
func (t *talk) reason() (tunnel.Reason, string) {
	switch l := t.learnt; {
	case t.unknown && l.IKEv1:
		return tunnel.IKEVersion, "the peer calls with IKEv1"
	case t.refused && l.Identity != "":
		return tunnel.Identity, "the peer calls itself " + l.Identity + " and this node " + l.CalledUs
	case t.refused && l.IKEOffer != "":
		return tunnel.IKEUnacceptable, "none of the peer's IKE proposals is one of ours: " + l.IKEOffer
	}
	return "", ""
}

// count remembers an address that nothing is known of.
func (e *ear) count(a netip.Addr, now time.Time) {
	c := e.callers[a]
	if c == nil {
		for len(e.callers) >= mostCallers {
			// The one with the fewest attempts goes: sources are easily made up.
			var least *tunnel.Caller
			for _, c := range e.callers {
				if least == nil || c.Attempts < least.Attempts || c.Attempts == least.Attempts && c.Last.Before(least.Last) {
					least = c
				}
			}
			delete(e.callers, least.Address)
		}
		c = &tunnel.Caller{Address: a, First: now}
		e.callers[a] = c
	}
	c.Last = now
	c.Attempts++
}

// forget makes room.
func (e *ear) forget(now time.Time) {
	for id, t := range e.talks {
		if now.Sub(t.at) > talkFor || len(e.talks) >= mostTalks {
			delete(e.talks, id)
		}
	}
	for a, c := range e.callers {
		if now.Sub(c.Last) > callerFor {
			delete(e.callers, a)
		}
	}
}
