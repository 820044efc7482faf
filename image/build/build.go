// Package build makes the image of the appliance from Debian packages: the root's tree, one slot, a
// disk that starts by BIOS and by UEFI, and the disk's formats for clouds. It needs root and the
// programs that `test/setup image` installs, and neither loop devices nor mounts.
package build

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/image/slot"
)

// Bounds of the result, in MiB.
const (
	MaxRoot = 200
	MaxSlot = 100
)

// Suite is the Debian release of the image.
const Suite = "trixie"

// Options configure a build.
type Options struct {
	// Debs are the package files of isthmusd and isthmus.
	Debs []string
	// Programs are further executable files of the root: a map from the path in the root to the
	// file here.
	Programs map[string]string
	// Keys are the files NAME.pub of the keys that the node accepts for slots. SigningKey is the
	// file of the key that signs this slot, and Password opens it.
	Keys                 []string
	SigningKey, Password string
	// Files is the directory image of the source tree.
	Files string
	// Out is the directory for the result. It is created if it is missing.
	Out string
	// Cache is a directory for downloaded Debian packages.
	Cache string
	// Mirror and Security are the mirrors of Debian and of its security updates. If one of them is
	// empty, mmdebstrap's defaults are used.
	Mirror, Security string
	// Kernel is one of Kernels; empty: "stable".
	Kernel string
	// Version is that of the slot. Its serial is the epoch.
	Version string
	// Epoch is the time of every file. Two builds with equal options and the same packages are
	// bit-identical.
	Epoch time.Time
	// Progress receives a line for each step; nil: none is written.
	Progress io.Writer
}

// Result is the result of a build.
type Result struct {
	Disk, Slot      string
	Signature, SBOM string
	// Root and SlotSize are in bytes.
	Root, SlotSize int64
	Packages       int
	Programs       int // names in bin and sbin
	Took           time.Duration
	SlotSum        string // SHA-256, hex
}

type builder struct {
	Options
	ctx   context.Context
	tree  string
	start time.Time
}

func (b *builder) step(format string, args ...any) {
	if b.Progress != nil {
		fmt.Fprintf(b.Progress, "image: %4.0f s  %s\n", time.Since(b.start).Seconds(), fmt.Sprintf(format, args...))
	}
}

