// Package debtest installs the Debian packages as a user would: on Debian 12 and 13, with systemd
// as process 1, in separate namespaces. mmdebstrap makes the roots once, next to those of test/vm;
// changes of a test are discarded with it.
package debtest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/vm"
)

// included are the packages of a root besides the essential ones and apt. depended are isthmusd's
// dependencies, which are in apt's archive.
var (
	included = []string{"systemd", "systemd-sysv", "passwd", "iproute2", "iputils-ping", "procps", "ca-certificates"}
	depended = []string{"charon-systemd", "libstrongswan-standard-plugins", "nftables", "kmod"}
)

const rootVersion = 1 // of the steps below: increase it when they change the result

// Root returns the directory of a Debian root, which must not be changed, and makes it if it is
// missing. That takes half a minute and the network.
func Root(ctx context.Context, suite string, progress io.Writer) (string, error) {
	name := "deb-" + suite + "-" + vm.Digest(fmt.Appendln(nil, rootVersion, suite, included, depended))
	return vm.Kept(ctx, name, progress, func(dir string, step func(string)) error {
		step("making a root of Debian " + suite + " (once, half a minute)")
		return vm.Debian(ctx, suite, dir, "--variant=minbase", "--include="+strings.Join(included, ","), "--dpkgopt=force-unsafe-io",
			"--skip=cleanup/apt", // keep the lists and the archive, so that apt needs no network
			`--customize-hook=chroot "$1" apt-get -qq --no-install-recommends --download-only install `+strings.Join(depended, " "))
	})
}

// boot makes a container: $1 is the lower directory, $2 the parent of the upper one. Process 1 is
// $3.
const boot = `set -e
mount --make-rprivate /
mkdir -p "$2/upper" "$2/work" "$2/root"
r=$2/root
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" root "$r"
mount -t proc proc "$r/proc"
mount -t sysfs sysfs "$r/sys"
mount -t cgroup2 cgroup2 "$r/sys/fs/cgroup"
mount -t tmpfs tmpfs "$r/run"
mount -t tmpfs tmpfs "$r/dev"
for n in null zero full random urandom tty; do touch "$r/dev/$n"; mount --bind "/dev/$n" "$r/dev/$n"; done
mkdir "$r/dev/net" "$r/dev/pts" "$r/dev/shm"
mknod -m 666 "$r/dev/net/tun" c 10 200
ln -s /proc/self/fd "$r/dev/fd"
ln -s pts/ptmx "$r/dev/ptmx"
touch "$r/dev/console"
ip link set lo up
mkdir -p "$r/run/old"
cd "$r"
pivot_root . run/old
umount -l /run/old
shift 2
exec env -i container=other PATH=/usr/sbin:/usr/bin "$@"
`

// Container is a root with a process 1. Everything in it ends with this process, however it ends.
type Container struct {
	cmd *exec.Cmd
	pid int // of process 1, as seen from here
	out bytes.Buffer
}

// Start starts a container from a root. Its changes go to dir, from which another container can
// start. init is process 1; none: systemd.
func Start(ctx context.Context, root, dir string, init ...string) (*Container, error) {
	systemd := len(init) == 0
	if systemd {
		init = []string{"/usr/lib/systemd/systemd", "--system", "--log-target=journal", "--show-status=0"}
		if _, err := os.Stat(filepath.Join(root, init[0])); err != nil {
			init[0] = "/lib/systemd/systemd"
		}
	}
	c := &Container{}
	args := append([]string{"--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--fork", "--kill-child", "sh", "-c", boot, "sh", root, dir}, init...)
	c.cmd = exec.Command("unshare", args...)
	c.cmd.Stdout, c.cmd.Stderr = &c.out, &c.out
	c.cmd.WaitDelay = time.Second
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting a container: %w", err)
	}
	err := until(ctx, func() error {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", c.cmd.Process.Pid))
		if err != nil {
			return err
		}
		if c.pid, err = strconv.Atoi(strings.TrimSpace(string(children))); err != nil {
			return err
		}
		name, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", c.pid))
		if err == nil && filepath.Base(name) != filepath.Base(init[0]) {
			err = fmt.Errorf("process 1 is %s yet", name)
		}
		if err == nil && systemd {
			_, err = c.Run(ctx, "systemctl is-system-running | grep -qE 'running|degraded'")
		}
		return err
	})
	if err != nil {
		c.Stop()
		return nil, fmt.Errorf("starting a container: %w: %s", err, c.out.String())
	}
	return c, nil
}

// Stop kills everything in the container, like a power loss.
func (c *Container) Stop() {
	if c.pid > 0 {
		_ = unix.Kill(c.pid, unix.SIGKILL)
	}
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
}

// Run runs a shell script in the container as root and returns its standard output.
func (c *Container) Run(ctx context.Context, script string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", "--target", strconv.Itoa(c.pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup",
		"env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/root", "DEBIAN_FRONTEND=noninteractive", "sh", "-euc", script)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = time.Minute // a busy machine reads the last output late
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s%s", script, err, stderr.String(), stdout.String())
	}
	return stdout.String(), nil
}

// until calls f every 50 ms until it returns nil, for a minute.
func until(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after a minute: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
