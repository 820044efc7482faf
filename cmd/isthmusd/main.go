// Command isthmusd is the router: it accepts documents over its API and makes tunnels, BGP
// sessions, routes and source NAT of them. Stopping it changes nothing in the kernel or in charon.
//
// TCP-MD5 (RFC 2385) does not work on the MPTCP sockets that Go listens on by default.
//
//go:debug multipathtcp=0
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/isthmus-net/isthmus/bgp/gobgp"
	"github.com/isthmus-net/isthmus/image/helper"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/nat/nftables"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/egress/dns"
	"github.com/isthmus-net/isthmus/router/egress/takeover"
	"github.com/isthmus-net/isthmus/router/egress/translog"
	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/fib/kernel"
	"github.com/isthmus-net/isthmus/router/firstboot"
	"github.com/isthmus-net/isthmus/router/host"
	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/router/logs"
	"github.com/isthmus-net/isthmus/router/machine"
	"github.com/isthmus-net/isthmus/router/metrics"
	"github.com/isthmus-net/isthmus/router/platform"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/ipsec"
	"github.com/isthmus-net/isthmus/tunnel/wireguard"
)

// version is set by the linker.
var version = "unknown"

type options struct {
	state, runtime string
	listen, hosts  string
	bundle         string
	vici           string
	bgpPort        int
	mover          string
	apiFrom, input string
	sshKeys        string
	platform       string
	metadata, seed string
	console        string
	refresh        time.Duration
	debug, safe    bool
	clean          bool
}

