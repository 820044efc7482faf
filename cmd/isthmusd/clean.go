package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/nat/nftables"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/fib/kernel"
	"github.com/isthmus-net/isthmus/router/host"
	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/store"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/ipsec"
)

const (
	// cleanLimit bounds all of clean, cleanPatience the wait for peers to confirm the end of their
	// SAs.
	cleanLimit    = time.Minute
	cleanPatience = 5 * time.Second
)

// keptFile has the former values of kernel parameters that the daemon changed.
func keptFile(o options) string { return filepath.Join(o.runtime, "parameters.json") }

// clean removes everything with our mark from the kernel and from charon, and restores kernel
// parameters. It keeps documents, secrets, certificates, and everything of others. It continues
// after an error.
func clean(ctx context.Context, o options, out io.Writer, log *slog.Logger) error {
	if err := notRunning(o); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, cleanLimit)
	defer cancel()
	links, err := link.Open()
	if err != nil {
		return err
	}
	defer links.Close()
	routes, err := kernel.New()
	if err != nil {
		return err
	}
	defer routes.Close()

	var errs []error
	var did []string
	done := func(n int, one, many string, err error) {
		if n == 1 {
			did = append(did, "1 "+one)
		} else if n > 0 {
			did = append(did, fmt.Sprintf("%d %s", n, many))
		}
		errs = append(errs, err)
	}
	filter := nftables.New(nftables.Options{Log: log})
	rules, err := filter.Observe(ctx)
	errs = append(errs, err)
	if rules.Present {
		// First, because the rules that keep inside addresses in are about to go. The former value
		// is restored at the end.
		if err := host.NewMachine(keptFile(o)).Forward(false); err != nil {
			return fmt.Errorf("turning forwarding off, before anything is removed: %w", err)
		}
	}

	vpn := ipsec.New(ipsec.Options{Socket: o.vici, Links: links, Log: log})
	patient, enough := context.WithTimeout(ctx, cleanPatience)
	n, err := vpn.Clear(patient)
	enough()
	vpn.Close()
	if errors.Is(err, ipsec.ErrNoCharon) {
		err = nil
	}
	done(n, "connection or key of charon", "connections and keys of charon", err)
	n, err = fib.Clear(ctx, routes)
	done(n, "route or next hop", "routes and next hops", err)
	n, err = links.ClearTransit()
	done(n, "routing rule", "routing rules", err)
	errs = append(errs, links.RemoveCanary())
	n, err = links.ClearLinks(tunnel.Mark)
	done(n, "tunnel interface", "tunnel interfaces", err)
	n, err = links.ClearIPsec(plan.FirstID, plan.LastID)
	done(n, "IPsec state or policy", "IPsec states and policies", err)
	if rules.Present {
		err = filter.Remove(ctx)
		if err == nil {
			did = append(did, "the table of rules")
		}
		errs = append(errs, err)
	}
	var divert nftables.Divert
	diverted, err := divert.Clear()
	if diverted {
		done(1, "diversion of ESP", "", err)
	} else {
		errs = append(errs, err)
	}
	n, err = links.ClearPools()
	done(n, "pool address", "pool addresses", err)
	n, err = host.Restore(keptFile(o))
	done(n, "kernel parameter, which is as before", "kernel parameters, which are as before", err)
	for _, name := range []string{"charon.loaded", "api.sock"} {
		if err := os.Remove(filepath.Join(o.runtime, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cleaning: %w", err)
	}
	if len(did) == 0 {
		fmt.Fprintln(out, "nothing to clean")
	} else {
		fmt.Fprintln(out, "cleaned: "+strings.Join(did, ", "))
	}
	return nil
}

// notRunning returns an error while a daemon runs, because it would recreate everything.
func notRunning(o options) error {
	used, err := store.InUse(o.state)
	if err != nil {
		return err
	}
	socket := filepath.Join(o.runtime, "api.sock")
	if conn, err := net.DialTimeout("unix", socket, time.Second); err == nil {
		conn.Close()
		used = true
	}
	if used {
		return errors.New("isthmusd runs, and would recreate everything: stop it first (systemctl stop isthmusd)")
	}
	return nil
}
