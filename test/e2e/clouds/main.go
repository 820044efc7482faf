// Command clouds shows isthmus at work: three clouds' VPN gateways, a WireGuard site, and a partner
// on the Internet, with one isthmus node between them.
//
//	clouds demo    show the tables, reach every spoke from every other, query the partner, and end
//	clouds lab     the same topology, with a prompt on the node
//
// It runs in network namespaces of this machine if the kernel has the features for it, else in
// those of a virtual machine. The exit status is 0 only if everything worked.
package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/isthmus-net/isthmus/test/e2e"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/vm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if len(os.Args) != 2 || !slices.Contains([]string{"demo", "lab"}, os.Args[1]) {
		fmt.Fprintln(os.Stderr, "usage: clouds demo | lab")
		os.Exit(2)
	}
	status, err := run(ctx, os.Args[1])
	if err != nil {
		fmt.Fprintf(os.Stderr, "clouds: %v\n", err)
		status = max(status, 1)
	}
	stop()
	os.Exit(status)
}

func run(ctx context.Context, what string) (int, error) {
	if !vm.Inside() {
		missing, err := vm.Missing()
		if err != nil {
			return 1, err
		}
		if len(missing) > 0 {
			return guest(ctx, what, missing)
		}
	}
	return 0, show(ctx, what == "lab")
}

// guest runs this program in a virtual machine.
func guest(ctx context.Context, what string, missing []string) (int, error) {
	fmt.Printf("This kernel lacks %s: running in a virtual machine.\n", strings.Join(missing, ", "))
	self, err := os.Executable()
	if err != nil {
		return 1, err
	}
	bin, err := programs()
	if err != nil {
		return 1, err
	}
	c := vm.Config{
		Payload: []string{self, filepath.Join(bin, "isthmusd"), filepath.Join(bin, "isthmus")},
		Command: []string{"./" + filepath.Base(self), what},
		Stdout:  os.Stdout, Stderr: os.Stderr, Progress: os.Stderr,
		TTY: what == "lab",
	}
	return vm.Run(ctx, c)
}

var began = time.Now()

