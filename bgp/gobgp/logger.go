package gobgp

import (
	"context"
	"fmt"
	"runtime/pprof"
	"strings"
	"sync"
	"time"

	"github.com/osrg/gobgp/v3/pkg/log"
	packet "github.com/osrg/gobgp/v3/pkg/packet/bgp"
	"github.com/osrg/gobgp/v3/pkg/server"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/bgp/filter"
)

// peerLabel is the goroutine label that names the peer whose message is being processed. The
// runtime prints it with the stack of a panic (GODEBUG tracebacklabels=1), so that a crash names
// the peer that caused it.
const peerLabel = "peer"

// logger is GoBGP's log. It is the only timely source of two facts: that a session has ended, and
// whose message is processed next. GoBGP logs them in the goroutine of the session, before it
// changes its tables. It calls the logger with locks held, so the logger only stores and queues.
//
// The texts are those of v3.37.0; TestSession and TestKiller fail when they change.
type logger struct {
	out *outbox
	id  func(address string) (uint32, bool)
	// held is called when a session has ended because its hold timer expired.
	held func(address string)
	// established is called when a session has come up.
	established func(address string)
	// released receives a value, if it has room, when GoBGP begins to process the barrier's
	// End-of-RIB.
	released chan<- struct{}

	mu      sync.Mutex
	expired map[string]bool // hold timer expired, but the session has not ended yet
	second  int64           // Unix time
	lines   int             // in that second
	labels  map[string]context.Context
}

func (l *logger) GetLevel() log.LogLevel { return log.DebugLevel }
func (l *logger) SetLevel(log.LogLevel)  {}

// Panic and Fatal panic in the calling goroutine, so that its label is printed.
func (l *logger) Panic(msg string, f log.Fields) { panic(msg + detail(f)) }
func (l *logger) Fatal(msg string, f log.Fields) { panic(msg + detail(f)) }
func (l *logger) Error(msg string, f log.Fields) { l.forward("ERROR", msg, f) }

func (l *logger) Warn(msg string, f log.Fields) {
	key, _ := f["Key"].(string)
	switch msg {
	case "hold timer expired":
		l.mu.Lock()
		l.expired[key] = true
		l.mu.Unlock()
	case "graceful restart timer expired":
		l.state(key, stateMessage{Expired: true, Error: "the peer did not come back within its restart time"})
		return
	case "received notification": // its "Peer Down" follows, if the session was up
		text, relay := notification(f)
		l.state(key, stateMessage{Error: text})
		if !relay { // the daemon logs what its relay does
			l.line("WARN", key, text)
		}
		return
	case "sent notification": // the relay reports it with the remedy, or "Peer Down" follows
		l.line("WARN", key, msg+detail(f))
		return
	case "prefix limit reached", // logged again for each further UPDATE
		// for each rejected path
		"No matching path for withdraw found, may be path was not installed into table":
		return
	}
	l.forward("WARN", msg, f)
}

func (l *logger) Info(msg string, f log.Fields) {
	key, _ := f["Key"].(string)
	switch msg {
	case "Peer Down":
		reason := fmt.Sprint(f["Reason"])
		l.mu.Lock()
		expired := l.expired[key]
		delete(l.expired, key)
		l.mu.Unlock()
		m := stateMessage{State: bgp.Idle, Down: true, Error: reason, Restarting: reason == "graceful-restart"}
		if reason == "hard-reset" || strings.HasPrefix(reason, "notification-received") {
			m.Error = "" // "received notification" has said more
		}
		if expired {
			// GoBGP would keep the paths of a silent peer as if it had announced a restart.
			m.Error, m.Restarting = "hold timer expired", false
			defer l.held(key)
		}
		l.state(key, m)
	case "Administrative shutdown(Prefix limit reached)":
		l.state(key, stateMessage{State: bgp.PrefixLimit})
	}
}

