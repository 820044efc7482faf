package auth

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"syscall"
	"time"
)

// Bounds of reading the log. The files may have 80 MiB together; one call reads a part of that, and
// keeps no more than a chunk of each of the two logs in memory.
const (
	auditRead  = 16 << 20 // bytes of one call
	auditChunk = 128 << 10
	auditLine  = 32 << 10 // of the longest line
)

// Query selects entries of the audit log. An empty field selects all.
type Query struct {
	Since, Until time.Time
	// Who is the caller: the whole name, or the person in "root (alice)".
	Who string
	// Method is the whole name or its last part; case does not matter.
	Method string
	Limit  int    // of entries
	Token  string // of the page before
}

func (q Query) matches(e Entry) bool {
	switch {
	case !q.Since.IsZero() && e.Time.Before(q.Since), !q.Until.IsZero() && !e.Time.Before(q.Until):
		return false
	case q.Who != "" && e.Who != q.Who && !strings.HasSuffix(e.Who, " ("+q.Who+")"):
		return false
	case q.Method != "" && !strings.EqualFold(e.Method, q.Method) && (e.Method == "" || !strings.EqualFold(path.Base(e.Method), q.Method)):
		return false
	}
	return true
}

// Page is a part of the audit log, newest entry first.
type Page struct {
	Entries []Entry
	Next    string // token of the next page; empty: this is the last one
	Damaged uint32 // lines that are not entries
}

// place is how far a log is read: the part of a file before an offset, and all older files. A file
// keeps its inode when the log is rotated.
type place struct {
	Inode uint64 `json:"i,omitzero"`
	End   int64  `json:"e,omitzero"`
	Done  bool   `json:"d,omitzero"`
}

// pageToken is how far both logs are read by a query.
type pageToken struct {
	Main    place  `json:"m"`
	Refused place  `json:"r"`
	Sum     []byte `json:"s"` // of the query
}

func (q Query) sum() []byte {
	q.Token, q.Limit = "", 0
	data, _ := json.Marshal(q)
	sum := sha256.Sum256(data)
	return sum[:8]
}

// List returns entries of this log and of the one of unauthenticated callers, newest first. A page
// may have fewer entries than the limit although more follow, because one call reads only a part.
func (l *Audit) List(q Query) (p Page, err error) {
	var from *pageToken
	if q.Token != "" {
		from = &pageToken{}
		data, err := base64.RawURLEncoding.DecodeString(q.Token)
		if err != nil || json.Unmarshal(data, from) != nil || !bytes.Equal(from.Sum, q.sum()) {
			return p, fmt.Errorf("%w: page_token: belongs to another list or filter; start again without it", ErrInvalid)
		}
	}
	budget := int64(auditRead)
	open := func(l *Audit, from *place) (*backward, error) {
		if l == nil || from != nil && from.Done {
			return &backward{}, nil
		}
		return openBackward(l.name, l.files, from, q.Since, &budget)
	}
	var starts [2]*place
	if from != nil {
		starts = [2]*place{&from.Main, &from.Refused}
	}
	main, err := open(l, starts[0])
	if err != nil {
		return p, err
	}
	defer main.close()
	refused, err := open(l.other, starts[1])
	if err != nil {
		return p, err
	}
	defer refused.close()
	for {
		main.advance(&p.Damaged)
		refused.advance(&p.Damaged)
		of := main
		if main.entry == nil || refused.entry != nil && refused.entry.Time.After(main.entry.Time) {
			of = refused
		}
		switch {
		case main.stopped || refused.stopped || len(p.Entries) == q.Limit && of.entry != nil:
			token, err := json.Marshal(pageToken{main.at(), refused.at(), q.sum()})
			p.Next = base64.RawURLEncoding.EncodeToString(token)
			return p, err
		case of.entry == nil:
			return p, nil
		case q.matches(*of.entry):
			p.Entries = append(p.Entries, *of.entry)
		}
		of.entry = nil
	}
}

