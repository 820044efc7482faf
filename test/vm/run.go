package vm

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Config describes a run in the guest. The zero value of each field is usable.
type Config struct {
	// Command is run as root in /payload, which has the files of Payload. It is looked up in $PATH;
	// programs of the payload are "./name".
	Command []string
	// Payload are files and directories of this machine. A file keeps its base
	// name; of a directory the content is copied.
	Payload []string
	// Env are further VAR=value pairs for the command; ISTHMUS_VM=1 is always set.
	Env []string
	// Out, if not "", receives the files that the command left in the guest's /out.
	Out string
	// Stdout and Stderr receive the command's output as it comes. Nil discards it.
	Stdout, Stderr io.Writer
	// TTY connects the command to this process's terminal instead; Stdout and
	// Stderr are not used.
	TTY bool
	// Suite is the Debian release of the guest; Trixie if "".
	Suite string
	// Limit ends command and guest; 10 minutes if 0, none with TTY.
	Limit time.Duration
	// CPUs (2) and MemoryMiB (2048) of the guest.
	CPUs, MemoryMiB int
	// Modules are loaded before the command; DefaultModules if nil.
	Modules []string
	// Progress receives lines about building and booting. Nil discards them.
	Progress io.Writer

	qemu *QEMU // of tests; FindQEMU's if nil
}

// DefaultModules are the modules that the topologies need. Loading them all before anything is
// measured keeps module loading (tens of milliseconds each under emulation) out of the first IKE
// exchange.
var DefaultModules = []string{
	"veth", "bridge", "dummy", "tun", "vrf", "wireguard", "af_packet",
	"xfrm_user", "xfrm_interface", "esp4", "esp6", "gcm", "seqiv", "echainiv", "cbc", "ctr", "authenc", "sha256_generic", "aesni_intel",
	"nf_tables", "nft_chain_nat", "nft_ct", "nft_nat", "nft_masq", "nft_log", "nft_limit", "nf_conntrack_netlink",
}

// ErrGuest means that the guest ended without the command's exit status.
var ErrGuest = errors.New("guest ended without a status")

// Inside reports whether this process runs in a guest that Run has started.
func Inside() bool { return os.Getenv("ISTHMUS_VM") == "1" }

// Run boots the image, runs the command and returns its exit status. Nothing is
// left afterwards, nor when ctx ends. Only one guest runs on this machine and
// user at a time: two would spoil each other's timing under emulation.
//
// After Limit the command is terminated (status 124, or 137 when it needed SIGKILL) and Out is
// still filled; a guest that does not manage that is ended half a minute later with an error.
func Run(ctx context.Context, c Config) (status int, err error) {
	if c.Progress == nil {
		c.Progress = io.Discard
	}
	if c.Suite == "" {
		c.Suite = Trixie
	}
	img, err := buildSuite(ctx, c.Suite, c.Progress)
	if err != nil {
		return 0, err
	}
	if c.qemu == nil {
		if c.qemu, err = FindQEMU(ctx, c.Progress); err != nil {
			return 0, err
		}
	}
	unlock, err := Lock(ctx, filepath.Join(filepath.Dir(img.Dir), "run.lock"))
	if err != nil {
		return 0, err
	}
	defer unlock()
	for boots := 1; ; boots++ {
		status, err = boot(ctx, c, img)
		// Under emulation a kernel sometimes crashes, such as when another processor executes code
		// that it is patching (seen once in a few hundred boots). The command has not been started
		// then.
		if errors.Is(err, errUnborn) && boots < maxBoots {
			fmt.Fprintf(c.Progress, "vm: booting again, since the %v\n", err)
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("running the guest: %w", err)
		}
		return status, nil
	}
}

// maxBoots is how often a guest that dies before it runs the command is booted.
const maxBoots = 3

// errUnborn is ErrGuest before the command was started.
var errUnborn = fmt.Errorf("%w while it booted", ErrGuest)

