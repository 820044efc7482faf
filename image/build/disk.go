package build

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/isthmus-net/isthmus/image/slot"
)

// The disk, in MiB. The rest, at least 64 MiB, becomes the partition "data" at the first boot.
// Google accepts whole GiB, Azure whole MiB.
const (
	biosMiB = 1
	espMiB  = 64
	envMiB  = 2
	SlotMiB = 256
	DiskMiB = 2048

	biosAt  = 1
	espAt   = biosAt + biosMiB
	envAt   = espAt + espMiB
	slotAAt = envAt + envMiB
)

const (
	mib    = 1 << 20
	sector = 512
)

// disk writes a GPT disk with the loaders of both firmwares, an empty environment block and the
// slot in slot a.
//
// GRUB for BIOS is made of Debian's modules. UEFI starts Debian's signed shim and GRUB, whose
// prefix is /EFI/debian.
func (b *builder) disk(tmp, img, disk string, signature []byte) error {
	loader := filepath.Join(tmp, "loader")
	args := []string{"--quiet", "--mode=root", "--variant=extract", "--include=grub-pc-bin,grub-efi-amd64-signed,shim-signed",
		"--skip=download/empty", `--setup-hook=mkdir -p "$1"/var/cache/apt/archives`,
		"--setup-hook=sync-in " + filepath.Join(b.Cache, "archives-"+Suite) + " /var/cache/apt/archives", Suite, loader}
	if b.Mirror != "" {
		args = append(args, b.Mirror)
	}
	if err := b.run("mmdebstrap", args...); err != nil {
		return fmt.Errorf("fetching the loaders: %w", err)
	}
	bios := filepath.Join(loader, "usr/lib/grub/i386-pc")
	core := filepath.Join(tmp, "core.img")
	if err := b.run("grub-mkimage", "-O", "i386-pc", "-d", bios, "-p", "(,gpt2)/EFI/debian", "-o", core,
		"biosdisk", "part_gpt", "fat", "squash4", "normal", "linux", "loadenv", "test", "true", "echo", "regexp", "configfile", "serial", "terminal", "sleep", "reboot"); err != nil {
		return err
	}
	esp := filepath.Join(tmp, "esp.img")
	if err := b.esp(loader, esp); err != nil {
		return fmt.Errorf("making the EFI system partition: %w", err)
	}
	if err := os.WriteFile(disk, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(disk, DiskMiB*mib); err != nil {
		return err
	}
	script := filepath.Join(tmp, "table")
	if err := os.WriteFile(script, []byte(partitions()), 0o644); err != nil {
		return err
	}
	if err := b.run("sh", "-c", `exec sfdisk --quiet --no-reread --no-tell-kernel "$1" < "$2"`, "sh", disk, script); err != nil {
		return err
	}
	d, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	boot, err := os.ReadFile(filepath.Join(bios, "boot.img"))
	if err != nil {
		return err
	}
	if len(boot) < sector {
		return fmt.Errorf("boot.img of GRUB has %d bytes", len(boot))
	}
	image, err := os.ReadFile(core)
	if err != nil {
		return err
	}
	if len(image) > biosMiB*mib {
		return fmt.Errorf("GRUB's core has %d bytes, more than its partition", len(image))
	}
	if err := install(boot, image, biosAt*mib/sector); err != nil {
		return err
	}
	env, err := b.environment(tmp, signature)
	if err != nil {
		return fmt.Errorf("making the partition of the loader's block: %w", err)
	}
	for at, data := range map[int64][]byte{0: boot[:440], biosAt * mib: image, envAt * mib: env} {
		if _, err := d.WriteAt(data, at); err != nil {
			return err
		}
	}
	for at, path := range map[int]string{espAt: esp, slotAAt: img} {
		if err := b.run("dd", "if="+path, "of="+disk, "bs=1M", fmt.Sprintf("seek=%d", at), "conv=notrunc,sparse", "status=none"); err != nil {
			return err
		}
	}
	return d.Close()
}

// partitions returns the table for sfdisk. The loader identifies partitions by their numbers,
// everything else by their names.
func partitions() string {
	const guid = "69737468-6d75-7300-0000-0000000000"
	// x86-64, UAPI.2 Discoverable Partitions Specification
	const root = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
	const env = "69737468-6D75-7300-656E-760000000000" // ours: a type that no other program uses
	// ours too: systemd-gpt-auto-generator ignores it
	noAuto := `attrs="GUID:63"`
	return strings.Join([]string{
		"label: gpt", "label-id: " + guid + "00", "first-lba: 2048",
		fmt.Sprintf("start=%dMiB, size=%dMiB, type=21686148-6449-6E6F-744E-656564454649, uuid=%s01, name=bios", biosAt, biosMiB, guid),
		fmt.Sprintf("start=%dMiB, size=%dMiB, type=uefi, uuid=%s02, name=esp, %s", espAt, espMiB, guid, noAuto),
		fmt.Sprintf("start=%dMiB, size=%dMiB, type=%s, uuid=%s03, name=%s, %s", envAt, envMiB, env, guid, slot.EnvLabel, noAuto),
		fmt.Sprintf("start=%dMiB, size=%dMiB, type=%s, uuid=%s0a, name=%s, %s", slotAAt, SlotMiB, root, guid, slot.A.Label(), noAuto),
		fmt.Sprintf("start=%dMiB, size=%dMiB, type=%s, uuid=%s0b, name=%s, %s", slotAAt+SlotMiB, SlotMiB, root, guid, slot.B.Label(), noAuto),
	}, "\n") + "\n"
}

// install does in memory what grub-bios-setup does: it writes the location of the core into the
// boot sector, and the location of the core's second sector into its first (GRUB manual, "BIOS
// installation"; struct grub_boot_blocklist in GRUB's i386/pc/boot.h).
func install(boot, core []byte, at uint64) error {
	const (
		kernelSector = 0x5c // GRUB_BOOT_MACHINE_KERNEL_SECTOR
		driveCheck   = 0x66 // GRUB_BOOT_MACHINE_DRIVE_CHECK
		blocklist    = 12
	)
	if len(core) < 2*sector {
		return fmt.Errorf("GRUB's core has %d bytes", len(core))
	}
	binary.LittleEndian.PutUint64(boot[kernelSector:], at)
	copy(boot[driveCheck:], []byte{0x90, 0x90}) // the BIOS's drive number is right
	binary.LittleEndian.PutUint64(core[sector-blocklist:], at+1)
	return nil
}

// esp makes the EFI system partition, with fixed times and a fixed serial number.
func (b *builder) esp(loader, esp string) error {
	if err := os.WriteFile(esp, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(esp, espMiB*mib); err != nil {
		return err
	}
	if err := b.run("mkfs.vfat", "--invariant", "-F", "32", "-n", "ESP", "-i", "69737468", esp); err != nil {
		return err
	}
	if err := b.run("mmd", "-i", esp, "::EFI", "::EFI/BOOT", "::EFI/debian"); err != nil {
		return err
	}
	// The order is fixed, because a directory has its files in the order in which they were copied.
	for _, f := range [][2]string{
		{filepath.Join(loader, "usr/lib/shim/shimx64.efi.signed"), "EFI/BOOT/BOOTX64.EFI"},
		{filepath.Join(loader, "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"), "EFI/BOOT/grubx64.efi"},
		{filepath.Join(b.Files, "grub.cfg"), "EFI/debian/grub.cfg"},
	} {
		from, to := f[0], f[1]
		copied := filepath.Join(filepath.Dir(esp), "esp-"+filepath.Base(to))
		if err := copyFile(from, copied, 0o644); err != nil {
			return err
		}
		if err := os.Chtimes(copied, b.Epoch, b.Epoch); err != nil {
			return err
		}
		if err := b.run("mcopy", "-m", "-i", esp, copied, "::"+to); err != nil {
			return err
		}
	}
	return nil
}
