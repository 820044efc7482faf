package debtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/isthmus-net/isthmus/test/vm"
)

const (
	module = "../.."
	low    = "0.0~1" // a version below all others
	// exposure bounds the rating of `systemd-analyze security` for a unit, times ten.
	exposure = 30
)

var suites = []string{"bookworm", "trixie"}

// plugins are those that charon may load, and needed those that it must load.
var (
	plugins = strings.Fields("charon-systemd random nonce openssl hmac kdf pem x509 pubkey pkcs1 pkcs8 constraints revocation kernel-netlink socket-default vici")
	needed  = strings.Fields("random nonce openssl pem x509 pubkey pkcs1 pkcs8 constraints revocation kernel-netlink socket-default vici")
)

func sh(t *testing.T, script string) string {
	t.Helper()
	cmd := exec.Command("sh", "-euc", script)
	cmd.Dir = module
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s%s", script, err, stderr.String(), out)
	}
	return string(out)
}

// prepare installs the build's dependencies, and builds the programs.
var prepare = sync.OnceValue(func() error {
	for _, script := range []string{"test/setup", "test/setup deb", "make build"} {
		cmd := exec.Command("sh", "-euc", script)
		cmd.Dir = module
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", script, err, out)
		}
	}
	return nil
})

// build makes the packages of a version in a directory. They are compressed at the lowest level,
// because compression takes most of the time.
func build(t *testing.T, version, dir string) string {
	t.Helper()
	if err := prepare(); err != nil {
		t.Fatal(err)
	}
	sh(t, "DPKG_DEB_COMPRESSOR_TYPE=gzip DPKG_DEB_COMPRESSOR_LEVEL=1 image/debian/build '"+version+"' "+dir)
	return dir
}

// current is the directory with the packages of this version.
var current string

func built(t *testing.T) string {
	t.Helper()
	if have, _ := filepath.Glob(current + "/*.deb"); len(have) == 0 {
		build(t, "", current)
	}
	return current
}

func TestMain(m *testing.M) {
	var err error
	if current, err = os.MkdirTemp("", "ist-deb-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	status := m.Run()
	os.RemoveAll(current)
	os.Exit(status)
}

// TestBuild checks that the packages pass lintian, have the listed files and modes, and are
// reproducible.
func TestBuild(t *testing.T) {
	one, two := built(t), build(t, "", t.TempDir())
	if a, b := sh(t, "cd "+one+" && sha256sum *.deb"), sh(t, "cd "+two+" && sha256sum *.deb"); a != b {
		t.Errorf("built twice:\n%s%s", a, b)
	}
	sh(t, "lintian --allow-root --fail-on error,warning "+one+"/*.deb")
	list := sh(t, "for d in "+one+"/*.deb; do dpkg-deb -c $d | awk '{ print $1, $2, $6 }' | grep -v '/$'; done | sed 's/ [.]/ /' | sort -k3")
	want, err := os.ReadFile("testdata/files.txt")
	if err != nil || list != string(want) {
		t.Errorf("files (%v):\n%s", err, list)
	}
	if files, _ := filepath.Glob(two + "/*"); len(files) != 2 {
		t.Errorf("left: %v", files)
	}
}

// TestModules checks that Debian's kernel has every module that is loaded at boot.
func TestModules(t *testing.T) {
	img, err := vm.Build(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	var have strings.Builder
	for _, name := range []string{"modules.dep", "modules.builtin"} {
		files, _ := filepath.Glob(img.Tree() + "/usr/lib/modules/*/" + name)
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			have.Write(text)
		}
	}
	list, err := os.ReadFile("../debian/modules-load.d/isthmus.conf")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(list)) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		n++
		if !strings.Contains(have.String(), "/"+line+".ko") && !strings.Contains(have.String(), "/"+strings.ReplaceAll(line, "_", "-")+".ko") {
			t.Errorf("the kernel has no module %s", line)
		}
	}
	if n == 0 {
		t.Error("no module is named")
	}
}

