package vm

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"

	"golang.org/x/sys/unix"
)

const emulator = "qemu-system-x86"

// QEMU is an installed QEMU.
type QEMU struct {
	command, env []string
}

// FindQEMU returns Debian 13's QEMU 10, whatever this machine has: without KVM a guest starts
// programs four times faster than under Debian 12's 7.2. It and its libraries are unpacked into the
// cache the first time, which takes a minute and the network.
func FindQEMU(ctx context.Context, progress io.Writer) (*QEMU, error) {
	dir, err := Kept(ctx, "qemu-"+Digest([]byte(emulator)), progress, func(dir string, step func(string)) error {
		step("unpacking QEMU of Debian " + Trixie + " (once, a minute)")
		return Debian(ctx, Trixie, dir, "--variant=extract", "--include="+emulator)
	})
	if err != nil {
		return nil, fmt.Errorf("installing QEMU: %w", err)
	}
	usr := filepath.Join(dir, "usr")
	libraries := filepath.Join(usr, "lib/x86_64-linux-gnu")
	return &QEMU{
		// The loader is Debian 13's as well, since this machine's may be older than the libraries.
		command: []string{
			filepath.Join(usr, "lib64/ld-linux-x86-64.so.2"), "--library-path", libraries, filepath.Join(usr, "bin/qemu-system-x86_64"),
			"-L", filepath.Join(usr, "share/qemu"), "-L", filepath.Join(usr, "share/seabios"), "-L", filepath.Join(usr, "lib/ipxe/qemu"),
		},
		env: []string{"QEMU_MODULE_DIR=" + filepath.Join(libraries, "qemu")},
	}, nil
}

// Command returns the command that starts QEMU with these arguments.
func (q *QEMU) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, q.command[0], slices.Concat(q.command[1:], args)...)
	cmd.Env = append(os.Environ(), q.env...)
	return cmd
}

// Processor returns QEMU's options for the processor: KVM where it works, else emulation.
func Processor() []string {
	if KVM() {
		return []string{"-accel", "kvm", "-cpu", "host"}
	}
	// Without cx16=off about one boot in ten died under QEMU 7.2, whose cmpxchg16b could leave
	// garbage in the flags when an interrupt followed it. With fsrm or fsrs the kernel fills memory
	// byte by byte, which is four times slower under emulation.
	return []string{"-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,la57=off,cx16=off,fsrm=off,fsrs=off"}
}

var hardwareVirtualisation = regexp.MustCompile(`(?m)^flags\b.*\s(vmx|svm)\b`)

// KVM reports whether this machine runs guests in hardware: the processor has the extension and the
// kernel makes a virtual CPU. A device node, or a virtual CPU, alone proves too little: containers
// have the one without permission, and paravirtual replacements (kvm-pvm) make the other but do not
// run a Debian kernel. ISTHMUS_KVM=0 turns it off where a broken nested KVM passes all this.
func KVM() bool {
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || !hardwareVirtualisation.Match(cpu) || os.Getenv("ISTHMUS_KVM") == "0" {
		return false
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	const createVM, createVCPU = 0xae01, 0xae41 // linux/kvm.h
	vm, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), createVM, 0)
	if errno != 0 {
		return false
	}
	defer unix.Close(int(vm))
	vcpu, _, errno := unix.Syscall(unix.SYS_IOCTL, vm, createVCPU, 0)
	if errno != 0 {
		return false
	}
	unix.Close(int(vcpu))
	return true
}