// ListAudit returns entries of the audit log; see Audit.List.
func (a *Authority) ListAudit(q Query) (Page, error) { return a.audit.List(q) }

// backward reads the lines of a log's files from the newest to the oldest.
type backward struct {
	files   []*os.File
	inodes  []uint64
	end     int64  // of the part of the first file that is not read
	data    []byte // a part of that file
	base    int64  // its place in the file
	entry   *Entry // the next one; nil: none was read
	before  place  // where entry ends
	budget  *int64
	stopped bool // the budget is used up
}

// openBackward opens the files of a log. It goes from the newest to the oldest, so that a rotation
// in between shows a file twice, which is left out, and leaves none out.
func openBackward(name string, older int, from *place, since time.Time, budget *int64) (*backward, error) {
	r := &backward{budget: budget}
	seen := map[uint64]bool{}
	for i := 0; i <= older; i++ {
		file := name
		if i > 0 {
			file = fmt.Sprintf("%s.%d", name, i)
		}
		f, err := os.Open(file)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			r.close()
			return nil, fmt.Errorf("reading the audit log: %w", err)
		}
		info, err := f.Stat()
		if err != nil || !info.Mode().IsRegular() {
			f.Close()
			continue
		}
		inode := info.Sys().(*syscall.Stat_t).Ino
		wanted := len(r.files) > 0 || from == nil || from.Inode == inode
		if seen[inode] || !wanted || !since.IsZero() && info.ModTime().Before(since) {
			f.Close() // no line is younger than its file
			seen[inode] = true
			continue
		}
		seen[inode] = true
		if len(r.files) == 0 {
			r.end = info.Size()
			if from != nil {
				r.end = min(max(from.End, 0), info.Size())
			}
		}
		r.files, r.inodes = append(r.files, f), append(r.inodes, inode)
	}
	return r, nil
}

func (r *backward) close() {
	for _, f := range r.files {
		f.Close()
	}
}

// at returns how far the log is read, without the entry that was not taken.
func (r *backward) at() place {
	switch {
	case r.entry != nil:
		return r.before
	case len(r.files) == 0:
		return place{Done: true}
	}
	return place{Inode: r.inodes[0], End: r.end}
}

// advance reads the next entry, unless there is one.
func (r *backward) advance(damaged *uint32) {
	for r.entry == nil && !r.stopped && len(r.files) > 0 {
		before := place{Inode: r.inodes[0], End: r.end}
		line, ok := r.line()
		if !ok {
			continue
		}
		e := &Entry{}
		if len(line) == 0 {
			continue
		}
		if json.Unmarshal(line, e) != nil || e.Event == "" {
			*damaged++
			continue
		}
		r.entry, r.before = e, before
	}
}

// line returns the last line that is not read yet. It returns false when that takes another step:
// at the beginning of a file, and when the budget is used up.
func (r *backward) line() ([]byte, bool) {
	if r.end == 0 {
		r.files[0].Close()
		r.files, r.inodes, r.data = r.files[1:], r.inodes[1:], nil
		if len(r.files) > 0 {
			info, err := r.files[0].Stat()
			if err == nil {
				r.end = info.Size()
			}
		}
		return nil, false
	}
	from := max(0, r.end-auditLine)
	if r.data == nil || from < r.base {
		base := max(0, r.end-auditChunk)
		if *r.budget < r.end-base {
			r.stopped = true
			return nil, false
		}
		*r.budget -= r.end - base
		data := make([]byte, r.end-base)
		if n, err := r.files[0].ReadAt(data, base); err != nil && (err != io.EOF || n < len(data)) {
			r.end = 0 // the file was cut under the reader
			return nil, false
		}
		r.data, r.base = data, base
	}
	part := bytes.TrimSuffix(r.data[from-r.base:r.end-r.base], []byte("\n"))
	i := bytes.LastIndexByte(part, '\n')
	if i < 0 && from > 0 {
		// Longer than any entry: both of its halves are damaged lines.
		r.end = from
		return []byte("-"), true
	}
	r.end = from + int64(i) + 1
	return part[i+1:], true
}