// TestVersion checks that versions are valid for Debian, and grow with the commits.
func TestVersion(t *testing.T) {
	if err := prepare(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	script, _ := filepath.Abs(module + "/image/debian/version")
	git := func(commands string) {
		t.Helper()
		sh(t, "cd "+dir+" && export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_NAME=x GIT_AUTHOR_EMAIL=x GIT_COMMITTER_NAME=x GIT_COMMITTER_EMAIL=x && "+commands)
	}
	commit := func(at string) string {
		return "echo '" + at + "' > f && git add f && GIT_COMMITTER_DATE='" + at + "' git commit -qm x"
	}
	var versions []string
	next := func(commands string) string {
		t.Helper()
		git(commands)
		v := strings.TrimSpace(sh(t, script+" "+dir))
		sh(t, "dpkg --validate-version '"+v+"'")
		versions = append(versions, v)
		return v
	}
	git("git init -q .")
	first := next(commit("2026-11-30T08:16:49Z"))
	if !regexp.MustCompile(`^0\.0~git20261130T081649\.[0-9a-f]{7}$`).MatchString(first) {
		t.Errorf("without a tag: %s", first)
	}
	next(commit("2026-11-30T10:16:50+02:00"))
	next("git tag v1.0.0-rc1")
	next("git tag -f v1.0.0")
	for i := range 11 { // 1.0.0+git9 is less than 1.0.0+git10
		next(commit(fmt.Sprintf("2026-12-01T00:00:%02dZ", i)))
	}
	next("echo x > f")
	next(commit("2026-12-02T00:00:00Z") + " && git tag v1.0.1")
	for i := 1; i < len(versions); i++ {
		sh(t, "dpkg --compare-versions '"+versions[i-1]+"' lt '"+versions[i]+"' || { echo '"+versions[i-1]+" is not less than "+versions[i]+"' >&2; false; }")
	}
}

// machine is a container that a test works in.
type machine struct {
	*testing.T
	*Container
	suite, root, dir string
}

func start(t *testing.T, suite string, init ...string) *machine {
	t.Helper()
	root, err := Root(t.Context(), suite, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{T: t, suite: suite, root: root, dir: t.TempDir()}
	m.begin(init...)
	t.Cleanup(func() {
		if t.Failed() && len(init) == 0 {
			log, _ := m.Container.Run(t.Context(), "journalctl --no-pager -n 60")
			t.Log(log)
		}
		m.Container.Stop()
	})
	return m
}

func (m *machine) begin(init ...string) {
	m.Helper()
	c, err := Start(m.Context(), m.root, m.dir, init...)
	if err != nil {
		m.Fatal(err)
	}
	m.Container = c
}

// do runs a script that must succeed.
func (m *machine) do(script string) string {
	m.Helper()
	out, err := m.Container.Run(m.Context(), script)
	if err != nil {
		m.Fatal(err)
	}
	return out
}

// await runs a script until it succeeds.
func (m *machine) await(script string) {
	m.Helper()
	if err := until(m.Context(), func() error { _, err := m.Container.Run(m.Context(), script); return err }); err != nil {
		m.Fatal(err)
	}
}

// copyIn copies packages into the container, as p-VERSION.
func (m *machine) copyIn(from, to string) {
	m.Helper()
	files, err := filepath.Glob(from + "/*.deb")
	if err != nil || len(files) != 2 {
		m.Fatalf("packages in %s: %v, %v", from, files, err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err == nil {
			cmd := exec.Command("nsenter", "--target", fmt.Sprint(m.pid), "--mount", "sh", "-c", "mkdir -p /root/"+to+" && cat > /root/"+to+"/"+filepath.Base(f))
			cmd.Stdin = strings.NewReader(string(data))
			err = cmd.Run()
		}
		if err != nil {
			m.Fatal(err)
		}
	}
}

func (m *machine) install(from string) string {
	m.Helper()
	return m.do("apt-get -qy --no-install-recommends install /root/" + from + "/*.deb 2>&1")
}

// files lists the root's files with modes and owners, except files that do not belong to packages.
func (m *machine) files() string {
	m.Helper()
	return m.do(`find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /root -o -path /tmp -o -path /var/tmp -o -path /var/cache -o -path /var/log -o -path /var/lib/apt \
 -o -path /var/lib/dpkg -o -path '/etc/*-' -o -path /etc/ld.so.cache -o -path /var/lib/systemd -o -path /etc/machine-id \) -prune -o -printf '%M %u:%g %p %l\n' | sort -k3; cat /etc/passwd /etc/group /etc/shadow /etc/gshadow`)
}

// TestChroot checks that in a root where services must not start, such as an image under
// construction, the packages can be installed and purged, the programs run, and nothing is left.
func TestChroot(t *testing.T) {
	debs := built(t)
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			m := start(t, suite, "/bin/sleep", "1000")
			m.copyIn(debs, "new")
			m.do("printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d")
			m.do("apt-get -qy --no-install-recommends install " + strings.Join(depended, " "))
			before := m.files()
			m.install("new")
			version := strings.TrimSpace(m.do("isthmusd -version"))
			if !strings.Contains(sh(t, "git describe --tags --always --dirty"), version) || strings.TrimSpace(m.do("isthmus version --client | awk '{ print $2 }'")) != version {
				t.Errorf("version %s", version)
			}
			if out := m.do("ps ax -o args="); strings.Contains(out, "isthmusd") || strings.Contains(out, "charon") {
				t.Errorf("a service was started:\n%s", out)
			}
			m.units()
			m.do("systemctl is-enabled isthmusd.service")
			m.do("apt-get -qy purge isthmusd isthmus")
			if after := m.files(); after != before {
				t.Errorf("after purge:\n%s", difference(before, after))
			}
		})
	}
}

