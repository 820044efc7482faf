package build

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/isthmus-net/isthmus/image/slot"
)

// installed are the Debian packages of the image, besides those that they and our own packages
// depend on.
var installed = []string{
	"systemd-sysv", "systemd-repart", "systemd-resolved", "systemd-timesyncd", "udev", "kmod", "procps",
	"initramfs-tools", "zstd", "e2fsprogs",
	"iproute2", "nftables", "charon-systemd", "libstrongswan-standard-plugins", "strongswan-swanctl", "ca-certificates",
	// To inspect a node: on its console, or by SSH if the document opens it.
	"openssh-server", "iputils-ping", "tcpdump", "conntrack", "less", "login", "passwd",
}

// Kernels are the Debian packages of the kernel, by name of the variant: the release's own, and a
// newer one from its backports. The newer one has features that the first lacks, such as a CHILD SA
// for each processor (RFC 9611: Linux 6.13, and strongSwan 6.0.2, which Debian 13 lacks), and gets
// security updates later.
var Kernels = map[string]string{"stable": kernelPackage, "backports": kernelPackage + "/" + Suite + "-backports"}

const kernelPackage = "linux-image-cloud-amd64"

// install makes the tree: Debian's packages, then ours with the dpkg in the tree.
func (b *builder) install() error {
	archives := filepath.Join(b.Cache, "archives-"+Suite)
	if err := os.MkdirAll(archives, 0o755); err != nil {
		return err
	}
	args := []string{
		"--quiet", "--mode=root", "--variant=essential", "--include=" + strings.Join(append(slices.Clone(installed), Kernels[b.Kernel]), ","),
		"--dpkgopt=force-confold", "--dpkgopt=force-unsafe-io",
		// Not by --dpkgopt: mmdebstrap would then also filter the essential packages, which takes
		// it half a minute. Their files are removed before dpkg installs them.
		`--setup-hook=mkdir -p "$1"/etc/dpkg/dpkg.cfg.d; printf '%s\n' path-exclude=/usr/share/man/* path-exclude=/usr/share/locale/* path-exclude=/usr/share/info/* ` +
			`path-exclude=/usr/share/doc/* path-include=/usr/share/doc/*/copyright > "$1"/etc/dpkg/dpkg.cfg.d/excluded`,
		`--extract-hook=cd "$1"/usr/share && rm -rf man/* locale/* info/* doc/*`,
		`--aptopt=Apt::Install-Recommends "false"`,
		"--skip=download/empty", "--skip=essential/unlink",
		`--setup-hook=mkdir -p "$1"/var/cache/apt/archives`,
		"--setup-hook=sync-in " + archives + " /var/cache/apt/archives",
		// The initial RAM disk is made when the kernel is installed, so its files come first.
		`--essential-hook=mkdir -p "$1"/etc/initramfs-tools`,
		"--essential-hook=sync-in " + filepath.Join(b.Files, "rootfs/etc/initramfs-tools") + " /etc/initramfs-tools",
		"--customize-hook=sync-out /var/cache/apt/archives " + archives,
		`--customize-hook=rm -rf "$1"/var/cache/apt "$1"/var/lib/apt`,
	}
	if b.Kernel == "backports" {
		// From the same mirror as the release, which mmdebstrap has recorded.
		args = append(args, fmt.Sprintf(`--setup-hook=cat "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/*.list 2>/dev/null | sed -n 's/^deb \(.*\) %[1]s main.*/deb \1 %[1]s-backports main/p' | head -1 > "$1"/etc/apt/sources.list.d/backports.list`, Suite))
	}
	for _, d := range b.Debs {
		args = append(args, "--customize-hook=copy-in "+d+" /tmp")
	}
	if len(b.Debs) > 0 {
		args = append(args, `--customize-hook=chroot "$1" sh -c 'dpkg -i /tmp/*.deb && rm -f /tmp/*.deb'`)
	}
	args = append(append(args, Suite, b.tree), sources(b.Mirror, b.Security)...)
	return b.run("mmdebstrap", args...)
}

// sources returns the sources of apt, as lines of sources.list(5): the release, its updates, and
// security updates. None: mmdebstrap's own, which are the same.
func sources(mirror, security string) []string {
	if mirror == "" || security == "" {
		return nil
	}
	return []string{"deb " + mirror + " " + Suite + " main", "deb " + mirror + " " + Suite + "-updates main", "deb " + security + " " + Suite + "-security main"}
}

