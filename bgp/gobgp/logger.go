package gobgp

import (
	"context"
	"fmt"
	"runtime/pprof"
	"strings"
	"sync"
	"time"

	"github.com/osrg/gobgp/v3/pkg/log"
	"github.com/osrg/gobgp/v3/pkg/server"

	"github.com/isthmus-net/isthmus/bgp"
)

// peerLabel is the goroutine label that names the peer whose message is being worked on. The runtime prints it with
// the stack of a panic (GODEBUG tracebacklabels=1), and so a crash names its culprit.
const peerLabel = "peer"

// logger is GoBGP's log. GoBGP tells through it, in the goroutine of the session and before the work on the tables
// that follows, what it tells nowhere else in time: that a session ended, and whose message comes next. GoBGP calls it
// with locks held, so it only takes notes.
//
// The texts are those of v3.37.0; TestSession and TestKiller fail when they change.
type logger struct {
	out *outbox
	id  func(address string) (uint32, bool)
	// held is called when the hold timer of a session has run out and the session has ended.
	held func(address string)
	// established is called when a session has come up.
	established func(address string)
	// released gets a value, if it has room, when the barrier's End-of-RIB is being worked on.
	released chan<- struct{}

	mu      sync.Mutex
	expired map[string]bool // hold timer, of sessions that have not ended yet
	second  int64           // Unix time
	lines   int             // in that second
	labels  map[string]context.Context
}

func (l *logger) GetLevel() log.LogLevel { return log.DebugLevel }
func (l *logger) SetLevel(log.LogLevel)  {}

// Panic and Fatal end the process in the calling goroutine, so that its label is printed.
func (l *logger) Panic(msg string, f log.Fields) { panic(msg + detail(f)) }
func (l *logger) Fatal(msg string, f log.Fields) { panic(msg + detail(f)) }
func (l *logger) Error(msg string, f log.Fields) { l.tell("ERROR", msg, f) }

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
	case "prefix limit reached", // once for each further UPDATE
		"No matching path for withdraw found, may be path was not installed into table": // for each refused path
		return
	}
	l.tell("WARN", msg, f)
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
		if expired {
			// GoBGP would keep the paths of a peer that fell silent as if it had announced a restart.
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
		// The server's goroutine starts the goroutines of the new state next, and they inherit the label.
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

// maxLines is how many lines are passed on in a second. Peers can cause lines at will.
const maxLines = 20

// tell passes a line on, and makes it the last error of the peer it is about.
func (l *logger) tell(level, msg string, f log.Fields) {
	now := time.Now().Unix()
	l.mu.Lock()
	if l.second != now {
		l.second, l.lines = now, 0
	}
	l.lines++
	drop := l.lines > maxLines
	l.mu.Unlock()
	if drop {
		return
	}
	key, _ := f["Key"].(string)
	id, _ := l.id(key)
	text := msg + detail(f)
	l.out.put(frameLog, logMessage{Level: level, Text: text, Peer: id})
	if id != 0 {
		l.state(key, stateMessage{Error: text})
	}
}

// detail returns what a field says that is worth reading.
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

// hook takes the label off the server's goroutine after each message, so that what GoBGP does next is not laid at the
// peer's door.
type hook struct{}

func (hook) Observe(server.FSMOperation, time.Duration, time.Duration) {
	pprof.SetGoroutineLabels(context.Background())
}
