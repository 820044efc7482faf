package auth

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/disk"
)

// Event is the moment at which an audit line was written.
type Event string

const (
	// Begin is written before anything is changed. If it cannot be written, the call is refused.
	Begin Event = "begin"
	// End has the result. If it is missing, the daemon died in between; the history shows whether
	// the write was accepted.
	End Event = "end"
	// Refused is a call or a connection that was refused.
	Refused Event = "refused"
	// Replaced is the first line of a log that was created again, because its file was removed,
	// renamed or replaced while the daemon used it.
	Replaced Event = "replaced"
)

// Entry is one line of the audit log. It never contains a secret.
type Entry struct {
	Time    time.Time `json:"time"`
	Event   Event     `json:"event"`
	Call    uint64    `json:"call,omitzero"` // joins Begin and End, unique since Started
	Who     string    `json:"who,omitzero"`
	Role    string    `json:"role,omitzero"`
	Serial  string    `json:"serial,omitzero"`
	Address string    `json:"address"`
	Method  string    `json:"method,omitzero"`
	// Object is the object of the call: the name of a secret, peer or client. A change that is not
	// made, or is reverted unless it is confirmed, begins with that.
	Object string `json:"object,omitzero"`
	// Digest is the SHA-256 of the document, in hexadecimal. Of an edit of policies, it is that of
	// the text, or of the message with all policies and names when there is more than a text.
	Digest string `json:"digest,omitzero"`
	From   uint64 `json:"fromGeneration,omitzero"`
	To     uint64 `json:"toGeneration,omitzero"`
	Result string `json:"result,omitzero"` // gRPC code
	Error  string `json:"error,omitzero"`
	// Suppressed is the number of refusals of the same client that were not written.
	Suppressed uint64 `json:"suppressed,omitzero"`
}

const (
	auditBytes = 8 << 20 // of one file
	auditFiles = 8       // besides the present one

	// Lines that unauthenticated callers cause have files of their own, so that they cannot push
	// lines out of the main log.
	refusedBytes = 4 << 20
	refusedFiles = 1
)

// Refusals are written at most this often for one client, and for all unauthenticated callers
// together: 720 lines a day besides the burst. Further ones are counted, and the next line has
// their number.
const (
	refusalsEvery = 2 * time.Minute
	refusalsBurst = 20
)

// Audit is an append-only log of JSON lines. It is rotated by size: name, name.1 (newest) to
// name.8.
type Audit struct {
	now   func() time.Time
	name  string
	limit int64
	files int    // besides the present one
	other *Audit // takes the lines of unauthenticated callers; nil: this log does
	// observe is called with each entry after it was written, without the lock. Nil: nothing is.
	observe func(Entry)

	mu       sync.Mutex
	file     *os.File
	info     os.FileInfo // of file
	size     int64
	calls    uint64
	refusals map[string]*refusals
	moved    bool      // by a rotation that has not created the new file
	replaced time.Time // when the file was last found missing; zero: never
}

type refusals struct {
	limiter    *rate.Limiter
	suppressed uint64
}

// OpenAudit opens the log, and creates it if it is missing. With an error it returns a log that is
// opened by the first entry that it can store, and refuses those before: a full or read-only disk
// must not stop a router from routing. Lines that unauthenticated callers cause go to a log of
// their own, RefusedLog of name, which is created with its first line.
func OpenAudit(name string, now func() time.Time) (*Audit, error) {
	l := &Audit{now: now, name: name, limit: auditBytes, files: auditFiles, refusals: make(map[string]*refusals)}
	l.other = &Audit{now: now, name: RefusedLog(name), limit: refusedBytes, files: refusedFiles, refusals: make(map[string]*refusals)}
	if err := l.openLocked(); err != nil {
		return l, fmt.Errorf("opening audit log: %w", err)
	}
	return l, nil
}

// Observe has f called with each entry that is written, and with the end of each call even if it
// could not be written. Call it before the log is used.
func (l *Audit) Observe(f func(Entry)) {
	l.observe = f
	if l.other != nil {
		l.other.observe = f
	}
}

// observed passes on an entry after an attempt to write it.
func (l *Audit) observed(e Entry, err error) {
	if l.observe != nil && (err == nil || e.Event == End) {
		e.Time = l.now().UTC()
		l.observe(e)
	}
}

// RefusedLog returns the name of the log for unauthenticated callers, in the same directory:
// audit-refused.log for audit.log.
func RefusedLog(name string) string {
	extension := filepath.Ext(name)
	return strings.TrimSuffix(name, extension) + "-refused" + extension
}

func (l *Audit) openLocked() (err error) {
	f, err := os.OpenFile(l.name, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := disk.SyncDir(filepath.Dir(l.name)); err != nil {
		return err
	}
	size := info.Size()
	// A line cut short by a loss of power must not swallow the next one.
	last := make([]byte, 1)
	if size > 0 {
		if _, err := f.ReadAt(last, size-1); err == nil && last[0] != '\n' {
			if _, err := f.WriteString("\n"); err != nil {
				return err
			}
			size++
		}
	}
	l.file, l.info, l.size, l.moved = f, info, size, false
	return nil
}

// Close closes the log. Every line is on disk already.
func (l *Audit) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	if l.other != nil {
		err = l.other.Close()
	}
	if l.file == nil {
		return err
	}
	return errors.Join(err, l.file.Close())
}

