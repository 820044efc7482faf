package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/peer"
)

// TestBGPAbuse has the site's end of the tunnel, which has all the keys, violate BGP. The clouds
// must not be affected.
func TestBGPAbuse(t *testing.T) {
	b := begin(t)
	spokes := b.c.Spokes
	b.c.Site.Speaker.Stop()
	b.c.Site.Speaker, b.c.Spokes = nil, spokes[:3]
	t.Cleanup(func() {
		if !t.Failed() { // else the topology is removed
			var err error
			b.c.Site.Speaker, err = peer.StartBIRD(context.Background(), b.c.Site.Node, b.c.Site.BGP)
			b.c.Spokes = spokes
			b.ok(err)
		}
	})
	b.until(10*time.Second, func() error {
		if p := b.peers()["site"]; p.GetState() == "established" {
			return fmt.Errorf("site is %v", p)
		}
		return nil
	})
	b.run("from the Internet", (*bench).strangers)
	b.run("garbage", (*bench).garbage)
	b.run("not its prefixes", (*bench).notItsPrefixes)
	b.run("our own", (*bench).ourOwn)
	b.run("flood", (*bench).flood)
	b.run("killers", (*bench).killers)
	b.run("the BGP process ends", (*bench).processEnds)
	b.run("no leak", (*bench).noLeak)
}

// undisturbed runs f and checks that no other session or tunnel was touched and that no packet
// between the clouds was lost.
func (b *bench) undisturbed(what string, f func()) {
	b.Helper()
	before, peers := b.baseline()
	status := b.status()
	b.lossless(what, f)
	b.untouched(before, peers, "site")
	if n := b.status().GetCounters().GetBgpStarts(); n != status.GetCounters().GetBgpStarts() {
		b.Errorf("%s: the BGP process was started %d times, before %d", what, n, status.GetCounters().GetBgpStarts())
	}
}

// rogue opens a session from the site. After a session that ended with an error the router waits
// some seconds before it accepts another one.
func (b *bench) rogue() *peer.RawBGP {
	b.Helper()
	var r *peer.RawBGP
	b.until(30*time.Second, func() (err error) {
		r, err = b.dialRogue(b.Context())
		return err
	})
	b.Cleanup(r.Close)
	return r
}

func (b *bench) dialRogue(ctx context.Context) (*peer.RawBGP, error) {
	return peer.DialRawBGP(ctx, b.c.Site.Node, netip.AddrPortFrom(b.c.NodeInside.Addr(), 179), SiteASN, SiteOutside)
}

var nexthopID = regexp.MustCompile(` nhid \d+`)

// routes are all routes of the node's kernel, as lines without the numbers of next hop objects,
// which are new after a restart of BGP.
func (b *bench) routes() []string {
	b.Helper()
	out, err := b.c.Node.Exec(b.Context(), "ip", "route", "show", "table", "all")
	b.ok(err)
	return strings.Split(strings.TrimSpace(nexthopID.ReplaceAllString(out, "")), "\n")
}

// routesAre waits until the kernel has the routes of before and one for each of the prefixes, and
// nothing else.
func (b *bench) routesAre(before []string, and ...netip.Prefix) {
	b.Helper()
	b.until(15*time.Second, func() error {
		got := b.routes()
		missing := func(a, b []string) []string {
			return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
		}
		gone, come := missing(before, got), missing(got, before)
		for _, p := range and {
			if i := slices.IndexFunc(come, func(s string) bool { return strings.HasPrefix(s, p.String()+" ") }); i >= 0 {
				come = slices.Delete(come, i, i+1)
			} else {
				gone = append(gone, p.String())
			}
		}
		if len(gone)+len(come) > 0 {
			return fmt.Errorf("routes missing: %q, too many: %q", gone, come)
		}
		return nil
	})
}

