package router

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/dns"
	"github.com/isthmus-net/isthmus/router/egress/health"
	"github.com/isthmus-net/isthmus/router/plan"
)

// TestUseOfNames: an address of a name stays while a flow of a source of the policy goes to it, and then goes with a note in `get names` and in the
// log of what the guard drops.
func TestUseOfNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		at := func(d time.Duration) string { return begin.Add(d).UTC().Format(time.RFC3339Nano) }
		file := filepath.Join(t.TempDir(), "names.json")
		known := fmt.Sprintf(`{"*.a.example": {"198.51.100.1": %q, "198.51.100.2": %[1]q, "198.51.100.3": %[1]q}, "*.b.example": {"198.51.100.1": %[1]q}}`, at(time.Minute))
		if err := os.WriteFile(file, []byte(known), 0o600); err != nil {
			t.Fatal(err)
		}
		to := func(source, destination string) conntrack.Flow {
			return conntrack.Flow{Protocol: 6, Original: conntrack.Tuple{Source: netip.MustParseAddrPort(source), Destination: netip.MustParseAddrPort(destination)}}
		}
		table := &flowTable{flows: []conntrack.Flow{to("10.1.0.1:1000", "198.51.100.1:443"), to("10.2.0.1:1000", "198.51.100.2:443"), to("198.51.100.3:443", "10.1.0.1:1000")}}
		var log bytes.Buffer
		r := &Router{Options: Options{Flows: table, Log: slog.New(slog.NewTextHandler(&log, nil))}, state: newObserved(), health: health.New(health.Options{}), proxies: health.New(health.Options{})}
		prefixes := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
		hold := 5 * time.Minute
		target := plan.Target{Names: egress.DNS{Floor: time.Second, Hold: hold}, NAT: nat.Config{Policies: []nat.Policy{
			{Name: "a", Action: nat.SNAT, Sources: prefixes("10.1.0.0/16"), Names: []string{"*.a.example"}},
			{Name: "b", Action: nat.SNAT, Sources: prefixes("10.2.0.0/16"), Names: []string{"*.b.example"}},
		}}}
		r.state.target = target
		r.names = dns.New(dns.Options{File: file, Changed: func(bool) {}, Log: slog.New(slog.DiscardHandler)})
		r.names.Set(target.Names, wantedNames(target), nil)
		ctx, cancel := context.WithCancel(t.Context())
		defer func() { cancel(); synctest.Wait() }()
		go r.names.Run(ctx)
		go r.watchUse(ctx)
		want := func(a, b string) {
			t.Helper()
			synctest.Wait()
			if got := fmt.Sprint(r.names.Addresses("*.a.example"), r.names.Addresses("*.b.example")); got != a+" "+b {
				t.Errorf("after %v: %s, want %s %s", time.Since(begin), got, a, b)
			}
		}
		want("[198.51.100.1 198.51.100.2 198.51.100.3]", "[198.51.100.1]")
		time.Sleep(time.Hour)
		want("[198.51.100.1]", "[]") // what is used by others, for another name, or by answers, does not count

		// The file knows it, too: a new daemon has it.
		data, err := os.ReadFile(file)
		var kept map[string]map[string]time.Time
		if err := errors.Join(err, json.Unmarshal(data, &kept)); err != nil || kept["*.a.example"]["198.51.100.1"].Before(time.Now()) {
			t.Errorf("after an hour the file has %s, %v", data, err)
		}

		table.mu.Lock()
		table.flows = nil
		table.mu.Unlock()
		time.Sleep(hold - useEvery - time.Second)
		want("[198.51.100.1]", "[]")
		time.Sleep(useEvery + time.Second)
		want("[]", "[]")

		f := nat.Flow{Source: netip.MustParseAddr("10.1.0.1"), Destination: netip.MustParseAddr("198.51.100.1"), Protocol: 6, Port: 443}
		r.guardDropped(nat.DropGuard, f)
		if text := log.String(); !strings.Contains(text, "198.51.100.1 was an address of *.a.example until") || !strings.Contains(text, "nameHold") || strings.Contains(text, "b.example") {
			t.Errorf("the log says %s", text)
		}
		log.Reset()
		f.Destination = netip.MustParseAddr("198.51.100.9")
		r.guardDropped(nat.DropGuard, f)
		if strings.Contains(log.String(), "was an address") {
			t.Errorf("of another address the log says %s", log.String())
		}
		got := map[string]string{}
		for _, n := range r.policyNames() {
			for _, g := range n.Gone {
				got[n.Name] += g.Address + " "
			}
		}
		if got["*.a.example"] != "198.51.100.1 " { // the others went an hour ago and more
			t.Errorf("just gone: %v", got)
		}
	})
}

