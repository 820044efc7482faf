package gobgp

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

// BenchmarkLoad makes BIRD announce prefixes and then end the session. It reports the seconds from
// Established to the last prefix in Reporter.Paths, from the end of the session to its report and
// to the last withdrawal, and the resources of the BGP process: CPU seconds and peak resident MiB.
func BenchmarkLoad(b *testing.B) {
	for _, size := range []int{10_000, 100_000} {
		b.Run(fmt.Sprintf("%dk", size/1000), func(b *testing.B) {
			var conf strings.Builder
			conf.WriteString("log stderr { fatal };\nrouter id 169.254.1.2;\nprotocol device {}\nprotocol static s4 { ipv4;\n")
			for i := range size {
				fmt.Fprintf(&conf, "route 10.%d.%d.%d/28 blackhole { bgp_med = %d; };\n", i>>12&255, i>>4&255, i<<4&255, i%(size/20))
			}
			conf.WriteString(`}
protocol bgp b4 { local 169.254.1.2 as 65001; neighbor 169.254.1.1 as 64620; passive; ipv4 { import none; export all; }; }
`)
			p := linkPeer("b4", "ist-bench", "169.254.1.1", "169.254.1.2", 65001)
			p.HoldTime, p.Keepalive = 90*time.Second, 30*time.Second
			var load, report, withdraw, cpu, peak float64
			for b.Loop() {
				bird := startBIRD(b, "ist-bench", []string{"169.254.1.1/30"}, []string{"169.254.1.2/30"}, conf.String())
				n := startNode(b, Options{}, bgp.Config{ASN: nodeASN, RouterID: addr("169.254.1.1"), Peers: []bgp.Peer{p}})
				eventually(b, 60*time.Second, "session", func() bool { return n.state("b4").State == bgp.Established })
				start := n.state("b4").Since
				count := func() (c int) { n.get(func() { c = len(n.routes) }); return c }
				eventually(b, 60*time.Second, "all prefixes", func() bool { return count() == size })
				load += time.Since(start).Seconds()
				c, m := usage(b, n.process().pid)
				cpu, peak = cpu+c, peak+m
				start = time.Now()
				bird.cmd.Process.Kill()
				eventually(b, 60*time.Second, "down", func() bool { return n.state("b4").State != bgp.Established })
				report += time.Since(start).Seconds()
				eventually(b, 60*time.Second, "no prefixes", func() bool { return count() == 0 })
				withdraw += time.Since(start).Seconds()
				n.stop()
				eventually(b, 10*time.Second, "the namespace is gone", func() bool {
					_, err := net.InterfaceByName("ist-bench")
					return err != nil
				})
			}
			for unit, v := range map[string]float64{
				"load-s": load, "down-report-s": report, "withdraw-s": withdraw, "child-cpu-s": cpu, "child-peak-MiB": peak,
			} {
				b.ReportMetric(v/float64(b.N), unit)
			}
		})
	}
}

// usage returns the CPU seconds and the peak resident MiB of a process.
func usage(t testing.TB, pid int) (cpu, peak float64) {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+2:]))
	for _, s := range f[11:13] { // utime and stime, in hundredths
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		cpu += float64(n) / 100
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, hwm, _ := strings.Cut(string(status), "VmHWM:")
	n, err := strconv.Atoi(strings.Fields(hwm)[0])
	if err != nil {
		t.Fatal(err)
	}
	return cpu, float64(n) / 1024
}

// BenchmarkList lists 100,000 paths of a peer, in pages of 10,000, with a fresh reading of the
// table. It reports the seconds for the listing, the longest time for which GoBGP answered no other
// request meanwhile, and the peak resident MiB of its process before and after.
func BenchmarkList(b *testing.B) {
	const size = 100_000
	var conf strings.Builder
	conf.WriteString("log stderr { fatal };\nrouter id 169.254.1.2;\nprotocol device {}\nprotocol static s4 { ipv4;\n")
	for i := range size {
		fmt.Fprintf(&conf, "route 10.%d.%d.%d/28 blackhole { bgp_med = %d; };\n", i>>12&255, i>>4&255, i<<4&255, i%(size/20))
	}
	conf.WriteString(`}
protocol bgp b4 { local 169.254.1.2 as 65001; neighbor 169.254.1.1 as 64620; passive; ipv4 { import none; export all; }; }
`)
	p, q := linkPeer("b4", "ist-bench", "169.254.1.1", "169.254.1.2", 65001), loPeer("q", "169.254.0.11", 65002)
	p.HoldTime, p.Keepalive = 90*time.Second, 30*time.Second
	startBIRD(b, "ist-bench", []string{"169.254.1.1/30"}, []string{"169.254.1.2/30"}, conf.String())
	newSpeaker(b, "169.254.0.11", 65002, nil)
	c := bgp.Config{ASN: nodeASN, RouterID: addr("169.254.1.1"), Peers: []bgp.Peer{p, q}}
	n := startNode(b, Options{}, c)
	eventually(b, 60*time.Second, "all prefixes", func() (ok bool) {
		n.get(func() { ok = len(n.routes) == size })
		return ok && n.state("q").State == bgp.Established
	})
	_, before := usage(b, n.process().pid)
	for _, v := range []struct {
		peer string
		view bgp.View
	}{{"b4", bgp.Accepted}, {"b4", bgp.Rejected}, {"q", bgp.Advertised}} {
		b.Run(string(v.view), func(b *testing.B) {
			var worst time.Duration
			for b.Loop() {
				stop, stopped := make(chan struct{}), make(chan struct{})
				go func() {
					defer close(stopped)
					for {
						select {
						case <-stop:
							return
						default:
						}
						q.MaxPrefixes = 1000 + q.MaxPrefixes%2 + 1 // a small request
						c.Peers = []bgp.Peer{p, q}
						start := time.Now()
						if err := n.Apply(b.Context(), c); err != nil {
							b.Error(err)
						}
						worst = max(worst, time.Since(start))
						time.Sleep(5 * time.Millisecond)
					}
				}()
				query := bgp.Query{Peer: v.peer, View: v.view, Limit: 10_000}
				for {
					page, err := n.List(b.Context(), query)
					if err != nil {
						b.Fatal(err)
					}
					if !page.More {
						break
					}
					query.After, query.Start = page.Entries[len(page.Entries)-1].Prefix, page.Start
				}
				close(stop)
				<-stopped
			}
			_, after := usage(b, n.process().pid)
			b.ReportMetric(worst.Seconds(), "worst-request-s")
			b.ReportMetric(before, "peak-before-MiB")
			b.ReportMetric(after, "peak-after-MiB")
		})
	}
}