// strangers tries BGP without a tunnel, and other ports that a node may have open, from an address
// that is not allowed.
func (b *bench) strangers() {
	for _, a := range []netip.Addr{NodePublic, EgressPublic} {
		ctx, cancel := context.WithTimeout(b.Context(), 1500*time.Millisecond)
		_, err := b.c.Internet.Node.DialContext(ctx, "tcp", netip.AddrPortFrom(a, 179).String())
		cancel()
		if e, ok := errors.AsType[net.Error](err); !ok || !e.Timeout() {
			b.Errorf("port 179 of %v answers the Internet: %v", a, err)
		}
	}
	stranger := net.Dialer{Timeout: 1500 * time.Millisecond, LocalAddr: &net.TCPAddr{IP: net.IPv4(203, 0, 113, 1)}}
	for _, port := range []uint16{7443, 22, 80} {
		err := b.c.Internet.Node.Do(func() error {
			conn, err := stranger.DialContext(b.Context(), "tcp", netip.AddrPortFrom(NodePublic, port).String())
			if err == nil {
				conn.Close()
			}
			return err
		})
		if e, ok := errors.AsType[net.Error](err); !ok || !e.Timeout() {
			b.Errorf("port %d answers a stranger: %v", port, err)
		}
	}
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	conn, err := b.c.Internet.Node.DialContext(ctx, "tcp", netip.AddrPortFrom(NodePublic, 7443).String())
	if err != nil {
		b.Errorf("the Internet does not reach the node at all, which makes this test worthless: %v", err)
		return
	}
	conn.Close()
}

// garbage sends malformed messages in an established session.
func (b *bench) garbage() {
	for _, g := range []struct {
		name  string
		bytes []byte
		code  string // of the NOTIFICATION (RFC 4271 section 4.5)
	}{
		{"another protocol", []byte("GET / HTTP/1.1\r\nHost: router\r\n\r\n"), "notification code 1"},
		{"length below a header's", append(bytes.Repeat([]byte{0xff}, 16), 0, 18, peer.BGPKeepalive), "notification code 1"},
		{"attributes longer than the message", peer.BGPMessage(peer.BGPUpdate, []byte{0, 0, 0, 9, 0x40, 1, 1, 0}), "notification code 3"},
	} {
		b.undisturbed("garbage, "+g.name, func() {
			r := b.rogue()
			b.ok(r.Write(g.bytes))
			select {
			case <-r.Done():
				if !strings.Contains(fmt.Sprint(r.Err()), g.code) {
					b.Errorf("%s: the session ended with %v, want %s", g.name, r.Err(), g.code)
				}
			case <-time.After(time.Minute):
				b.Errorf("%s: the session goes on", g.name)
			}
			r.Close()
			b.until(10*time.Second, func() error {
				if p := b.peers()["site"]; p.GetState() == "established" || !strings.Contains(p.GetLastError(), "NOTIFICATION") {
					return fmt.Errorf("site is %v", p)
				}
				return nil
			})
		})
	}
}

// site returns the document with a change in the text after the name of the site's peer.
func (b *bench) site(old, new string) string {
	b.Helper()
	document := b.c.Document()
	at := strings.LastIndex(document, "- name: site\n")
	if !strings.Contains(document[at:], old) {
		b.Fatalf("no %q in %s", old, document[at:])
	}
	return document[:at] + strings.Replace(document[at:], old, new, 1)
}

// notItsPrefixes announces the one prefix that is allowed, and some that are not.
func (b *bench) notItsPrefixes() {
	before := b.routes()
	foreign := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), VPC, netip.MustParsePrefix("172.16.1.0/24"), netip.MustParsePrefix("172.20.0.0/25"),
		netip.MustParsePrefix("172.20.0.0/16"), netip.MustParsePrefix("192.0.2.80/32"), netip.MustParsePrefix("169.254.64.0/30")}
	b.undisturbed("foreign prefixes", func() {
		r := b.rogue()
		b.ok(r.Announce([]uint32{SiteASN}, b.c.SiteInside.Addr(), nil, append(foreign, Office)...))
		b.until(15*time.Second, func() error {
			if p := b.peers()["site"]; p.GetPrefixesReceived() != 8 || p.GetPrefixesAccepted() != 1 {
				return fmt.Errorf("site is %v", p)
			}
			return nil
		})
		b.routesAre(before, Office)
		r.Close()
		b.routesAre(before)
	})
}

