package event

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
)

// Snapshot is the state of a node that is compared with the recorded one.
type Snapshot struct {
	Now     time.Time
	Started time.Time // of the daemon
	Tunnels []*isthmusv1.TunnelStatus
	Peers   []*isthmusv1.PeerStatus
	Pools   []*isthmusv1.PoolStatus
	// Conditions are those of the node and of all objects, not only the first ones of a type.
	Conditions []*isthmusv1.Condition
	Revisions  []*isthmusv1.Revision // newest first
	Generation uint64                // of the present document
	Applied    uint64                // newest generation carried out since the start; 0: none yet
}

// settling is how long after a start the absence of an object or a condition proves nothing: what
// the node has not looked at yet is absent too.
const settling = time.Minute

// object is the recorded state of a tunnel, a session, a condition or an address.
type object struct {
	state string // type of the event; of a condition its severity
	since time.Time
	// seen in this run of the daemon, which is not in the log
	seen bool
	// timesUp of the last look, which is not in the log
	timesUp uint64
}

// State is the state of the node according to the events: the log's events applied one after the
// other. So a restart continues with the state that the log says, and an event that was held back
// is found again at the next look.
type State struct {
	// objects are tunnels, sessions, present conditions, and addresses that are down.
	objects    map[string]object
	based      bool   // generation is known
	generation uint64 // newest one with an event
	applied    uint64
	running    bool // the last run has not recorded its stop
}

func newState() *State { return &State{objects: map[string]object{}} }

// conditionKey and addressKey are keys of State.objects; those of tunnels and sessions are their
// names as in the events.
func conditionKey(kind, object string) string { return "condition\x00" + kind + "\x00" + object }

func addressKey(pool, address string) string { return "address\x00" + pool + "\x00" + address }

// apply changes the state by an event.
func (st *State) apply(e Event) {
	set := func(key, state string) {
		o := st.objects[key]
		o.state, o.since = state, e.Time
		st.objects[key] = o
	}
	switch e.Type {
	case TunnelUp.Name, TunnelDown.Name, TunnelSuspect.Name, SessionUp.Name, SessionDown.Name:
		set(e.Object, e.Type)
	case TunnelRemoved.Name, SessionRemoved.Name:
		delete(st.objects, e.Object)
	case ConditionBegan.Name:
		set(conditionKey(e.Detail, e.Object), string(e.Severity))
	case ConditionChanged.Name:
		key := conditionKey(e.Detail, e.Object)
		o := st.objects[key]
		o.state = string(e.Severity)
		st.objects[key] = o
	case ConditionEnded.Name:
		delete(st.objects, conditionKey(e.Detail, e.Object))
	case PoolAddressDown.Name:
		set(addressKey(e.Object, e.Detail), e.Type)
	case PoolAddressUp.Name:
		delete(st.objects, addressKey(e.Object, e.Detail))
	case DocumentAccepted.Name, Reverted.Name:
		st.based, st.generation = true, max(st.generation, e.Generation)
	case Applied.Name:
		st.applied = e.Generation
	case NodeStarted.Name:
		st.running = true
	case NodeStopped.Name:
		st.running = false
	}
}

// own are conditions whose begin and end have events of their own kind.
var own = []string{condition.TunnelDown.Name, condition.TunnelSuspect.Name, condition.SessionDown.Name}

// down are the states in which a tunnel is not up. Not known is neither.
var down = []string{"down", "connecting", "dead", "disabled"}

// Compare returns the events that lead from the recorded state to a snapshot. It changes neither.
func Compare(st *State, s Snapshot) []Event {
	c := comparison{State: st, s: s}
	for _, t := range s.Tunnels {
		c.tunnel(t)
	}
	for _, p := range s.Peers {
		c.peer(p)
	}
	c.removed()
	c.pools()
	c.conditions()
	c.documents()
	return c.out
}

type comparison struct {
	*State
	s   Snapshot
	out []Event
}

