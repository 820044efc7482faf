package firstboot

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"
)

const (
	maxDocument  = 1 << 20
	maxRedirects = 3
	fetchWithin  = 30 * time.Second
)

// fetch gets the document at a URL, and accepts it only with the given digest. Errors do not have
// the URL, which may include credentials.
func fetch(ctx context.Context, at, sum string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchWithin)
	defer cancel()
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return "", errors.New("documentURL: is not a URL")
	}
	host := q.URL.Host
	q.Header.Set("User-Agent", "isthmus")
	c := &http.Client{
		Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10, TLSHandshakeTimeout: fetchWithin},
		CheckRedirect: func(q *http.Request, via []*http.Request) error {
			if len(via) > maxRedirects {
				return fmt.Errorf("more than %d redirects", maxRedirects)
			}
			if q.URL.Scheme != "https" && q.URL.Scheme != "http" {
				return fmt.Errorf("a redirect to %s", q.URL.Scheme)
			}
			return nil
		},
	}
	fail := func(err error) (string, error) {
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err
		}
		return "", fmt.Errorf("documentURL: getting the document from %s: %w; the node must reach it from the network in which it starts", host, err)
	}
	answer, err := c.Do(q)
	if err != nil {
		return fail(err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fail(fmt.Errorf("status %d", answer.StatusCode))
	}
	body, err := io.ReadAll(io.LimitReader(answer.Body, maxDocument+1))
	if err != nil {
		return fail(err)
	}
	if len(body) > maxDocument {
		return fail(fmt.Errorf("it is larger than %d bytes", maxDocument))
	}
	if got := sha256.Sum256(body); hex.EncodeToString(got[:]) != sum {
		return fail(fmt.Errorf("its SHA-256 is %x instead of documentSHA256", got))
	}
	return string(body), nil
}
