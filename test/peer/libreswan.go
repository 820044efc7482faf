package peer

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
)

const pluto = "/usr/libexec/ipsec/"

// Pluto is a running libreswan daemon.
type Pluto struct {
	Node *lab.Node
	// Log is the path of its log.
	Log     string
	process *lab.Process
	dir     string
	loaded  []string
}

// StartPluto starts libreswan in the node and waits until it answers.
func StartPluto(ctx context.Context, n *lab.Node) (*Pluto, error) {
	fail := func(err error) (*Pluto, error) {
		return nil, fmt.Errorf("starting libreswan in %s: %w", n.Name, err)
	}
	dir, err := n.Dir()
	if err != nil {
		return fail(err)
	}
	p := &Pluto{Node: n, dir: filepath.Join(dir, "pluto")}
	p.Log = filepath.Join(p.dir, "pluto.log")
	if err := os.MkdirAll(p.path("nss"), 0o700); err != nil {
		return fail(err)
	}
	if err := p.write(nil); err != nil {
		return fail(err)
	}
	if _, err := os.Stat(p.path("nss/cert9.db")); err != nil {
		if _, err := n.ExecPeer(ctx, "certutil", "-N", "-d", "sql:"+p.path("nss"), "--empty-password"); err != nil {
			return fail(err)
		}
	}
	log, _ := os.ReadFile(p.Log) // of one that was killed
	before := len(log)
	os.Remove(p.path("pluto.ctl"))
	os.Remove(p.path("pluto.pid"))
	p.process, err = n.StartPeer("pluto", nil, pluto+"pluto", "--nofork", "--config", p.path("ipsec.conf"), "--secretsfile", p.path("ipsec.secrets"),
		"--nssdir", p.path("nss"), "--rundir", p.dir, "--dumpdir", p.dir, "--logfile", p.Log, "--no-dnssec")
	if err != nil {
		return fail(err)
	}
	// It loads its configuration by a program of its own, and listens after that.
	err = lab.Until(ctx, 30*time.Second, func() error {
		log, err := os.ReadFile(p.Log)
		if i := strings.LastIndex(string(log), "Starting Pluto"); err == nil && (i < before || !strings.Contains(string(log[i:]), "loading secrets from")) {
			err = errNotYet
		}
		return err
	})
	if err != nil {
		return fail(fmt.Errorf("see %s: %w", p.Log, err))
	}
	return p, nil
}

func (p *Pluto) path(name string) string { return filepath.Join(p.dir, name) }

func (p *Pluto) write(tunnels []Tunnel) error {
	// Interfaces and routes are the lab's; two tunnels of one peer have the same identity.
	conf := "config setup\n  ipsec-interface-managed=no\n  uniqueids=no\n"
	var secrets strings.Builder
	for _, t := range tunnels {
		c, err := t.libreswan()
		if err != nil {
			return err
		}
		conf += c
		fmt.Fprintf(&secrets, "%s %s : PSK \"%s\"\n", orAddress(t.LocalID, t.Local), orAddress(t.RemoteID, t.Remote), t.PSK)
	}
	if err := os.WriteFile(p.path("ipsec.secrets"), []byte(secrets.String()), 0o600); err != nil {
		return err
	}
	return os.WriteFile(p.path("ipsec.conf"), []byte(conf), 0o600)
}

// Load sets libreswan's tunnels to exactly these.
func (p *Pluto) Load(ctx context.Context, tunnels ...Tunnel) error {
	fail := func(err error) error { return fmt.Errorf("loading tunnels: %w", err) }
	if len(tunnels) > 1 {
		// It refuses a second CHILD SA with the same selectors, regardless of the interface.
		return fail(fmt.Errorf("libreswan has one tunnel for everything, not %d", len(tunnels)))
	}
	if err := p.write(tunnels); err != nil {
		return fail(err)
	}
	for _, name := range p.loaded {
		if _, err := p.whack(ctx, "--delete", "--name", name); err != nil {
			return fail(err)
		}
	}
	p.loaded = nil
	if _, err := p.whack(ctx, "--rereadsecrets"); err != nil {
		return fail(err)
	}
	if _, err := p.Node.ExecPeer(ctx, pluto+"addconn", "--ctlsocket", p.path("pluto.ctl"), "--config", p.path("ipsec.conf"), "--autoall"); err != nil {
		return fail(err)
	}
	for _, t := range tunnels {
		p.loaded = append(p.loaded, t.Name)
	}
	out, err := p.whack(ctx, "--briefconnectionstatus")
	if err == nil && !strings.Contains(out, fmt.Sprintf("loaded %d,", len(tunnels))) {
		err = fmt.Errorf("not all are there: %s, see %s", strings.TrimSpace(out), p.Log)
	}
	if err != nil {
		return fail(err)
	}
	return nil
}

func (p *Pluto) whack(ctx context.Context, args ...string) (string, error) {
	return p.Node.ExecPeer(ctx, append([]string{pluto + "whack", "--rundir", p.dir}, args...)...)
}

var plutoChild = regexp.MustCompile(`(?m)^#\d+: "([^"]+)".* ESTABLISHED_CHILD_SA`)

