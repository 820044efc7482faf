package report

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/bell"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/test/crowd"
)

// Ring: namespace.

// nest is a router with the rules of a document in force, and a canary on its underlay.
type nest struct {
	*crowd.Crowd
	t         *testing.T
	r         *Report
	documents *documents
	observer  *observe.Observer
	applier   *apply.Applier
	// called has a value for each request to /wait, which is answered when answer is closed.
	called, answer chan struct{}
	namespaces     int // that threads of this process are in without a canary
}

func newNest(t *testing.T) *nest {
	n := &nest{Crowd: crowd.New(t, 2), t: t, called: make(chan struct{}, 16), answer: make(chan struct{})}
	n.Router.Run(`ip addr add 172.30.0.1/24 dev tun0
		ip -6 addr add 2001:db8::1/64 dev up0 nodad
		ip -6 route add default via 2001:db8::fe
		ip -6 addr add 2001:db8::11/128 dev up0 nodad
		sysctl -qw net.ipv6.conf.all.forwarding=1`)
	n.Server.Run(`ip -6 addr add 2001:db8::fe/64 dev r0 nodad
		ip -6 addr add 2001:db8:1::1/128 dev lo nodad`)
	six := netip.MustParseAddr("2001:db8::11")
	config := n.Config
	config.Attachments = []nat.Attachment{{Interface: "tun0", Sources: append(slices.Clone(config.Attachments[0].Sources), netip.MustParsePrefix("fd00::/16"), netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("172.30.0.0/24"))}}
	config.Pools = append(slices.Clone(config.Pools), nat.Pool{Name: "six", Addresses: []nat.PoolAddress{{Address: six, Public: six}}},
		nat.Pool{Name: "unused", Addresses: []nat.PoolAddress{{Address: netip.MustParseAddr("192.0.2.13"), Public: netip.MustParseAddr("10.0.9.9")}}})
	config.Policies = append(slices.Clone(config.Policies),
		nat.Policy{Name: "six", Action: nat.SNAT, Sources: []netip.Prefix{netip.MustParsePrefix("fd00::/16")}, Pool: "six"},
		nat.Policy{Name: "near", Action: nat.SNAT, Sources: []netip.Prefix{netip.MustParsePrefix("172.30.0.0/24")}, Pool: "p"},
		nat.Policy{Name: "wide", Action: nat.Deny, Sources: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, Destinations: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}})

	var links *link.Links
	var err error
	n.Router.Do(func() { links, err = link.Open() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(links.Close)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	target := plan.Target{Underlay: spec.Underlay{Interface: "up0", Address: netip.MustParseAddr("192.0.2.1")}, NAT: config}
	n.documents = &documents{status: document.Status{Target: target}}
	n.observer = observer(t, links, config)
	n.observer.Use(nil, target)
	n.observer.ReadMachine()
	n.applier = n.newApplier(links, log)
	n.applier.Set(apply.Wanted{Mode: apply.Carry, Target: target})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); n.applier.Run(ctx, func() {}) }()
	for limit := time.Now().Add(time.Minute); !n.applier.Settled(); time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("not applied: %+v", n.applier.Failures())
		}
	}
	cancel()
	<-done
	n.r = New(Options{Documents: n.documents, Applied: n.applier, Observed: n.observer, NAT: n.Driver, Addresses: links, FIB: idle{}, Bell: &bell.Bell{}, Log: log})

	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.URL.Path == "/wait" {
			n.called <- struct{}{}
			select {
			case <-n.answer:
			case <-q.Context().Done():
			}
		}
		host, _, _ := net.SplitHostPort(q.RemoteAddr)
		fmt.Fprintln(w, host)
	})}
	var wg sync.WaitGroup
	for _, at := range []string{"198.51.100.1:80", "[2001:db8:1::1]:80"} {
		var l net.Listener
		n.Server.Do(func() { l, err = net.Listen("tcp", at) })
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() { _ = server.Serve(l) })
	}
	t.Cleanup(func() { server.Close(); wg.Wait() })
	n.namespaces = namespaces()
	return n
}

func (n *nest) prove(ctx context.Context, to, canary, from string) (*isthmusv1.EgressProof, error) {
	return n.r.ProveEgress(ctx, &isthmusv1.ProveEgressRequest{Destinations: []string{to}, Canary: canary, CanarySource: from})
}

