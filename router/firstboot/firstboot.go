package firstboot

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/platform"
	"github.com/isthmus-net/isthmus/router/spec"
)

// Node is the new node.
type Node interface {
	// Generation returns the number of the newest accepted document; 0: there has never been one.
	Generation() uint64
	// CheckFirst returns the problems of a text as the first document, as spec.Problems.
	CheckFirst(ctx context.Context, text string) error
	// ApplyFirst makes a text the first document. With another one accepted meanwhile, the error
	// wraps store.ErrStale.
	ApplyFirst(ctx context.Context, text string) (uint64, error)
	// SetFirstAccess sets the sources that may reach the API until the document names some.
	SetFirstAccess(ctx context.Context, api []netip.Prefix) error
	// SetFacts sets the platform's present addresses. The error is why the present document cannot
	// be used with them.
	SetFacts(ctx context.Context, p spec.Platform) error
}

// Options configure a Boot.
type Options struct {
	// Platform is the platform; empty: detect it by DMI and by a seed.
	Platform platform.Kind
	Reader   platform.Options
	Sys      string // /sys
	Runtime  string // directory of data that need not outlive a boot
	Console  string // file with the text for the console
	Records  Records
	Port     uint16 // of the API
	// Issue signs an admin's request, and returns the certificate and those of the authority, in
	// PEM, and the name in the server's certificate.
	Issue func(name string, request []byte, lifetime time.Duration) (certificate, authority, serverName string, err error)
	// Act writes an action of the first boot to the audit log.
	Act func(method, object, digest string, do func() (uint64, error)) error
	// Authority returns a unique name of the node's authority; empty: there is none.
	Authority func() string
	// Changed is called when Hosts may have changed.
	Changed func()
	// Deadline bounds the wait for user-data, and SeedWait the wait for a NoCloud seed. Defaults:
	// 15m, 2m.
	Deadline, SeedWait time.Duration
	// Refresh is the interval of reading facts. Default: 5m.
	Refresh time.Duration
	Log     *slog.Logger
}

// factsWait is how long user-data waits for facts, which the admin's context includes. factsWithin
// bounds one read of them.
const (
	factsWait   = 30 * time.Second
	factsWithin = time.Minute
	factsRetry  = time.Minute
)

// Boot is the first boot of a node, and has the platform's facts. Its methods are safe for
// concurrent use.
type Boot struct {
	o    Options
	node Node

	saving  sync.Mutex // held while rec is written
	showing sync.Mutex // held while the console's files are written

	mu        sync.Mutex
	rec       record
	damaged   error // why the record cannot be read
	kind      platform.Kind
	began     time.Time
	trouble   *isthmusv1.Condition // of user-data
	report    *isthmusv1.Condition // of Azure's report
	facts     platform.Facts
	read      time.Time // when facts were read; zero: never
	factsErr  error
	factsBad  time.Time // since when
	ready     chan struct{}
	readyOnce sync.Once
	notes     []string // for the console
	unusable  error    // why the document cannot be used with the facts
	moved     string   // how public addresses have changed, and when
	movedAt   time.Time
}

// New reads the record of an earlier run.
func New(o Options) *Boot {
	if o.Deadline == 0 {
		o.Deadline = 15 * time.Minute
	}
	if o.SeedWait == 0 {
		o.SeedWait = 2 * time.Minute
	}
	if o.Refresh == 0 {
		o.Refresh = 5 * time.Minute
	}
	b := &Boot{o: o, ready: make(chan struct{}), began: time.Now()}
	if b.damaged = b.load(); b.damaged != nil {
		o.Log.Error("user-data is not used", "err", b.damaged)
	}
	return b
}

// API returns the sources that may reach the API until the document names some.
func (b *Boot) API() []netip.Prefix { return b.record().API }

// Addresses returns the last addresses from the platform.
func (b *Boot) Addresses() spec.Platform { return b.record().Addresses }

// Hosts returns further names and addresses for the server's certificate: those of the user-data,
// and the public addresses of the machine.
func (b *Boot) Hosts() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := slices.Clone(b.rec.Hosts)
	for _, n := range b.facts.NICs {
		for _, a := range n.Addresses {
			if a.Public.IsValid() {
				out = append(out, a.Public.String())
			}
		}
	}
	return out
}

// Run does the first boot, unless it is done, and then reads facts periodically, until ctx is done.
func (b *Boot) Run(ctx context.Context, node Node) {
	b.node = node
	b.show()
	kind := b.find(ctx)
	b.mu.Lock()
	b.kind = kind
	b.mu.Unlock()
	if kind == platform.None || ctx.Err() != nil {
		b.o.Log.Info("this machine is not on a supported platform; user-data is not read")
		return
	}
	b.o.Log.Info("platform found", "platform", string(kind))
	reader, err := platform.Open(kind, b.o.Reader)
	if err != nil {
		b.setTrouble(condition.FirstBootFailed.Error(time.Now(), "%v", err))
		return
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { b.keepFacts(ctx, reader) })
	b.take(ctx, reader)
	b.reportReady(ctx, reader)
}

// find returns the platform. A seed's disk may appear after the daemon has started.
func (b *Boot) find(ctx context.Context) platform.Kind {
	if b.o.Platform != "" {
		return b.o.Platform
	}
	dmi := platform.ReadDMI(b.o.Sys)
	until := time.Now().Add(b.o.SeedWait)
	for {
		if k := platform.Detect(dmi, platform.HasSeed(b.o.Reader.Seed)); k != platform.None || time.Now().After(until) {
			return k
		}
		select {
		case <-ctx.Done():
			return platform.None
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// setTrouble sets the condition of user-data. Nil: there is none. A condition with the same text
// keeps its time.
func (b *Boot) setTrouble(c *isthmusv1.Condition) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c == nil || b.trouble == nil || b.trouble.Type != c.Type || b.trouble.Message != c.Message {
		b.trouble = c
	}
}

// reportReady reports to a platform that waits for it, once in a boot.
func (b *Boot) reportReady(ctx context.Context, reader platform.Reader) {
	p, ok := reader.(platform.Provisioner)
	reported := filepath.Join(b.o.Runtime, "reported-ready")
	if _, err := os.Lstat(reported); !ok || err == nil || b.record().Quiet {
		return
	}
	err := platform.Keep(ctx, p.ReportReady, func(err error) {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.report == nil || !strings.Contains(b.report.Message, err.Error()) {
			b.o.Log.Warn("reporting to the platform that the node is ready failed; retrying", "err", err)
			b.report = condition.NotReported.Warning(time.Now(), "the node cannot report to the platform that it is ready, and the platform may call its creation failed: %v", err)
		}
	})
	if err != nil {
		return
	}
	b.mu.Lock()
	b.report = nil
	b.mu.Unlock()
	b.o.Log.Info("reported to the platform that the node is ready")
	if err := os.WriteFile(reported, nil, 0o600); err != nil {
		b.o.Log.Warn("the next start of the daemon reports again", "err", err)
	}
}
