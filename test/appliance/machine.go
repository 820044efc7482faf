// Package appliance starts the image under QEMU as a cloud would, and examines it from outside: its
// serial console, its disk and its network.
package appliance

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/vm"
)

// Firmware starts a machine.
type Firmware int

// The firmwares.
const (
	BIOS Firmware = iota
	UEFI
	SecureBoot // UEFI with Microsoft's keys
)

// Config describes the machine to start.
type Config struct {
	// Disk is the disk's file. It is written.
	Disk string
	// Firmware starts the disk.
	Firmware Firmware
	// Seed is a NoCloud disk; empty: none.
	Seed string
	// UUID is the machine's in DMI; empty: none.
	UUID string
	// Net are arguments of QEMU for network cards; nil: one card with QEMU's own DHCP and no
	// forwarding.
	Net []string
	// Files are open in QEMU, from descriptor 3 on; Start closes them here.
	Files []*os.File
	// First are arguments of QEMU for devices that come before the disk, Extra further ones.
	First, Extra []string
	// MemoryMiB is the memory's size; 0: 1024.
	MemoryMiB int
	// Log receives notes about the emulation. Nil: none.
	Log func(format string, args ...any)
}

// Machine is a machine that runs. Its methods may be called from one goroutine.
type Machine struct {
	dir     string
	cmd     *exec.Cmd
	console net.Conn
	log     func(format string, args ...any)
	started time.Time
	done    chan struct{} // closed when QEMU has ended

	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{} // closed and replaced when text grows
	at   int           // what Expect has read
}

// ErrEnded means that the machine ended while a method waited for its output.
var ErrEnded = errors.New("machine ended")

// consoleLimit is how much of a console is kept.
const consoleLimit = 8 << 20

// Start starts a machine. It runs until Close, or until ctx is done.
func Start(ctx context.Context, c Config) (_ *Machine, err error) {
	defer func() {
		for _, f := range c.Files {
			f.Close()
		}
	}()
	dir, err := os.MkdirTemp("", "ist-image-")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dir)
		}
	}()
	l, err := net.Listen("unix", filepath.Join(dir, "console"))
	if err != nil {
		return nil, err
	}
	defer l.Close()
	args, err := arguments(c, dir)
	if err != nil {
		return nil, fmt.Errorf("starting a machine: %w", err)
	}
	qemu, err := vm.FindQEMU(ctx, os.Stderr)
	if err != nil {
		return nil, fmt.Errorf("starting a machine: %w", err)
	}
	if c.Log == nil {
		c.Log = func(string, ...any) {}
	}
	m := &Machine{dir: dir, log: c.Log, cmd: qemu.Command(ctx, args...), started: time.Now(), done: make(chan struct{}), more: make(chan struct{})}
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	m.cmd.ExtraFiles = c.Files
	var stderr bytes.Buffer
	m.cmd.Stderr = &stderr
	if err := m.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting a machine: %w", err)
	}
	go func() {
		m.cmd.Wait()
		l.Close()
		close(m.done)
	}()
	m.console, err = l.Accept()
	if err != nil {
		<-m.done
		return nil, fmt.Errorf("starting a machine: %w: %s", err, stderr.String())
	}
	go m.read()
	go m.watch()
	return m, nil
}

// silence is how long an emulated firmware may be silent before the loader's first line. It shows
// output within ten seconds, also on a busy machine, or it hangs.
const silence = 90 * time.Second

// watch resets a machine whose firmware hangs before the loader starts, as happens sometimes under
// emulation with SMM: one core spins and the console shows nothing more.
func (m *Machine) watch() {
	size, since := 0, time.Now()
	for {
		select {
		case <-m.done:
			return
		case <-time.After(time.Second):
		}
		text := m.Text()
		if len(text) != size {
			size, since = len(text), time.Now()
		}
		if time.Since(since) > silence && inFirmware(text) {
			since = time.Now()
			m.log("the firmware is silent for %v; resetting the machine: %v", silence, m.reset())
		}
	}
}