// namespaces returns how many network namespaces threads of this process are in.
func namespaces() int {
	all := map[string]bool{}
	files, _ := filepath.Glob("/proc/self/task/*/ns/net")
	for _, f := range files {
		if name, err := os.Readlink(f); err == nil { // else the thread has ended
			all[name] = true
		}
	}
	return len(all)
}

// clean wants nothing to be left of a canary.
func (n *nest) clean(when string) {
	n.t.Helper()
	// a thread takes a moment to end
	for deadline := time.Now().Add(time.Minute); namespaces() > n.namespaces; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			n.t.Fatalf("%s: %d network namespaces, %d before", when, namespaces(), n.namespaces)
		}
	}
	if _, err := n.Router.Try("ip link show canary0"); err == nil {
		n.t.Errorf("%s: canary0 is there", when)
	}
	if routes := n.Router.Run("ip route show table all") + n.Router.Run("ip -6 route show table all"); strings.Contains(routes, "255.254") || strings.Contains(routes, "fd00::fe") {
		n.t.Errorf("%s: %s", when, routes)
	}
	_, effective := n.applier.Effective()
	if d, err := n.Driver.Differences(context.Background(), effective.NAT); err != nil || len(d) > 0 {
		n.t.Errorf("%s: the rules are others: %v, %v", when, d, err)
	}
}

const v4Canary, v6Canary = "http://198.51.100.1/ip", "http://[2001:db8:1::1]/ip"

// TestForwardedCanary: the canary's packets are decided as those of a spoke, also by rules of
// others that the node's own packets do not meet.
func TestForwardedCanary(t *testing.T) {
	n := newNest(t)
	for _, k := range []struct {
		to, canary, from string
		seen             []string
	}{
		{"198.51.100.0/24", v4Canary, "10.0.255.254", []string{"192.0.2.11", "192.0.2.12"}},
		{"2001:db8:1::/64", v6Canary, "fd00::fe", []string{"2001:db8::11"}},
		// of a network that tun0 is connected to
		{"198.51.100.0/24", v4Canary, "172.30.0.9", []string{"192.0.2.11", "192.0.2.12"}},
		// the only policy that has it is about other destinations
		{"198.51.100.0/24", v4Canary, "10.9.0.9", nil},
	} {
		p, err := n.prove(t.Context(), k.to, k.canary, k.from)
		if err != nil {
			t.Fatalf("from %s: %v", k.from, err)
		}
		if len(p.Canaries) != 1 || p.Canaries[0].Address != k.from {
			t.Fatalf("from %s: %v", k.from, p.Canaries)
		}
		c := p.Canaries[0]
		if k.seen == nil {
			if p.Holds || c.SeenAs != "" || c.Error == "" || len(p.Violations) != 1 || !strings.Contains(p.Violations[0], "got no answer: ") {
				t.Errorf("from %s: %v, %q", k.from, c, p.Violations)
			}
		} else if !p.Holds || !slices.Contains(k.seen, c.SeenAs) {
			t.Errorf("from %s: seen as %q (%s), want one of %q; %q", k.from, c.SeenAs, c.Error, k.seen, p.Violations)
		}
		n.clean("from " + k.from)
	}

	n.Router.Run("nft table ip evil { chain f { type filter hook forward priority 0; oifname up0 meta mark set 7; }; chain p { type nat hook postrouting priority 50; meta mark 7 masquerade; }; }")
	p, err := n.prove(t.Context(), "198.51.100.0/24", v4Canary, "10.0.255.254")
	if err != nil {
		t.Fatal(err)
	}
	if c := p.Canaries[0]; p.Holds || c.SeenAs != "192.0.2.1" || !slices.ContainsFunc(p.Violations, func(v string) bool {
		return strings.HasPrefix(v, "the canary called from 10.0.255.254, ") && strings.Contains(v, "192.0.2.1, which is not expected")
	}) {
		t.Errorf("others masquerade: %v, %q", c, p.Violations)
	}
	n.clean("others masquerade")
}

