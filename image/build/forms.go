package build

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Form is the disk in a format that a cloud or a hypervisor accepts.
type Form struct {
	// For is the cloud or hypervisor.
	For, Path string
	// Size is the file's size in bytes, and Allocated the disk space that it uses.
	Size, Allocated int64
}

// Forms makes the formats of a disk from Build, in the same directory.
//
// AWS accepts the stream-optimized VMDK, or the raw disk, as a snapshot (VM Import/Export User
// Guide, "Importing a disk as a snapshot"). Azure accepts a fixed VHD whose size is a whole number
// of MiB ("Create and upload a generic Linux VHD"). Google accepts a gzipped tar archive in the old
// GNU format with one file, disk.raw, of whole GiB ("Import a disk manually").
func Forms(ctx context.Context, disk string, epoch time.Time) (out []Form, err error) {
	dir := filepath.Dir(disk)
	b := &builder{Options: Options{Epoch: epoch}, ctx: ctx}
	forms := []struct {
		who, name string
		make      func(path string) error
	}{
		{"KVM", "isthmus.qcow2", func(p string) error { return b.run("qemu-img", "convert", "-c", "-O", "qcow2", disk, p) }},
		{"AWS", "isthmus.vmdk", func(p string) error {
			return b.run("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", disk, p)
		}},
		// Without force_size, the size is rounded to cylinders.
		{"Azure", "isthmus.vhd", func(p string) error {
			if err := b.run("qemu-img", "convert", "-O", "vpc", "-o", "subformat=fixed,force_size=on", disk, p); err != nil {
				return err
			}
			return checkVHD(p)
		}},
		{"Google", "isthmus.tar.gz", func(p string) error {
			return b.run("sh", "-c", `tar --format=oldgnu -S --mtime=@$SOURCE_DATE_EPOCH --owner=0 --group=0 --numeric-owner -C "$1" -cf - "$2" | gzip -n -6 > "$3"`, "sh", dir, filepath.Base(disk), p)
		}},
	}
	for _, f := range forms {
		path := filepath.Join(dir, f.name)
		if err := errors.Join(f.make(path), ctx.Err()); err != nil {
			os.Remove(path)
			return nil, fmt.Errorf("making the disk for %s: %w", f.who, err)
		}
		form, err := form(f.who, path)
		if err != nil {
			return nil, err
		}
		out = append(out, form)
	}
	raw, err := form("AWS, KVM", disk)
	return append(out, raw), err
}

func form(who, path string) (Form, error) {
	var allocated int64
	fi, err := os.Stat(path)
	if err != nil {
		return Form{}, err
	}
	err = walk(path, func(f file) error { allocated = f.blocks * 512; return nil })
	return Form{For: who, Path: path, Size: fi.Size(), Allocated: allocated}, err
}

// checkVHD checks the footer of a fixed VHD (Virtual Hard Disk Image Format Specification 1.0):
// Azure refuses a size that is not a whole number of MiB.
func checkVHD(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	footer := make([]byte, 512)
	if _, err := f.ReadAt(footer, fi.Size()-512); err != nil {
		return err
	}
	const fixed = 2
	var wrong []string
	if string(footer[:8]) != "conectix" {
		wrong = append(wrong, "it has no footer")
	}
	if binary.BigEndian.Uint32(footer[60:]) != fixed {
		wrong = append(wrong, "it is not a fixed disk")
	}
	if n := binary.BigEndian.Uint64(footer[48:]); n != uint64(fi.Size()-512) || n%mib != 0 {
		wrong = append(wrong, fmt.Sprintf("its size is %d bytes, the file has %d", n, fi.Size()))
	}
	if len(wrong) > 0 {
		return fmt.Errorf("checking %s: %s", path, strings.Join(wrong, ", "))
	}
	return nil
}
