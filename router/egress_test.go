package router

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"

	"github.com/isthmus-net/isthmus/router/egress"
)

func (m *machine) probe(_ context.Context, _ string, from netip.Addr, t egress.Target) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.sick[from.String()+" "+t.Host] {
		return errors.New("sick")
	}
	return nil
}

// setSick makes probes from an address fail, or succeed again, and waits until that is noticed.
func (m *machine) setSick(sick bool, from string) {
	m.mu.Lock()
	m.sick[from+" 198.51.100.7"] = sick
	m.mu.Unlock()
	time.Sleep(20 * time.Second)
	synctest.Wait()
}

// egress returns which addresses of the pool new flows may get, and what is announced.
func (m *machine) egress() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var usable []netip.Addr
	for _, a := range m.nat.Pools[0].Usable(false, "") {
		usable = append(usable, a.Address)
	}
	return fmt.Sprint(usable, m.bgp.Announce)
}

func TestSickAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		dir := t.TempDir()
		r, stop := m.boot(dir)
		doc := strings.Replace(base, "egress: {pools: [{name: p, addresses: [{address: 10.9.0.5}]}]", `announce: [10.9.0.0/24]
egress: {pools: [{name: p, addresses: [{address: 10.9.0.5}, {address: 10.9.0.6}], announce: [0.0.0.0/0], probes: {targets: ["icmp://198.51.100.7"], holdDown: 1m}}]`, 1)
		accept(t, r, doc)
		time.Sleep(time.Minute)
		m.taken()
		time.Sleep(5 * time.Minute)
		expect(t, m) // probes alone write nothing
		want := func(egress string, conditions ...string) {
			t.Helper()
			if got := m.egress(); got != egress {
				t.Errorf("%s, want %s", got, egress)
			}
			var got []string
			for _, c := range status(r).GetConditions() {
				got = append(got, c.GetType())
			}
			if fmt.Sprint(got) != fmt.Sprint(conditions) {
				t.Errorf("conditions %v, want %v", got, conditions)
			}
		}
		want("[10.9.0.5 10.9.0.6] [0.0.0.0/0 10.9.0.0/24]")

		m.setSick(true, "10.9.0.5")
		want("[10.9.0.6] [0.0.0.0/0 10.9.0.0/24]", "PoolDegraded")
		expect(t, m, "nat")
		if p := listed[*isthmusv1.ListPoolsResponse](t, r, &isthmusv1.ListPoolsRequest{}).GetPools(); p[0].Healthy != 1 || p[0].Members[0].Health != "down" || p[0].Members[1].Health != "healthy" || !p[0].Announced ||
			p[0].Members[0].Targets[0].LastError != "sick" {
			t.Errorf("pools %v", p)
		}

		// A document that does not change the probes keeps their results.
		accept(t, r, strings.Replace(doc, "name: x,", "name: y,", 1))
		want("[10.9.0.6] [0.0.0.0/0 10.9.0.0/24]", "PoolDegraded")
		m.taken()

		// With the last address goes what depends on them, and nothing else; an address that is
		// down is better than none.
		m.setSick(true, "10.9.0.6")
		want("[10.9.0.5 10.9.0.6] [10.9.0.0/24]", "PoolDown")
		expect(t, m, "nat", "bgp")
		if p := listed[*isthmusv1.ListPoolsResponse](t, r, &isthmusv1.ListPoolsRequest{}).GetPools(); p[0].Announced || p[0].Healthy != 0 {
			t.Errorf("pools %v", p)
		}

		m.setSick(false, "10.9.0.5")
		want("[10.9.0.5 10.9.0.6] [10.9.0.0/24]", "PoolDown") // held down
		time.Sleep(time.Minute)
		synctest.Wait()
		want("[10.9.0.5] [0.0.0.0/0 10.9.0.0/24]", "PoolDegraded")

		// Without probes, no address is sick.
		accept(t, r, strings.Replace(doc, `, probes: {targets: ["icmp://198.51.100.7"], holdDown: 1m}`, "", 1))
		want("[10.9.0.5 10.9.0.6] [0.0.0.0/0 10.9.0.0/24]")

		// A new daemon has no results at first, and probes.
		accept(t, r, doc)
		stop()
		r, stop = m.boot(dir)
		defer stop()
		synctest.Wait()
		want("[10.9.0.5 10.9.0.6] [0.0.0.0/0 10.9.0.0/24]")
		time.Sleep(5 * time.Second)
		synctest.Wait()
		want("[10.9.0.5] [0.0.0.0/0 10.9.0.0/24]", "PoolDegraded")
	})
}