// ourOwn sends the node's own prefixes back, by a session that accepts every prefix: only the AS
// path keeps them out.
func (b *bench) ourOwn() {
	before := b.routes()
	b.ok(b.r.Apply(b.Context(), b.site("import: {allow: [{prefix: "+Office.String()+"}]}", "import: {allow: [{prefix: 0.0.0.0/0, le: 32}]}")))
	b.undisturbed("our own prefixes", func() {
		r := b.rogue()
		more := netip.MustParsePrefix("172.20.9.0/24")
		for _, a := range []struct {
			path   []uint32
			prefix netip.Prefix
		}{
			{[]uint32{SiteASN, NodeASN}, netip.MustParsePrefix("0.0.0.0/0")},
			{[]uint32{SiteASN, NodeASN, AWSASN}, VPC},
			{[]uint32{SiteASN, 65099, NodeASN, 65098}, netip.MustParsePrefix("172.20.8.0/24")},
			{[]uint32{SiteASN}, more},
		} {
			b.ok(r.Announce(a.path, b.c.SiteInside.Addr(), nil, a.prefix))
		}
		b.routesAre(before, more)
		b.until(15*time.Second, func() error {
			if p := b.peers()["site"]; p.GetState() != "established" || p.GetPrefixesReceived() != 4 || p.GetPrefixesAccepted() != 1 {
				return fmt.Errorf("site is %v, want one of four prefixes accepted", p)
			}
			return nil
		})
		r.Close()
		b.routesAre(before)
	})
	b.ok(b.r.Apply(b.Context(), b.c.Document()))
}

// memory returns the peak memory of isthmusd and its children, in MiB.
func (b *bench) memory() (mib int) {
	b.Helper()
	statuses, _ := filepath.Glob("/proc/[0-9]*/status")
	for _, file := range statuses {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		field := map[string]int{}
		for line := range strings.Lines(string(text)) {
			if words := strings.Fields(line); len(words) > 1 {
				field[words[0]], _ = strconv.Atoi(words[1])
			}
		}
		if pid := b.r.Daemon.Pid(); field["Pid:"] == pid || field["PPid:"] == pid {
			mib += field["VmHWM:"] >> 10
		}
	}
	if mib == 0 {
		b.Fatal("isthmusd does not run")
	}
	return mib
}

// flood announces a million prefixes, to limits that GoBGP enforces with each UPDATE and that are
// compared with counters.
func (b *bench) flood() {
	var flood []byte
	for i := 0; i < 1_000_000; {
		attrs := []byte{0x40, 1, 1, 0, 0x40, 2, 6, 2, 1, 0, 0, SiteASN >> 8, SiteASN & 0xff, 0x40, 3, 4}
		attrs = append(attrs, b.c.SiteInside.Addr().AsSlice()...)
		body := append([]byte{0, 0, 0, byte(len(attrs))}, attrs...)
		for ; len(body) < 4000 && i < 1_000_000; i++ {
			body = append(body, 24, byte(20+i>>16), byte(i>>8), byte(i))
		}
		flood = append(flood, peer.BGPMessage(peer.BGPUpdate, body)...)
	}
	before := b.routes()
	// The peak never falls again, so the low limit goes first.
	for _, of := range []struct {
		limit uint32
		most  int // MiB
	}{{1000, 150}, {30_000, 600}} {
		limit, most := of.limit, of.most
		b.ok(b.r.Apply(b.Context(), b.site("  import:", fmt.Sprintf("  maxPrefixes: %d\n  import:", limit))))
		b.undisturbed(fmt.Sprintf("a million prefixes, limit %d", limit), func() {
			was, start := b.memory(), time.Now()
			r := b.rogue()
			var sent atomic.Bool
			go func() { sent.Store(r.Write(flood) == nil) }()
			b.until(2*time.Minute, func() error {
				if p := b.peers()["site"]; p.GetState() != "prefix-limit" || !p.GetNextTry().AsTime().After(time.Now()) {
					return fmt.Errorf("site is %v", p)
				}
				return nil
			})
			b.step("limit %d: prefix-limit after %.1f s, all of it sent: %v, memory %d MiB, before %d MiB", limit, time.Since(start).Seconds(), sent.Load(), b.memory(), was)
			if n := b.memory(); n > most {
				b.Errorf("limit %d: isthmusd and its children have had %d MiB in memory, want at most %d", limit, n, most)
			}
			if r, err := b.dialRogue(b.Context()); err == nil {
				r.Close()
				b.Errorf("limit %d: the peer was admitted again at once", limit)
			}
			b.routesAre(before)
		})
		b.cli("reset", "peer", "site")
	}
	b.ok(b.r.Apply(b.Context(), b.c.Document()))
}

