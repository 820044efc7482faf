package lane

import (
	"fmt"
	"math/bits"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/router/lane/stamp"
)

// Judge judges the lanes of one link. It is not safe for use by several goroutines.
type Judge struct {
	link   Link
	id     uint64 // of this node's reports
	lanes  []*one
	ticked time.Time
	stalls int
	peer   struct {
		id       uint64
		at       time.Time // of the last report
		restarts int
	}
	silent time.Time
	told   string // what the last judgement said, to find changes
}

// one is the state of a lane.
type one struct {
	Lane
	began    time.Time
	sequence uint32 // of the next request
	replies  uint32 // number of replies that were sent
	sent     [64]struct {
		sequence uint32
		at       time.Time
	}
	// stamp, reply and echo are the times of the last STAMP packet, the last answer to a request,
	// and the last echo reply.
	stamp, reply, echo time.Time
	in, out            Direction
	inGood, outGood    int
	report             stamp.LaneReport
	window             window
	sizer              sizer
	trips              [128]time.Duration
	tripped            int
	usable             bool
	why                string
	err                error
}

// NewJudge returns a judge of a link. id is the random number of this node's reports.
func NewJudge(l Link, id uint64, now time.Time) *Judge {
	j := &Judge{id: id, ticked: now}
	j.Use(l, now)
	return j
}

// Use changes the link. Lanes that stay keep their state.
func (j *Judge) Use(l Link, now time.Time) {
	former := j.lanes
	j.link, j.lanes = l, nil
	for _, lane := range l.Lanes {
		i := slices.IndexFunc(former, func(o *one) bool { return o.Lane == lane })
		if i >= 0 {
			j.lanes = append(j.lanes, former[i])
			continue
		}
		small := 576 // every host can receive it (RFC 791 section 3.1)
		if lane.Local.Is6() {
			small = 1280 // RFC 8200 section 5
		}
		unknown := Direction{Status: Unknown, Since: now, Why: "no packet has come yet", Loss: -1}
		j.lanes = append(j.lanes, &one{Lane: lane, began: now, in: unknown, out: unknown, usable: true, sizer: sizer{small: small, full: lane.MTU}})
	}
}

func (j *Judge) lane(number int) *one {
	i := slices.IndexFunc(j.lanes, func(o *one) bool { return o.Number == number })
	if i < 0 {
		return nil
	}
	return j.lanes[i]
}

// Request returns the next request for a lane, and false if the link does not have it. probe is the
// size in bytes of the IP packet to send, 0 for a small one: a lane has at most one of each kind
// between two judgements.
func (j *Judge) Request(number int, probe bool, now time.Time) (p stamp.Packet, size int, ok bool) {
	o := j.lane(number)
	if o == nil {
		return p, 0, false
	}
	if probe {
		if size = o.sizer.probe(now, now.Sub(o.reply) < DeadAfter); size == 0 {
			return p, 0, false
		}
		o.sizer.sequence = o.sequence
	}
	p.Stamp = stamp.Stamp{Sequence: o.sequence, Time: stamp.Time(now), Session: uint16(j.id)}
	p.Report = j.reported()
	slot := &o.sent[o.sequence%uint32(len(o.sent))]
	slot.sequence, slot.at = o.sequence, now
	o.sequence++
	return p, size, true
}

// Asks reports whether an echo request is needed on a lane, because the other node's daemon sends
// nothing on it.
func (j *Judge) Asks(number int, now time.Time) bool {
	o := j.lane(number)
	return o != nil && now.Sub(o.stamp) > Interval+Interval/2
}

func (j *Judge) reported() *stamp.Report {
	r := &stamp.Report{ID: j.id}
	for _, o := range j.lanes {
		l := stamp.LaneReport{Lane: uint8(o.Number), PathMTU: uint16(o.sizer.path), Loss: uint16(max(0, o.in.Loss) * 1000)}
		switch o.in.Status {
		case OK:
			l.Heard = stamp.Hears
		case Dead:
			l.Heard = stamp.Silence
		}
		r.Lanes = append(r.Lanes, l)
	}
	return r
}