// units checks both units with systemd-analyze.
func (m *machine) units() {
	m.Helper()
	for _, unit := range []string{"isthmusd.service", "strongswan.service"} {
		if out := m.do("systemd-analyze verify --man=no " + unit + " 2>&1"); strings.TrimSpace(out) != "" {
			m.Errorf("%s: systemd-analyze verify %s: %s", m.suite, unit, out)
		}
		out, err := m.Container.Run(m.Context(), fmt.Sprintf("systemd-analyze security --no-pager --offline=yes --threshold=%d %s 2>&1", exposure, unit))
		figure := regexp.MustCompile(`Overall exposure level for .*`).FindString(out)
		if err != nil || figure == "" {
			m.Errorf("%s: %v", m.suite, err)
		}
		m.Logf("%s: %s", m.suite, figure)
		if strings.Contains(out, "nknown system call") {
			m.Errorf("%s: %s", m.suite, out)
		}
	}
}

// network is a LAN and a partner, in network namespaces of the container.
const network = `
for n in lan out; do ip netns add $n; ip -n $n link set lo up; done
ip link add lan0 type veth peer name eth0 netns lan; ip link add wan type veth peer name eth0 netns out
ip link set lan0 up; ip link set wan up; ip -n lan link set eth0 up; ip -n out link set eth0 up
ip addr add 10.1.0.1/24 dev lan0; ip -n lan addr add 10.1.0.2/24 dev eth0; ip -n lan route add default via 10.1.0.1
ip addr add 192.0.2.100/24 dev wan; ip -n out addr add 192.0.2.1/24 dev eth0; ip -n out addr add 198.51.100.7/32 dev lo; ip route add default via 192.0.2.1
`

const document = `node: {name: hub, asn: 64620}
underlay: {interface: wan, address: 192.0.2.100}
attachments: [{name: lan, interface: lan0, sources: [10.1.0.0/16]}]
tunnels:
- {name: lane, wireguard: {privateKey: lane, peerPublicKey: "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=", endpoint: "192.0.2.1:51820", listenPort: 51821}, inside: [{local: 169.254.10.1/30}]}
peers: [{name: far, tunnel: lane, asn: 64621, import: {allow: [{prefix: 10.9.0.0/16}]}, export: {allow: [{prefix: 0.0.0.0/0}]}}]
announce: [0.0.0.0/0]
egress:
  pools: [{name: partner, addresses: [{address: 192.0.2.10}]}]
  policies: [{name: all, sources: [10.0.0.0/8], pool: partner}]
`

// kernel is the state of a network namespace that the daemon may change.
func (m *machine) kernel() string {
	m.Helper()
	return m.do("ip -d link; ip addr; ip route show table all; ip -6 route show table all | sort; ip rule; ip nexthop; nft list ruleset; sysctl -a 2>/dev/null | grep '^net[.]ip' | grep -v stable_secret")
}