// Children implements IKE.
func (p *Pluto) Children(ctx context.Context) (map[string]int, error) {
	out, err := p.whack(ctx, "--showstates")
	if err != nil {
		return nil, err
	}
	n := map[string]int{}
	for _, m := range plutoChild.FindAllStringSubmatch(out, -1) {
		n[m[1]]++
	}
	return n, nil
}

// RekeyIKE implements IKE.
func (p *Pluto) RekeyIKE(ctx context.Context, tunnel string) error {
	_, err := p.whack(ctx, "--rekey-ike", "--name", tunnel, "--asynchronous")
	return err
}

// RekeyChild implements IKE.
func (p *Pluto) RekeyChild(ctx context.Context, tunnel string) error {
	_, err := p.whack(ctx, "--rekey-child", "--name", tunnel, "--asynchronous")
	return err
}

// Terminate implements IKE.
func (p *Pluto) Terminate(ctx context.Context, tunnel string) error {
	_, err := p.whack(ctx, "--terminate", "--name", tunnel)
	return err
}

// Kill implements IKE.
func (p *Pluto) Kill(ctx context.Context) error { return crash(ctx, p.Node, p.process) }

// libreswan renders the tunnel in the format of ipsec.conf(5).
func (t Tunnel) libreswan() (string, error) {
	ike, _, err := libreswanProposals(t.IKE)
	if err != nil {
		return "", err
	}
	esp, groups, err := libreswanProposals(t.ESP)
	if err != nil {
		return "", err
	}
	if len(groups) > 1 {
		return "", fmt.Errorf("tunnel %s: libreswan knows one group for all of its ESP proposals, not %s", t.Name, strings.Join(groups, " and "))
	}
	pfs := "yes"
	if len(groups) == 0 {
		pfs = "no"
	}
	var b strings.Builder
	set := func(key string, value any) { fmt.Fprintf(&b, "  %s=%v\n", key, value) }
	seconds := func(d time.Duration) string { return fmt.Sprintf("%ds", int(d.Seconds())) }
	fmt.Fprintf(&b, "conn %s\n", t.Name)
	set("keyexchange", "ikev2")
	set("authby", "secret")
	set("left", t.Local)
	set("right", t.Remote)
	set("leftid", orAddress(t.LocalID, t.Local))
	set("rightid", orAddress(t.RemoteID, t.Remote))
	set("leftsubnet", cmp.Or(t.Selectors, "0.0.0.0/0"))
	set("rightsubnet", cmp.Or(t.Selectors, "0.0.0.0/0"))
	set("ike", ike)
	set("esp", esp)
	set("pfs", pfs)
	set("ipsec-interface", t.IfID)
	set("leftupdown", "/bin/true")
	set("mobike", "no")
	set("auto", map[string]string{"": "add", "none": "add", "trap": "ondemand", "start": "start"}[t.Start])
	if l := t.Life; l.IKERekey > 0 {
		// One margin for both: the rest of the shorter lifetime.
		set("ikelifetime", seconds(l.IKEExpire))
		set("salifetime", seconds(l.ChildExpire))
		set("rekeymargin", seconds(min(l.IKEExpire-l.IKERekey, l.ChildExpire-l.ChildRekey)))
		if l.ChildExpireBytes > 0 {
			// it rekeys at a random point in the last quarter
			set("ipsec-max-bytes", l.ChildExpireBytes)
		}
		if l.ReplayWindow > 0 {
			set("replay-window", l.ReplayWindow)
		}
	}
	if t.DPD > 0 {
		set("dpddelay", seconds(t.DPD))
		set("retransmit-timeout", "30s")
	}
	return b.String(), nil
}

var libreswanWords = map[string]string{
	"aes128": "aes128", "aes192": "aes192", "aes256": "aes256",
	"aes128gcm16": "aes_gcm128", "aes192gcm16": "aes_gcm192", "aes256gcm16": "aes_gcm256",
	"sha1": "sha1", "sha256": "sha2_256", "sha384": "sha2_384", "sha512": "sha2_512",
	"modp1536": "dh5", "modp2048": "dh14", "modp3072": "dh15", "modp4096": "dh16", "modp6144": "dh17", "modp8192": "dh18",
	"ecp256": "dh19", "ecp384": "dh20", "ecp521": "dh21", "curve25519": "dh31",
}

// libreswanProposals translates proposals from swanctl's notation and returns the groups in it.
func libreswanProposals(list string) (text string, groups []string, err error) {
	var out []string
	for proposal := range strings.SplitSeq(list, ",") {
		var part [3][]string // encryption, integrity or pseudo-random function, group
		for word := range strings.SplitSeq(proposal, "-") {
			w, ok := libreswanWords[strings.TrimPrefix(word, "prf")]
			if !ok {
				return "", nil, fmt.Errorf("libreswan has no %s", word)
			}
			i := 0
			switch {
			case strings.HasPrefix(w, "dh"):
				i = 2
				if !slices.Contains(groups, w) {
					groups = append(groups, w)
				}
			case strings.HasPrefix(w, "sha"):
				i = 1
			}
			part[i] = append(part[i], w)
		}
		p := strings.Join(part[0], "+")
		if len(part[1]) > 0 {
			p += "-" + strings.Join(part[1], "+")
		}
		if len(part[2]) > 0 {
			p += ";" + strings.Join(part[2], "+")
		}
		out = append(out, p)
	}
	return strings.Join(out, ","), groups, nil
}