// Receive takes a packet that came on a lane with a TTL, and returns the reply to a request; nil:
// it is not one.
func (j *Judge) Receive(number int, p stamp.Packet, ttl uint8, now time.Time) *stamp.Packet {
	o := j.lane(number)
	if o == nil {
		return nil
	}
	if p.Report == nil { // a sender that is not isthmus proves nothing about the peer's daemon
		return o.answer(p, ttl, now, nil)
	}
	o.stamp = now
	j.learn(p.Report, now)
	if !p.Reply {
		o.window.add(p.Sequence)
		return o.answer(p, ttl, now, j.reported())
	}
	slot := &o.sent[p.Sender.Sequence%uint32(len(o.sent))]
	if slot.sequence != p.Sender.Sequence || slot.at.IsZero() {
		return nil // older than the last requests
	}
	o.reply = now
	if trip := now.Sub(slot.at) - max(0, stamp.Between(p.Received, p.Time)); trip > 0 {
		o.trips[o.tripped%len(o.trips)] = trip
		o.tripped++
	}
	slot.at = time.Time{} // a second copy of the reply is not an answer
	o.sizer.answered(p.Sender.Sequence, now)
	return nil
}

func (o *one) answer(p stamp.Packet, ttl uint8, now time.Time, r *stamp.Report) *stamp.Packet {
	at := stamp.Time(now)
	reply := &stamp.Packet{Stamp: stamp.Stamp{Sequence: o.replies, Time: at, Session: p.Session}, Received: at, Sender: p.Stamp, TTL: ttl, Report: r}
	o.replies++
	return reply
}

// learn takes the report of the other node.
func (j *Judge) learn(r *stamp.Report, now time.Time) {
	if r.ID != j.peer.id {
		if j.peer.id != 0 {
			j.peer.restarts++
		}
		j.peer.id = r.ID
		for _, o := range j.lanes {
			o.window = window{}
		}
	}
	j.peer.at = now
	for _, l := range r.Lanes {
		if o := j.lane(int(l.Lane)); o != nil {
			o.report = l
		}
	}
}

// Echoed takes an echo reply on a lane.
func (j *Judge) Echoed(number int, now time.Time) {
	if o := j.lane(number); o != nil {
		o.echo = now
	}
}

// Failed takes the error of sending on a lane; nil: the last packet was sent.
func (j *Judge) Failed(number int, err error) {
	if o := j.lane(number); o != nil {
		o.err = err
	}
}

// Tick judges the lanes, and reports whether a state has changed.
func (j *Judge) Tick(now time.Time) bool {
	// While this process did not run, it heard nothing. That says nothing about the lanes.
	if late := now.Sub(j.ticked) - Interval; late >= DeadAfter/2 {
		j.stalls++
		for _, o := range j.lanes {
			for _, at := range []*time.Time{&o.stamp, &o.reply, &o.echo} {
				if !at.IsZero() {
					*at = earliest(at.Add(late), now)
				}
			}
		}
		if !j.peer.at.IsZero() {
			j.peer.at = earliest(j.peer.at.Add(late), now)
		}
	}
	j.ticked = now
	heard := time.Time{}
	for _, o := range j.lanes {
		o.judgeIn(now, j.link.Node)
		heard = latest(heard, o.stamp)
	}
	fresh := !j.peer.at.IsZero() && now.Sub(j.peer.at) < DeadAfter
	for _, o := range j.lanes {
		o.judgeOut(now, j.link.Node, fresh)
	}
	j.judgeSilence(now, heard)
	j.judgeUse(now)
	told := ""
	for _, o := range j.lanes {
		told += fmt.Sprint(o.in.Status, o.out.Status, o.usable, o.silent(now), o.sizer.path, o.report.PathMTU, ";")
	}
	told += fmt.Sprint(j.silent, j.peer.restarts)
	changed := told != j.told
	j.told = told
	return changed
}

func (o *one) judgeIn(now time.Time, node string) {
	last := latest(o.stamp, o.echo)
	age := now.Sub(last)
	if age <= 2*Interval {
		o.inGood++
	} else {
		o.inGood = 0
	}
	switch {
	case last.IsZero():
	case o.in.Status == Unknown, o.in.Status == Dead && o.inGood >= UpAfter:
		o.in = Direction{Status: OK, Since: now}
	case o.in.Status == OK && age >= DeadAfter:
		o.in = Direction{Status: Dead, Since: last, Why: fmt.Sprintf("no packet of %s arrives", node)}
	}
	switch w := &o.window; {
	case o.in.Status == Dead:
		o.in.Loss = 1
	case !w.begun:
		o.in.Loss = -1
	default:
		n := min(windowSize, int(w.last-w.first)+1)
		o.in.Loss = 1 - float64(bits.OnesCount64(w.seen[0])+bits.OnesCount64(w.seen[1]))/float64(n)
	}
}

