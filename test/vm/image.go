// Package vm boots a throw-away Debian machine whose kernel has everything that isthmus uses (ESP,
// xfrm interfaces, WireGuard, VRF, conntrack), and runs one command in it as root. A topology of
// any size then uses the network namespaces of that one machine. QEMU uses KVM where KVM works and
// software emulation where it does not.
package vm

import (
	"bytes"
	"context"
	"debug/elf"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Debian releases that a root can be made from. Tests use that of the image unless they name
// another.
const (
	Trixie   = "trixie"
	Bookworm = "bookworm"
)

const version = 1 // of the build steps below: raise it when they change the result

var (
	//go:embed packages.txt
	packageList string
	//go:embed init.sh
	guestInit []byte
	//go:embed stage2.sh
	stage2 string // comes with the payload: changing it does not change the image
)

// bootModules are the modules that the initramfs needs to reach the root; loadOrder adds their
// dependencies.
var bootModules = []string{"virtio_pci", "virtio_blk", "virtio_console", "overlay"}

// keptModules are the directories below kernel/ that stay in the root. The
// rest of the kernel's modules are drivers for hardware that no guest has.
var keptModules = []string{"net", "crypto", "arch", "lib", "drivers/net", "drivers/virtio", "drivers/char/virtio_console.ko", "drivers/block/virtio_blk.ko", "fs"}

// Image is a built root: a Debian tree, the same tree as an ext4 file
// system, its kernel and an initramfs. It is never written after the build.
type Image struct {
	// Dir holds all of it.
	Dir string
}

// Tree is the root as a directory, to run the peers' programs from by chroot.
func (i *Image) Tree() string { return filepath.Join(i.Dir, "tree") }

func (i *Image) disk() string      { return filepath.Join(i.Dir, "root.ext4") }
func (i *Image) initramfs() string { return filepath.Join(i.Dir, "initramfs.cpio") }
func (i *Image) kernel() string    { return filepath.Join(i.Dir, "kernel") }

// packages returns those of a suite: a line may name the suite that it is for.
func packages(suite string) []string {
	var p []string
	for line := range strings.Lines(packageList) {
		f := strings.Fields(line)
		if len(f) > 0 && !strings.HasPrefix(f[0], "#") && (len(f) == 1 || f[1] == suite) {
			p = append(p, f[0])
		}
	}
	return p
}

// Build returns the cached image of Debian 13 and makes it first when it is not there, which takes
// a minute or two and the network. Its name is a digest of everything that decides its content. One
// process builds, others wait for it; an interrupted build leaves nothing that the next one would
// take for complete. Progress is written as short lines.
func Build(ctx context.Context, progress io.Writer) (*Image, error) {
	return buildSuite(ctx, Trixie, progress)
}

func buildSuite(ctx context.Context, suite string, progress io.Writer) (*Image, error) {
	if suite != Trixie && suite != Bookworm {
		return nil, fmt.Errorf("building the guest root: suite %q: it is %s or %s", suite, Trixie, Bookworm)
	}
	h := append(fmt.Appendln(nil, version, suite, packages(suite), bootModules, keptModules), guestInit...)
	dir, err := Kept(ctx, "root-"+Digest(h), progress, func(dir string, step func(string)) error {
		return build(ctx, suite, &Image{Dir: dir}, step)
	})
	if err != nil {
		return nil, fmt.Errorf("building the guest root: %w", err)
	}
	return &Image{Dir: dir}, nil
}

func build(ctx context.Context, suite string, img *Image, step func(string)) error {
	tree := img.Tree()
	step("installing Debian " + suite + " with strongSwan, BIRD and FRR into a directory (once, 1-2 minutes)")
	// dpkg-deb -x would replace the symbolic link /lib by a directory, hence tar.
	libreswan := `cd "$1/tmp" && APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get -qq download libreswan &&` +
		` dpkg-deb --fsys-tarfile libreswan_*.deb | tar -x --keep-directory-symlink -C "$1" && rm -f libreswan_*.deb`
	err := Debian(ctx, suite, tree, "--variant=minbase", "--include="+strings.Join(packages(suite), ","),
		"--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=force-unsafe-io",
		"--customize-hook="+libreswan,
		"--customize-hook=rm -rf \"$1\"/var/cache/apt/* \"$1\"/var/lib/apt/lists/*")
	if err != nil {
		return err
	}
	if fi, err := os.Lstat(filepath.Join(tree, "lib")); err != nil || fi.Mode()&fs.ModeSymlink == 0 {
		return errors.New("checking the tree: /lib is not a symbolic link: a package was unpacked over it")
	}
	for _, d := range []string{"payload", "out", "vm", "lab"} {
		if err := os.MkdirAll(filepath.Join(tree, d), 0o755); err != nil {
			return err
		}
	}
	step("preparing kernel and modules")
	vers, err := os.ReadDir(filepath.Join(tree, "usr/lib/modules"))
	if err != nil || len(vers) != 1 {
		return fmt.Errorf("looking for one kernel in the tree: %d found: %w", len(vers), err)
	}
	kver := vers[0].Name()
	if err := prepareModules(ctx, tree, kver); err != nil {
		return fmt.Errorf("preparing modules: %w", err)
	}
	if err := prepareKernel(ctx, filepath.Join(tree, "boot/vmlinuz-"+kver), img.kernel()); err != nil {
		return fmt.Errorf("preparing the kernel: %w", err)
	}
	if err := os.RemoveAll(filepath.Join(tree, "boot")); err != nil {
		return err
	}
	if err := writeInitramfs(tree, kver, img.initramfs()); err != nil {
		return fmt.Errorf("writing the initramfs: %w", err)
	}
	step("writing the file system image")
	var size int64
	err = filepath.WalkDir(tree, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if fi, err := d.Info(); err == nil && fi.Mode().IsRegular() {
			size += (fi.Size() + 4095) &^ 4095
		} else {
			size += 4096
		}
		return nil
	})
	if err != nil {
		return err
	}
	return run(ctx, "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-m", "0", "-b", "4096",
		"-E", "root_owner=0:0", "-d", tree, img.disk(), fmt.Sprintf("%dM", size*12/10>>20+64))
}