// TestSickProxy has the proxies of two policies fail and return.
func TestSickProxy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		doc := strings.Replace(base, "policies: [", `policies: [
{name: web, action: redirect, sources: [172.16.0.0/16], protocol: tcp, ports: ["80"], to: "10.7.0.9:3128", probes: {fall: 2, holdDown: 30s}},
{name: tls, action: redirect, sources: [172.16.0.0/16], protocol: tcp, ports: ["443"], to: "10.7.0.10:3128", whenDown: bypass, probes: {targets: ["tcp://10.7.0.10:1", "icmp://10.7.0.10"]}},
`, 1)
		want := func(down string, conditions ...string) {
			t.Helper()
			var got, is []string
			m.mu.Lock()
			for _, p := range m.nat.Policies {
				if p.Down {
					got = append(got, p.Name)
				}
			}
			m.mu.Unlock()
			if fmt.Sprint(got) != down {
				t.Errorf("down: %v, want %v", got, down)
			}
			got = nil
			policies := r.Policies()
			for _, p := range policies {
				if p.Down {
					got = append(got, p.Name)
				}
			}
			if fmt.Sprint(got) != down {
				t.Errorf("shown as down: %v, want %v", got, down)
			}
			for _, c := range status(r).GetConditions() {
				is = append(is, c.GetSeverity()+" "+c.GetMessage())
			}
			if fmt.Sprint(is) != fmt.Sprint(conditions) {
				t.Errorf("conditions %q, want %q", is, conditions)
			}
		}
		sick := func(yes bool, proxy string) {
			m.mu.Lock()
			m.sick["0.0.0.0 "+proxy] = yes
			m.mu.Unlock()
			time.Sleep(20 * time.Second)
			synctest.Wait()
		}
		accept(t, r, doc)
		time.Sleep(time.Minute)
		m.taken()
		time.Sleep(5 * time.Minute)
		expect(t, m)
		want("[]")

		sick(true, "10.7.0.9")
		expect(t, m, "nat")
		web := "error proxy 10.7.0.9 of policy web is down, reaches 0 of 1 targets, needs 1 (tcp://10.7.0.9:3128: sick); new flows are rejected"
		want("[web]", web)
		sick(true, "10.7.0.10")
		tls := "warning proxy 10.7.0.10 of policy tls is down, reaches 0 of 2 targets, needs 2 (tcp://10.7.0.10:1: sick; icmp://10.7.0.10: sick); new flows are decided by the other policies"
		want("[tls web]", tls, web)

		// It returns after the hold-down. A proxy that is no longer probed counts as working.
		sick(false, "10.7.0.9")
		if got := fmt.Sprint(status(r).GetConditions()); !strings.Contains(got, "policy web is returning, held down until") {
			t.Error(got)
		}
		time.Sleep(30 * time.Second)
		synctest.Wait()
		want("[tls]", tls)
		accept(t, r, strings.Replace(doc, `, probes: {targets: ["tcp://10.7.0.10:1", "icmp://10.7.0.10"]}`, "", 1))
		want("[]")
	})
}

// TestNamesOfAFormerRun starts a daemon that has stored addresses and no resolver that answers.
func TestNamesOfAFormerRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		dir := t.TempDir()
		known := `{"a.example": {"198.51.100.1": "2100-01-01T00:00:00Z", "2001:db8::1": "2100-01-01T00:00:00Z"}, "b.example": {"198.51.100.1": "2100-01-01T00:00:00Z", "198.51.100.2": "2100-01-01T00:00:00Z"}}`
		if err := os.WriteFile(filepath.Join(dir, "names.json"), []byte(known), 0o600); err != nil {
			t.Fatal(err)
		}
		r, stop := m.boot(dir)
		defer stop()
		doc := strings.Replace(base, "policies: [{name: x, sources: [10.0.0.0/8], pool: p}]", `resolvers: ["127.0.0.1:1"], policies: [
{name: x, sources: [10.0.0.0/8], names: [b.example], pool: p}, {name: w, sources: [10.0.0.0/8], names: [a.example], pool: p}, {name: none, sources: [10.0.0.0/8], names: [c.example], pool: p}]`, 1)
		accept(t, r, doc)
		m.mu.Lock()
		for i, want := range []string{"none []", "w [198.51.100.1/32 2001:db8::1/128]", "x [198.51.100.2/32]"} {
			if p := m.nat.Policies[i]; fmt.Sprint(p.Name, " ", p.Destinations) != want {
				t.Errorf("%s has %v, want %s", p.Name, p.Destinations, want)
			}
		}
		m.mu.Unlock()
		names := listed[*isthmusv1.ListNamesResponse](t, r, &isthmusv1.ListNamesRequest{}).GetNames()
		if len(names) != 3 || names[1].GetName() != "b.example" || fmt.Sprint(names[1].GetAddresses(), names[1].GetPolicies()) != "[198.51.100.1 198.51.100.2] [x]" {
			t.Errorf("names %v", names)
		}
		if got := fmt.Sprint(status(r).GetConditions()); !strings.Contains(got, "NameShared") || !strings.Contains(got, "198.51.100.1 of name b.example is not a destination of policy x, since policy w decides the same flows to it") {
			t.Errorf("conditions %s", got)
		}
	})
}

// TestFormerUnderlayLosesItsPools checks that pool addresses go with the pool, also from another
// interface.
func TestFormerUnderlayLosesItsPools(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, base)
		accept(t, r, strings.Replace(base, "eth0", "eth1", 1))
		if len(m.by["eth0"]) > 0 || fmt.Sprint(m.by["eth1"]) != "[10.9.0.5]" {
			t.Errorf("addresses %v", m.by)
		}
	})
}

// TestAddressOfRulesStaysThoughDocumentsCome has the rules of a document in the kernel that is two
// documents old.
func TestAddressOfRulesStaysThoughDocumentsCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, base)
		m.mu.Lock()
		m.unruly = errors.New("no")
		m.mu.Unlock()
		accept(t, r, strings.Replace(base, "10.9.0.5", "10.9.0.6", 1))
		accept(t, r, strings.Replace(base, "10.9.0.5", "10.9.0.7", 1))
		m.mu.Lock()
		m.unruly = nil
		m.mu.Unlock()
		time.Sleep(2 * lastRetry)
		if m.taken(); fmt.Sprint(m.pool) != "[10.9.0.7]" {
			t.Errorf("addresses %v", m.pool)
		}
	})
}