// settled reports whether absence proves something.
func (c *comparison) settled() bool { return c.s.Now.Sub(c.s.Started) >= settling }

// add adds an event of a state that began at a time. former is the state that it ends.
func (c *comparison) add(k *Kind, name, detail string, since time.Time, former object, format string, args ...any) *Event {
	// A state that is older than the look by more than a moment was not seen to begin.
	const moment = 5 * time.Second
	at := c.s.Now
	if !since.IsZero() && since.Before(at) && at.Sub(since) < moment {
		at = since
	}
	e := Event{Time: at.UTC(), Type: k.Name, Object: name, Detail: detail, Severity: k.Severity, Message: fmt.Sprintf(format, args...)}
	if !former.since.IsZero() && at.After(former.since) {
		e.Lasted = at.Sub(former.since)
	}
	c.out = append(c.out, e)
	return &c.out[len(c.out)-1]
}

func has(all []*isthmusv1.Condition, k *condition.Kind) *isthmusv1.Condition {
	i := slices.IndexFunc(all, func(c *isthmusv1.Condition) bool { return c.Type == k.Name })
	if i < 0 {
		return nil
	}
	return all[i]
}

// words are the recorded states of tunnels, sessions and addresses in words.
var words = map[string]string{
	TunnelUp.Name: " up", TunnelDown.Name: " down", TunnelSuspect.Name: " suspect", SessionUp.Name: " established", SessionDown.Name: " down", PoolAddressDown.Name: " down",
}

// after says how long a state lasted.
func after(former object, at time.Time) string {
	if d := at.Sub(former.since).Round(time.Second); !former.since.IsZero() && d > 0 {
		text := d.String()
		if short, ok := strings.CutSuffix(text, "m0s"); ok {
			text = short + "m"
		}
		return " after " + text + words[former.state]
	}
	return ""
}

// flaps returns how often an object came up since the last look, besides the present time. An
// object that was up before the daemon started may be seen before its driver has counted it.
func (o object) flaps(up string, timesUp uint64) uint64 {
	counted := o.timesUp
	if o.state == up {
		counted = max(counted, 1)
	}
	if !o.seen || timesUp <= counted {
		return 0
	}
	return timesUp - counted
}

func (c *comparison) tunnel(t *isthmusv1.TunnelStatus) {
	name := "tunnel/" + t.Name
	was := c.objects[name]
	why := cmp.Or(t.GetExplanation().GetWhat(), t.LastError)
	since := t.GetSince().AsTime()
	flaps := was.flaps(TunnelUp.Name, t.TimesUp)
	switch {
	case t.State == "up":
		if was.state == TunnelUp.Name {
			if flaps == 0 {
				return
			}
			c.add(TunnelDown, name, "", time.Time{}, was, "the tunnel was down between two looks%s", after(was, c.s.Now))
			was = object{}
		}
		e := c.add(TunnelUp, name, "", since, was, "the tunnel is up%s", after(was, c.s.Now))
		if flaps > 1 {
			e.Message += fmt.Sprintf("; it came up %d times since the last look", flaps)
		}
	case t.State == "suspect":
		if was.state != TunnelSuspect.Name {
			c.add(TunnelSuspect, name, "", since, was, "%s", cmp.Or(why, "data does not pass in both directions"))
		}
	case !slices.Contains(down, t.State):
	case was.state == TunnelDown.Name:
		if flaps > 0 {
			c.add(TunnelUp, name, "", time.Time{}, was, "the tunnel was up between two looks, %d times%s", flaps, after(was, c.s.Now))
			c.add(TunnelDown, name, "", since, object{}, "the tunnel is down again: %s", cmp.Or(why, "it is "+t.State))
		}
	case was.seen && was.state != "" || has(t.Conditions, condition.TunnelDown) != nil:
		// A tunnel that this run has not seen up may need a moment; the condition waits for it.
		c.add(TunnelDown, name, "", since, was, "the tunnel is down%s: %s", after(was, c.s.Now), cmp.Or(why, "it is "+t.State))
	}
}