// prefixSID makes GoBGP v3.37.0 panic: a Prefix-SID attribute with an unknown sub-TLV in its SRv6
// service TLV.
var prefixSID = []byte{0xc0, 0x28, 0x09, 0x05, 0x00, 0x06, 0x00, 0x09, 0x00, 0x02, 0x00, 0x00}

// killers sends messages that crash GoBGP v3.37.0: none of them reaches it. The filter removes an
// attribute and accepts the route that came with it; a message of an unknown type ends the session.
func (b *bench) killers() {
	before := b.routes()
	b.undisturbed("what GoBGP does not survive", func() {
		r := b.rogue()
		b.ok(r.Announce([]uint32{SiteASN}, b.c.SiteInside.Addr(), prefixSID, Office))
		b.routesAre(before, Office)
		b.until(15*time.Second, func() error {
			f := b.peers()["site"].GetFilter()
			if len(f.GetDiscarded()) != 1 || f.GetDiscarded()[0].GetType() != 40 || f.GetDiscarded()[0].GetCount() != 1 {
				return fmt.Errorf("the filter has counted %v", f)
			}
			return nil
		})
		b.ok(r.Send(9, nil))
		select {
		case <-r.Done():
			if !strings.Contains(fmt.Sprint(r.Err()), "notification code 1") {
				b.Errorf("the session ended with %v", r.Err())
			}
		case <-time.After(time.Minute):
			b.Error("the session goes on")
		}
		r.Close()
		b.routesAre(before)
		b.until(15*time.Second, func() error {
			if p := b.peers()["site"]; p.GetState() == "quarantined" || !strings.Contains(p.GetLastError(), "type 9") {
				return fmt.Errorf("site is %v", p)
			}
			return nil
		})
	})
}

// processEnds kills the BGP process: forwarding does not change, no peer is quarantined, and all
// sessions come back by graceful restart.
func (b *bench) processEnds() {
	before, peers := b.baseline()
	sessions, starts, routes := b.sessions(), b.status().GetCounters().GetBgpStarts(), b.routes()
	b.lossless("the BGP process is killed", func() {
		pid := b.child()
		b.ok(syscall.Kill(pid, syscall.SIGKILL))
		b.until(time.Minute, func() error {
			if n := b.status().GetCounters().GetBgpStarts() - starts; n != 1 {
				return fmt.Errorf("the BGP process was started %d times", n)
			}
			for name, p := range b.peers() {
				if name != "site" && (p.GetState() != "established" || p.GetTimesUp() != peers[name].GetTimesUp()+1) {
					return fmt.Errorf("peer %s is %s (%s)", name, p.GetState(), p.GetLastError())
				}
			}
			return nil
		})
	})
	b.untouched(before, nil, "site")
	for name, p := range b.peers() {
		if p.GetState() == "quarantined" {
			b.Errorf("peer %s is quarantined", name)
		}
	}
	for name, s := range b.sessions() {
		if n := s.Withdrawals - sessions[name].Withdrawals; s.State != "Established" || n != 0 {
			b.Errorf("session %s is %s and has seen %d withdrawals", name, s.State, n)
		}
	}
	b.routesAre(routes)
	r := b.rogue()
	b.ok(r.Announce([]uint32{SiteASN}, b.c.SiteInside.Addr(), nil, Office))
	b.routesAre(routes, Office)
	r.Close()
	b.routesAre(routes)
}

// child returns the process ID of isthmusd's BGP process.
func (b *bench) child() int {
	b.Helper()
	statuses, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range statuses {
		text, err := os.ReadFile(file)
		if err != nil || !strings.HasPrefix(string(text), "isthmusd-bgp\x00") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		b.ok(err)
		return pid
	}
	b.Fatal("no BGP process")
	return 0
}