// TestProofWaitsForTheRules: the rules may take in a moment later what was observed, here an
// address of the node. A proof fails when they never do.
func TestProofWaitsForTheRules(t *testing.T) {
	n := newNest(t)
	const broken = "the rules in the kernel are not those of generation"
	violated := func(p *isthmusv1.EgressProof) bool {
		return slices.ContainsFunc(p.GetViolations(), func(v string) bool { return strings.HasPrefix(v, broken) })
	}
	n.Router.Run("ip addr add 192.0.2.77/32 dev up0")
	n.observer.ReadMachine()
	p, err := n.prove(t.Context(), "198.51.100.0/24", "", "")
	if err != nil || p.Holds || !violated(p) {
		t.Fatalf("rules that stay as they were: %v, %q", err, p.GetViolations())
	}

	proof := make(chan *isthmusv1.EgressProof, 1)
	go func() {
		p, err := n.prove(t.Context(), "198.51.100.0/24", "", "")
		if err != nil {
			t.Error(err)
		}
		proof <- p
	}()
	select {
	case p := <-proof:
		t.Fatalf("a proof came before the rules: %q", p.GetViolations())
	case <-time.After(writeTime / 20):
	}
	if err := n.applier.PutRules(t.Context()); err != nil {
		t.Fatal(err)
	}
	if p := <-proof; violated(p) {
		t.Errorf("rules that take in what was observed: %q", p.GetViolations())
	}
	n.clean("after the proofs")
}