func (c *comparison) peer(p *isthmusv1.PeerStatus) {
	name := "peer/" + p.Name
	was := c.objects[name]
	since := p.GetSince().AsTime()
	flaps := was.flaps(SessionUp.Name, p.TimesUp)
	why := p.LastError
	if d := has(p.Conditions, condition.SessionDown); why == "" && d != nil {
		why = d.Message
	}
	why = cmp.Or(why, "it is "+p.State)
	switch {
	case p.State == "unknown": // BGPDown says so
	case p.State == "established":
		if was.state == SessionUp.Name {
			if flaps == 0 {
				return
			}
			c.add(SessionDown, name, "", time.Time{}, was, "the session was down between two looks%s", after(was, c.s.Now))
			was = object{}
		}
		e := c.add(SessionUp, name, "", since, was, "the session is established%s", after(was, c.s.Now))
		if flaps > 1 {
			e.Message += fmt.Sprintf("; it came up %d times since the last look", flaps)
		}
	case was.state == SessionDown.Name:
		if flaps > 0 {
			c.add(SessionUp, name, "", time.Time{}, was, "the session was established between two looks, %d times%s", flaps, after(was, c.s.Now))
			c.add(SessionDown, name, "", since, object{}, "the session is down again: %s", why)
		}
	case was.seen && was.state != "" || has(p.Conditions, condition.SessionDown) != nil:
		c.add(SessionDown, name, "", since, was, "the session is down%s: %s", after(was, c.s.Now), why)
	}
}

