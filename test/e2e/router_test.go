package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
	"github.com/isthmus-net/isthmus/test/vm"
)

// bench is a running topology with a router in the middle.
type bench struct {
	*testing.T
	c     *Clouds
	r     *Router
	leaks *lab.Capture
	conn  *grpc.ClientConn
	start time.Time
}

func (b *bench) step(format string, args ...any) {
	b.Logf("%6.1f s  %s", time.Since(b.start).Seconds(), fmt.Sprintf(format, args...))
}

func (b *bench) ok(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

func (b *bench) cli(args ...string) string {
	b.Helper()
	out, err := b.r.CLI(b.Context(), args...)
	b.ok(err)
	return out
}

// until waits until f succeeds, and fails with its last error when the time is up.
func (b *bench) until(limit time.Duration, f func() error) {
	b.Helper()
	b.ok(lab.Until(b.Context(), limit, f))
}

func programs() string {
	if vm.Inside() {
		dir, _ := os.Getwd()
		return dir
	}
	dir, _ := filepath.Abs("../../bin/e2e")
	return dir
}

// kept is the bench of the last test, with its topology, if that test passed: the next one goes on
// with it, since to build one takes about a minute under emulation.
var kept *bench

// begin returns the topology with a router, the document applied and everything up. It may be the
// one of an earlier test: the document and the secrets are those of Clouds, the history and the
// counters are not new.
func begin(t *testing.T) *bench {
	b := kept
	kept = nil
	if b == nil {
		b = build(t, programs())
	}
	b = &bench{T: t, c: b.c, r: b.r, start: time.Now()}
	t.Cleanup(func() {
		if t.Failed() {
			b.close()
			return
		}
		kept = b
	})
	return b.ready()
}

// build builds the topology and starts the router from the programs in a directory.
func build(t *testing.T, bin string) *bench {
	b := &bench{T: t, start: time.Now()}
	ctx := context.Background() // the topology may outlive the test
	var err error
	b.c, err = NewClouds(ctx, CloudsOptions{})
	b.ok(err)
	defer func() {
		if b.r == nil {
			b.close()
		}
	}()
	b.ok(b.c.Start(ctx))
	b.step("gateways started")
	r, err := b.c.StartRouter(ctx, bin)
	b.ok(err)
	b.r = r
	b.step("router started")
	b.ok(b.r.SetSecrets(ctx))
	return b
}

// ready applies the document, and waits until everything is up.
func (b *bench) ready() *bench {
	b.Helper()
	var err error
	b.leaks, err = b.c.Internet.Node.Capture("", Inside...)
	b.ok(err)
	b.dial()
	b.ok(b.r.Apply(b.Context(), b.c.Document()))
	b.step("document applied")
	b.up()
	b.step("every session is established")
	b.ok(b.c.AllReachable(b.Context(), 60*time.Second))
	b.step("every spoke reaches every other")
	return b
}

// close removes the topology. In a guest, its logs are kept if the test has failed.
func (b *bench) close() {
	if b.T.Failed() && vm.Inside() {
		b.c.Lab.Save(context.Background(), "/out/"+b.T.Name())
	}
	if err := b.c.Close(); err != nil {
		b.T.Error(err)
	}
}

func (b *bench) dial() {
	conn, err := grpc.NewClient("unix:"+b.r.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	b.ok(err)
	b.Cleanup(func() { conn.Close() })
	b.conn = conn
}

func (b *bench) tunnels() map[string]*isthmusv1.TunnelStatus {
	b.Helper()
	out, err := b.r.Tunnels(b.Context())
	b.ok(err)
	return out
}

func (b *bench) peers() map[string]*isthmusv1.PeerStatus {
	b.Helper()
	out, err := b.r.Peers(b.Context())
	b.ok(err)
	return out
}

func (b *bench) status() *isthmusv1.SystemStatus {
	b.Helper()
	s, err := isthmusv1.NewSystemServiceClient(b.conn).GetStatus(b.Context(), &isthmusv1.GetStatusRequest{})
	b.ok(err)
	return s
}

// up waits until every tunnel is up and every session established, on both sides.
func (b *bench) up() {
	b.Helper()
	b.until(90*time.Second, func() error {
		if err := b.r.Up(b.Context()); err != nil {
			return err
		}
		return b.c.Established(b.Context())
	})
}

// lossless runs f while every spoke sends 100 packets a second to the next one, and checks that all
// arrive and come back.
func (b *bench) lossless(what string, f func()) {
	b.Helper()
	for _, w := range b.losses(0, what, f) {
		b.Error(w)
	}
}

// losing is lossless for an action that may lose some packets of each stream, and can be repeated:
// a busy machine loses packets too, so the action is repeated once if more were lost.
func (b *bench) losing(most int, what string, f func()) {
	b.Helper()
	wrong := b.losses(most, what, f)
	if len(wrong) > 0 {
		b.Logf("once more since %q", wrong)
		wrong = b.losses(most, what, f)
	}
	for _, w := range wrong {
		b.Error(w)
	}
}

// losses returns the streams that lost more than most packets while f ran.
func (b *bench) losses(most int, what string, f func()) (wrong []string) {
	b.Helper()
	var pingers []*lab.Pinger
	for i, from := range b.c.Spokes {
		to := b.c.Spokes[(i+1)%len(b.c.Spokes)]
		p, err := from.Node.Ping(to.Addr, lab.PingOptions{Interval: 10 * time.Millisecond})
		b.ok(err)
		defer p.Stop()
		pingers = append(pingers, p)
	}
	time.Sleep(500 * time.Millisecond)
	began := time.Now()
	f()
	time.Sleep(500 * time.Millisecond)
	sent := 0
	for i, p := range pingers {
		r := p.Stop()
		sent += r.Sent
		if r.Lost > most {
			wrong = append(wrong, fmt.Sprintf("%s: from %s: %v", what, b.c.Spokes[i].Node.Name, r))
		}
	}
	b.step("%s: %d packets in %.1f s, %.0f a second", what, sent, time.Since(began).Seconds(), float64(sent)/(time.Since(began).Seconds()+0.5))
	return wrong
}

// sessions returns the state of every session as the peers see it.
func (b *bench) sessions() map[string]peer.Session {
	b.Helper()
	out := map[string]peer.Session{}
	for _, g := range b.c.Gateways() {
		for _, i := range g.Instances {
			list, err := i.Speaker.Sessions(b.Context())
			b.ok(err)
			for _, s := range list {
				out[i.Router.Name+"/"+s.Name] = s
			}
		}
	}
	if b.c.Site.Speaker == nil {
		return out // another BGP speaker runs there
	}
	list, err := b.c.Site.Speaker.Sessions(b.Context())
	b.ok(err)
	for _, s := range list {
		out["site/"+s.Name] = s
	}
	return out
}

// baseline returns the states that untouched compares with. It waits until no IKE daemon has an
// exchange under way: where both ends initiated, a tunnel has two IKE_SAs at first, and the node
// shows the other one when one of them is ended.
func (b *bench) baseline() (map[string]*isthmusv1.TunnelStatus, map[string]*isthmusv1.PeerStatus) {
	b.Helper()
	var seen map[string]*isthmusv1.TunnelStatus
	var since time.Time
	b.until(2*time.Minute, func() error {
		now := b.tunnels()
		for name, t := range now {
			if was := seen[name]; !proto.Equal(t.GetEstablished(), was.GetEstablished()) || t.GetKind() != "wireguard" && !proto.Equal(t.GetKeyed(), was.GetKeyed()) {
				seen, since = now, time.Now()
				return fmt.Errorf("tunnel %s: from %v to %v", name, was, t)
			}
		}
		daemons := []peer.IKE{b.r.Charon}
		for _, g := range b.c.Gateways() {
			for _, i := range g.Instances {
				daemons = append(daemons, i.IKE)
			}
		}
		for _, d := range daemons {
			if c, ok := d.(*peer.Charon); ok {
				if err := c.Resting(b.Context()); err != nil {
					seen = nil
					return err
				}
			}
		}
		if time.Since(since) < time.Second { // the daemon reads charon a moment after a change
			return errors.New("at rest for less than a second")
		}
		return nil
	})
	return b.tunnels(), b.peers()
}

// untouched checks that tunnels and sessions other than the named ones are the same as before: not
// established again, and with counters that did not go back.
func (b *bench) untouched(before map[string]*isthmusv1.TunnelStatus, beforePeers map[string]*isthmusv1.PeerStatus, but ...string) {
	b.Helper()
	for name, t := range b.tunnels() {
		was := before[name]
		if slices.Contains(but, name) || was == nil {
			continue
		}
		// WireGuard makes new keys every two minutes; a peer that was added again counts from zero.
		rekeyed := t.GetKind() != "wireguard" && !proto.Equal(t.GetKeyed(), was.GetKeyed())
		if t.GetState() != "up" || t.GetTimesUp() != was.GetTimesUp() || rekeyed || !proto.Equal(t.GetEstablished(), was.GetEstablished()) ||
			t.GetRxBytes() < was.GetRxBytes() || t.GetTxBytes() < was.GetTxBytes() {
			b.Errorf("tunnel %s was touched: from %v to %v", name, was, t)
		}
	}
	for name, p := range b.peers() {
		was := beforePeers[name]
		if slices.Contains(but, name) || was == nil {
			continue
		}
		if p.GetState() != "established" || !proto.Equal(p.GetSince(), was.GetSince()) {
			b.Errorf("peer %s was touched: from %v to %v", name, was, p)
		}
	}
}

// TestMainJob checks the topology of the demo with a real router.
func TestMainJob(t *testing.T) {
	b := begin(t)
	run := b.run
	run("one address", (*bench).oneAddress)
	run("tables", (*bench).tables)
	run("same document", (*bench).sameDocument)
	run("mistakes", (*bench).mistakes)
	run("edit one", (*bench).editOne)
	run("rekey", (*bench).rekey)
	run("delete by hand", (*bench).deleteByHand)
	run("kill daemon", (*bench).killDaemon)
	run("kill charon", (*bench).killCharon)
	run("no leak", (*bench).noLeak)
}

// run is t.Run with the same bench.
func (b *bench) run(name string, f func(b *bench)) {
	b.T.Run(name, func(t *testing.T) {
		sub := *b
		sub.T = t
		f(&sub)
	})
}

// noLeak checks that no packet with an inside source was on the Internet since begin.
func (b *bench) noLeak() {
	if n, first, err := b.leaks.Stop(); err != nil || n != 0 {
		b.Errorf("%d packets with an inside source on the Internet (%v), first: %q", n, err, first)
	}
}

func (b *bench) oneAddress() {
	for _, s := range b.c.Spokes {
		if a, err := b.c.Ask(b.Context(), s); err != nil || a != EgressPublic {
			b.Errorf("from %s the partner saw %v, %v; want %v", s.Node.Name, a, err, EgressPublic)
		}
	}
	r, err := isthmusv1.NewNATServiceClient(b.conn).ListPolicies(b.Context(), &isthmusv1.ListPoliciesRequest{})
	b.ok(err)
	if p := r.GetPolicies(); len(p) != 1 || p[0].GetFlows() < 4 || !p[0].GetInstalled() {
		b.Errorf("policies %v, want one with four flows", p)
	}
}

func (b *bench) tables() {
	for _, noun := range []string{"tunnels", "peers", "routes", "nat", "status"} {
		out := b.cli("get", noun)
		b.Logf("isthmus get %s\n%s", noun, out)
	}
	if out := b.cli("get", "peers"); strings.Count(out, "established") != 7 {
		b.Errorf("want seven established sessions")
	}
	if out := b.cli("get", "tunnels"); strings.Count(out, " up ") != 7 {
		b.Errorf("want seven tunnels that are up")
	}
}

func (b *bench) sameDocument() {
	// Where both sides have opened a tunnel at the same time, one of the two SAs is still to be
	// ended.
	before := b.status().GetCounters()
	quiet := time.Now()
	b.until(time.Minute, func() error {
		if now := b.status().GetCounters(); !proto.Equal(before, now) {
			before, quiet = now, time.Now()
		}
		if time.Since(quiet) < 7*time.Second {
			return fmt.Errorf("the router is still at work: %v", before)
		}
		return nil
	})
	b.ok(b.r.Apply(b.Context(), b.c.Document()))
	time.Sleep(3 * time.Second)
	if after := b.status().GetCounters(); !proto.Equal(before, after) {
		b.Errorf("the same document again wrote: from %v to %v", before, after)
	}
}

func (b *bench) mistakes() {
	text, err := os.ReadFile(filepath.Join(programs(), "fifteen.yaml"))
	if err != nil {
		text, err = os.ReadFile("../../router/spec/testdata/fifteen.yaml")
	}
	b.ok(err)
	before := b.status()
	_, err = b.r.CLIInput(b.Context(), string(text), "apply", "-f", "-")
	if err == nil {
		b.Fatal("a document with mistakes was accepted")
	}
	if n := strings.Count(err.Error(), "standard input:"); n < 15 {
		b.Errorf("%d lines for fifteen mistakes: %v", n, err)
	}
	after := b.status()
	if after.GetGeneration() != before.GetGeneration() || !proto.Equal(before.GetCounters(), after.GetCounters()) {
		b.Errorf("a refused document changed %v to %v", before, after)
	}
}

func (b *bench) editOne() {
	before, peers := b.baseline()
	edited := strings.Replace(b.c.Document(), "- name: google-1\n", "- name: google-1\n  mtu: 1380\n", 1)
	b.losing(0, "editing one tunnel, and back", func() {
		apply := func(document string, want uint32) {
			b.ok(b.r.Apply(b.Context(), document))
			b.until(20*time.Second, func() error {
				if mtu := b.tunnels()["google-1"].GetMtu(); mtu != want {
					return fmt.Errorf("mtu is %d, not %d", mtu, want)
				}
				return nil
			})
		}
		apply(edited, 1380)
		apply(b.c.Document(), before["google-1"].GetMtu())
	})
	b.untouched(before, peers)
}

// rekey rekeys IKE and CHILD SAs three times from each side.
func (b *bench) rekey() {
	type end struct {
		ike  peer.IKE
		name string
	}
	ends := func(daemons ...peer.IKE) (out []end) {
		for _, ike := range daemons {
			children, err := ike.Children(b.Context())
			b.ok(err)
			for name, n := range children {
				if n != 1 {
					b.Errorf("%d CHILD_SAs for %s", n, name)
				}
				out = append(out, end{ike, name})
			}
		}
		if len(out) != 6 {
			b.Fatalf("CHILD_SAs %v, want six", out)
		}
		return out
	}
	var gateways []peer.IKE
	for _, g := range b.c.Gateways() {
		for _, i := range g.Instances {
			gateways = append(gateways, i.IKE)
		}
	}
	ours, theirs := ends(b.r.Charon), ends(gateways...)
	before := b.tunnels()
	b.losing(0, "rekeying IKE and CHILD three times from either side", func() {
		for range 3 {
			for _, side := range [][]end{ours, theirs} {
				for _, e := range side {
					b.ok(e.ike.RekeyChild(b.Context(), e.name))
					b.ok(e.ike.RekeyIKE(b.Context(), e.name))
				}
				time.Sleep(2 * time.Second)
			}
		}
	})
	b.until(30*time.Second, func() error {
		for name, t := range b.tunnels() {
			if t.GetKind() == "ipsec" && (t.GetState() != "up" || !t.GetKeyed().AsTime().After(before[name].GetKeyed().AsTime())) {
				return fmt.Errorf("tunnel %s: %v", name, t)
			}
		}
		return nil
	})
	ends(b.r.Charon)
	ends(gateways...)
}

// deleteByHand removes parts of one tunnel and checks that they come back, and that the others are
// untouched.
func (b *bench) deleteByHand() {
	const victim = "aws-1"
	heal := func(what, victim string, f func()) {
		before, peers := b.baseline()
		f()
		time.Sleep(time.Second)
		b.up()
		b.untouched(before, peers, victim)
		b.step("%s: healed", what)
	}
	heal("every connection unloaded from charon", "", func() {
		empty := filepath.Join(b.r.Dir, "empty.conf")
		b.ok(os.WriteFile(empty, nil, 0o600))
		_, err := b.r.Charon.Swanctl(b.Context(), "--load-conns", "--file", empty)
		b.ok(err)
		b.until(90*time.Second, func() error {
			out, err := b.r.Charon.Swanctl(b.Context(), "--list-conns")
			if n := strings.Count(out, "isthmus:") / 2; err == nil && n != 6 {
				err = fmt.Errorf("%d connections are loaded", n)
			}
			return err
		})
	})
	heal("WireGuard's peer removed", "site", func() {
		_, err := b.c.Node.Exec(b.Context(), "wg", "set", b.tunnels()["site"].GetInterface(), "peer", b.c.SiteKey.Public, "remove")
		b.ok(err)
		// The kernel sends no notification, so the tunnel is reported up until the daemon polls:
		// only a later handshake shows that it is.
		removed := time.Now()
		b.until(30*time.Second, func() error {
			if t := b.tunnels()["site"]; t.GetState() != "up" || !t.GetKeyed().AsTime().After(removed) {
				return fmt.Errorf("the site's tunnel: %v", t)
			}
			return nil
		})
	})
	heal("CHILD_SA deleted", victim, func() {
		_, err := b.r.Charon.Swanctl(b.Context(), "--terminate", "--child", b.connection(victim))
		b.ok(err)
	})
	heal("IKE_SA deleted by the peer", victim, func() {
		for _, i := range b.c.AWS.Instances {
			children, err := i.IKE.Children(b.Context())
			b.ok(err)
			for name := range children {
				if strings.HasSuffix(name, "2") {
					b.ok(i.IKE.Terminate(b.Context(), name))
				}
			}
		}
	})
	heal("interface deleted", victim, func() {
		_, err := b.c.Node.Exec(b.Context(), "ip", "link", "del", b.tunnels()[victim].GetInterface())
		b.ok(err)
	})
	b.ok(b.c.AllReachable(b.Context(), 30*time.Second))
	// charon receives no notification of this.
	before := b.tunnels()
	_, err := b.c.Node.Exec(b.Context(), "ip", "xfrm", "state", "flush")
	b.ok(err)
	b.until(60*time.Second, func() error {
		for name, t := range b.tunnels() {
			if t.GetKind() == "ipsec" && !t.GetKeyed().AsTime().After(before[name].GetKeyed().AsTime()) {
				return fmt.Errorf("tunnel %s has the SAs that the kernel lost: %v", name, t)
			}
		}
		return nil
	})
	b.up()
	b.ok(b.c.AllReachable(b.Context(), 30*time.Second))
	b.step("the kernel's IPsec states flushed: healed")
}

// connection returns the name of a tunnel's CHILD_SA in our charon.
func (b *bench) connection(tunnel string) string {
	b.Helper()
	children, err := b.r.Charon.Children(b.Context())
	b.ok(err)
	for name := range children {
		if strings.HasSuffix(name, tunnel) {
			return name
		}
	}
	b.Fatalf("no CHILD_SA for %s in %v", tunnel, children)
	return ""
}

func (b *bench) killDaemon() {
	before, _ := b.baseline()
	sessions := b.sessions()
	// The site's WireGuard is in the kernel here; an embedded device would end with the daemon.
	b.losing(0, "kill -9 of isthmusd and start", func() {
		b.r.Kill()
		time.Sleep(3 * time.Second)
		b.ok(b.r.StartDaemon(b.Context()))
		b.dial()
		b.up()
		time.Sleep(5 * time.Second)
	})
	b.survived(before, sessions)
}

// survived checks after a start of isthmusd that no tunnel was established again, and that no peer
// has seen a withdrawal.
func (b *bench) survived(before map[string]*isthmusv1.TunnelStatus, sessions map[string]peer.Session) {
	b.Helper()
	for name, t := range b.tunnels() {
		// charon reports ages in whole seconds.
		if d := t.GetEstablished().AsTime().Sub(before[name].GetEstablished().AsTime()); d > 2*time.Second {
			b.Errorf("tunnel %s was established again: %v, %v later than before", name, t.GetEstablished(), d)
		}
	}
	for name, s := range b.sessions() {
		if n := s.Withdrawals - sessions[name].Withdrawals; n != 0 {
			b.Errorf("session %s has seen %d withdrawals", name, n)
		}
	}
}

func (b *bench) killCharon() {
	// Behind NAT the kernel receives no ESP from the end of charon's socket until the daemon
	// replaces it: a moment here, a quarter of a second under emulation.
	b.losing(50, "kill -9 of charon and start", func() {
		b.r.Charon.Process.Signal(unix.SIGKILL)
		<-b.r.Charon.Process.Done()
		time.Sleep(3 * time.Second)
		b.ok(b.r.StartCharon(b.Context()))
		b.up()
		time.Sleep(5 * time.Second)
	})
	b.until(60*time.Second, func() error {
		children, err := b.r.Charon.Children(b.Context())
		if err != nil {
			return err
		}
		if len(children) != 6 {
			return fmt.Errorf("CHILD_SAs %v, want six", children)
		}
		for name, n := range children {
			if n != 1 {
				return fmt.Errorf("%d CHILD_SAs for %s", n, name)
			}
		}
		return nil
	})
}
