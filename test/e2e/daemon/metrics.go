package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"go.yaml.in/yaml/v3"
)

// Credentials are what a client needs of its context.
type Credentials struct{ Authority, Certificate, Key string }

// Read reads the credentials in a context file.
func (c *Credentials) Read(context []byte) error {
	if err := yaml.Unmarshal(context, c); err != nil {
		return fmt.Errorf("reading a context: %w", err)
	}
	return nil
}

// Dial connects to an address, as net.Dialer.DialContext does.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// Scraper reads the metrics of a node over mutual TLS, as Prometheus does.
type Scraper struct {
	client *http.Client
	url    string
}

// NewScraper returns a Scraper with the credentials in a context file. The node's API is at
// address, which dial reaches.
func NewScraper(dial Dial, address string, context []byte) (*Scraper, error) {
	var c Credentials
	if err := c.Read(context); err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair([]byte(c.Certificate), []byte(c.Key))
	if err != nil {
		return nil, fmt.Errorf("reading a context: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(c.Authority)) {
		return nil, errors.New("reading a context: it has no authority")
	}
	return &Scraper{url: "https://" + address + "/metrics", client: &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DialContext:     dial,
		TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, ServerName: "isthmusd", NextProtos: []string{"http/1.1"}},
	}}}, nil
}

// Scrape returns the metrics in the text format of Prometheus.
func (s *Scraper) Scrape(ctx context.Context) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return "", err
	}
	r, err := s.client.Do(request)
	if err != nil {
		return "", fmt.Errorf("reading metrics: %w", err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %s: %s", r.Status, text)
	}
	if err != nil {
		return "", fmt.Errorf("reading metrics: %w", err)
	}
	return string(text), nil
}
