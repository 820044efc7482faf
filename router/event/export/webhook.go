package export

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/router/secret"
)

// maxAnswer bounds what is read of an answer.
const maxAnswer = 4 << 10

// body is what a webhook receives.
type body struct {
	Node string `json:"node"`
	// Log is the identity of the node's log, within which the numbers of events are unique.
	Log string `json:"log"`
	// Gap is true when events before these may be missing.
	Gap    bool              `json:"gap,omitempty"`
	Events []json.RawMessage `json:"events"`
}

type webhook struct {
	target  Target
	node    string
	secrets secret.Lookup
	client  *http.Client
}

func newWebhook(t Target, node string, secrets secret.Lookup, reach func(netip.Addr) error) *webhook {
	return &webhook{target: t, node: node, secrets: secrets, client: &http.Client{
		Timeout: sendTime,
		Transport: &http.Transport{
			DialContext: dialer(reach).DialContext, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}, TLSHandshakeTimeout: sendTime,
			MaxConnsPerHost: 1, MaxResponseHeaderBytes: 64 << 10, IdleConnTimeout: time.Minute, ForceAttemptHTTP2: true,
		},
		// A receiver must not choose another one.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

func (w *webhook) close() { w.client.CloseIdleConnections() }

func (w *webhook) send(ctx context.Context, log string, gap bool, events []event.Event) error {
	b := body{Node: w.node, Log: log, Gap: gap}
	for _, e := range events {
		text, err := protojson.Marshal(e.Proto())
		if err != nil {
			return fmt.Errorf("encoding event %d: %w", e.Seq, err)
		}
		b.Events = append(b.Events, text)
	}
	data, err := json.Marshal(b)
	if err != nil {
		return err
	}
	q, err := http.NewRequestWithContext(ctx, http.MethodPost, w.target.Webhook, bytes.NewReader(data))
	if err != nil {
		return err
	}
	q.Header.Set("Content-Type", "application/json")
	q.Header.Set("User-Agent", "isthmus")
	if w.target.Secret.Name != "" {
		key, err := w.secrets(w.target.Secret)
		if err != nil {
			return fmt.Errorf("reading secret %s: %w", w.target.Secret.Name, err)
		}
		at := strconv.FormatInt(time.Now().Unix(), 10)
		q.Header.Set("Isthmus-Timestamp", at)
		q.Header.Set("Isthmus-Signature", "sha256="+signature(key, at, data))
	}
	a, err := w.client.Do(q)
	if err != nil {
		return fmt.Errorf("sending to %s: %w", w.target, shorter(err))
	}
	defer a.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(a.Body, maxAnswer))
	if a.StatusCode/100 == 2 {
		return nil
	}
	err = fmt.Errorf("sending to %s: it answers %d %s", w.target, a.StatusCode, http.StatusText(a.StatusCode))
	if s, perr := strconv.Atoi(a.Header.Get("Retry-After")); perr == nil && s > 0 {
		return laterError{err, time.Duration(min(s, 3600)) * time.Second}
	}
	return err
}

// signature returns the HMAC-SHA-256 of a time and a body in hexadecimal digits. The time is in it,
// so that a receiver can refuse what is old.
func signature(key []byte, at string, data []byte) string {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(at + "."))
	m.Write(data)
	return hex.EncodeToString(m.Sum(nil))
}

// shorter removes the method and the URL, which net/http adds: a URL may have a key in it.
func shorter(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}
