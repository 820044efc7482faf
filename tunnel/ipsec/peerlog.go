package ipsec

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/strongswan/govici/vici"

	"github.com/isthmus-net/isthmus/tunnel"
)

const (
	// maxPending bounds the negotiations without a tunnel yet; strangers can open any number of
	// them.
	maxPending = 512
	// pendingFor is how long such a negotiation is kept: charon ends a half-open one after 30 s.
	pendingFor = 2 * time.Minute
	maxCallers = 256            // addresses without a tunnel
	callerFor  = 24 * time.Hour // after its last attempt, an address is dropped
	maxWords   = 300            // limit in bytes for text from a peer that users read
	// exactFor is how long a reason from the peer's own attempt has precedence over its vaguer
	// answers.
	exactFor = 5 * time.Minute
)

// line is one line of charon's log.
type line struct {
	sa    string // connection of the IKE SA, if assigned
	name  string // connection of that, once it is known
	words string
}

// presented matches the identity of a peer that answers.
var presented = regexp.MustCompile(`^(?:authentication of '(.*)' with pre-shared key successful$|IDir '(.*?)' does not match to )`)

// pendingSA is an IKE SA that a peer has initiated and that charon has not assigned to a
// connection. Lines come from several threads of charon, not always in order.
type pendingSA struct {
	at      time.Time
	remote  netip.Addr
	unknown bool // no connection has its address, or none has its IKE version
	refused bool // none of its proposals or identities matches a connection
	counted bool
	learnt  tunnel.Evidence
}

// logWatcher evaluates charon's log lines about unknown peers. It depends only on its input and
// state.
type logWatcher struct {
	pending map[string]*pendingSA
	callers map[netip.Addr]*tunnel.Caller
}

func newLogWatcher() logWatcher {
	return logWatcher{map[string]*pendingSA{}, map[netip.Addr]*tunnel.Caller{}}
}

var (
	lookingFor = regexp.MustCompile(`^looking for peer configs matching \S+?\[(.*)\]\.\.\.(?P<peer>\S+?)\[(.*)\]$`)
	noConfig   = regexp.MustCompile(`^no IKE config found for \S+?\.\.\.(?P<peer>\S+?), sending`)
	halfOpen   = regexp.MustCompile(`^deleting half open IKE_SA with (?P<peer>\S+) after timeout`)
	refusedTS  = regexp.MustCompile(`^traffic selectors (.*) unacceptable`)
)

// sender returns the source address of a packet that charon has received.
func sender(words string) (netip.Addr, bool) {
	rest, ok := strings.CutPrefix(words, "received packet: from ")
	if !ok {
		return netip.Addr{}, false
	}
	text, _, _ := strings.Cut(rest, "[")
	a, err := netip.ParseAddr(text)
	return a, err == nil
}

// evidence adds to e what a line reveals about the peer, and reports whether e has changed.
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
	if len(s) > maxWords {
		return strings.ToValidUTF8(s[:maxWords], "") + "…"
	}
	return s
}

// handle evaluates a line about an IKE SA without a connection. It returns the SA once its peer's
// address is known.
func (w *logWatcher) handle(l line, now time.Time) *pendingSA {
	t := w.pending[l.sa]
	if t == nil {
		w.forget(now)
		t = &pendingSA{}
		w.pending[l.sa] = t
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

// reason returns why charon refused the SA; empty if it did not.
func (t *pendingSA) reason() (tunnel.Reason, string) {
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

// countCaller records an attempt from an address without a tunnel.
func (w *logWatcher) countCaller(a netip.Addr, now time.Time) {
	c := w.callers[a]
	if c == nil {
		for len(w.callers) >= maxCallers {
			// The address with the fewest attempts is dropped, because sources are easily forged.
			var least *tunnel.Caller
			for _, c := range w.callers {
				if least == nil || c.Attempts < least.Attempts || c.Attempts == least.Attempts && c.Last.Before(least.Last) {
					least = c
				}
			}
			delete(w.callers, least.Address)
		}
		c = &tunnel.Caller{Address: a, First: now}
		w.callers[a] = c
	}
	c.Last = now
	c.Attempts++
}

// forget drops old entries, and makes room for a new one.
func (w *logWatcher) forget(now time.Time) {
	for id, t := range w.pending {
		if now.Sub(t.at) > pendingFor || len(w.pending) >= maxPending {
			delete(w.pending, id)
		}
	}
	for a, c := range w.callers {
		if now.Sub(c.Last) > callerFor {
			delete(w.callers, a)
		}
	}
}

// handleEvent evaluates an event, and reports whether a tunnel must be read again.
func (d *Driver) handleEvent(e vici.Event) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e.Name == "log" {
		return d.handleLine(decodeLine(e.Message), e.Timestamp)
	}
	dirty := false
	for _, conn := range decodeEvent(e) {
		if name, ours := strings.CutPrefix(conn, tunnel.Mark); ours && d.records[name] != nil {
			d.dirty[conn], dirty = true, true
		}
	}
	return dirty
}

// handleLine evaluates a line of charon's log. d.mu is held.
func (d *Driver) handleLine(l line, now time.Time) (dirty bool) {
	name, ours := strings.CutPrefix(l.name, tunnel.Mark)
	if r := d.records[name]; ours && r != nil {
		if t := d.peerLog.pending[l.sa]; t != nil {
			delete(d.peerLog.pending, l.sa) // the SA now has a connection
		}
		if a, ok := sender(l.words); ok && a == r.cfg.IPsec.RemoteAddress {
			r.heard = now
		}
		learnt := evidence(&r.evidence, l.words)
		if m := presented.FindStringSubmatch(l.words); m != nil && m[1]+m[2] != r.cfg.IPsec.RemoteIdentity {
			r.evidence.Identity, learnt = brief(m[1]+m[2]), true
		}
		if !r.note(l.words, now) && !learnt {
			return false
		}
		d.dirty[l.name] = true
		return true
	}
	if l.sa == "" || ours {
		return false
	}
	t := d.peerLog.handle(l, now)
	if t == nil {
		return false
	}
	reason, why := t.reason()
	_, packet := sender(l.words)
	if !packet && !t.unknown && reason == "" && !t.learnt.HalfOpen {
		return false
	}
	known := false
	for name, r := range d.records {
		if r.cfg.IPsec.RemoteAddress != t.remote {
			continue
		}
		known = true
		if packet {
			r.heard = now
		}
		if r.state.Status == tunnel.Up || reason == "" && !t.learnt.HalfOpen {
			continue
		}
		former := r.evidence
		r.evidence = r.evidence.With(t.learnt)
		if reason != "" {
			r.because(reason, why, now)
		}
		if r.evidence != former || reason != "" {
			d.dirty[connection(name)], dirty = true, true
		}
	}
	if t.unknown && !known && !t.counted {
		t.counted = true
		d.peerLog.countCaller(t.remote, now)
	}
	return dirty
}

// Callers returns the addresses without a tunnel that have recently tried to open an IKE SA,
// sorted. Their proposals and identities are not known, because charon answers such a caller at
// once with NO_PROPOSAL_CHOSEN.
func (d *Driver) Callers() []tunnel.Caller {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.peerLog.forget(time.Now())
	for _, r := range d.records {
		delete(d.peerLog.callers, r.cfg.IPsec.RemoteAddress) // there is a tunnel for it now
	}
	var out []tunnel.Caller
	for _, c := range d.peerLog.callers {
		out = append(out, *c)
	}
	slices.SortFunc(out, func(a, b tunnel.Caller) int { return a.Address.Compare(b.Address) })
	return out
}