// removed compares the recorded tunnels and sessions with those of the document, once that is
// carried out: before, they are not there yet.
func (c *comparison) removed() {
	if c.s.Generation == 0 || c.s.Applied != c.s.Generation || !c.settled() {
		return
	}
	present := map[string]bool{}
	for _, t := range c.s.Tunnels {
		present["tunnel/"+t.Name] = true
	}
	for _, p := range c.s.Peers {
		present["peer/"+p.Name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(c.objects)) {
		switch {
		case present[name]:
		case strings.HasPrefix(name, "tunnel/"):
			c.add(TunnelRemoved, name, "", time.Time{}, c.objects[name], "the tunnel is no longer in the document")
		case strings.HasPrefix(name, "peer/"):
			c.add(SessionRemoved, name, "", time.Time{}, c.objects[name], "the session is no longer in the document")
		}
	}
}

func (c *comparison) pools() {
	present := map[string]bool{}
	for _, p := range c.s.Pools {
		for _, m := range p.Members {
			name := "pool/" + p.Name
			key := addressKey(name, m.Address)
			present[key] = true
			was, isDown := c.objects[key]
			switch m.Health {
			case "down":
				if !isDown {
					c.add(PoolAddressDown, name, m.Address, m.GetSince().AsTime(), object{}, "%s is down: %s", m.Address, cmp.Or(m.Reason, "its health checks fail"))
				}
			case "healthy", "unprobed":
				if isDown {
					c.add(PoolAddressUp, name, m.Address, m.GetSince().AsTime(), was, "%s is %s%s", m.Address, m.Health, after(was, c.s.Now))
				}
			}
		}
	}
	if !c.settled() {
		return
	}
	for _, key := range slices.Sorted(maps.Keys(c.objects)) {
		if parts := strings.SplitN(key, "\x00", 3); parts[0] == "address" && !present[key] {
			c.add(PoolAddressUp, parts[1], parts[2], time.Time{}, c.objects[key], "%s is no longer in the pool", parts[2])
		}
	}
}

// objectOf returns the object of a condition as events have it.
func objectOf(c *isthmusv1.Condition) string {
	if c.Object == "" {
		return "node"
	}
	return cut(strings.Replace(c.Object, " ", "/", 1), maxObject)
}

func (c *comparison) conditions() {
	present := map[string]bool{}
	for _, one := range c.s.Conditions {
		name := objectOf(one)
		key := conditionKey(one.Type, name)
		if slices.Contains(own, one.Type) || present[key] {
			continue
		}
		present[key] = true
		was, known := c.objects[key]
		switch {
		case !known:
			e := c.add(ConditionBegan, name, one.Type, one.GetSince().AsTime(), object{}, "%s: %s", one.Type, one.Message)
			e.Severity = Severity(one.Severity)
		case was.state != one.Severity:
			e := c.add(ConditionChanged, name, one.Type, time.Time{}, was, "%s: was of severity %s: %s", one.Type, was.state, one.Message)
			e.Severity = Severity(one.Severity)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(c.objects)) {
		was := c.objects[key]
		// After a restart, a condition may need its time to be found again.
		if parts := strings.SplitN(key, "\x00", 3); parts[0] == "condition" && !present[key] && (was.seen || c.settled()) {
			c.add(ConditionEnded, parts[2], parts[1], time.Time{}, was, "%s has ended%s", parts[1], after(was, c.s.Now))
		}
	}
}

// unconfirmed is how the reason of a revision begins that the node made because the former one was
// not confirmed; see router/document.
const unconfirmed = "not confirmed"

func (c *comparison) documents() {
	for _, r := range slices.Backward(c.s.Revisions) {
		if r.Generation <= c.generation || !c.based && r.GetTime().AsTime().Before(c.s.Started) {
			continue
		}
		kind, text := DocumentAccepted, fmt.Sprintf("generation %d: %s, %d changes", r.Generation, r.Reason, r.Changes)
		if strings.HasPrefix(r.Reason, unconfirmed) {
			kind = Reverted
		}
		if r.Message != "" {
			text += ": " + r.Message
		}
		e := c.add(kind, "node", "", r.GetTime().AsTime(), object{}, "%s", text)
		e.Who, e.Generation = r.Author, r.Generation
	}
	if c.s.Applied != 0 && c.s.Applied != c.applied && c.s.Applied == c.s.Generation {
		e := c.add(Applied, "node", "", time.Time{}, object{}, "generation %d is carried out", c.s.Applied)
		e.Generation = c.s.Applied
	}
}

// look notes in the state, after the events of a snapshot were applied, the facts that are not in
// events.
func (st *State) look(s Snapshot) {
	// An object is seen once it is in its recorded state: after a restart, a tunnel that was up may
	// be connecting until the node has looked.
	note := func(name, state string, timesUp uint64) {
		if o, ok := st.objects[name]; ok && o.state == state {
			o.seen, o.timesUp = true, timesUp
			st.objects[name] = o
		}
	}
	for _, t := range s.Tunnels {
		switch {
		case t.State == "up":
			note("tunnel/"+t.Name, TunnelUp.Name, t.TimesUp)
		case t.State == "suspect":
			note("tunnel/"+t.Name, TunnelSuspect.Name, t.TimesUp)
		case slices.Contains(down, t.State):
			note("tunnel/"+t.Name, TunnelDown.Name, t.TimesUp)
		}
	}
	for _, p := range s.Peers {
		switch p.State {
		case "unknown":
		case "established":
			note("peer/"+p.Name, SessionUp.Name, p.TimesUp)
		default:
			note("peer/"+p.Name, SessionDown.Name, p.TimesUp)
		}
	}
	for _, c := range s.Conditions {
		note(conditionKey(c.Type, objectOf(c)), c.Severity, 0)
	}
	// Without a recorded generation, or with a state directory that was restored, the present one
	// is where the events begin.
	newest := s.Generation
	if len(s.Revisions) > 0 {
		newest = max(newest, s.Revisions[0].Generation)
	}
	if !st.based || newest < st.generation {
		st.based, st.generation = true, newest
	}
}