func (l *logger) Debug(msg string, f log.Fields) {
	switch msg {
	case "received update":
		key, _ := f["Key"].(string)
		l.label(key)
	case "EOR received":
		if key, _ := f["Key"].(string); key == barrierAddress {
			select {
			case l.released <- struct{}{}:
			default:
			}
		}
	case "failed to connect":
		key, _ := f["Key"].(string)
		l.state(key, stateMessage{Error: fmt.Sprintf("connecting: %v", f["Error"])})
	case "state changed":
		// GoBGP's server goroutine now starts the goroutines of the new state, which inherit the
		// label.
		key, _ := f["Key"].(string)
		l.label(key)
		old, _ := f["old"].(string)
		next, _ := f["new"].(string)
		if s := sessionStates[next]; s != "" && old != "BGP_FSM_ESTABLISHED" {
			l.state(key, stateMessage{State: s})
			if s == bgp.Established {
				l.established(key)
			}
		}
	}
}

func (l *logger) label(key string) {
	l.mu.Lock()
	ctx, ok := l.labels[key]
	if !ok {
		ctx = pprof.WithLabels(context.Background(), pprof.Labels(peerLabel, key))
		l.labels[key] = ctx
	}
	l.mu.Unlock()
	pprof.SetGoroutineLabels(ctx)
}

func (l *logger) state(key string, m stateMessage) {
	var ok bool
	if m.Peer, ok = l.id(key); ok {
		l.out.put(frameState, m)
	}
}

// maxLines bounds how many log lines are forwarded in a second, because peers can cause any number
// of them.
const maxLines = 20

// forward sends a line to the daemon, and makes it the last error of the peer that it is about.
func (l *logger) forward(level, msg string, f log.Fields) {
	key, _ := f["Key"].(string)
	text := msg + detail(f)
	if l.line(level, key, text) {
		l.state(key, stateMessage{Error: text})
	}
}

// line sends a line to the daemon. It returns false if there are too many.
func (l *logger) line(level, key, text string) bool {
	now := time.Now().Unix()
	l.mu.Lock()
	if l.second != now {
		l.second, l.lines = now, 0
	}
	l.lines++
	drop := l.lines > maxLines
	l.mu.Unlock()
	if drop {
		return false
	}
	id, _ := l.id(key)
	l.out.put(frameLog, logMessage{Level: level, Text: text, Peer: id})
	return true
}

// notification returns what a NOTIFICATION says, and whether the relay sent it. The relay says why
// it has ended the session.
func notification(f log.Fields) (text string, relay bool) {
	code, _ := f["Code"].(uint8)
	subcode, _ := f["Subcode"].(uint8)
	data, _ := f["Data"].([]byte)
	if code == packet.BGP_ERROR_CEASE && subcode == filter.EndedHere {
		return string(data), true
	}
	text = fmt.Sprintf("received NOTIFICATION %d/%d: %v", code, subcode, packet.NewNotificationErrorCode(code, subcode))
	if s, _ := f["Communicated-Reason"].(string); s != "" {
		text += fmt.Sprintf(", reason %q", s)
	} else if len(data) > 0 {
		text += fmt.Sprintf(", data %x", data)
	}
	return text, false
}

// detail returns the fields that are useful to a reader.
func detail(f log.Fields) string {
	var b strings.Builder
	for _, k := range []string{"Error", "error", "Err", "Data", "Code", "Subcode", "Communicated-Reason"} {
		if v, ok := f[k]; ok {
			s := fmt.Sprint(v)
			fmt.Fprintf(&b, ", %s %s", strings.ToLower(k), s[:min(len(s), 200)])
		}
	}
	return b.String()
}

// hook removes the label from the server's goroutine after each message, so that a crash in
// GoBGP's next action is not attributed to the peer.
type hook struct{}

func (hook) Observe(server.FSMOperation, time.Duration, time.Duration) {
	pprof.SetGoroutineLabels(context.Background())
}
