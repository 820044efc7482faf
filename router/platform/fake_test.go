package platform

import (
	"encoding/xml"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// fake is a metadata service that answers from testdata, as strictly as the real one: without the
// required header, it answers nothing.
type fake struct {
	kind  Kind
	dir   string
	mu    sync.Mutex
	over  map[string]http.HandlerFunc // by path, in place of the file
	asked []string
}

func newFake(t *testing.T, k Kind) (*fake, Reader) {
	t.Helper()
	return newImpatient(t, k, time.Minute)
}

// newImpatient is newFake with a reader that gives each request so much time.
func newImpatient(t *testing.T, k Kind, request time.Duration) (*fake, Reader) {
	t.Helper()
	f := &fake{kind: k, dir: filepath.Join("testdata", string(k)), over: map[string]http.HandlerFunc{}}
	s := httptest.NewServer(f)
	t.Cleanup(s.Close)
	r, err := Open(k, Options{Metadata: s.URL, Wire: s.URL, Request: request})
	if err != nil {
		t.Fatal(err)
	}
	return f, r
}

func (f *fake) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	f.mu.Lock()
	f.asked = append(f.asked, q.Method+" "+q.URL.Path)
	over := f.over[q.URL.Path]
	f.mu.Unlock()
	if over == nil {
		over = f.over["*"]
	}
	if over != nil {
		over(w, q)
		return
	}
	h := q.Header
	switch f.kind {
	case AWS:
		if q.URL.Path == "/latest/api/token" {
			if q.Method != http.MethodPut || h.Get("X-aws-ec2-metadata-token-ttl-seconds") == "" {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			io.WriteString(w, "AQAEAK3fakeTOKEN==")
			return
		}
		if h.Get("X-aws-ec2-metadata-token") != "AQAEAK3fakeTOKEN==" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
	case Azure:
		if h.Get("Metadata") != "true" || q.URL.Query().Get("api-version") == "" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
	case Google:
		if h.Get("Metadata-Flavor") != "Google" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		w.Header().Set("Metadata-Flavor", "Google")
	}
	data, err := os.ReadFile(filepath.Join(f.dir, strings.ReplaceAll(strings.TrimPrefix(q.URL.Path, "/"), "/", "+")))
	if err != nil {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Write(data)
}

// answer sets the answer to a path.
func (f *fake) answer(path string, h http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.over[path] = h
}

func text(status int, kind, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("Content-Type", kind)
		w.Header().Set("Metadata-Flavor", "Google")
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// wire is Azure's wire server.
func (f *fake) wire(t *testing.T, reports *[]health) {
	f.answer("/machine/", func(w http.ResponseWriter, q *http.Request) {
		if q.Method != http.MethodGet || q.URL.RawQuery != "comp=goalstate" || q.Header.Get("x-ms-version") == "" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		io.WriteString(w, `<?xml version="1.0" encoding="utf-8"?><GoalState xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><Version>2012-11-30</Version><Incarnation>7</Incarnation>
<Machine><ExpectedState>Started</ExpectedState></Machine><Container><ContainerId>c6d5526c-5ac2-4200-b6e2-56f2b70c5ab2</ContainerId>
<RoleInstanceList><RoleInstance><InstanceId>_hub-1</InstanceId><State>Started</State></RoleInstance></RoleInstanceList></Container></GoalState>`)
	})
	f.answer("/machine", func(w http.ResponseWriter, q *http.Request) {
		body, _ := io.ReadAll(q.Body)
		var h health
		if err := xml.Unmarshal(body, &h); err != nil || q.Method != http.MethodPost || q.URL.RawQuery != "comp=health" || !strings.HasPrefix(q.Header.Get("Content-Type"), "text/xml") {
			t.Errorf("health: %v, %s %s: %s", err, q.Method, q.URL, body)
		}
		f.mu.Lock()
		*reports = append(*reports, h)
		f.mu.Unlock()
	})
}

func newServer(t *testing.T, h http.Handler) string {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}