// TestProxyListensBehindTheRules: the DNS proxy begins to listen when the rules that say who may ask are there. Its tunnel's interface does not exist, which tells that it
// has tried.
func TestProxyListensBehindTheRules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		apply(t, r, base)
		tries := func(want int) {
			t.Helper()
			synctest.Wait()
			if _, _, _, n := r.names.Deaf(); n != want {
				t.Errorf("%d listeners try, want %d", n, want)
			}
		}
		m.mu.Lock()
		m.unruly = errors.New("no")
		m.mu.Unlock()
		doc := strings.Replace(base, "egress: {", "egress: {dnsProxy: {listen: [10.9.0.4], from: [a]}, ", 1)
		apply(t, r, doc)
		apply(t, r, strings.Replace(doc, "name: x", "name: y", 1)) // neither is carried out
		time.Sleep(2 * lastRetry)
		tries(0)
		m.mu.Lock()
		m.unruly = nil
		m.mu.Unlock()
		time.Sleep(2 * lastRetry)
		tries(1)
		if got := fmt.Sprint(m.nat.DNS); got != "[{t-a 10.9.0.4 []}]" {
			t.Errorf("doors %s", got)
		}
		if got := fmt.Sprint(r.status().GetConditions()); !strings.Contains(got, "DNSProxyDown") || !strings.Contains(got, "10.9.0.4 by interface t-a") {
			t.Errorf("conditions %s", got)
		}

		// One more listener leaves the first one alone, and when the rules cannot be written it stays.
		m.mu.Lock()
		m.unruly = errors.New("no")
		m.mu.Unlock()
		apply(t, r, strings.Replace(doc, "from: [a]", "from: [a, b]", 1))
		time.Sleep(2 * lastRetry)
		tries(1)
		apply(t, r, base)
		synctest.Wait()
		tries(0)
	})
}

// TestNameConditions: a name with new addresses in each answer, one with addresses that no name may stand for, and an attachment that is told more new addresses
// than it may have a condition with a remedy each. Ring: namespace; needs root for port 53.
func TestNameConditions(t *testing.T) {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		for n, buffer := byte(0), make([]byte, 1024); ; n++ {
			size, from, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buffer[:size]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			address := [4]byte{198, 51, 100, n}
			if strings.HasPrefix(strings.ToLower(q.Name.String()), "meta") {
				address = [4]byte{169, 254, 169, 254}
			}
			m.Header, m.Additionals = dnsmessage.Header{ID: m.ID, Response: true}, nil
			if q.Type == dnsmessage.TypeA && strings.HasPrefix(strings.ToLower(q.Name.String()), "many") {
				for i := range byte(200) {
					m.Answers = append(m.Answers, dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 60}, Body: &dnsmessage.AResource{A: [4]byte{11, 0, n, i}}})
				}
			} else if q.Type == dnsmessage.TypeA {
				m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class}, Body: &dnsmessage.AResource{A: address}}}
			}
			if out, err := m.Pack(); err == nil {
				_, _ = conn.WriteTo(out, from)
			}
		}
	}()
	r := &Router{Options: Options{Log: slog.New(slog.DiscardHandler)}, state: newObserved()}
	r.state.target = plan.Target{NAT: nat.Config{Policies: []nat.Policy{{Name: "a", Names: []string{"meta.example", "turns.example", "*.any.example"}}}}}
	r.names = dns.New(dns.Options{Changed: func(bool) {}, Apply: func(context.Context) error { return nil }, Log: slog.New(slog.DiscardHandler)})
	r.names.Set(egress.DNS{Floor: 20 * time.Millisecond, Resolvers: []netip.AddrPort{netip.MustParseAddrPort(conn.LocalAddr().String())},
		Proxy: []egress.Listener{{Address: netip.MustParseAddr("127.53.53.20"), Interface: "lo"}}}, wantedNames(r.state.target), nil)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { r.names.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	spoke, err := net.Dial("udp", "127.53.53.20:53")
	if err != nil {
		t.Fatal(err)
	}
	defer spoke.Close()
	asked := 0
	for end := time.Now().Add(15 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		asked++
		query := dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(fmt.Sprintf("many%d.any.example.", asked)), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
		if packed, err := query.Pack(); err == nil {
			_, _ = spoke.Write(packed) // it may not listen yet
		}
		got := ""
		for _, c := range r.nameConditions() {
			got += c.Type + ": " + c.Message + "\n"
		}
		if strings.Contains(got, "NameDiffers: name turns.example of policies a") && strings.Contains(got, "egress.dnsProxy") &&
			strings.Contains(got, "NewNamesLimited: the DNS proxy has refused ") && strings.Contains(got, "behind lo: ") &&
			strings.Contains(got, "AddressesRefused: name meta.example of policies a: 169.254.169.254 and the like are refused") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("conditions: %s", got)
		}
	}
	if _, err := r.names.Resolve(t.Context(), "meta.example"); err == nil || !strings.Contains(err.Error(), "which no name may stand for") {
		t.Errorf("a probe is told %v", err)
	}
}