// inFirmware reports whether the loader has shown nothing since the last restart, so that the
// firmware runs.
func inFirmware(text string) bool {
	const restart = "reboot: Restarting system"
	if at := strings.LastIndex(text, restart); at >= 0 {
		text = text[at:]
	}
	return !strings.Contains(text, "isthmus: slot")
}

// reset is the reset button.
func (m *Machine) reset() error {
	conn, err := net.Dial("unix", filepath.Join(m.dir, "qmp"))
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	answers := bufio.NewScanner(conn) // the greeting comes first
	for _, command := range []string{"qmp_capabilities", "system_reset"} {
		if _, err := fmt.Fprintf(conn, "{\"execute\": %q}\n", command); err != nil {
			return err
		}
		for answers.Scan() && !strings.Contains(answers.Text(), `"return"`) {
			if strings.Contains(answers.Text(), `"error"`) {
				return errors.New(answers.Text())
			}
		}
	}
	return answers.Err()
}

func (m *Machine) read() {
	buf := make([]byte, 64<<10)
	for {
		n, err := m.console.Read(buf)
		m.mu.Lock()
		if m.text.Len() < consoleLimit {
			m.text.Write(buf[:n])
		}
		close(m.more)
		m.more = make(chan struct{})
		m.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// Expect waits until the console shows a match of the expression, after the match of an earlier
// call, and returns the match and its groups.
func (m *Machine) Expect(expression string, limit time.Duration) ([]string, error) {
	re := regexp.MustCompile(expression)
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		m.mu.Lock()
		text, more := m.text.Bytes()[m.at:], m.more
		if at := re.FindSubmatchIndex(text); at != nil {
			var groups []string
			for i := 0; i < len(at); i += 2 {
				groups = append(groups, string(text[max(at[i], 0):max(at[i+1], 0)]))
			}
			m.at += at[1]
			m.mu.Unlock()
			return groups, nil
		}
		m.mu.Unlock()
		select {
		case <-more:
		case <-m.done:
			return nil, fmt.Errorf("waiting for %q on the console: %w\n%s", expression, ErrEnded, m.Tail(4000))
		case <-timer.C:
			return nil, fmt.Errorf("waiting for %q on the console: nothing after %v\n%s", expression, limit, m.Tail(4000))
		}
	}
}

// Tail returns the end of the console's text.
func (m *Machine) Tail(n int) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.text.Bytes()
	return string(b[max(0, len(b)-n):])
}

// Text returns all that the console has shown.
func (m *Machine) Text() string { return m.Tail(consoleLimit) }

// Send types on the console.
func (m *Machine) Send(text string) error {
	_, err := io.WriteString(m.console, text)
	return err
}

// Rescue waits for the loader, and has it start a root shell on the console.
func (m *Machine) Rescue(limit time.Duration) error {
	if _, err := m.Expect(`Esc within`, limit); err != nil {
		return err
	}
	return m.Send("\x1b")
}

// Shown waits until the console's text, all of it, has a word.
func (m *Machine) Shown(word string, limit time.Duration) error {
	for end := time.Now().Add(limit); !strings.Contains(m.Text(), word); time.Sleep(200 * time.Millisecond) {
		select {
		case <-m.done:
			return fmt.Errorf("waiting for %q on the console: %w\n%s", word, ErrEnded, m.Tail(4000))
		default:
		}
		if time.Now().After(end) {
			return fmt.Errorf("waiting for %q on the console: nothing after %v\n%s", word, limit, m.Tail(4000))
		}
	}
	return nil
}

// Prompt waits for the shell on the console. Enter brings a new prompt when other text has followed
// the last one.
func (m *Machine) Prompt(limit time.Duration) error {
	if err := m.Shown("root@", limit); err != nil {
		return err
	}
	if err := m.Send("\n"); err != nil {
		return err
	}
	if _, err := m.Expect(`root@[^\n]*[#]`, limit); err != nil {
		return err
	}
	_, err := m.Run("stty -echo; PS1=; dmesg -n 1", limit)
	return err
}