// prepareModules keeps the modules that a router can use, unpacked (Debian 13 compresses modules)
// and without the two parts that cost emulated time at each load: the signature and the type
// information.
func prepareModules(ctx context.Context, tree, kver string) error {
	dir := filepath.Join(tree, "usr/lib/modules", kver)
	kernel := filepath.Join(dir, "kernel")
	var packed, kept []string
	err := filepath.WalkDir(kernel, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, _ := filepath.Rel(kernel, p)
		keep := slices.ContainsFunc(keptModules, func(k string) bool {
			return strings.HasPrefix(rel, k+"/") || strings.TrimSuffix(rel, ".xz") == k
		})
		if !keep {
			return os.Remove(p)
		}
		if strings.HasSuffix(p, ".xz") {
			packed = append(packed, p)
		}
		kept = append(kept, strings.TrimSuffix(p, ".xz"))
		return nil
	})
	if err != nil {
		return err
	}
	for part := range slices.Chunk(packed, 200) {
		if err := run(ctx, "xz", append([]string{"-d"}, part...)...); err != nil {
			return err
		}
	}
	for _, p := range kept {
		if err := stripModule(p); err != nil {
			return err
		}
	}
	return run(ctx, "chroot", tree, "depmod", kver)
}

// stripModule cuts an appended signature off (Documentation/admin-guide/module-signing.rst:
// signature, 12 byte trailer, magic string) and renames the section .BTF so that the
// kernel does not find it.
func stripModule(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	const magic = "~Module signature appended~\n"
	if bytes.HasSuffix(b, []byte(magic)) {
		end := len(b) - len(magic)
		b = b[:end-12-int(binary.BigEndian.Uint32(b[end-4:end]))]
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	if f.Section(".BTF") != nil {
		names := f.Section(".shstrtab")
		if i := bytes.Index(b[names.Offset:names.Offset+names.Size], []byte("\x00.BTF\x00")); i >= 0 {
			b[int(names.Offset)+i+1] = '-'
		}
	}
	return os.WriteFile(path, b, 0o644)
}

// prepareKernel unpacks the kernel: booting the ELF image by its PVH entry saves unpacking 50 MB
// under emulation. The guest unpacks an unknown compression itself, which only costs time.
func prepareKernel(ctx context.Context, bz, dst string) error {
	b, err := os.ReadFile(bz)
	if err != nil {
		return err
	}
	for _, p := range []struct {
		magic string
		cmd   []string
	}{
		{"\x02\x21\x4c\x18", []string{"lz4", "-dcq"}},
		{"\xfd7zXZ\x00", []string{"xz", "-dcq"}},
		{"\x28\xb5\x2f\xfd", []string{"zstd", "-dcq"}},
	} {
		for off := 0; ; {
			i := bytes.Index(b[off:], []byte(p.magic))
			if i < 0 {
				break
			}
			cmd := exec.CommandContext(ctx, p.cmd[0], p.cmd[1:]...)
			cmd.Stdin = bytes.NewReader(b[off+i:])
			out, _ := cmd.Output() // every unpacker complains about the data after the packed part
			if bytes.HasPrefix(out, []byte(elf.ELFMAG)) {
				return os.WriteFile(dst, out, 0o644)
			}
			off += i + 1
		}
	}
	return os.WriteFile(dst, b, 0o644)
}

// loadOrder returns the named modules with their dependencies, dependencies first.
func loadOrder(tree, kver string, names []string) ([]string, error) {
	b, err := os.ReadFile(filepath.Join(tree, "usr/lib/modules", kver, "modules.dep"))
	if err != nil {
		return nil, err
	}
	builtin, err := os.ReadFile(filepath.Join(tree, "usr/lib/modules", kver, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	var order []string
	for _, want := range names {
		found := strings.Contains(string(builtin), "/"+want+".ko\n")
		for line := range strings.Lines(string(b)) {
			file, deps, _ := strings.Cut(line, ":")
			name := strings.ReplaceAll(strings.TrimSuffix(filepath.Base(file), ".ko"), "-", "_")
			if name != want {
				continue
			}
			found = true
			need := strings.Fields(deps)
			slices.Reverse(need)
			for _, m := range append(need, file) {
				if !slices.Contains(order, m) {
					order = append(order, m)
				}
			}
		}
		if !found {
			return nil, fmt.Errorf("looking for module %s: not in modules.dep", want)
		}
	}
	return order, nil
}

// writeInitramfs writes a cpio archive in the "newc" format
// (Documentation/driver-api/early-userspace/buffer-format.rst).
func writeInitramfs(tree, kver, dst string) error {
	var w bytes.Buffer
	ino := 0
	add := func(name string, mode int, data []byte) {
		ino++
		fmt.Fprintf(&w, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
			ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
		w.Write(make([]byte, -w.Len()&3))
		w.Write(data)
		w.Write(make([]byte, -w.Len()&3))
	}
	busybox, err := os.ReadFile(filepath.Join(tree, "bin/busybox"))
	if err != nil {
		return err
	}
	for _, d := range []string{"bin", "dev", "proc", "sys", "m", "l", "rw", "n"} {
		add(d, unix.S_IFDIR|0o755, nil)
	}
	add("bin/busybox", unix.S_IFREG|0o755, busybox)
	add("init", unix.S_IFREG|0o755, guestInit)
	mods, err := loadOrder(tree, kver, bootModules)
	if err != nil {
		return err
	}
	for i, m := range mods {
		b, err := os.ReadFile(filepath.Join(tree, "usr/lib/modules", kver, m))
		if err != nil {
			return err
		}
		add(fmt.Sprintf("m/%02d-%s", i, filepath.Base(m)), unix.S_IFREG|0o644, b)
	}
	add("TRAILER!!!", 0, nil)
	return os.WriteFile(dst, w.Bytes(), 0o644)
}
