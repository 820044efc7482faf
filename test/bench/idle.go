package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
)

// idleDocument is a small node. Its tunnel has no peer that answers, so its session keeps retrying.
const idleDocument = `node: {name: bench, asn: 64620}
underlay: {interface: eth0, address: 10.99.0.10, publicAddress: 198.51.100.20}
tunnels:
- name: site
  wireguard: {privateKey: key, peerPublicKey: ` + publicKey + `, endpoint: '10.99.0.1:51820', listenPort: 51821}
  inside: [{local: 169.254.80.2/30}]
peers:
- {name: site, tunnel: site, asn: 65004, import: {allow: [{prefix: 172.20.0.0/24}]}}
announce: [0.0.0.0/0]
egress:
  pools:
  - {name: partner, addresses: [{address: 10.99.0.11, publicAddress: 198.51.100.21}]}
  policies:
  - {name: spokes, sources: [172.20.0.0/24], pool: partner}
`

// buildDaemon builds the real isthmusd.
func buildDaemon(ctx context.Context, l *lab.Lab) (string, error) {
	bin := filepath.Join(l.Dir, "isthmusd")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", bin, "github.com/isthmus-net/isthmus/cmd/isthmusd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building isthmusd: %w: %s", err, out)
	}
	return bin, nil
}

// startDaemon starts isthmusd without charon, and returns how long it took until it served.
func startDaemon(ctx context.Context, n *lab.Node, bin string, args ...string) (*lab.Process, *client, time.Duration, error) {
	dir, err := n.Dir()
	if err != nil {
		return nil, nil, 0, err
	}
	began := time.Now()
	p, err := n.Start("isthmusd", append([]string{bin, "-state", filepath.Join(dir, "state"), "-runtime", filepath.Join(dir, "run"), "-vici", filepath.Join(dir, "none")}, args...)...)
	if err != nil {
		return nil, nil, 0, err
	}
	for {
		c, err := connect(filepath.Join(dir, "run", "api.sock"))
		if err != nil {
			return nil, nil, 0, err
		}
		if _, err = c.system.GetStatus(ctx, &isthmusv1.GetStatusRequest{}); err == nil {
			return p, c, time.Since(began), nil
		}
		c.Close()
		if time.Since(began) > 20*time.Second {
			return nil, nil, 0, fmt.Errorf("isthmusd does not serve: %w", err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// idle measures the real isthmusd with a small document and nothing to do.
func (b *bench) idle(ctx context.Context) error {
	l, err := b.lab()
	if err != nil {
		return err
	}
	defer l.Close()
	bin, err := buildDaemon(ctx, l)
	if err != nil {
		return err
	}
	node, far := l.Node("node"), l.Node("internet")
	l.Link(lab.End{Node: node, Name: "eth0", Addrs: []netip.Prefix{netip.MustParsePrefix("10.99.0.10/24")}},
		lab.End{Node: far, Name: "node", Addrs: []netip.Prefix{netip.MustParsePrefix("10.99.0.1/24")}})
	node.IP("route add default via 10.99.0.1")
	if err := l.Up(ctx); err != nil {
		return err
	}
	start := func() (*lab.Process, *client, time.Duration, error) {
		return startDaemon(ctx, node, bin, "-listen", "10.99.0.10:7443")
	}
	t := newTable("Idle: isthmusd with a WireGuard tunnel and a BGP session whose peer is away, egress, no charon")
	// The first start also makes keys and the certificate authority, and is not counted.
	p, c, first, err := start()
	if err != nil {
		return err
	}
	key, err := peer.NewWGKey()
	if err == nil {
		_, err = c.secrets.SetSecret(ctx, &isthmusv1.SetSecretRequest{Name: "key", Value: []byte(key.Private)})
	}
	if err == nil {
		_, _, err = c.apply(ctx, idleDocument)
	}
	if err != nil {
		text, _ := os.ReadFile(p.Log)
		return errors.Join(err, fmt.Errorf("isthmusd: %s", text))
	}
	for range b.rounds {
		c.Close()
		p.Signal(unix.SIGKILL)
		<-p.Done()
		var took time.Duration
		if p, c, took, err = start(); err != nil {
			return err
		}
		t.add("both", "start to serving ms", took.Seconds()*1000)
		time.Sleep(5 * time.Second)
		all, err := processes(node)
		if err != nil {
			return err
		}
		child := 0
		for _, pid := range all {
			if pid != p.Pid() {
				child = pid
			}
		}
		if len(all) != 2 {
			return fmt.Errorf("isthmusd is %d processes, not two", len(all))
		}
		sets := []struct {
			row  string
			pids []int
		}{{"both", all}, {"daemon", []int{p.Pid()}}, {"BGP process", []int{child}}}
		var cpu []time.Duration
		var woken []float64
		for _, s := range sets {
			cpu, woken = append(cpu, cpuTime(s.pids...)), append(woken, wakeups(s.pids...))
		}
		const look = 10 * time.Second
		time.Sleep(look)
		for i, s := range sets {
			t.add(s.row, "CPU ms/s", (cpuTime(s.pids...)-cpu[i]).Seconds()*1000/look.Seconds())
			t.add(s.row, "wake-ups/s", (wakeups(s.pids...)-woken[i])/look.Seconds())
			t.add(s.row, "RSS MiB", status("VmRSS", s.pids...))
			t.add(s.row, "private MiB", status("RssAnon", s.pids...))
		}
	}
	c.Close()
	t.print(os.Stdout)
	fmt.Printf("The first start of all, which makes the certificate authority, took %d ms.\n", first.Milliseconds())
	return nil
}
