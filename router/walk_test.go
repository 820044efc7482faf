package router

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/test/root"
	"github.com/isthmus-net/isthmus/tunnel"
)

// walkDocument returns a random document of few possible parts, so that parts come, change and go.
func walkDocument(r *rand.Rand) string {
	var b strings.Builder
	some := func(p float64) bool { return r.Float64() < p }
	asn, underlay := some(0.8), "eth0"
	if some(0.2) {
		underlay = "eth1"
	}
	if b.WriteString("node: {name: n"); asn {
		b.WriteString(", asn: 64620")
	}
	fmt.Fprintf(&b, "}\nunderlay: {interface: %s, address: 10.9.0.4}\n", underlay)
	var names []string
	var list strings.Builder
	for i, name := range []string{"a", "b", "c"} {
		if some(0.3) {
			continue
		}
		names = append(names, name)
		if some(0.6) {
			fmt.Fprintf(&list, "- {name: %s, mtu: %d, ipsec: {remoteAddress: 198.51.100.%d, psk: k}}\n", name, 1400-r.IntN(2), i+1)
		} else {
			fmt.Fprintf(&list, "- {name: %s, inside: [{local: 169.254.%d.2/30, remote: 169.254.%d.1}], wireguard: {privateKey: k, listenPort: %d, peerPublicKey: %sE=}}\n", name, i, i, 51820+i+10*r.IntN(2), strings.Repeat("A", 42))
		}
	}
	if len(names) > 0 {
		b.WriteString("tunnels:\n" + list.String())
		if some(0.7) {
			fmt.Fprintf(&b, "staticRoutes: [{prefix: 10.%d.0.0/16, tunnels: [%s]}]\n", 7+r.IntN(2), strings.Join(names, ", "))
		}
	}
	if asn && len(names) > 0 && some(0.8) {
		b.WriteString("peers:\n")
		for _, name := range names {
			fmt.Fprintf(&b, "- {name: p%s, tunnel: %s, asn: %d}\n", name, name, 65001+r.IntN(2))
		}
	}
	if some(0.8) {
		var addresses []string
		for i := range 3 {
			if len(addresses) == 0 || some(0.5) {
				addresses = append(addresses, fmt.Sprintf("{address: 10.9.0.%d}", 5+(i+r.IntN(2))%4))
			}
		}
		slices.Sort(addresses)
		fmt.Fprintf(&b, "egress: {pools: [{name: p, addresses: [%s]}], policies: [{name: x, sources: [10.%d.0.0/16], pool: p}]}\n", strings.Join(slices.Compact(addresses), ", "), r.IntN(3))
	}
	return b.String()
}

// kernel is the final state of a machine.
type kernel struct {
	Tunnels map[place]tunnel.Config
	Alive   map[string]bool // interfaces of these tunnels
	Pool    map[string][]netip.Addr
	NAT     string
	BGP     string
	Static  string
	Forward bool
}

func (m *machine) kernel() kernel {
	m.mu.Lock()
	defer m.mu.Unlock()
	k := kernel{Tunnels: maps.Clone(m.tunnels), Alive: map[string]bool{}, Pool: map[string][]netip.Addr{}, NAT: fmt.Sprint(m.nat), BGP: fmt.Sprint(m.bgp), Static: fmt.Sprint(m.static), Forward: m.forward}
	for _, c := range m.tunnels {
		if alive, known := m.alive[c.Interface]; known {
			k.Alive[c.Interface] = alive
		}
	}
	for iface, list := range m.by {
		if len(list) > 0 {
			k.Pool[iface] = slices.SortedFunc(slices.Values(list), netip.Addr.Compare)
		}
	}
	return k
}

// TestRandomWalk checks that after random documents, confirmations, faults and restarts, a node
// that has come to rest is the same as one that starts on an empty machine with the last document.
func TestRandomWalk(t *testing.T) {
	steps, seeds := 200, root.Count(uint64(4), 1)
	for seed := range seeds {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { walk(t, rand.New(rand.NewPCG(seed, 11)), steps) })
		})
	}
}

func walk(t *testing.T, r *rand.Rand, steps int) {
	m, dir := newMachine(t), t.TempDir()
	m.faulty = true
	n, stop := m.boot(dir)
	fault := func(old error) error {
		if old != nil || r.IntN(3) > 0 {
			return nil
		}
		return errors.New("no such luck")
	}
	var trail []string
	for step := range steps + 1 {
		what := ""
		switch k := r.IntN(12); {
		case k < 5:
			c := document.Change{Author: "tester"}
			if r.IntN(3) == 0 {
				c.Confirm = time.Duration(1+r.IntN(120)) * time.Second
			}
			doc := walkDocument(r)
			_, _, err := n.documents.Apply(t.Context(), c, text(doc))
			if err != nil {
				t.Fatalf("%v: %s", err, doc)
			}
			what = "apply " + doc
		case k == 5:
			_ = n.documents.Confirm(n.Generation())
			what = "confirm"
		case k == 6:
			_, _, _ = n.documents.Rollback(t.Context(), document.Change{Author: "tester"}, 0)
			what = "rollback"
		case k == 7:
			stop()
			n, stop = m.boot(dir)
			what = "restart"
		case k == 8:
			time.Sleep(time.Duration(r.IntN(90)) * time.Second)
			what = "wait"
		default:
			m.mu.Lock()
			switch r.IntN(6) {
			case 0:
				m.staying = fault(m.staying)
			case 1:
				m.muted = fault(m.muted)
			case 2:
				m.unread = fault(m.unread)
			case 3:
				m.unruly = fault(m.unruly)
			case 4:
				m.failing["a"] = fault(m.failing["a"])
			case 5:
				// Another process removes the rules.
				m.rules = false
				what = "flush, "
			}
			what += fmt.Sprint("faults ", m.staying, m.muted, m.unread, m.unruly, m.failing)
			m.mu.Unlock()
		}
		trail = append(trail, what)
		if r.IntN(2) == 0 {
			synctest.Wait()
		}
		if step%25 == 0 {
			compare(t, m, n, dir, trail)
		}
	}
	stop()
}

// compare waits until a node comes to rest, and compares its machine with one on which a node with
// the same state starts.
func compare(t *testing.T, m *machine, n *Router, dir string, trail []string) {
	t.Helper()
	m.mu.Lock()
	m.staying, m.muted, m.unread, m.unruly = nil, nil, nil, nil
	clear(m.failing)
	m.mu.Unlock()
	time.Sleep(5 * time.Minute) // the longest back-off, and the time for a confirmation
	synctest.Wait()
	if s := status(n); s.GetAppliedGeneration() != s.GetGeneration() || len(s.GetConditions()) > 0 {
		t.Errorf("the node does not come to rest: %v", s)
	}
	fresh := newMachine(t)
	fresh.faulty = true
	state := t.TempDir()
	if err := os.CopyFS(state, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	_, stop := fresh.boot(state)
	time.Sleep(5 * time.Minute)
	synctest.Wait()
	defer stop()
	if got, want := m.kernel(), fresh.kernel(); !reflect.DeepEqual(got, want) {
		t.Errorf("after the walk\n%+v\nfresh\n%+v\nlast steps\n%s", got, want, strings.Join(trail[max(0, len(trail)-12):], "\n"))
	}
}