// TestLife has both packages on a machine from the first installation to the purge: sandboxed, with
// a document, through an upgrade without a lost packet, the end of processes, a reboot, and
// removal.
func TestLife(t *testing.T) {
	lower, debs := build(t, low, t.TempDir()), built(t)
	for _, suite := range suites {
		t.Run(suite, func(t *testing.T) {
			m := start(t, suite)
			m.copyIn(lower, "low")
			m.copyIn(debs, "new")
			m.do("apt-get -qy --no-install-recommends install " + strings.Join(depended, " "))
			m.do(network)
			m.await("! ip addr show tentative | grep -q .")
			before, kernel := m.files(), m.kernel()

			m.install("low")
			m.do("systemctl is-active isthmusd strongswan")
			m.sandbox()
			m.charon()
			m.do("head -c32 /dev/urandom | base64 | isthmus secret set lane")
			m.do("cat > /root/hub.yaml <<'E'\n" + document + "E\nisthmus apply -f /root/hub.yaml")
			m.await("ip netns exec lan ping -c1 -W1 198.51.100.7")
			m.await("pgrep -U 490179")
			m.do(`sed -i 's/^ISTHMUSD_OPTIONS=.*/ISTHMUSD_OPTIONS="-debug"/' /etc/default/isthmusd`)

			// An upgrade loses no packet, keeps edited files, and the new version runs afterwards.
			m.do("ip netns exec lan ping -i 0.05 198.51.100.7 > /run/ping 2>&1 & echo $! > /run/ping.pid")
			former := m.do("systemctl show -p MainPID --value isthmusd")
			m.install("new")
			m.do("systemctl is-active isthmusd")
			m.await("isthmus get status")
			m.do("kill -INT $(cat /run/ping.pid)")
			m.await("grep -q 'packet loss' /run/ping")
			// The last reply may still be missing.
			for i, reply := range regexp.MustCompile(`icmp_seq=(\d+) ttl`).FindAllStringSubmatch(m.do("cat /run/ping"), -1) {
				if reply[1] != fmt.Sprint(i+1) {
					t.Errorf("during the upgrade, answer %d is to request %s", i+1, reply[1])
					break
				}
			}
			if m.do("systemctl show -p MainPID --value isthmusd") == former {
				t.Error("the daemon was not restarted")
			}
			m.do(`grep -q '"-debug"' /etc/default/isthmusd; tr '\0' ' ' < /proc/$(systemctl show -p MainPID --value isthmusd)/cmdline | grep -q -- -debug`)
			m.do("isthmus get status | grep -E '^hub .* 1 +1 '")

			// A daemon that dies or hangs is restarted. A stopped one leaves no process, and
			// everything that carries traffic.
			pid := m.do("systemctl show -p MainPID --value isthmusd")
			m.do("kill -9 " + pid)
			m.await("p=$(systemctl show -p MainPID --value isthmusd); [ $p != 0 ] && [ $p != " + strings.TrimSpace(pid) + " ] && isthmus get status")
			m.do("mkdir -p /run/systemd/system/isthmusd.service.d && printf '[Service]\\nWatchdogSec=2s\\n' > /run/systemd/system/isthmusd.service.d/w.conf && systemctl daemon-reload && systemctl restart isthmusd")
			pid = m.do("systemctl show -p MainPID --value isthmusd")
			m.do("kill -STOP " + pid)
			m.await("p=$(systemctl show -p MainPID --value isthmusd); [ $p != 0 ] && [ $p != " + strings.TrimSpace(pid) + " ] && isthmus get status && systemctl is-active isthmusd")
			m.do("rm -r /run/systemd/system/isthmusd.service.d; systemctl daemon-reload; systemctl stop isthmusd")
			if out, err := m.Container.Run(t.Context(), "pgrep -U 490179,isthmus"); err == nil {
				t.Errorf("processes are left: %s", out)
			}
			m.do("ip netns exec lan ping -c1 -W1 198.51.100.7; nft list table inet isthmus")
			m.do("systemctl start isthmusd")

			// Removal keeps the state and restores the kernel. The next installation continues with
			// the state.
			m.do("isthmus get status")
			m.do("apt-get -qy remove isthmusd isthmus")
			if after := m.kernel(); after != kernel {
				t.Errorf("after remove, in the kernel:\n%s", difference(kernel, after))
			}
			m.do("test -s /var/lib/isthmus/admin.yaml; id isthmus; systemctl is-active strongswan")
			m.install("new")
			m.await("isthmus get status | grep -E '^hub .* 1 +1 '")

			m.restart()

			// Purge leaves nothing.
			m.do("apt-get -qy purge isthmusd isthmus")
			if out := m.do("ip -d link; ip addr; ip route show table all; ip nexthop; nft list ruleset"); strings.Contains(out, "isthmus") || strings.Contains(out, "192.0.2.10/") || strings.Contains(out, "proto 73") {
				t.Errorf("after purge, in the kernel:\n%s", out)
			}
			if after := m.files(); after != before {
				t.Errorf("after purge:\n%s", difference(before, after))
			}
		})
	}
}