// TestCanaryIsAlone: while one calls, another proof waits, and then finds the rules of the
// document. One whose caller goes leaves nothing behind.
func TestCanaryIsAlone(t *testing.T) {
	n := newNest(t)
	type outcome struct {
		p   *isthmusv1.EgressProof
		err error
	}
	prove := func(ctx context.Context, canary, from string) chan outcome {
		done := make(chan outcome, 1)
		go func() {
			p, err := n.prove(ctx, "198.51.100.0/24", canary, from)
			done <- outcome{p, err}
		}()
		return done
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	first := prove(ctx, "http://198.51.100.1/wait", "10.0.255.254")
	select {
	case <-n.called:
	case o := <-first:
		t.Fatalf("the canary was not called: %v", o)
	}
	if out := n.Router.Run("ip route get 10.0.255.254"); !strings.Contains(out, "dev canary0") {
		t.Errorf("while it calls: %s", out)
	}
	// Other work on the rules takes nothing away meanwhile.
	if err := n.applier.PutRules(t.Context()); err != nil {
		t.Error(err)
	}
	n.Router.Run("ip link show canary0")

	gone, leave := context.WithCancel(t.Context())
	leave()
	if o := <-prove(gone, "", ""); !errors.Is(o.err, context.Canceled) {
		t.Errorf("a caller who went while he waited: %v", o)
	}
	second := prove(t.Context(), "", "")
	select {
	case o := <-second:
		t.Fatalf("another proof did not wait: %v", o)
	case <-time.After(100 * time.Millisecond):
	}
	cancel()
	if o := <-first; o.err == nil && o.p.Holds {
		t.Errorf("the caller has gone: %v", o)
	}
	if o := <-second; o.err != nil || !o.p.Holds {
		t.Errorf("another proof: %v", o)
	}
	n.clean("the caller has gone")

	// One that could not be taken away goes with the next rules.
	_, remove, err := n.r.Addresses.Canary(netip.MustParseAddr("10.0.255.254"), netip.MustParseAddr("198.51.100.1"), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.applier.PutRules(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := n.Router.Try("ip link show canary0"); err == nil {
		t.Error("a canary that was left over stays")
	}
	if err := remove(); err != nil {
		t.Error(err)
	}
	n.clean("the next rules")

	n.r.Applied = n.newApplier(nil, n.r.Log) // which has put in none
	if o := <-prove(t.Context(), v4Canary, "10.0.255.254"); o.err != nil || o.p.Holds || !strings.Contains(o.p.Canaries[0].Error, "not in force") {
		t.Errorf("without rules: %v", o)
	}
	close(n.answer)
}

// TestCanarySources: an address that anything else may need has no canary.
func TestCanarySources(t *testing.T) {
	n := newNest(t)
	n.Router.Run("ip route add 10.0.7.7/32 dev tun0")
	n.r.Resolvers = func() []netip.Addr { return []netip.Addr{netip.MustParseAddr("10.0.8.8")} }
	n.observer.ReadMachine()
	n.r.FIB = onRoute{netip.MustParsePrefix("10.0.7.8/32")}
	if err := n.applier.PutRules(t.Context()); err != nil {
		t.Fatal(err)
	}
	writes := n.Driver.Writes()
	for _, k := range []struct{ canary, from, words string }{
		{"", "10.0.255.254", "nothing to call"},
		{v4Canary, "10.0.255", "is not an address"},
		{v4Canary, "::ffff:10.0.255.254", "is not an address"},
		{v6Canary, "fd00::fe%tun0", "is not an address"},
		{v4Canary, "fd00::fe", "not of the family"},
		{v6Canary, "10.0.255.254", "not of the family"},
		{v4Canary, "224.0.0.9", "which no router forwards"},
		{v4Canary, "127.0.0.2", "which no router forwards"},
		{v4Canary, "0.0.0.0", "which no router forwards"},
		{v4Canary, "169.254.1.1", "which no router forwards"},
		{v4Canary, "168.63.129.16", "the cloud's platform"},
		{v4Canary, "192.0.2.1", "an address of this node"},
		{v4Canary, "172.31.0.1", "an address of this node"},
		{v4Canary, "10.0.9.9", "a public address of pool unused"},
		{v4Canary, "192.0.2.12", "address of pool p"},
		{v6Canary, "2001:db8::11", "address of pool six"},
		{v4Canary, "192.0.2.77", "the network that interface up0 is connected to"},
		{v4Canary, "10.0.8.8", "a DNS server of this node"},
		{v4Canary, "10.0.7.7", "has a route of its own, by interface tun0"},
		{v4Canary, "10.0.7.8", "has a route of its own"},
		{v4Canary, "240.0.0.9", "which no router forwards"},
		{v6Canary, "fd01::fe", "in the sources of no policy"},
		{v4Canary, "10.1.0.9", "in the sources of no attachment"},
	} {
		p, err := n.prove(t.Context(), "198.51.100.0/24", k.canary, k.from)
		if !errors.Is(err, api.ErrInvalid) || !strings.Contains(err.Error(), "canary_source: ") || !strings.Contains(err.Error(), k.words) {
			t.Errorf("from %s: %v, %v; want %q", k.from, p, err, k.words)
		}
	}
	n.documents.status.Target.NAT.Attachments = append(slices.Clone(n.documents.status.Target.NAT.Attachments), nat.Attachment{Interface: fib.Canary})
	if _, err := n.prove(t.Context(), "198.51.100.0/24", v4Canary, "10.0.255.254"); !errors.Is(err, api.ErrPrecondition) {
		t.Errorf("the document has an interface of this name: %v", err)
	}
	if w := n.Driver.Writes(); w != writes {
		t.Errorf("%d transactions for what is refused", w-writes)
	}
	// The target is checked as well.
	for _, target := range []string{"http://192.0.2.1/", "http://10.0.0.1/", "http://169.254.169.254/latest"} {
		c := &canary{from: netip.MustParseAddr("10.0.255.254")}
		q, err := readCanary(&isthmusv1.ProveEgressRequest{Canary: target, CanarySource: c.from.String()})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.r.forwarded(t.Context(), q, "up0"); !errors.Is(err, errNotPublic) {
			t.Errorf("calling %s: %v", target, err)
		}
	}
}

// onRoute is a forwarding table with a route.
type onRoute struct{ prefix netip.Prefix }

func (l onRoute) Routes() []fib.RouteState {
	return []fib.RouteState{{Key: fib.Main(l.prefix), Installed: true}}
}

// TestCanaryEnds: a call that ends without an answer ends its dial as well, which would go on
// sending.
func TestCanaryEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	began, ended := make(chan struct{}), make(chan struct{})
	result := make(chan error, 1)
	go func() {
		_, err := fetch(ctx, &url.URL{Scheme: "http", Host: "192.0.2.1"}, func(ctx context.Context, _ string) (net.Conn, error) {
			close(began)
			<-ctx.Done()
			close(ended)
			return nil, ctx.Err()
		})
		result <- err
	}()
	<-began
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("the dial goes on")
	}
}

func (idle) Installed(fib.Key) bool    { return false }
func (onRoute) Installed(fib.Key) bool { return false }
func (idle) Count() (c fib.Counts)     { return c }
func (onRoute) Count() (c fib.Counts)  { return c }
