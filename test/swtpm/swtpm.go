// Package swtpm starts TPMs made of software, for tests.
package swtpm

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// startLimit is for a process on a loaded machine.
const startLimit = time.Minute

// TPM is one TPM. It keeps its state in a directory, so that another one started on that is the
// same TPM after a reset.
type TPM struct {
	cmd  *exec.Cmd
	path string
}

// Start starts a TPM as if a firmware had started it already; it takes commands at Socket.
func Start(t *testing.T, state string) *TPM {
	t.Helper()
	path := filepath.Join(socketDir(t), "s")
	return start(t, path, path+".ctrl", "--tpmstate", "dir="+state, "--server", "type=unixio,path="+path, "--ctrl", "type=unixio,path="+path+".ctrl", "--flags", "not-need-init,startup-clear")
}

// StartFor starts a TPM for one run of QEMU, which ends it.
func StartFor(t *testing.T, state string) *TPM {
	t.Helper()
	path := filepath.Join(socketDir(t), "s")
	return start(t, path, path, "--tpmstate", "dir="+state, "--ctrl", "type=unixio,path="+path, "--terminate")
}

// socketDir returns a directory whose name is short: a socket's path has at most 107 bytes.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ist-tpm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func start(t *testing.T, path, awaited string, args ...string) *TPM {
	t.Helper()
	cmd := exec.Command("swtpm", append([]string{"socket", "--tpm2"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatalf("starting swtpm: %v", err)
	}
	tpm := &TPM{cmd, path}
	t.Cleanup(tpm.Stop)
	for end := time.Now().Add(startLimit); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(awaited); err == nil {
			return tpm
		}
		if time.Now().After(end) {
			tpm.Stop()
			t.Fatalf("swtpm does not listen: %s", out.String())
		}
	}
}

// Socket is the path at which it takes commands, or, of one for QEMU, to which QEMU's emulator
// backend connects.
func (p *TPM) Socket() string { return p.path }

// Stop ends it, as a reset does.
func (p *TPM) Stop() {
	if p.cmd.ProcessState == nil {
		p.cmd.Process.Kill()
		p.cmd.Wait()
	}
}

// Tool runs a program of tpm2-tools, and leaves nothing of it in the TPM. The error has its output.
func (p *TPM) Tool(dir, name string, args ...string) (string, error) {
	run := func(name string, args ...string) (string, error) {
		cmd := exec.Command(name, append([]string{"-T", "swtpm:path=" + p.path}, args...)...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
		}
		return string(out), err
	}
	out, err := run(name, args...)
	for _, what := range []string{"-t", "-l", "-s"} {
		if _, ferr := run("tpm2_flushcontext", what); ferr != nil && err == nil {
			err = ferr
		}
	}
	return out, err
}