func step(format string, args ...any) {
	fmt.Printf("[%5.1f s] %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
}

func show(ctx context.Context, prompt bool) (err error) {
	step("making the Internet, three clouds, a site, a partner and a node behind 1:1 NAT")
	c, err := e2e.NewClouds(ctx, e2e.CloudsOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	leaks, err := c.Internet.Node.Capture("", e2e.Inside...)
	if err != nil {
		return err
	}
	step("starting the gateways (strongSwan, BIRD, FRR, WireGuard)")
	if err := c.Start(ctx); err != nil {
		return err
	}
	step("starting isthmusd")
	bin, err := programs()
	if err != nil {
		return err
	}
	r, err := c.StartRouter(ctx, bin)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			explain(ctx, r)
		}
	}()
	if err := r.SetSecrets(ctx); err != nil {
		return err
	}
	step("isthmus apply -f hub-1.yaml\n\n%s", indent(c.Document()))
	if err := r.Apply(ctx, c.Document()); err != nil {
		return err
	}
	step("waiting for every BGP session")
	if err := lab.Until(ctx, 2*time.Minute, func() error { return c.Established(ctx) }); err != nil {
		return err
	}
	if err := c.AllReachable(ctx, time.Minute); err != nil {
		return err
	}
	// Prefixes are counted every few seconds.
	err = lab.Until(ctx, 20*time.Second, func() error {
		peers, err := r.Peers(ctx)
		for name, p := range peers {
			if p.PrefixesReceived == 0 {
				err = fmt.Errorf("peer %s has announced nothing", name)
			}
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, noun := range []string{"tunnels", "peers", "routes"} {
		out, err := r.CLI(ctx, "get", noun)
		if err != nil {
			return err
		}
		step("isthmus get %s\n\n%s", noun, indent(out))
	}
	if err := traffic(ctx, c); err != nil {
		return err
	}
	n, first, err := leaks.Count()
	if err != nil {
		return err
	}
	if n > 0 {
		return fmt.Errorf("%d packets with an inside source were on the Internet, the first: %q", n, first)
	}
	step("no packet with an inside source was on the Internet")
	if prompt {
		return shell(ctx, r, bin)
	}
	var out string
	err = lab.Until(ctx, time.Minute, func() error {
		text, err := r.CLI(ctx, "status", "--check")
		if err != nil {
			return fmt.Errorf("the node is not well: %s: %w", text, err)
		}
		out, err = r.CLI(ctx, "status")
		return err
	})
	if err != nil {
		return err
	}
	step("isthmus status\n\n%s", indent(out))
	step("everything works")
	return nil
}

// explain shows the state after a failure.
func explain(ctx context.Context, r *e2e.Router) {
	for _, noun := range []string{"status", "tunnels", "peers", "routes"} {
		if out, err := r.CLI(ctx, "get", noun); err == nil {
			step("isthmus get %s\n\n%s", noun, indent(out))
		}
	}
	if text, err := os.ReadFile(r.Daemon.Log); err == nil {
		step("what isthmusd said last\n\n%s", indent(string(text[max(0, len(text)-20000):])))
	}
}

// traffic pings between all spokes and queries the partner from each.
func traffic(ctx context.Context, c *e2e.Clouds) error {
	step("ping between every pair of spokes, 100 packets a second")
	m, err := c.PingMesh(10 * time.Millisecond)
	if err != nil {
		return err
	}
	time.Sleep(2 * time.Second)
	reports := m.Stop()
	var lost int
	for _, name := range slices.Sorted(maps.Keys(reports)) {
		fmt.Printf("    %-28s %v\n", name, reports[name])
		lost += reports[name].Lost
	}
	if lost > 0 {
		return fmt.Errorf("%d packets were lost between the spokes", lost)
	}
	step("one request to the partner from each spoke")
	seen := map[netip.Addr]bool{}
	for _, s := range c.Spokes {
		a, err := c.Ask(ctx, s)
		if err != nil {
			return err
		}
		seen[a] = true
		fmt.Printf("    %-14s %-16s the partner saw %v\n", s.Node.Name, s.Addr, a)
	}
	if len(seen) != 1 || !seen[e2e.EgressPublic] {
		return fmt.Errorf("the partner saw %v, not just %v", slices.Collect(maps.Keys(seen)), e2e.EgressPublic)
	}
	return nil
}

// programs returns the directory of isthmusd and isthmus: the payload of the guest, or the output
// of `make build`.
func programs() (string, error) {
	if vm.Inside() {
		return filepath.Abs(".")
	}
	return filepath.Abs("bin")
}

// shell runs a prompt on the node, with isthmus in the path and connected.
func shell(ctx context.Context, r *e2e.Router, bin string) error {
	fmt.Print("\nA shell on the node: `isthmus get peers`, `isthmus describe tunnel aws-0`, `isthmus watch tunnels`.\n" +
		"The other machines are network namespaces: `ip netns`. `exit` ends the lab.\n\n")
	rc := filepath.Join(r.Dir, "bashrc")
	if err := os.WriteFile(rc, []byte(fmt.Sprintf("PATH=%s:$PATH\nPS1='hub-1# '\nexport ISTHMUS_SOCKET=%s\n. <(isthmus completion bash) 2>/dev/null\ncd %s\n", bin, r.Socket(), r.Dir)), 0o600); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "bash", "--rcfile", rc, "-i")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return r.Node.Do(func() error {
		if err := cmd.Start(); err != nil {
			return err
		}
		// The status of the last command is not a failure of this program.
		_ = cmd.Wait()
		return nil
	})
}

func indent(text string) string {
	return "    " + strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n    ") + "\n"
}