// Build makes disk.raw, slot.img and sbom.json in o.Out. A build that fails leaves none of them.
func Build(ctx context.Context, o Options) (_ Result, err error) {
	if os.Geteuid() != 0 {
		return Result{}, errors.New("building the image: run this as root, because mmdebstrap must set the owners of files")
	}
	o.Kernel = cmp.Or(o.Kernel, "stable")
	if Kernels[o.Kernel] == "" {
		return Result{}, fmt.Errorf("building the image: kernel %q: give stable or backports", o.Kernel)
	}
	if err := os.MkdirAll(o.Out, 0o755); err != nil {
		return Result{}, fmt.Errorf("building the image: %w", err)
	}
	tmp, err := os.MkdirTemp(o.Out, ".build-")
	if err != nil {
		return Result{}, fmt.Errorf("building the image: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	b := &builder{Options: o, ctx: ctx, tree: filepath.Join(tmp, "tree"), start: time.Now()}
	r, err := b.build(tmp)
	if err != nil {
		return Result{}, fmt.Errorf("building the image: %w", err)
	}
	r.Took = time.Since(b.start)
	return r, nil
}

func (b *builder) build(tmp string) (r Result, err error) {
	b.step("installing Debian %s", Suite)
	if err := b.install(); err != nil {
		return r, err
	}
	b.step("finishing the root")
	if err := b.finish(); err != nil {
		return r, fmt.Errorf("finishing the root: %w", err)
	}
	bom, packages, err := b.sbom()
	if err != nil {
		return r, fmt.Errorf("listing packages: %w", err)
	}
	r.Packages = packages
	if err := b.trim(); err != nil {
		return r, fmt.Errorf("removing files of the build: %w", err)
	}
	if problems := Audit(b.tree); len(problems) > 0 {
		return r, fmt.Errorf("checking the root:\n  %s", strings.Join(problems, "\n  "))
	}
	if r.Root, err = size(b.tree); err != nil {
		return r, err
	}
	if r.Root > MaxRoot<<20 {
		return r, fmt.Errorf("the root has %d MiB, more than %d", r.Root>>20, MaxRoot)
	}
	if r.Programs, err = countPrograms(b.tree); err != nil {
		return r, err
	}
	b.step("packing the slot")
	img := filepath.Join(tmp, "slot.img")
	if err := b.squash(img); err != nil {
		return r, fmt.Errorf("packing the slot: %w", err)
	}
	fi, err := os.Stat(img)
	if err != nil {
		return r, err
	}
	if r.SlotSize = fi.Size(); r.SlotSize > MaxSlot<<20 {
		return r, fmt.Errorf("the slot has %d MiB, more than %d", r.SlotSize>>20, MaxSlot)
	}
	if r.SlotSum, err = sum(img); err != nil {
		return r, err
	}
	release := slot.Release{Version: b.Version, Serial: b.Epoch.Unix()}
	signature, err := slot.Sign(b.SigningKey, b.Password, img, release)
	if err != nil {
		return r, err
	}
	if s, err := slot.ParseSignature(signature); err != nil || s.Release != release {
		return r, fmt.Errorf("version %q: a version has 1 to 64 letters, digits, and . ~ + _ - (%w)", b.Version, err)
	}
	b.step("writing the disk")
	disk := filepath.Join(tmp, "disk.raw")
	if err := b.disk(tmp, img, disk, signature); err != nil {
		return r, fmt.Errorf("writing the disk: %w", err)
	}
	for name, text := range map[string][]byte{"sbom.json": bom, "slot.img.minisig": signature} {
		if err := os.WriteFile(filepath.Join(tmp, name), text, 0o644); err != nil {
			return r, err
		}
	}
	for name, p := range map[string]*string{"slot.img": &r.Slot, "slot.img.minisig": &r.Signature, "disk.raw": &r.Disk, "sbom.json": &r.SBOM} {
		*p = filepath.Join(b.Out, name)
		if err := os.Rename(filepath.Join(tmp, name), *p); err != nil {
			return r, err
		}
	}
	return r, nil
}

// squash packs the tree. All times are the epoch, and files have no extended attributes, so no
// capabilities either.
func (b *builder) squash(img string) error {
	// The loader supports no compression that packs better and unpacks as fast. SOURCE_DATE_EPOCH
	// is the time of all files.
	return b.run("mksquashfs", b.tree, img, "-comp", "gzip", "-b", "256K", "-noappend", "-no-progress", "-quiet", "-no-xattrs")
}

// run runs a program with the build's environment. Its output is part of the error.
func (b *builder) run(name string, args ...string) error {
	cmd := exec.CommandContext(b.ctx, name, args...)
	cmd.Env = b.env()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		text := out.String()
		if len(text) > 4000 {
			text = text[len(text)-4000:]
		}
		return fmt.Errorf("running %s: %w\n%s", name, err, text)
	}
	return nil
}

func (b *builder) env() []string {
	env := []string{"SOURCE_DATE_EPOCH=" + strconv.FormatInt(b.Epoch.Unix(), 10), "TZ=UTC", "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive"}
	for _, name := range []string{"PATH", "HOME", "TMPDIR", "http_proxy", "https_proxy", "no_proxy"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

func (b *builder) in(path ...string) string {
	return filepath.Join(append([]string{b.tree}, path...)...)
}

// size returns the bytes in the files below a directory, each counted once.
func size(dir string) (total int64, err error) {
	seen := map[uint64]bool{}
	err = walk(dir, func(f file) error {
		if f.info.Mode().IsRegular() && !seen[f.inode] {
			seen[f.inode] = true
			total += f.info.Size()
		}
		return nil
	})
	return total, err
}

// countPrograms counts the names in the directories of programs.
func countPrograms(dir string) (n int, err error) {
	for _, d := range []string{"usr/bin", "usr/sbin"} {
		entries, err := os.ReadDir(filepath.Join(dir, d))
		if err != nil {
			return 0, fmt.Errorf("counting programs: %w", err)
		}
		n += len(entries)
	}
	return n, nil
}

func sum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("reading %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// environment makes the partition "env" of a new disk.
func (b *builder) environment(tmp string, signature []byte) ([]byte, error) {
	fat, env := filepath.Join(tmp, "env.img"), filepath.Join(tmp, "grubenv")
	if err := errors.Join(os.WriteFile(fat, make([]byte, slot.EnvArea), 0o644), os.WriteFile(env, slot.FormatEnv(slot.Env{Good: slot.A}), 0o644), os.Chtimes(env, b.Epoch, b.Epoch)); err != nil {
		return nil, err
	}
	if err := b.run("mkfs.vfat", "--invariant", "-F", "12", "-n", "ENV", "-i", "69737469", fat); err != nil {
		return nil, err
	}
	if err := b.run("mcopy", "-m", "-i", fat, env, "::grubenv"); err != nil {
		return nil, err
	}
	area, err := os.ReadFile(fat)
	if err != nil {
		return nil, err
	}
	if at, err := slot.FindEnv(area); err != nil {
		return nil, err
	} else if at != slot.EnvAt {
		return nil, fmt.Errorf("the loader's block is at byte %d, but the initial RAM disk reads it at %d", at, slot.EnvAt)
	}
	out := make([]byte, slot.SignatureAt(slot.B)+slot.SignatureLimit)
	copy(out, area)
	copy(out[slot.SignatureAt(slot.A):], slot.SignatureBlock(signature))
	return out, nil
}
