package native

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/e2e"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
	"github.com/isthmus-net/isthmus/test/vm"
)

// bench is a running matrix with the router.
type bench struct {
	*testing.T
	*matrix
	r     *e2e.Router
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

func (b *bench) until(limit time.Duration, f func() error) {
	b.Helper()
	b.ok(lab.Until(b.Context(), limit, f))
}

func (b *bench) status() (map[string]*isthmusv1.TunnelStatus, map[string]*isthmusv1.PeerStatus) {
	b.Helper()
	t, err := b.r.Tunnels(b.Context())
	b.ok(err)
	p, err := b.r.Peers(b.Context())
	b.ok(err)
	return t, p
}

// up waits until every tunnel is up and every session established, on both sides.
func (b *bench) up(limit time.Duration) {
	b.Helper()
	b.until(limit, func() error {
		if err := b.r.Up(b.Context()); err != nil {
			return err
		}
		for _, c := range b.cells {
			if err := c.Established(b.Context()); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b *bench) run(name string, f func(b *bench)) {
	b.T.Run(name, func(t *testing.T) {
		sub := *b
		sub.T = t
		f(&sub)
	})
}

// TestMatrix runs every preset against its look-alike.
func TestMatrix(t *testing.T) {
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if !vm.Inside() {
		dir += "/../../../bin/e2e"
	}
	b := &bench{T: t, start: time.Now()}
	b.matrix, err = newMatrix(t.Context())
	b.ok(err)
	t.Cleanup(func() {
		if t.Failed() && vm.Inside() {
			b.lab.Save(context.Background(), "/out/"+t.Name())
		}
		if err := b.lab.Close(); err != nil {
			t.Error(err)
		}
	})
	leaks, err := b.internet.Node.Capture("", netip.MustParsePrefix("10.0.0.0/9"), netip.MustParsePrefix("10.254.0.0/16"), netip.MustParsePrefix("169.254.0.0/16"))
	b.ok(err)
	b.step("built")
	b.ok(b.matrix.start(t.Context()))
	b.step("gateways started")
	b.r, err = e2e.StartRouter(t.Context(), b.node, netip.AddrPortFrom(e2e.NodePrivate.Addr(), 7443), dir)
	b.ok(err)
	for _, c := range b.cells {
		b.ok(b.r.SetSecret(t.Context(), c.Name, c.Config.Peerings[0].PSK))
	}
	b.ok(b.r.Apply(t.Context(), b.document()))
	b.step("document applied")
	b.up(90 * time.Second)
	b.step("every session is established")
	b.run("timers", (*bench).timers)
	b.run("prefix limit", (*bench).prefixLimit)
	b.run("stray connections", (*bench).stray)
	b.run("fragments", (*bench).fragments)
	b.run("rekeys", (*bench).rekeys)
	b.run("early packets", (*bench).early)
	b.run("bytes", (*bench).bytes)
	b.run("maintenance", (*bench).maintenance)
	b.run("peers restart", (*bench).restart)
	if n, first, err := leaks.Stop(); err != nil || n != 0 {
		t.Errorf("%d packets with an inside source on the Internet (%v), first: %q", n, err, first)
	}
}

// timers checks that each session has the cloud's hold time, and was established within it.
func (b *bench) timers() {
	tunnels, peers := b.status()
	for _, t := range b.tunnels() {
		s, p := tunnels[t.name], peers[t.name]
		took := p.GetSince().AsTime().Sub(s.GetSince().AsTime())
		b.Logf("%-16s %-10s %-26s BGP after %4.1f s, hold %v", t.name, t.cell.cloud, s.GetAlgorithms(), took.Seconds(), p.GetHoldTime().AsDuration())
		if p.GetHoldTime().AsDuration() != t.cell.Config.Hold || took > t.cell.Config.Hold {
			b.Errorf("%s: hold time %v after %v, want %v", t.name, p.GetHoldTime().AsDuration(), took, t.cell.Config.Hold)
		}
	}
}

// prefixLimit checks that, when one gateway announces more than another accepts, the session of the
// other stays up, and the node reports the prefixes that it holds back.
func (b *bench) prefixLimit() {
	limits := map[string]int{}
	b.until(time.Minute, func() error {
		for _, c := range b.cells {
			for _, i := range c.Instances {
				sessions, err := i.Speaker.Sessions(b.Context())
				if err != nil {
					return err
				}
				for _, s := range sessions {
					limits[c.Name] = s.Imported
					want := func(n int) bool { return n >= many }
					if c.cloud == "aws" {
						want = func(n int) bool { return n == 90 }
					}
					if c.Name == "oci2" {
						want = func(n int) bool { return n > 0 }
					}
					if s.State != "Established" || !want(s.Imported) {
						return fmt.Errorf("%s: session %+v", c.Name, s)
					}
				}
			}
		}
		return nil
	})
	_, peers := b.status()
	for _, t := range b.tunnels() {
		p := peers[t.name]
		held := t.cell.cloud == "aws"
		if (p.GetPrefixesHeldBack() > 0) != held || (len(p.GetConditions()) > 0) != held || p.GetTimesUp() != 1 {
			b.Errorf("%s: %d held back, conditions %v, up %d times", t.name, p.GetPrefixesHeldBack(), p.GetConditions(), p.GetTimesUp())
		}
	}
	b.step("prefixes taken: %v", limits)
}

// stray checks that Azure's instances, which also try BGP from their private addresses, get no
// answer, and that no session is affected.
func (b *bench) stray() {
	_, before := b.status()
	var wg sync.WaitGroup
	for _, c := range b.cells {
		for k := range c.Instances {
			if strings.HasPrefix(c.cloud, "azure") {
				wg.Go(func() {
					for range 3 {
						if err := c.Stray(k, time.Second); err == nil {
							b.Errorf("%s: a session from the private address of instance %d was accepted", c.Name, k)
						}
					}
				})
			}
		}
	}
	wg.Wait()
	_, after := b.status()
	for name, p := range after {
		if p.GetState() != "established" || p.GetTimesUp() != before[name].GetTimesUp() {
			b.Errorf("peer %s: from %v to %v", name, before[name], p)
		}
	}
}

// fragments checks that no IKE message to Google was in fragments so far, and that a fragmented one
// does not arrive.
func (b *bench) fragments() {
	for _, c := range b.cells {
		if c.cloud != "gcp" {
			continue
		}
		n, err := c.FragmentsDropped(b.Context())
		b.ok(err)
		if n != 0 {
			b.Errorf("%s: %d IKE messages came in fragments", c.Name, n)
		}
		var d net.Dialer
		b.ok(b.node.Do(func() error {
			conn, err := d.DialContext(b.Context(), "udp", netip.AddrPortFrom(c.Config.Peerings[0].Outside, 500).String())
			if err != nil {
				return err
			}
			defer conn.Close()
			_, err = conn.Write(make([]byte, 3000))
			return err
		}))
		b.until(5*time.Second, func() error {
			n, err := c.FragmentsDropped(b.Context())
			if err == nil && n != 1 {
				err = fmt.Errorf("%s has dropped %d", c.Name, n)
			}
			return err
		})
	}
}

// lossless pings the far end of every tunnel while f runs, and expects every answer; from a hasty
// one, that no pause is longer than hole. A busy machine still loses packets, one of 60,000 with
// six busy processes on two cores: f runs once more then.
func (b *bench) lossless(what string, o lab.PingOptions, tunnels []tunnel, hasty func(tunnel) bool, f func()) {
	b.Helper()
	wrong := b.losses(what, o, tunnels, hasty, f)
	if len(wrong) > 0 {
		b.Logf("%s, again since %q", what, wrong)
		wrong = b.losses(what, o, tunnels, hasty, f)
	}
	for _, w := range wrong {
		b.Error(w)
	}
}

// losses pings while f runs, and returns the losses that should not have happened.
func (b *bench) losses(what string, o lab.PingOptions, tunnels []tunnel, hasty func(tunnel) bool, f func()) (wrong []string) {
	b.Helper()
	before := b.refused(tunnels)
	pingers := make([]*lab.Pinger, len(tunnels))
	for i, t := range tunnels {
		var err error
		pingers[i], err = b.node.Ping(t.peering.Inside, o)
		b.ok(err)
		defer pingers[i].Stop()
	}
	time.Sleep(200 * time.Millisecond)
	f()
	time.Sleep(200 * time.Millisecond)
	reports := make([]lab.Report, len(tunnels))
	var wg sync.WaitGroup
	for i := range pingers {
		wg.Go(func() { reports[i] = pingers[i].Stop() })
	}
	wg.Wait()
	sent, missed, lost := 0, 0, map[string]lab.Report{}
	refused, counters := 0, map[string]int{}
	for name, n := range b.refused(tunnels) {
		if n -= before[name]; n > 0 {
			refused, counters[name] = refused+n, n
		}
	}
	for i, r := range reports {
		sent += r.Sent
		if r.Lost > 0 {
			lost[tunnels[i].name] = r
		}
		if libreswan(tunnels[i]) {
			missed += r.Lost
		}
		if r.Lost > 0 && !hasty(tunnels[i]) || r.Gap > hole {
			wrong = append(wrong, fmt.Sprintf("%s: %s: %v", what, tunnels[i].name, r))
		}
	}
	b.step("%s: %d packets, lost %d of libreswan, %v, %d counted by the kernels, %v", what, sent, missed, lost, refused, counters)
	return wrong
}

// hole is the longest allowed pause of a tunnel whose other end does not wait for this one while an
// SA is rekeyed: the time of an IKE exchange on a busy machine.
const hole = 5 * time.Second

// refused returns how many packets the kernels of this node and of those with libreswan have
// dropped because of their SA or policy, by node and counter. XfrmAcquireError here counts those
// that came on an SA whose SPI this node had allocated and whose keys it did not have yet (the
// kernel found a larval state, net/xfrm/xfrm_input.c), XfrmInNoStates those that came on an SA that
// was gone.
func (b *bench) refused(tunnels []tunnel) map[string]int {
	b.Helper()
	sum := map[string]int{}
	count := func(n *lab.Node) {
		out, err := n.Exec(b.Context(), "cat", "/proc/net/xfrm_stat")
		b.ok(err)
		for line := range strings.Lines(out) {
			if words := strings.Fields(line); len(words) == 2 {
				v, err := strconv.Atoi(words[1])
				b.ok(err)
				sum[n.Name+" "+words[0]] = v
			}
		}
	}
	count(b.node)
	for _, t := range tunnels {
		if libreswan(t) {
			count(t.instance.Node)
		}
	}
	return sum
}

// libreswan reports whether libreswan is at the other end. It removes an old SA as soon as it sends
// the DELETE, while the last packets are on their way; and it sends on a new SA as soon as it has
// answered a request for it, as it may (RFC 7296 section 2.8), while this node still processes the
// answer. strongSwan waits in both cases.
func libreswan(t tunnel) bool {
	_, is := t.instance.IKE.(*peer.Pluto)
	return is
}

// none is for actions during which no gateway may lose a packet.
func none(tunnel) bool { return false }

var ikeSA = regexp.MustCompile(`(?m)^isthmus:(\S+): #(\d+), ESTABLISHED`)

// ikes are the numbers of our IKE_SAs by tunnel.
func (b *bench) ikes() (map[string]string, error) {
	out, err := b.r.Charon.Swanctl(b.Context(), "--list-sas")
	numbers := map[string]string{}
	for _, m := range ikeSA.FindAllStringSubmatch(out, -1) {
		numbers[m[1]] = m[2]
	}
	return numbers, err
}

// rekeys rekeys IKE and CHILD SAs three times from each side, and waits each time until all are
// new: a wrong group shows only then.
func (b *bench) rekeys() {
	all := b.tunnels()
	const rounds = 3
	for _, side := range []struct {
		name  string
		of    func(tunnel) (peer.IKE, string)
		hasty func(tunnel) bool
	}{
		{"by this node", func(t tunnel) (peer.IKE, string) { return b.r.Charon, "isthmus:" + t.name }, none},
		{"by the gateways", func(t tunnel) (peer.IKE, string) { return t.instance.IKE, t.theirs }, libreswan},
	} {
		each := func(f func(ike peer.IKE, name string) error) {
			for _, t := range all {
				b.ok(f(side.of(t)))
			}
		}
		o := lab.PingOptions{Interval: 30 * time.Millisecond} // 400 a second in all
		b.lossless("CHILD SAs renewed "+side.name, o, all, side.hasty, func() {
			for range rounds {
				before, _ := b.status()
				time.Sleep(1100 * time.Millisecond) // charon reports ages in whole seconds
				each(func(ike peer.IKE, name string) error { return ike.RekeyChild(b.Context(), name) })
				b.until(time.Minute, func() error { return b.keyed(all, before) })
			}
		})
		b.lossless("IKE SAs renewed "+side.name, o, all, side.hasty, func() {
			for range rounds {
				before, err := b.ikes()
				b.ok(err)
				each(func(ike peer.IKE, name string) error { return ike.RekeyIKE(b.Context(), name) })
				b.until(2*time.Minute, func() error {
					now, err := b.ikes()
					for _, t := range all {
						if now[t.name] == before[t.name] || now[t.name] == "" {
							return fmt.Errorf("the IKE SA of %s was not renewed: %v", t.name, err)
						}
					}
					return nil
				})
			}
		})
	}
	b.until(time.Minute, b.single)
}

// early has this node rekey the CHILD SAs toward libreswan, whose first packets on each come before
// charon has installed its keys in the kernel: all of them arrive.
func (b *bench) early() {
	var tunnels []tunnel
	for _, t := range b.tunnels() {
		if libreswan(t) {
			tunnels = append(tunnels, t)
		}
	}
	const rounds = 10
	b.lossless(fmt.Sprintf("CHILD SAs of %d tunnels renewed %d times", len(tunnels), rounds), lab.PingOptions{}, tunnels, none, func() {
		for range rounds {
			before, _ := b.status()
			time.Sleep(1100 * time.Millisecond) // charon reports ages in whole seconds
			for _, t := range tunnels {
				b.ok(b.r.Charon.RekeyChild(b.Context(), "isthmus:"+t.name))
			}
			b.until(time.Minute, func() error { return b.keyed(tunnels, before) })
		}
	})
}

// keyed returns nil when the CHILD SAs of all tunnels are newer than before.
func (b *bench) keyed(tunnels []tunnel, before map[string]*isthmusv1.TunnelStatus) error {
	now, err := b.r.Tunnels(b.Context())
	for _, t := range tunnels {
		if !now[t.name].GetKeyed().AsTime().After(before[t.name].GetKeyed().AsTime()) {
			return fmt.Errorf("the CHILD SA of %s was not renewed: %v", t.name, err)
		}
	}
	return err
}

// single returns nil when both sides have one CHILD SA for each tunnel.
func (b *bench) single() error {
	ours, err := b.r.Charon.Children(b.Context())
	if err != nil {
		return err
	}
	for _, t := range b.tunnels() {
		theirs, err := t.instance.IKE.Children(b.Context())
		if err != nil {
			return err
		}
		if ours["isthmus:"+t.name] != 1 || theirs[t.theirs] != 1 {
			return fmt.Errorf("%s: %d and %d CHILD SAs", t.name, ours["isthmus:"+t.name], theirs[t.theirs])
		}
	}
	return nil
}

// bytes checks that Azure's gateway rekeys by volume, and so does this node, without other events.
func (b *bench) bytes() {
	var counted []tunnel
	for _, t := range b.tunnels() {
		if t.cell.Config.Life.ChildExpireBytes == 3<<19 || t.cell.ipsec == oursByVolume {
			counted = append(counted, t)
		}
	}
	b.lossless("rekeying by volume", lab.PingOptions{Interval: 5 * time.Millisecond, Size: 1200}, counted, libreswan, func() {
		before, _ := b.status()
		b.until(60*time.Second, func() error { return b.keyed(counted, before) })
	})
}

// maintenance checks that, when AWS lowers the MED of one tunnel and replaces the other's endpoint,
// traffic to the VPC changes over first.
func (b *bench) maintenance() {
	aws := b.cells[0]
	i := aws.Instances[0]
	via := func(want int) {
		b.Helper()
		b.until(time.Minute, func() error {
			ways, err := b.r.Ways(b.Context(), netip.PrefixFrom(aws.lan, 16).Masked())
			if err == nil && len(ways) != want {
				err = fmt.Errorf("to the VPC through %v, want %d ways", ways, want)
			}
			return err
		})
	}
	via(2)
	p, err := b.node.Ping(aws.lan, lab.PingOptions{})
	b.ok(err)
	b.ok(i.Speaker.SetMED(b.Context(), i.BGP.Neighbors[1], 50))
	via(1)
	b.ok(i.Replace(b.Context(), 0, 5*time.Second))
	b.up(90 * time.Second)
	b.ok(i.Speaker.SetMED(b.Context(), i.BGP.Neighbors[1], 100))
	via(2)
	r := p.Stop()
	if r.Lost > 0 {
		b.Errorf("while an endpoint was replaced: %v", r)
	}
	b.step("an endpoint replaced: %v", r)
}

// restart lets every gateway's IKE daemon crash and come back without state.
func (b *bench) restart() {
	var wg sync.WaitGroup
	errs := make([]error, 0)
	var mu sync.Mutex
	for _, c := range b.cells {
		for _, i := range c.Instances {
			wg.Go(func() {
				err := i.Restart(b.Context())
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					errs = append(errs, err)
				}
			})
		}
	}
	wg.Wait()
	for _, err := range errs {
		b.Error(err)
	}
	back := time.Now()
	b.step("every gateway is back, with nothing")
	up := map[string]time.Duration{}
	b.until(120*time.Second, func() error {
		tunnels, _ := b.status()
		var missing error
		for _, t := range b.tunnels() {
			children, err := t.instance.IKE.Children(b.Context())
			if _, done := up[t.name]; done {
				continue
			}
			if err != nil || tunnels[t.name].GetState() != "up" || children[t.theirs] == 0 {
				missing = fmt.Errorf("%s is %s, there %d CHILD SAs: %v", t.name, tunnels[t.name].GetState(), children[t.theirs], err)
				continue
			}
			up[t.name] = time.Since(back).Round(100 * time.Millisecond)
		}
		return missing
	})
	b.step("tunnels back after: %v", up)
	b.up(90 * time.Second)
	b.until(time.Minute, b.single)
	b.lossless("after all", lab.PingOptions{Interval: 20 * time.Millisecond}, b.tunnels(), none, func() { time.Sleep(time.Second) })
}