// judgeOut judges the direction to the other node. Its answers prove it. Without them, the other
// node says on any lane whether packets come; fresh says that it does so now.
func (o *one) judgeOut(now time.Time, node string, fresh bool) {
	proof := now.Sub(latest(o.reply, o.echo)) < DeadAfter
	if proof {
		o.outGood++
	} else {
		o.outGood = 0
	}
	hears, silence := fresh && o.report.Heard == stamp.Hears, fresh && o.report.Heard == stamp.Silence
	if last := latest(o.reply, o.echo); fresh && o.report.Heard == stamp.Never && !last.IsZero() && now.Sub(last) >= FirstProof {
		silence = true // its daemon has started, and the direction died meanwhile
	}
	loss := o.out.Loss
	if fresh {
		loss = float64(o.report.Loss) / 1000
	}
	switch {
	case o.out.Status == Unknown && (proof || hears), o.out.Status == Dead && (hears || o.outGood >= UpAfter):
		o.out = Direction{Status: OK, Since: now}
	case o.out.Status != Dead && !proof && silence:
		o.out = Direction{Status: Dead, Since: latest(latest(o.reply, o.echo), o.began), Why: fmt.Sprintf("%s says that no packet of this node arrives", node)}
	case o.out.Status == OK && !proof && !fresh:
		o.out = Direction{Status: Unknown, Since: now, Why: fmt.Sprintf("%s does not say whether packets of this node arrive", node)}
		loss = -1
	}
	if o.out.Loss = loss; o.out.Status == Dead {
		o.out.Loss = 1
	}
}

// judgeSilence finds that the daemon of the other node sends nothing, while its kernel answers.
func (j *Judge) judgeSilence(now, heard time.Time) {
	answers := slices.ContainsFunc(j.lanes, func(o *one) bool { return !o.echo.IsZero() && now.Sub(o.echo) < DeadAfter })
	switch {
	case !answers || !heard.IsZero() && now.Sub(heard) < DeadAfter:
		j.silent = time.Time{}
	case j.silent.IsZero():
		j.silent = latest(heard, j.lanes[0].began)
	}
}

// silent reports whether only the kernel of the other node answers on a lane.
func (o *one) silent(now time.Time) bool {
	return o.in.Status == OK && now.Sub(o.stamp) >= DeadAfter
}

// judgeUse decides which lanes routes may use.
func (j *Judge) judgeUse(now time.Time) {
	proved := func(o *one) bool { return o.in.Status == OK && o.out.Status == OK }
	narrow := func(o *one) bool { return o.sizer.path != 0 || o.report.PathMTU != 0 }
	for _, o := range j.lanes {
		other := func(is func(*one) bool) bool {
			return slices.ContainsFunc(j.lanes, func(p *one) bool { return p != o && is(p) })
		}
		o.why = ""
		switch {
		case o.in.Status == Dead:
			o.why = o.in.Why
		case o.out.Status == Dead:
			o.why = o.out.Why
		case !proved(o) && now.Sub(o.began) >= FirstProof && other(proved):
			o.why = "it was not proved, and another lane was"
		case proved(o) && narrow(o) && other(func(p *one) bool { return proved(p) && !narrow(p) }):
			o.why = "large packets do not arrive, and they do on another lane"
		}
		o.usable = o.why == ""
	}
}

// State returns the state of the link at the last judgement.
func (j *Judge) State() LinkState {
	s := LinkState{Name: j.link.Name, Node: j.link.Node, Silent: j.silent, Restarts: j.peer.restarts, Stalls: j.stalls}
	for _, o := range j.lanes {
		l := LaneState{Lane: o.Lane, In: o.in, Out: o.out, Usable: o.usable, Why: o.why, Silent: o.silent(j.ticked), RTT: o.percentiles(), Err: o.err}
		switch {
		case o.sizer.path != 0:
			l.PathMTU = o.sizer.path
			if l.Out.Status == OK {
				l.Out.Status, l.Out.Since, l.Out.Why = MTU, o.sizer.since, fmt.Sprintf("packets of up to %d bytes arrive at %s, and those of %d do not", o.sizer.path, j.link.Node, o.MTU)
			}
		case o.sizer.proved:
			l.PathMTU = o.MTU
		}
		if n := o.report.PathMTU; n != 0 && l.In.Status == OK {
			l.In.Status, l.In.Why = MTU, fmt.Sprintf("packets of %s of up to %d bytes arrive, and larger ones do not", j.link.Node, n)
		}
		s.Lanes = append(s.Lanes, l)
	}
	return s
}

func (o *one) percentiles() RTT {
	n := min(o.tripped, len(o.trips))
	if n == 0 {
		return RTT{}
	}
	trips := slices.Sorted(slices.Values(o.trips[:n]))
	return RTT{Samples: n, P50: trips[n/2], P99: trips[min(n-1, n*99/100)]}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earliest(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