func boot(ctx context.Context, c Config, img *Image) (status int, err error) {
	dir, err := os.MkdirTemp("", "ist-vm-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	limit := c.Limit
	if limit == 0 {
		limit = 10 * time.Minute
	}
	if !c.TTY {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit+30*time.Second)
		defer cancel()
	}
	env := guestEnv(c, limit)
	if c.TTY {
		restore, err := rawTerminal()
		if err != nil {
			return 0, err
		}
		defer restore()
	}
	in, out := filepath.Join(dir, "in.tar"), filepath.Join(dir, "out.tar")
	if err := writePayload(in, c, env); err != nil {
		return 0, fmt.Errorf("packing the payload: %w", err)
	}
	if err := os.WriteFile(out, nil, 0o600); err != nil {
		return 0, err
	}
	if err := os.Truncate(out, 1<<30); err != nil { // sparse
		return 0, err
	}

	// QEMU connects to these. An EOF from our side would close the guest's port,
	// which is why they are sockets and not pipes.
	ports := map[string]net.Listener{}
	for _, name := range []string{"status", "out", "err", "tty"} {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			return 0, err
		}
		defer l.Close()
		ports[name] = l
	}
	args := qemuArgs(c, img, dir)
	cmd := c.qemu.Command(ctx, args...)
	// a terminal's ^C is ours to handle
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	var qemuErr strings.Builder
	cmd.Stderr = &qemuErr
	started := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	var wg sync.WaitGroup
	serve := func(name string, f func(net.Conn)) {
		wg.Go(func() {
			conn, err := ports[name].Accept()
			if err != nil {
				return // QEMU died before it connected; Wait returns why
			}
			defer conn.Close()
			f(conn)
		})
	}
	copyTo := func(w io.Writer) func(net.Conn) {
		if w == nil {
			w = io.Discard
		}
		return func(conn net.Conn) { io.Copy(w, conn) }
	}
	status = -1
	unborn := true
	serve("status", func(conn net.Conn) {
		for s := bufio.NewScanner(conn); s.Scan(); {
			switch what, value, _ := strings.Cut(s.Text(), " "); what {
			case "started":
				unborn = false
				fmt.Fprintf(c.Progress, "vm: command started after %.1f s of wall time, %s s of guest time\n", time.Since(started).Seconds(), value)
			case "exit":
				if n, err := strconv.Atoi(value); err == nil {
					status = n
				}
			}
		}
	})
	serve("out", copyTo(c.Stdout))
	serve("err", copyTo(c.Stderr))
	serve("tty", func(conn net.Conn) {
		if c.TTY {
			// ends with the process, or at the next key after the guest is gone
			go io.Copy(conn, os.Stdin)
			io.Copy(os.Stdout, conn)
		} else {
			io.Copy(io.Discard, conn)
		}
	})
	err = cmd.Wait()
	for _, l := range ports {
		l.Close()
	}
	wg.Wait()
	if ctx.Err() != nil {
		return 0, fmt.Errorf("%w\n%s", context.Cause(ctx), console(dir))
	}
	if status < 0 {
		reason := ErrGuest
		if unborn {
			reason = errUnborn
		}
		return 0, fmt.Errorf("%w: %v\n%s%s", reason, err, qemuErr.String(), console(dir))
	}
	if c.Out != "" {
		if err := unpack(out, c.Out); err != nil {
			return 0, fmt.Errorf("receiving files: %w", err)
		}
	}
	return status, nil
}

// console returns the end of the guest's kernel console, which has the reason why a guest died.
func console(dir string) string {
	b, _ := os.ReadFile(filepath.Join(dir, "console"))
	return tail(b)
}

func qemuArgs(c Config, img *Image, dir string) []string {
	cpus, mem := c.CPUs, c.MemoryMiB
	if cpus == 0 {
		cpus = 2
	}
	if mem == 0 {
		mem = 2048
	}
	args := append(Processor(),
		"-smp", strconv.Itoa(cpus), "-m", strconv.Itoa(mem),
		// q35 boots several seconds faster than pc under emulation; microvm does not boot Debian's
		// kernel.
		"-M", "q35,usb=off,vmport=off,i8042=off,smbus=off,sata=off",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", img.kernel(), "-initrd", img.initramfs(),
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check cryptomgr.notests"+
			" apparmor=0 audit=0 noreplace-smp random.trust_cpu=on 8250.nr_uarts=1",
		"-chardev", "file,id=console,path="+filepath.Join(dir, "console"), "-serial", "chardev:console",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=tty,path="+filepath.Join(dir, "tty"), "-device", "virtconsole,chardev=tty",
	)
	for _, name := range []string{"status", "out", "err"} {
		args = append(args, "-chardev", "socket,id="+name+",path="+filepath.Join(dir, name),
			"-device", "virtserialport,chardev="+name+",name="+name)
	}
	for i, d := range []string{
		"file=" + img.disk() + ",readonly=on", "file=" + filepath.Join(dir, "in.tar") + ",readonly=on", "file=" + filepath.Join(dir, "out.tar"),
	} {
		args = append(args, "-drive", fmt.Sprintf("%s,if=none,id=d%d,format=raw,cache=unsafe", d, i), "-device", fmt.Sprintf("virtio-blk-pci,drive=d%d", i))
	}
	return args
}

