package platform

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"
	"unicode/utf8"
)

// client queries one metadata service. It connects only to that service's address, whatever an
// answer, a proxy in the environment or a redirect says.
type client struct {
	kind   Kind
	base   string
	http   *http.Client
	within time.Duration
}

func newClient(k Kind, base string, within time.Duration) (*client, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "http" || u.Host == "" || u.Path != "" || u.RawQuery != "" {
		return nil, fmt.Errorf("metadata service %q: give a URL as http://169.254.169.254", base)
	}
	if _, err := netip.ParseAddr(u.Hostname()); err != nil {
		return nil, fmt.Errorf("metadata service %q: give an address, not a name", base)
	}
	port := u.Port()
	if port == "" {
		port = "80"
	}
	at := net.JoinHostPort(u.Hostname(), port)
	dialer := &net.Dialer{Timeout: within}
	return &client{kind: k, base: base, within: within, http: &http.Client{
		Transport: &http.Transport{
			Proxy:                  nil,
			DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", at) },
			DisableCompression:     true,
			DisableKeepAlives:      true,
			MaxResponseHeaderBytes: 16 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// request is one HTTP request.
type request struct {
	method, path string
	header       map[string]string
	body         string
	limit        int
}

// errMissing means that the service answers, but has nothing at the path.
var errMissing = errors.New("not there")

// do sends one request, and returns the body and the header of an answer with status 200 or 201.
func (c *client) do(ctx context.Context, q request) ([]byte, http.Header, error) {
	ctx, cancel := context.WithTimeout(ctx, c.within)
	defer cancel()
	method := q.method
	if method == "" {
		method = http.MethodGet
	}
	r, err := http.NewRequestWithContext(ctx, method, c.base+q.path, strings.NewReader(q.body))
	if err != nil {
		return nil, nil, fmt.Errorf("asking %s for %s: %w", c.kind, q.path, err)
	}
	r.Header.Set("User-Agent", "isthmus")
	for k, v := range q.header {
		r.Header.Set(k, v)
	}
	answer, err := c.http.Do(r)
	if err != nil {
		return nil, nil, c.unreachable(q.path, err)
	}
	defer answer.Body.Close()
	fail := func(format string, args ...any) ([]byte, http.Header, error) {
		return nil, nil, fmt.Errorf("asking %s for %s: %s", c.kind, q.path, fmt.Sprintf(format, args...))
	}
	switch s := answer.StatusCode; {
	case s == http.StatusNotFound || s == http.StatusGone:
		return nil, nil, fmt.Errorf("asking %s for %s: %w", c.kind, q.path, errMissing)
	case s >= 300 && s < 400:
		return fail("the service at %s redirects, which no metadata service does: look for a proxy between the node and its platform", c.base)
	case s == http.StatusUnauthorized || s == http.StatusForbidden:
		return fail("the service refuses with status %d: %s", s, refused[c.kind])
	case s != http.StatusOK && s != http.StatusCreated:
		return fail("the service answers with status %d: see whether the platform has an outage", s)
	}
	limit := q.limit
	if limit == 0 {
		limit = maxFact
	}
	body, err := io.ReadAll(io.LimitReader(answer.Body, int64(limit)+1))
	if err != nil {
		return nil, nil, c.unreachable(q.path, err)
	}
	if len(body) > limit {
		return fail("the answer is larger than %d bytes: make it smaller", limit)
	}
	kind, _, _ := mime.ParseMediaType(answer.Header.Get("Content-Type"))
	if start := strings.ToLower(strings.TrimSpace(string(body[:min(len(body), 64)]))); kind == "text/html" || strings.HasPrefix(start, "<!doctype html") || strings.HasPrefix(start, "<html") {
		return fail("the answer is a web page, as of a proxy or a captive portal: the address %s must lead to the platform's metadata service", c.base)
	}
	return body, answer.Header, nil
}

// refused is the advice when a service refuses.
var refused = map[Kind]string{
	AWS:    "turn the metadata service on for the instance (aws ec2 modify-instance-metadata-options --http-endpoint enabled)",
	Azure:  "see whether a proxy is between the node and 169.254.169.254",
	Google: "see whether a proxy is between the node and 169.254.169.254",
}

// unreachable says why no answer came, without the text that net/http adds.
func (c *client) unreachable(path string, err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("asking %s for %s: no complete answer within %v: see whether the node has its address and a route to %s: %w", c.kind, path, c.within, c.base, err)
	}
	return fmt.Errorf("asking %s for %s: %w", c.kind, path, err)
}

// text returns an answer that is one short line.
func (c *client) text(ctx context.Context, q request) (string, error) {
	body, _, err := c.do(ctx, q)
	if err != nil {
		return "", err
	}
	return oneLine(c.kind, q.path, body)
}

// maxLine bounds in bytes a value that is a name or a number.
const maxLine = 512

func oneLine(k Kind, path string, body []byte) (string, error) {
	s := strings.TrimSpace(string(body))
	if len(s) > maxLine || !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return "", fmt.Errorf("asking %s for %s: the answer is not one line of text", k, path)
	}
	return s, nil
}

// lines returns the lines of an answer, at most limit of them.
func (c *client) lines(ctx context.Context, q request, limit int) (out []string, err error) {
	body, _, err := c.do(ctx, q)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(body)) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		if len(out) == limit {
			return nil, fmt.Errorf("asking %s for %s: the answer has more than %d lines", c.kind, q.path, limit)
		}
		if line, err = oneLine(c.kind, q.path, []byte(line)); err != nil {
			return nil, err
		}
		out = append(out, line)
	}
	return out, nil
}

// decode reads JSON.
func decode(k Kind, path string, body []byte, into any) error {
	if err := json.Unmarshal(body, into); err != nil {
		// The library's error has Go types, which may be long.
		return fmt.Errorf("asking %s for %s: the answer is not the JSON that the platform documents: %.100s", k, path, err.Error())
	}
	return nil
}

// mac converts a hardware address into the form of NIC.MAC.
func mac(s string) (string, error) {
	if len(s) == 12 { // Azure's form
		s = s[0:2] + ":" + s[2:4] + ":" + s[4:6] + ":" + s[6:8] + ":" + s[8:10] + ":" + s[10:12]
	}
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 {
		return "", fmt.Errorf("%q is not a hardware address of Ethernet", short(s))
	}
	return hw.String(), nil
}

// short bounds the part of an answer in an error.
func short(s string) string {
	if len(s) > 64 {
		s = s[:64] + "..."
	}
	return s
}

// addr parses an address of a NIC.
func addr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() {
		return netip.Addr{}, fmt.Errorf("%q is not an address of a machine", short(s))
	}
	return a.Unmap(), nil
}

// public parses a public address.
func public(s string) (netip.Addr, error) {
	a, err := addr(s)
	if err == nil && (!a.IsGlobalUnicast() || a.IsPrivate()) {
		err = fmt.Errorf("%q is not a public address", short(s))
	}
	return a, err
}