// Run runs a command in the shell on the console, and returns its output. A status other than 0 is
// an error.
func (m *Machine) Run(command string, limit time.Duration) (string, error) {
	const mark = "=-=-="
	if err := m.Send(fmt.Sprintf("echo %s'begin'; { %s\n}; echo %s'end' $?\n", mark, command, mark)); err != nil {
		return "", err
	}
	found, err := m.Expect(`(?s)`+mark+`begin\r?\n(.*?)`+mark+`end (\d+)`, limit)
	if err != nil {
		return "", err
	}
	out := strings.ReplaceAll(found[1], "\r", "")
	if found[2] != "0" {
		return out, fmt.Errorf("running %q on the machine: status %s: %s", command, found[2], out)
	}
	return out, nil
}

// Since returns how long ago the machine was started.
func (m *Machine) Since() time.Duration { return time.Since(m.started) }

// Ended waits until the machine has ended by itself, as after poweroff.
func (m *Machine) Ended(limit time.Duration) error {
	select {
	case <-m.done:
		return nil
	case <-time.After(limit):
		return fmt.Errorf("waiting for the machine to end: it runs after %v\n%s", limit, m.Tail(2000))
	}
}

// Close cuts the power.
func (m *Machine) Close() error {
	m.cmd.Process.Kill()
	<-m.done
	m.console.Close()
	return os.RemoveAll(m.dir)
}

func arguments(c Config, dir string) ([]string, error) {
	memory := c.MemoryMiB
	if memory == 0 {
		memory = 1024
	}
	smm := "off"
	if c.Firmware == SecureBoot {
		smm = "on"
	}
	args := append(vm.Processor(),
		"-smp", "2", "-m", fmt.Sprint(memory), "-M", "q35,usb=off,vmport=off,smm="+smm,
		"-nodefaults", "-no-user-config", "-display", "none",
		"-qmp", "unix:"+filepath.Join(dir, "qmp")+",server=on,wait=off",
		"-chardev", "socket,id=console,path="+filepath.Join(dir, "console"), "-serial", "chardev:console",
		"-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
	)
	// QEMU's writes are in the page cache of this machine at once, and outlive QEMU. To flush them
	// would only wait for this machine's disk.
	args = append(append(args, c.First...), "-drive", "if=none,id=disk,format=raw,cache=unsafe,file="+c.Disk, "-device", "virtio-blk-pci,drive=disk,bootindex=1")
	if c.UUID != "" {
		args = append(args, "-uuid", c.UUID)
	}
	if c.Seed != "" {
		args = append(args, "-drive", "if=none,id=seed,format=raw,readonly=on,file="+c.Seed, "-device", "virtio-blk-pci,drive=seed")
	}
	if c.Firmware != BIOS {
		const ovmf = "/usr/share/OVMF/"
		code, vars := ovmf+"OVMF_CODE_4M.fd", ovmf+"OVMF_VARS_4M.fd"
		if c.Firmware == SecureBoot {
			code, vars = ovmf+"OVMF_CODE_4M.secboot.fd", ovmf+"OVMF_VARS_4M.ms.fd"
			args = append(args, "-global", "driver=cfi.pflash01,property=secure,value=on")
		}
		own, err := os.ReadFile(vars)
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, "vars.fd"), own, 0o600); err != nil {
			return nil, err
		}
		args = append(args, "-drive", "if=pflash,format=raw,unit=0,readonly=on,file="+code, "-drive", "if=pflash,format=raw,unit=1,file="+filepath.Join(dir, "vars.fd"))
	}
	network := c.Net
	if network == nil {
		network = []string{"-netdev", "user,id=net0,restrict=on", "-device", "virtio-net-pci,netdev=net0,romfile="}
	}
	return append(append(args, network...), c.Extra...), nil
}