func main() {
	gobgp.RunIfChild()

	var o options
	flag.StringVar(&o.state, "state", "/var/lib/isthmus", "`directory` of documents, secrets, certificates and the audit log")
	flag.StringVar(&o.runtime, "runtime", "/run/isthmus", "`directory` of the API's unix socket and of data that need not outlive a boot")
	flag.StringVar(&o.listen, "listen", ":7443", "`address` of the API with mutual TLS; empty: only the unix socket")
	flag.StringVar(&o.apiFrom, "api-from", "", "`prefixes` of sources that may reach the API besides those of the document, also without a document, comma-separated")
	flag.StringVar(&o.input, "input", "keep", "what to do with packets to the node that no rule accepts, unless the document sets it: `drop or keep`")
	flag.StringVar(&o.hosts, "hosts", "", "further names and addresses for the server's certificate, `comma-separated`")
	flag.StringVar(&o.bundle, "bundle", "", "`file` for the first admin's context, written once (default: admin.yaml in the state directory)")
	flag.StringVar(&o.vici, "vici", ipsec.DefaultSocket, "`path` of charon's vici socket")
	flag.IntVar(&o.bgpPort, "bgp-port", 179, "TCP `port` for BGP sessions that peers open")
	flag.StringVar(&o.mover, "mover", "", "`program` that has the platform lead public addresses to this node; called as PROGRAM take ADDRESS=PUBLIC...")
	flag.StringVar(&o.sshKeys, "ssh-keys", "", "`file` with the keys of the machine's SSH server, written from the document; empty: the document does not set the keys")
	flag.StringVar(&o.platform, "platform", "none", "where the machine runs, for user-data and the platform's addresses: `auto, none, aws, azure, google or nocloud`")
	flag.DurationVar(&o.refresh, "platform-refresh", 5*time.Minute, "interval of reading the platform's addresses, `1s to 1h`")
	flag.StringVar(&o.metadata, "metadata", "", "`URL` of the metadata service instead of the platform's own, for tests")
	flag.StringVar(&o.seed, "seed", "/run/isthmus-seed", "`directory` of a NoCloud seed")
	flag.StringVar(&o.console, "console", "", "`file` with the text for the machine's console after the first boot (default: console in the runtime directory)")
	flag.BoolVar(&o.debug, "debug", false, "log more")
	flag.BoolVar(&o.safe, "safe", false, "apply nothing and leave the running configuration alone; only serve the API, to apply another document or to roll back before the next start")
	flag.BoolVar(&o.clean, "clean", false, "remove everything that isthmusd has made in the kernel and in charon, and exit; keep the state. Refuses while isthmusd runs")
	showVersion := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *showVersion {
		fmt.Println(version)
		return
	}
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "isthmusd: takes no arguments, got %q\n", flag.Args())
		os.Exit(2)
	}
	if o.input != "drop" && o.input != "keep" {
		fmt.Fprintf(os.Stderr, "isthmusd: -input %s: give drop or keep\n", o.input)
		os.Exit(2)
	}
	apiFrom, err := sources(o.apiFrom)
	if err != nil {
		fmt.Fprintf(os.Stderr, "isthmusd: %v\n", err)
		os.Exit(2)
	}
	if _, ok := platform.ParseKind(o.platform); !ok && o.platform != "auto" {
		fmt.Fprintf(os.Stderr, "isthmusd: -platform %s: give auto, none, aws, azure, google or nocloud\n", o.platform)
		os.Exit(2)
	}
	if o.refresh < time.Second || o.refresh > time.Hour {
		fmt.Fprintf(os.Stderr, "isthmusd: -platform-refresh %v: give 1s to 1h\n", o.refresh)
		os.Exit(2)
	}
	if o.bgpPort < 1 || o.bgpPort > math.MaxUint16 {
		fmt.Fprintf(os.Stderr, "isthmusd: -bgp-port %d is not a valid TCP port: give one from 1 to 65535\n", o.bgpPort)
		os.Exit(2)
	}
	if strings.ContainsFunc(o.hosts, func(r rune) bool { return r > unicode.MaxASCII }) {
		fmt.Fprintf(os.Stderr, "isthmusd: -hosts %s: a certificate has only names in ASCII: write xn--... for others\n", o.hosts)
		os.Exit(2)
	}
	log, kept := newLog(os.Stderr, o.debug, time.Now)
	if err := protect(); err != nil {
		log.Error("isthmusd ends", "err", err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	work := func(ctx context.Context, o options, log *slog.Logger) error { return run(ctx, o, apiFrom, log, kept) }
	if o.clean {
		work = func(ctx context.Context, o options, log *slog.Logger) error { return clean(ctx, o, os.Stdout, log) }
	}
	if err := work(ctx, o, log); err != nil {
		log.Error("isthmusd ends", "err", err)
		os.Exit(1)
	}
}

// run wires everything from the bottom up, and runs it until ctx is done.
func run(ctx context.Context, o options, apiFrom []netip.Prefix, log *slog.Logger, kept *logs.Log) (err error) {
	started := time.Now()
	if err := os.MkdirAll(o.runtime, 0o755); err != nil {
		return fmt.Errorf("making the runtime directory: %w", err)
	}
	st, err := store.Open(o.state)
	if err != nil {
		return err
	}
	defer st.Close()
	audit, err := auth.OpenAudit(filepath.Join(o.state, "audit.log"), time.Now)
	if err != nil {
		log.Error("calls that change something are refused until they can be written to the audit log", "err", err)
	}
	defer audit.Close()
	events, err := event.Open(filepath.Join(o.state, "events.log"), time.Now)
	if err != nil {
		log.Error("events are only in memory until they can be written", "err", err)
	}
	defer events.Close()
	api.ObserveCalls(audit, events)
	if o.bundle == "" {
		o.bundle = filepath.Join(o.state, "admin.yaml")
	}
	authority, err := auth.New(auth.Options{
		Store: st, Address: address(o.listen), Bundle: o.bundle, Notice: os.Stderr, Audit: audit, Now: time.Now, Sane: built(),
	})
	if err != nil {
		return err
	}
	older, err := st.Remember(filepath.Join(o.runtime, "state.json"))
	if err != nil {
		log.Warn("the age of the state cannot be stored outside of it", "err", err)
	}
	if older != "" {
		log.Error("the state directory is older than before: was a copy restored?", "why", older)
	}

	seal := machine.NewSeal(machine.SealOptions{Store: st, Sealer: helper.Client{}, Sys: "/sys", Log: log.With("room", "machine")})
	func() {
		ctx, cancel := context.WithTimeout(ctx, sealLimit)
		defer cancel()
		seal.Await(ctx)
	}()
	kernelOf, err := host.Open(keptFile(o))
	if err != nil {
		return err
	}
	links, err := link.Open()
	if err != nil {
		return err
	}
	defer links.Close()
	var boot *firstboot.Boot // nil: the platform is not used
	nameServer := func() {
		if now, err := hosts(o, links); err == nil {
			if boot != nil {
				now = append(now, boot.Hosts()...)
			}
			authority.SetHosts(now)
		}
	}
	if o.platform != "none" {
		boot = newBoot(o, st, authority, audit, nameServer, log)
	}
	nameServer()
	routes, err := kernel.New()
	if err != nil {
		return err
	}
	table := fib.New(routes, log.With("room", "fib"))
	filter := nftables.New(nftables.Options{Log: log.With("room", "nat")})
	flows, err := conntrack.Open()
	if err != nil {
		return err
	}
	defer flows.Close()
	// Traffic does not need the log.
	var translations router.Translations
	if r, err := translog.Open(filepath.Join(o.state, "flows"), log.With("room", "translog")); err != nil {
		log.Error("the log of translations is not available", "err", err)
	} else {
		defer r.Close()
		translations = r
	}
	var divert nftables.Divert
	vpn := ipsec.New(ipsec.Options{
		Socket: o.vici, Secrets: st.Lookup, Links: links, Log: log.With("room", "ipsec"), RuntimeDir: o.runtime, Divert: divert.To,
	})
	wg := wireguard.New(wireguard.Options{Secrets: st.Lookup, Links: links, Log: log.With("room", "wireguard")})
	defer wg.Close()
	former, err := routes.Observe(ctx)
	if err != nil {
		return fmt.Errorf("reading the routes of a former run: %w", err)
	}
	speaker := gobgp.New(gobgp.Options{
		ListenPort: o.bgpPort, Secrets: st.Lookup, Log: log.With("room", "bgp"),
		Adopting: func() bool { return len(former.Routes) > 0 },
	})

	var mover takeover.Mover
	if o.mover != "" {
		mover = takeover.Command(o.mover)
	}
	var ssh func([]string) error
	if o.sshKeys != "" {
		ssh = func(keys []string) error { return host.AllowSSH(o.sshKeys, keys) }
	}
	var beneath *machine.Machine // set below, because it needs the router
	var shown http.Handler       // likewise
	var firstAPI []netip.Prefix
	var facts spec.Platform
	var place func() *isthmusv1.PlatformStatus
	var bootConditions func() []*isthmusv1.Condition
	if boot != nil {
		firstAPI, facts, place, bootConditions = boot.API(), boot.Addresses(), boot.Status, boot.Conditions
	}
	r, err := router.New(router.Options{
		Store: st, Drivers: map[tunnel.Kind]tunnel.Driver{tunnel.KindIPsec: vpn, tunnel.KindWireGuard: wg}, BGP: speaker, Tables: speaker, FIB: table, NAT: filter, Flows: flows, Translations: translations, Addresses: links, Host: kernelOf, Interfaces: interfaces(links), Shares: kernel.Shares, Allowances: links.Allowances,
		APIPort: port(o.listen), APIFrom: apiFrom, FirstAPI: firstAPI, Facts: facts, Platform: place, SSH: ssh, Drop: o.input == "drop", Resolvers: dns.System,
		Version: version, Events: events, Log: log, Safe: o.safe, Metrics: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) { shown.ServeHTTP(w, q) }),
		Notices: func() []*isthmusv1.Condition {
			all := slices.Concat(authority.Conditions(), notices(audit, older), events.Conditions(), beneath.Conditions())
			if bootConditions != nil {
				all = append(all, bootConditions()...)
			}
			return all
		}, Charon: vpn.Conditions, Callers: vpn.Callers, Mover: mover, NamesFile: filepath.Join(o.state, "names.json"), ExportFile: filepath.Join(o.state, "export.json"),
		Counters: func() router.Counters {
			return router.Counters{
				Vici: vpn.Writes(), WireGuard: wg.Writes(), NFTables: filter.Writes(), BGP: speaker.Writes(), BGPStarts: speaker.Starts(),
				Netlink: links.Writes() + routes.Writes() + kernelOf.Writes(),
			}
		},
	})
	if err != nil {
		return err
	}
	socket := filepath.Join(o.runtime, "api.sock")
	beneath = machine.New(machine.Options{
		Helper: helper.Client{}, Node: r, Records: st, Seal: seal, Sys: "/sys", Log: log.With("room", "machine"),
		Serves: func(ctx context.Context) error { return api.Ping(ctx, socket) },
	})
	shown = metrics.NewHandler(metrics.Options{Source: r, Expiries: authority.Expiries, Version: version, Revision: revision(), Go: runtime.Version(), Log: log.With("room", "metrics")})
	server, err := api.Listen(api.Options{Router: r, Machine: beneath, Authority: authority, Events: events, Logs: kept, Address: o.listen, Socket: socket, Metrics: shown, Log: log})
	if err != nil {
		return err
	}
	log.Info("serving", "address", o.listen, "version", version, "after", time.Since(started).Round(time.Millisecond))

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go authority.Await(ctx)
	go follow(ctx, links, nameServer)
	go tell(ctx, r, log)
	go beneath.Judge(ctx)
	go seal.Keep(ctx, r.SecretsOpened)
	go watch(ctx, r, func(ctx context.Context) error { return api.Ping(ctx, socket) }, log)
	if boot != nil && !o.safe {
		go boot.Run(ctx, r)
	}
	served := make(chan error, 1)
	go func() {
		served <- server.Serve(ctx)
		cancel()
	}()
	err = r.Run(ctx)
	cancel()
	return errors.Join(err, <-served)
}

// sealLimit is how long the start waits for sealed secrets. Without them the daemon continues, and
// retries.
const sealLimit = 10 * time.Second

// notices are conditions of the audit log and of the state directory.
func notices(audit *auth.Audit, older string) []*isthmusv1.Condition {
	out := audit.Conditions()
	if older != "" {
		out = append(out, condition.StateOlder.Error(time.Time{}, "%s", "the state directory is older than before, as after a copy is restored:  "+older+"; certificates and secrets that were revoked or replaced since may be valid again: look through `isthmus client list`, revoke again, and apply the document again"))
	}
	return out
}
