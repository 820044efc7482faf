// Package platform reads from the cloud that a machine runs on: its user-data, and facts that the
// machine cannot see itself, such as its public addresses. It has a small reader for each cloud's
// metadata service. A reader trusts no answer: each is limited in bytes and in time, and none leads
// to another server.
package platform

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/router/backoff"
)

// Kind is a platform.
type Kind string

// The platforms.
const (
	None    Kind = "none"
	AWS     Kind = "aws"
	Azure   Kind = "azure"
	Google  Kind = "google"
	NoCloud Kind = "nocloud" // a disk or a directory with user-data and meta-data
)

// ParseKind parses a platform's name.
func ParseKind(s string) (Kind, bool) {
	for _, k := range []Kind{None, AWS, Azure, Google, NoCloud} {
		if s == string(k) {
			return k, true
		}
	}
	return "", false
}

// String returns the platform's name as people write it.
func (k Kind) String() string {
	switch k {
	case AWS:
		return "AWS"
	case Azure:
		return "Azure"
	case Google:
		return "Google Cloud"
	case NoCloud:
		return "NoCloud"
	}
	return string(k)
}

// Limits in bytes. MaxUserData applies after base64 is decoded; AWS itself accepts 16 KiB of
// user-data, Azure 64, Google 256.
const (
	MaxUserData = 64 << 10
	maxFact     = 64 << 10
	maxNICs     = 32
	maxPublic   = 64 // public addresses of one NIC
)

// Facts is what a platform says about the machine. Missing facts are zero.
type Facts struct {
	Platform Kind
	Instance string // its id, which a copy of the machine's disk does not have
	Region   string
	Zone     string
	Type     string
	NICs     []NIC // in the order of the platform: the first one is the primary one
}

// NIC is a network interface as the platform describes it.
type NIC struct {
	MAC       string // six pairs of hexadecimal digits in lower case, with colons
	Addresses []Address
	Subnets   []netip.Prefix
	Router    netip.Addr // invalid: unknown
	MTU       int        // in bytes; 0: unknown, use DHCP
}

// Address is an address of a NIC, with the public address that the platform translates to it one to
// one; invalid: none.
type Address struct {
	Address netip.Addr
	Public  netip.Addr
}

// Reader reads from one platform. Its methods try once; Keep retries.
type Reader interface {
	// UserData returns the user-data that the machine was created with, and nothing if there was
	// none.
	UserData(ctx context.Context) ([]byte, error)
	// Facts returns what the platform says about the machine; with an error, they are incomplete.
	Facts(ctx context.Context) (Facts, error)
}

// Options configure a reader.
type Options struct {
	// Metadata is the base of the metadata service's URLs, for tests. Default:
	// http://169.254.169.254.
	Metadata string
	// Wire is the base of the URLs of Azure's wire server, for tests. Default:
	// http://168.63.129.16.
	Wire string
	// Seed is the directory of a NoCloud seed.
	Seed string
	// Request is the timeout of one request. Default: 5s.
	Request time.Duration
}

// Open returns the reader of a platform; None has none.
func Open(k Kind, o Options) (Reader, error) {
	if o.Metadata == "" {
		o.Metadata = "http://169.254.169.254"
	}
	if o.Wire == "" {
		o.Wire = "http://168.63.129.16"
	}
	if o.Request == 0 {
		o.Request = 5 * time.Second
	}
	switch k {
	case AWS:
		c, err := newClient(k, o.Metadata, o.Request)
		return &aws{client: c}, err
	case Azure:
		c, err := newClient(k, o.Metadata, o.Request)
		if err != nil {
			return nil, err
		}
		w, err := newClient(k, o.Wire, o.Request)
		return &azure{client: c, wire: w}, err
	case Google:
		c, err := newClient(k, o.Metadata, o.Request)
		return &google{client: c}, err
	case NoCloud:
		return &noCloud{dir: o.Seed}, nil
	}
	return nil, fmt.Errorf("platform %q has no reader", k)
}

// ErrPermanent means that another attempt would have the same result.
var ErrPermanent = errors.New("another attempt does not help")

// retry is the pace of attempts.
var retry = backoff.Backoff{First: 500 * time.Millisecond, Last: 15 * time.Second}

// Keep calls ask until it succeeds, the error wraps ErrPermanent, or ctx is done. It calls failed
// with each error. The network may come up long after the daemon.
func Keep(ctx context.Context, ask func(context.Context) error, failed func(error)) error {
	for failures := 0; ; failures++ {
		err := ask(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			return ctx.Err()
		}
		failed(err)
		if errors.Is(err, ErrPermanent) {
			return err
		}
		timer := time.NewTimer(retry.Delay(failures))
		select {
		case <-ctx.Done():
			timer.Stop()
			return err
		case <-timer.C:
		}
	}
}