// finish copies the files of the image over the tree and fixes what Debian leaves to the first
// boot.
func (b *builder) finish() error {
	if err := copyTree(filepath.Join(b.Files, "rootfs"), b.tree); err != nil {
		return err
	}
	for _, unit := range []string{"systemd-networkd.service", "systemd-resolved.service", "systemd-timesyncd.service", "serial-getty@ttyS0.service", "modules-locked.service",
		"isthmus-system.service", "isthmus-trial.timer", "isthmus-ssh.path", "isthmus-ssh-gone.path"} {
		if err := b.run("chroot", b.tree, "systemctl", "-q", "enable", unit); err != nil {
			return err
		}
	}
	for _, unit := range []string{"ssh.service", "ssh.socket", "nftables.service", "apt-daily.timer", "dpkg-db-backup.timer", "systemd-pstore.service",
		// A login needs a password, and there are none.
		"getty@tty1.service", "systemd-logind.service", "e2scrub_reap.service", "e2scrub_all.timer"} {
		if err := b.run("chroot", b.tree, "systemctl", "-q", "mask", unit); err != nil {
			return err
		}
	}
	for path, from := range b.Programs {
		if err := copyFile(from, b.in(path), 0o755); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(b.in(slot.KeyDir), 0o755); err != nil {
		return err
	}
	for _, key := range b.Keys {
		if err := copyFile(key, b.in(slot.KeyDir, filepath.Base(key)), 0o644); err != nil {
			return err
		}
	}
	kernels, _ := filepath.Glob(b.in("boot/vmlinuz-*"))
	if len(kernels) != 1 {
		return fmt.Errorf("there are %d kernels, want one", len(kernels))
	}
	version := strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	for from, to := range map[string]string{"vmlinuz-": "vmlinuz", "initrd.img-": "initrd.img"} {
		if err := os.Rename(b.in("boot", from+version), b.in("boot", to)); err != nil {
			return err
		}
	}
	if err := prune(b.in("boot"), func(path string) bool { return path == "vmlinuz" || path == "initrd.img" }); err != nil {
		return err
	}
	if err := b.modules(version); err != nil {
		return fmt.Errorf("choosing kernel modules: %w", err)
	}
	for path, text := range map[string]string{
		// Mounted over by the initial RAM disk.
		"etc/machine-id":      "",
		"etc/hostname":        "isthmus\n",
		"etc/hosts":           "127.0.0.1 localhost\n::1 localhost ip6-localhost\n",
		"usr/lib/clock-epoch": "",
	} {
		if err := os.WriteFile(b.in(path), []byte(text), 0o644); err != nil {
			return err
		}
	}
	release, err := os.OpenFile(b.in("usr/lib/os-release"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(release, "IMAGE_ID=isthmus\nIMAGE_VERSION=%s\n", b.Version); err != nil {
		release.Close()
		return err
	}
	if err := release.Close(); err != nil {
		return err
	}
	if err := os.MkdirAll(b.in("data"), 0o755); err != nil {
		return err
	}
	os.Remove(b.in("etc/resolv.conf"))
	return os.Symlink("../run/systemd/resolve/resolv.conf", b.in("etc/resolv.conf"))
}

// drivers are modules that neither a cloud's machine nor a router needs, below the directory kernel
// of the modules.
var drivers = []string{
	"drivers/comedi", "drivers/hid", "drivers/media", "drivers/soundwire", "drivers/leds", "drivers/thermal", "drivers/platform", "drivers/vhost", "drivers/target",
	"drivers/md/bcache", "drivers/cdrom/pktcdvd.ko.xz", "drivers/infiniband/ulp", "drivers/infiniband/sw",
	"fs/bcachefs", "fs/btrfs", "fs/xfs", "fs/smb", "fs/nfs", "fs/nfsd", "fs/nfs_common", "fs/lockd", "fs/ceph", "fs/ntfs3", "fs/orangefs", "fs/erofs", "fs/exfat",
	"fs/cachefiles", "fs/netfs", "fs/zonefs", "fs/sysv", "fs/romfs", "fs/dlm", "fs/ocfs2", "fs/gfs2", "fs/9p", "fs/afs", "fs/f2fs", "fs/jfs", "fs/nilfs2", "fs/ubifs",
	"net/sctp", "net/dccp", "net/rds", "net/tipc", "net/can", "net/ax25", "net/netrom", "net/rose", "net/bluetooth", "net/wireless", "net/mac80211", "net/9p", "net/ceph",
	"net/sunrpc", "net/batman-adv", "net/atm", "net/nfc", "net/openvswitch", "arch/x86/kvm", "virt",
}

// modules removes modules that are never loaded.
func (b *builder) modules(version string) error {
	for _, d := range drivers {
		if err := os.RemoveAll(b.in("usr/lib/modules", version, "kernel", d)); err != nil {
			return err
		}
	}
	return b.run("chroot", b.tree, "depmod", version)
}

// building are packages that the build needs and the node does not: their files are removed, and
// they are not in the slot's SBOM.
var building = []string{
	"adduser", "apt", "cpio", "debconf", "debianutils-none", "diffutils", "dmsetup", "dpkg", "initramfs-tools", "initramfs-tools-bin", "initramfs-tools-core", "klibc-utils", "libklibc",
	"libdebconfclient0", "openssh-client", "openssl", "perl-base", "sensible-utils", "ucf", "zstd", "linux-base", "dracut-install", "logsave", "wtmpdb", "runit-helper",
	"openssh-sftp-server", "hostname", "ncurses-bin",
}

// kept are files of such packages that the node needs.
var kept = []string{"/usr/bin/ssh-keygen", "/usr/bin/openssl", "/usr/bin/hostname"}

// trim removes files that only the build needs, and traces of the machine and the time of the
// build.
func (b *builder) trim() error {
	others := map[string]bool{} // directories and files of packages that stay
	lists, err := filepath.Glob(b.in("var/lib/dpkg/info/*.list"))
	if err != nil {
		return err
	}
	read := func(list string) ([]string, error) {
		text, err := os.ReadFile(list)
		return strings.Split(strings.TrimSpace(string(text)), "\n"), err
	}
	for _, list := range lists {
		name, _, _ := strings.Cut(strings.TrimSuffix(filepath.Base(list), ".list"), ":")
		if slices.Contains(building, name) {
			continue
		}
		files, err := read(list)
		if err != nil {
			return err
		}
		for _, f := range files {
			others[f] = true
		}
	}
	for _, list := range lists {
		name, _, _ := strings.Cut(strings.TrimSuffix(filepath.Base(list), ".list"), ":")
		if !slices.Contains(building, name) {
			continue
		}
		files, err := read(list)
		if err != nil {
			return err
		}
		for _, f := range files {
			// Debian's lists have paths from before /usr was merged.
			if others[f] || slices.Contains(kept, f) || slices.Contains(kept, "/usr"+f) {
				continue
			}
			if fi, err := os.Lstat(b.in(f)); err != nil || fi.IsDir() {
				continue
			}
			if err := os.Remove(b.in(f)); err != nil {
				return err
			}
		}
	}
	for _, dir := range []string{"dev", "proc", "sys", "run", "tmp", "var", "root", "home", "media", "mnt", "srv", "opt", "usr/share/doc-base", "usr/share/lintian", "usr/share/bug",
		"usr/share/bash-completion", "usr/share/zsh", "usr/share/perl5", "usr/share/debconf", "usr/share/initramfs-tools", "usr/share/pixmaps", "usr/share/icons", "usr/share/polkit-1",
		"usr/lib/x86_64-linux-gnu/perl-base", "usr/share/perl", "usr/lib/udev/hwdb.d", "etc/udev/hwdb.d"} {
		if err := prune(b.in(dir), func(string) bool { return false }); err != nil {
			return err
		}
	}
	for _, path := range []string{"usr/lib/udev/hwdb.bin", "etc/udev/hwdb.bin", "etc/initramfs-tools", "etc/apt", "etc/dpkg", "etc/kernel", "etc/logrotate.d", "etc/cron.daily", "etc/shadow-", "etc/passwd-", "etc/group-",
		"etc/gshadow-", "etc/subuid-", "etc/subgid-", "etc/.pwd.lock", "etc/ssh/moduli", "usr/lib/systemd/system/systemd-hwdb-update.service"} {
		if err := os.RemoveAll(b.in(path)); err != nil {
			return err
		}
	}
	keys, _ := filepath.Glob(b.in("etc/ssh/ssh_host_*"))
	for _, k := range keys {
		if err := os.Remove(k); err != nil {
			return err
		}
	}
	// The node has no users, so setuid and setgid bits have no use.
	return walk(b.tree, func(f file) error {
		if m := f.info.Mode(); m.IsRegular() && m&(fs.ModeSetuid|fs.ModeSetgid) != 0 {
			return os.Chmod(f.path, m.Perm())
		}
		return nil
	})
}

// prune removes everything below a directory that keep does not want; the directory stays.
func prune(dir string, keep func(name string) bool) error {
	entries, err := os.ReadDir(dir)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if keep(e.Name()) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// copyTree copies the files below from over those below to. Directories get mode 0755; files keep
// only whether they are executable.
func copyTree(from, to string) error {
	return walk(from, func(f file) error {
		rel, err := filepath.Rel(from, f.path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch mode := f.info.Mode(); {
		case mode.IsDir():
			return os.MkdirAll(target, 0o755)
		case mode&fs.ModeSymlink != 0:
			link, err := os.Readlink(f.path)
			if err != nil {
				return err
			}
			os.Remove(target)
			return os.Symlink(link, target)
		default:
			perm := fs.FileMode(0o644)
			if mode&0o100 != 0 {
				perm = 0o755
			}
			os.Remove(target)
			return copyFile(f.path, target, perm)
		}
	})
}

func copyFile(from, to string, perm fs.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, perm)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return os.Chmod(to, perm)
}

type file struct {
	path   string
	info   fs.FileInfo
	inode  uint64
	blocks int64
}

// walk calls f for everything below dir, and for dir itself, in the order of names.
func walk(dir string, f func(file) error) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st, _ := fi.Sys().(*syscall.Stat_t)
		return f(file{path, fi, st.Ino, st.Blocks})
	})
}
