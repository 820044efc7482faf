package door

import (
	"net/http"
	"strings"
	"sync"
	"time"
)

// minKept is how long a page is kept at least. One that takes longer to make is kept for keptTimes
// as long.
const (
	minKept   = time.Second
	keptTimes = 9
)

// shared makes a page once for all clients that ask for it within a while. Clients choose only
// whether it is compressed.
type shared struct {
	next http.Handler
	now  func() time.Time

	mu          sync.Mutex // held while the page is made: one at a time
	plain, gzip answer
}

// answer is a page as it was made.
type answer struct {
	status int
	header http.Header
	body   []byte
	until  time.Time
}

func (a *answer) Header() http.Header    { return a.header }
func (a *answer) WriteHeader(status int) { a.status = status }

func (a *answer) Write(p []byte) (int, error) {
	a.body = append(a.body, p...)
	return len(p), nil
}

// ServeHTTP implements http.Handler.
func (s *shared) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a := s.get(strings.Contains(r.Header.Get("Accept-Encoding"), "gzip"))
	for name, values := range a.header {
		w.Header()[name] = values
	}
	w.WriteHeader(a.status)
	_, _ = w.Write(a.body) // a client that has left does not need it
}

func (s *shared) get(gzip bool) answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	kept := &s.plain
	if gzip {
		kept = &s.gzip
	}
	began := s.now()
	if began.Before(kept.until) {
		return *kept
	}
	made := answer{status: http.StatusOK, header: http.Header{}}
	// A request of our own: nothing that a client sends reaches the page.
	ask := &http.Request{Method: http.MethodGet, Header: http.Header{}}
	if gzip {
		ask.Header.Set("Accept-Encoding", "gzip")
	}
	s.next.ServeHTTP(&made, ask)
	done := s.now()
	made.until = done.Add(max(minKept, keptTimes*done.Sub(began)))
	*kept = made
	return made
}