// goneLocked reports whether the open file is no longer the one under its name.
func (l *Audit) goneLocked() bool {
	if l.file == nil || l.moved {
		return false
	}
	info, err := os.Lstat(l.name)
	return errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(info, l.info)
}

// followLocked creates the log again if its file was removed, renamed or replaced, and says so in
// its first line.
func (l *Audit) followLocked() error {
	if !l.goneLocked() {
		return nil
	}
	l.replaced = l.now()
	old := l.file
	if err := l.openLocked(); err != nil {
		return err
	}
	_ = old.Close() // its lines are on disk
	return l.writeLocked(Entry{Event: Replaced, Who: ServerName, Address: "unix",
		Error: "the file of the audit log was removed, renamed or replaced; this one goes on, and former lines may be missing"})
}

// replacedFor is how long a condition reports a replaced log.
const replacedFor = 24 * time.Hour

// Conditions reports that the log was removed, renamed or replaced while the daemon used it.
func (l *Audit) Conditions() []*isthmusv1.Condition {
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.followLocked() // a failure refuses the next changing call
	if l.replaced.IsZero() || l.now().Sub(l.replaced) > replacedFor {
		return nil
	}
	return []*isthmusv1.Condition{condition.AuditLogReplaced.Warning(l.replaced, "%s", l.name+" was removed, renamed or replaced under the daemon, and was made again: look for who did that; the daemon rotates the log itself")}
}

// write appends an entry and returns once it is on disk.
func (l *Audit) write(e Entry) error {
	l.mu.Lock()
	err := l.writeLocked(e)
	l.mu.Unlock()
	l.observed(e, err)
	return err
}

func (l *Audit) writeLocked(e Entry) error {
	e.Time = l.now().UTC()
	line, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("writing audit log: %w", err)
	}
	if l.file == nil {
		if err := l.openLocked(); err != nil {
			return fmt.Errorf("opening audit log: %w", err)
		}
	}
	if err := l.followLocked(); err != nil {
		return fmt.Errorf("opening audit log: %w", err)
	}
	if l.size > 0 && l.size+int64(len(line)) > l.limit {
		if err := l.rotateLocked(); err != nil {
			return fmt.Errorf("rotating audit log: %w", err)
		}
	}
	n, err := l.file.Write(append(line, '\n'))
	if err != nil {
		// A partial line would swallow the next one.
		return fmt.Errorf("writing audit log: %w", errors.Join(err, l.file.Truncate(l.size)))
	}
	l.size += int64(n)
	if err := l.file.Sync(); err != nil {
		return fmt.Errorf("writing audit log: %w", err)
	}
	return nil
}

func (l *Audit) rotateLocked() error {
	present, err := l.file.Stat()
	if err != nil {
		return err
	}
	// An earlier attempt may have moved the files without opening a new one: moving them again
	// would push the oldest out.
	first := l.files - 1
	if info, err := os.Lstat(l.name); err != nil || !os.SameFile(info, present) {
		first = -1
	}
	l.moved = true
	for i := first; i >= 0; i-- {
		from := l.name
		if i > 0 {
			from = fmt.Sprintf("%s.%d", l.name, i)
		}
		err := os.Rename(from, fmt.Sprintf("%s.%d", l.name, i+1))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	old := l.file
	if err := l.openLocked(); err != nil {
		return err
	}
	return old.Close()
}

// begin writes the entry of a call that is about to change something, and returns it for end.
func (l *Audit) begin(e Entry) (Entry, error) {
	l.mu.Lock()
	l.calls++
	e.Event, e.Call = Begin, l.calls
	err := l.writeLocked(e)
	l.mu.Unlock()
	l.observed(e, err)
	return e, err
}

// Act makes a change on behalf of the daemon, with Begin and End in the log like those of a call; e
// has the author, the change and the base generation. If Begin cannot be written, Act does nothing.
// do returns the generation that it made; 0: none.
func (l *Audit) Act(e Entry, do func() (uint64, error)) error {
	e.Address = "unix"
	e, err := l.begin(e)
	if err != nil {
		return err
	}
	generation, err := do()
	e.Event, e.Result, e.To = End, "OK", generation
	if err != nil {
		e.Result, e.Error = "FailedPrecondition", shorten(err.Error())
	}
	_ = l.write(e) // the change is made, and its Begin is on disk
	return err
}

// refuse writes a refusal, unless the client under key has had too many of them recently.
func (l *Audit) refuse(key string, e Entry) error {
	if key == "" && l.other != nil { // an unauthenticated caller
		return l.other.refuse(key, e)
	}
	e.Event = Refused
	if !l.admitRefusal(key, &e) {
		return nil
	}
	return l.write(e)
}

// admitRefusal reports whether a refusal is written, and sets the number of those that were not.
func (l *Audit) admitRefusal(key string, e *Entry) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.refusals[key]
	if r == nil {
		r = &refusals{limiter: rate.NewLimiter(rate.Every(refusalsEvery), refusalsBurst)}
		l.refusals[key] = r
	}
	if !r.limiter.AllowN(l.now(), 1) {
		r.suppressed++
		return false
	}
	e.Suppressed = r.suppressed
	r.suppressed = 0
	return true
}