// guestEnv is a shell script that the guest reads before it runs the command.
func guestEnv(c Config, limit time.Duration) string {
	var b strings.Builder
	mods := c.Modules
	if mods == nil {
		mods = DefaultModules
	}
	fmt.Fprintf(&b, "MODULES=%s\nVM_LIMIT=%d\nexport ISTHMUS_VM=1\n", quote(strings.Join(mods, " ")), int(limit.Seconds()))
	if c.TTY {
		rows, cols := 24, 80
		if ws, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ); err == nil && ws.Row > 0 {
			rows, cols = int(ws.Row), int(ws.Col)
		}
		term := os.Getenv("TERM")
		if term == "" {
			term = "vt100"
		}
		fmt.Fprintf(&b, "VM_TTY='%d %d'\nexport TERM=%s\n", rows, cols, quote(term))
	}
	for _, e := range c.Env {
		name, value, _ := strings.Cut(e, "=")
		fmt.Fprintf(&b, "export %s=%s\n", name, quote(value))
	}
	return b.String()
}

// quote makes s one word of a POSIX shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// writePayload writes the tar archive that the guest unpacks over its root.
func writePayload(dst string, c Config, env string) (err error) {
	f, err := os.Create(dst)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	var words []string
	for _, a := range c.Command {
		words = append(words, quote(a))
	}
	for name, text := range map[string]string{"vm/env": env, "vm/stage2": stage2, "vm/command": "#!/bin/sh\nexec " + strings.Join(words, " ") + "\n"} {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(text))}); err != nil {
			return err
		}
		if _, err := io.WriteString(w, text); err != nil {
			return err
		}
	}
	for _, p := range c.Payload {
		top, err := filepath.Abs(p)
		if err != nil {
			return err
		}
		base := ""
		if fi, err := os.Stat(top); err != nil {
			return err
		} else if !fi.IsDir() {
			base = filepath.Base(top)
		}
		err = filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, _ := filepath.Rel(top, p)
			return addFile(w, p, filepath.Join("payload", base, rel))
		})
		if err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	// A disk has whole sectors: without this the guest would not see the end.
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	return f.Truncate((fi.Size() + 4095) &^ 4095)
}

func addFile(w *tar.Writer, path, name string) error {
	fi, err := os.Stat(path) // follows a link: the guest gets the content
	if err != nil {
		return err
	}
	h, err := tar.FileInfoHeader(fi, "")
	if err != nil {
		return err
	}
	h.Name, h.Uid, h.Gid, h.Uname, h.Gname = name, 0, 0, "", ""
	if err := w.WriteHeader(h); err != nil || !fi.Mode().IsRegular() {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}

// unpack writes the archive's directories and files below dir; links and devices
// are left out.
func unpack(archive, dir string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := filepath.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			if err := root.MkdirAll(name, 0o755); err != nil {
				return err
			}
		case tar.TypeReg:
			if err := root.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				return err
			}
			o, err := root.OpenFile(name, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, fs.FileMode(h.Mode).Perm())
			if err != nil {
				return err
			}
			_, err = io.Copy(o, r)
			if err := errors.Join(err, o.Close()); err != nil {
				return err
			}
		}
	}
}

// rawTerminal hands every key to the guest until restore is called.
func rawTerminal() (restore func(), err error) {
	old, err := unix.IoctlGetTermios(0, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("using the terminal: standard input: %w", err)
	}
	raw := *old
	raw.Iflag &^= unix.BRKINT | unix.ICRNL | unix.INPCK | unix.ISTRIP | unix.IXON
	raw.Oflag &^= unix.OPOST
	raw.Cflag |= unix.CS8
	raw.Lflag &^= unix.ECHO | unix.ICANON | unix.IEXTEN | unix.ISIG
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(0, unix.TCSETS, &raw); err != nil {
		return nil, fmt.Errorf("using the terminal: %w", err)
	}
	return func() { _ = unix.IoctlSetTermios(0, unix.TCSETS, old) }, nil
}