// sandbox checks that the daemon's process is restricted as its unit says.
func (m *machine) sandbox() {
	m.Helper()
	status := m.do("cat /proc/$(systemctl show -p MainPID --value isthmusd)/status")
	uid := strings.TrimSpace(m.do("id -u isthmus"))
	for _, line := range []string{"Uid:\t" + uid + "\t" + uid, "NoNewPrivs:\t1\n", "Seccomp:\t2\n", "CapBnd:\t00000000002035e0\n", "CapEff:\t00000000002035e0\n"} {
		if !strings.Contains(status, line) {
			m.Errorf("no %q in\n%s", line, status)
		}
	}
	if out := m.do("stat -c '%a %U' /var/lib/isthmus /run/isthmus /run/isthmus/api.sock /var/lib/isthmus/admin.yaml"); out != "700 isthmus\n755 isthmus\n600 isthmus\n600 isthmus\n" {
		m.Errorf("modes:\n%s", out)
	}
	// Only root, by being root, gets in.
	if out, err := m.Container.Run(m.Context(), "setpriv --reuid isthmus --regid isthmus --clear-groups isthmus --socket /run/isthmus/api.sock get status"); err == nil {
		m.Errorf("another process of the daemon's user has access: %s", out)
	}
	m.await("journalctl --no-pager -u isthmusd | grep 'connected to charon'")
}

// charon compares charon's plugins with the list.
func (m *machine) charon() {
	m.Helper()
	out := m.do("swanctl --stats | tr '\\n' ' '")
	_, list, _ := strings.Cut(out, "loaded plugins:")
	loaded := strings.Fields(list)
	for _, p := range loaded {
		if !slices.Contains(plugins, p) {
			m.Errorf("charon has loaded %s", p)
		}
	}
	for _, p := range needed {
		if !slices.Contains(loaded, p) {
			m.Errorf("charon has not loaded %s, only %v", p, loaded)
		}
	}
	m.do(`grep -q "Seccomp:.2" /proc/$(systemctl show -p MainPID --value strongswan)/status; grep -q "CapBnd:.0000000000003400" /proc/$(systemctl show -p MainPID --value strongswan)/status`)
	m.do("[ $(stat -c '%U:%G' /run/charon.vici) = root:isthmus ]")
	// These are the only kernel parameters that charon may write.
	m.do(`p=$(systemctl show -p MainPID --value strongswan); may() { nsenter -t $p -m test -w "$1"; }
may /proc/sys/net/core/somaxconn || exit 1; may /run || exit 2; for f in /proc/sys/net/ipv4/ip_forward /etc/passwd; do if may $f; then exit 3; fi; done`)
}

// restart reboots the machine. Two services, one where the network is set up and one where
// cloud-init sets it up, check which rules there are.
func (m *machine) restart() {
	m.Helper()
	m.do(`cat > /etc/systemd/system/net-probe.service <<'E'
[Unit]
DefaultDependencies=no
After=network-pre.target local-fs.target
Before=network.target sysinit.target shutdown.target
Wants=network-pre.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'nft list table inet isthmus > /run/seen 2>&1; cat /proc/sys/net/ipv4/ip_forward; systemctl show -p StatusText isthmusd; true'
[Install]
WantedBy=sysinit.target
E
systemctl enable net-probe`)
	m.Container.Stop()
	m.begin()
	if seen := m.do("cat /run/seen"); !strings.Contains(seen, "chain") {
		m.Errorf("before the network: %s", seen)
	}
	if out := m.do("journalctl --no-pager -b | grep -i 'ordering cycle' || true"); out != "" {
		m.Errorf("units: %s", out)
	}
	m.do("systemctl is-active isthmusd")
	// The network comes later.
	m.do(network)
	m.await("ip netns exec lan ping -c1 -W1 198.51.100.7")
	m.await("isthmus get status | grep -E '^hub .* 1 +1 '")
	m.do("systemctl disable net-probe; rm /etc/systemd/system/net-probe.service; systemctl daemon-reload")
}

// difference returns the lines that only one of two texts has.
func difference(a, b string) string {
	var out strings.Builder
	for _, d := range []struct{ sign, from, in string }{{"-", a, b}, {"+", b, a}} {
		has := map[string]int{}
		for line := range strings.Lines(d.in) {
			has[strings.TrimSuffix(line, "\n")]++
		}
		for line := range strings.Lines(d.from) {
			line = strings.TrimSuffix(line, "\n")
			if has[line]--; has[line] < 0 {
				fmt.Fprintln(&out, d.sign+line)
			}
		}
	}
	return out.String()
}
